"""What generated command lines had found wrong: each ends in one line, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tokenprune
from tests.helpers.official import Layout
from tests.helpers.zoo import BY_NAME
from tokenprune.cli import app


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    tokenprune.save_pretrained(BY_NAME["timm class token"].sparsified(), root / "saved", model_card=False)
    Image.new("RGB", (50, 40)).save(root / "photo.png")
    return {"saved": str(root / "saved"), "photo": str(root / "photo.png")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops", "{saved}", "--image-size", "33"], "--image-size 33: the model takes no such images: Input height"),
        (["flops", "x" * 300], f"no model '{'x' * 80}…': File name too long"),
        (["flops", "{saved}", "-k", "0.9", "-k", "0.5", "--plot", "{folder}/curve"], "must say which kind of file"),
        (["show", "{saved}", "{photo}", "-o", "{folder}"], "is a folder; name a file"),
        (["convert", "{official}", "-o", "{photo}/saved"], "photo.png/saved: "),
        (["convert", "{official}", "-o", "{folder}/saved", "--stages", "1,2"], "has 3 predictor(s), one a stage"),
    ],
)
def test_odd_arguments_end_in_one_line_and_code_2(
    arguments: list[str], message: str, places: dict[str, str], tmp_path: Path
) -> None:
    official = tmp_path / "official.pth"
    torch.save({"model": Layout(width=64, depth=4, heads=1, image_size=64, classes=10).state()}, official)
    for name, place in {**places, "official": str(official), "folder": str(tmp_path)}.items():
        arguments = [argument.replace(f"{{{name}}}", place) for argument in arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and [file.name for file in tmp_path.iterdir()] == ["official.pth"]
