"""The pictures in the docs, made again from a run of the demo.

``make demo``, then ``python -m tests.helpers.documentation_pictures runs/digits``. Needs scikit-image for its
photographs, and Chromium for those of the report.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import skimage.data
import timm
import torch
import typer
from PIL import Image
from sklearn.datasets import load_sample_images

import tokenprune
from recipes.digits.model import build_model
from recipes.digits.presets import DATA
from tests.helpers.browser import find_browser

IMAGES = Path(__file__).parents[2] / "docs" / "images"
CLASSES = (0, 2, 3, 5, 7, 8)
PHONE, DESKTOP = (390, 844), (1000, 900)


def main(
    demo: Annotated[Path, typer.Argument(help="Where the demo wrote.")] = Path("runs/digits"),
    data: Annotated[Path, typer.Option(help="Its images.")] = DATA,
) -> None:
    """Write every picture of ``docs/images`` that shows kept tokens or a report."""
    runs = json.loads((demo / "results.json").read_text())["runs"]
    run = next(Path(run["folder"]) for run in runs if run["config"]["scorer"] == "predictor")
    model: Any = tokenprune.from_pretrained(run, model=build_model())
    files = [sorted((data / "validation" / str(digit)).glob("*.png"))[7] for digit in CLASSES]
    digits(model, files)
    photographs()
    timed = tokenprune.throughput(model, (3, 64, 64), batch_size=64)
    page = tokenprune.report(
        model, runs=run, images=files[:4], throughput=timed, title="Digits with a learned scorer, ρ = 0.7"
    )
    report(page)


def digits(model: Any, files: list[Path]) -> None:
    """Scenes of the demo, and what the learned scorer keeps of them."""
    title = "Tokens kept by the learned scorer, ρ = 0.7"
    _save(_drawn(tokenprune.show(model, files, scores=False, title=title), dpi=80), "kept_tokens")
    title = "Digits among clutter, learned scorer, ρ = 0.7"
    _save(_drawn(tokenprune.show(model, files[:3], title=title), dpi=90), "kept_and_scores")
    tokenprune.animate(model, files[:4], IMAGES / "kept_tokens.gif")


def photographs() -> None:
    """Photographs of scikit-learn and scikit-image in a model that has learned nothing."""
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224")
    tokenprune.sparsify(model, keep_ratio=0.7, scorer="cls_attention")
    shown = [*load_sample_images().images, skimage.data.astronaut(), skimage.data.chelsea()]
    figure = tokenprune.show(model, shown, title="Class attention with random weights")
    _drawn(figure, dpi=64).save(IMAGES / "photographs.jpg", quality=85, optimize=True)


def report(page: str) -> None:
    """A report as it looks on a desk, and in pieces side by side on a phone."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        browser = driver.chromium.launch(executable_path=find_browser())
        taken = {}
        for name, (width, height), scheme in (("desktop", DESKTOP, "light"), ("phone", PHONE, "dark")):
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(file.as_uri())
            taken[name] = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
        browser.close()
    _save(taken["desktop"], "report_desktop")
    _save(_pieces(taken["phone"], number=4), "report_phone")


def _pieces(picture: Image.Image, *, number: int, gap: int = 12) -> Image.Image:
    """A long picture cut into pieces that stand side by side."""
    height = -(-picture.height // number)
    wide = Image.new("RGB", (number * picture.width + (number - 1) * gap, height), "white")
    for piece in range(number):
        cut = picture.crop((0, piece * height, picture.width, min((piece + 1) * height, picture.height)))
        wide.paste(cut, (piece * (picture.width + gap), 0))
    return wide


def _drawn(figure: Any, *, dpi: int) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


def _save(picture: Image.Image, name: str) -> None:
    # 256 colours of each picture's own, and no patterns of dots: a third of the bytes.
    picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        IMAGES / f"{name}.png", optimize=True
    )


if __name__ == "__main__":
    typer.run(main)
