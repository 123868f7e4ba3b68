"""The report: what stands on the page, and how a real browser takes it on a phone, on a desk and on paper."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images

import tokenprune
from tests.helpers.browser import find_browser
from tests.helpers.runs import EVIL, write_run
from tokenprune.analysis.report.charts import bar_chart, line_chart, thinned, ticks
from tokenprune.analysis.report.runs import read_run

PHOTOS = load_sample_images().images


def small_vit() -> Any:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=160, patch_size=16, embed_dim=32, depth=6, num_heads=2)
    return tokenprune.sparsify(model, (2, 4), 0.6, scorer="cls_attention")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = small_vit()
    timed = tokenprune.throughput(model, (3, 160, 160), batch_size=1, pairs=2, warmup=0)
    run = write_run(tmp_path_factory.mktemp("runs") / "first")
    before = model.tokenprune.keep_ratio
    made = tokenprune.report(model, runs=run, images=list(PHOTOS), throughput=timed, keep_ratios=(0.5, 0.9), title=EVIL)
    assert model.tokenprune.keep_ratio == before
    return made


def test_the_page_says_what_becomes_of_pruned_tokens() -> None:
    model = tokenprune.sparsify(tokenprune.unsparsify(small_vit()), (3,), 0.5, pruned="merge")
    made = tokenprune.report(model, images=[PHOTOS[0]])
    assert "stages=(3,), keep_ratio=(0.5,), scorer=&#39;predictor&#39;, pruned=&#39;merge&#39;" in made
    assert "Pruned tokens" in made and "Merge" in made


def test_the_page_says_what_is_known(page: str) -> None:
    model = small_vit()
    counted = tokenprune.flops(model, (3, 160, 160))
    for text in ("75.00 %", "80.00 %", "95.00 %", "1.67", "python -m recipes.deit", "1.0.31", "ClassAttention",
                 "100 → 60 → 36", "60.0% → 36.0%", "Not to be trusted:", "pruned patches veiled",
                 f"{counted.dense_gmacs:.4g} GMACs dense, {counted.sparse_gmacs:.4g} sparse",
                 "stages=(2, 4), keep_ratio=(0.6, 0.36), scorer=&#39;cls_attention&#39;"):  # fmt: skip
        assert text in page, text
    block = counted.sparse_blocks[4] / 1e6
    assert f"block 4: {block:.4g} million multiply-adds" in page
    order = re.findall(r"<title>(block \d|stage \d): ", page)
    assert order[::2] == [
        "block 0",
        "block 1",
        "stage 1",
        *(f"block {n}" for n in (2, 3)),
        "stage 2",
        "block 4",
        "block 5",
    ]
    assert f"stage 2: {counted.stages[1] / 1e6:.4g} million multiply-adds" in page
    assert "stage 2 ends at 50.0%" in page and "stage 1 ends at 60.0%" in page
    curve = re.search(r"GMACs over ρ: (.*?) at 0.5, ", page)
    model.tokenprune.keep_ratio = 0.5
    assert curve is not None and curve[1] == f"{tokenprune.flops(model, (3, 160, 160)).sparse_gmacs:.3g}"


def test_nothing_given_becomes_markup(page: str) -> None:
    assert "<script>alert" not in page and '<img src="http' not in page
    assert page.count("<script>") == 1 and page.count("&lt;script&gt;alert") >= 3  # title, settings, command
    assert "http://example.com" in page  # as text


def test_pictures_differ_from_stage_to_stage_and_say_what_they_are(page: str) -> None:
    pictures = re.findall(r'<img src="(data:image/\w+;base64,[^"]+)" alt="([^"]+)"', page)
    assert len(pictures) == 2 * (3 + 2) and len({source for source, _ in pictures}) == len(pictures)
    texts = [text for _, text in pictures]
    assert "Image 1 after stage 1: 60 of 100 patches kept, the others veiled" in texts
    assert "Image 2, whole" in texts and "Image 2: scores of stage 2, a colour a patch" in texts


def test_runs_alone_and_several_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", top1=0.7, gmacs=0.5), write_run(tmp_path / "b", name="deit"),
            write_run(tmp_path / "c", sparse=False, top1=0.8)]  # fmt: skip
    page = tokenprune.report(runs=runs)
    rows = re.findall(r"<tr><td>(dense|a|b|c)</td>\s*<td>([\d.]+) %</td>", page)
    assert rows == [("dense", "80.00"), ("a", "70.00"), ("b", "75.00"), ("c", "80.00")]
    assert "Kept tokens" not in page and page.count("Kept in training") == 2 and "Accuracy and cost" in page
    dense = tokenprune.report(runs=runs[2])
    assert "Accuracy in training: c" in dense and "Kept in training" not in dense
    with_model = tokenprune.report(small_vit(), runs=runs[:2], keep_ratios=())
    assert "this model, sparse" in with_model and "Cost at other" not in with_model


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(tokenprune.PictureError, match="nothing to report on"):
        tokenprune.report()
    with pytest.raises(tokenprune.PictureError, match="belong to a model"):
        tokenprune.report(runs=run, images=PHOTOS[0])
    with pytest.raises(tokenprune.PictureError, match=r"holds no run that is complete.*No such file"):
        tokenprune.report(runs=tmp_path / "nowhere")
    with pytest.raises(tokenprune.StateError, match="not sparsified"):
        tokenprune.report(timm.create_model("test_vit"))
    for damage, message in (("{", "damaged"), ("[]", "no 'scores'"), ('{"scores": {"top1": "x"}}', "no 'scores'"),
                            ('{"scores": {}}', "no 'gmacs'"), ("1" * 5000, "damaged"), ("[" * 100_000, "damaged"),
                            ('{"scores": {}, "gmacs": {"sparse": 0}}', "not above 0")):  # fmt: skip
        (run / "results.json").write_text(damage)
        with pytest.raises(tokenprune.PictureError, match=message):
            read_run(run)


def test_a_run_that_says_little_of_itself_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text('{"scores": {}, "gmacs": {"dense": 1.5}, "settings": {"learning_rate": 0.1}}')
    page = tokenprune.report(runs=run)
    assert "learning_rate" in page and "1.5" in page


def test_a_torn_log_keeps_its_whole_lines(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert len(run.training) == 30 and len(run.evaluation) == 3
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + "\n" + json.dumps({"kind": "evaluation", "step": 40, "top1": 1}) + "\n")
    assert len(read_run(tmp_path / "run").evaluation) == 4  # a run that went on behind a torn line
    assert run.kept()["stage 1"][-1] == (30, pytest.approx(0.6)) and list(run.kept()) == ["stage 1", "stage 2"]
    assert all("loss" not in line for line in run.training)  # not a number
    log.unlink()
    assert read_run(tmp_path / "run").kept() == {}


@pytest.mark.parametrize(
    "lowest, highest", [(0, 1), (0.2, 0.9), (3, 3), (0, 0), (-2, 5), (1e-5, 3e-5), (0, 93.1), (99.98, 99.99)]
)
def test_ticks_are_round_and_enclose(lowest: float, highest: float) -> None:
    marks = ticks(lowest, highest)
    assert 2 <= len(marks) <= 8 and marks[0] <= lowest + 1e-12 and marks[-1] >= highest - 1e-12
    steps = {round(second - first, 12) for first, second in itertools.pairwise(marks)}
    assert max(steps) - min(steps) < 1e-9 * max(1, abs(highest))


def test_charts_are_drawn_to_scale() -> None:
    svg = ElementTree.fromstring(
        line_chart({"a < b": [(0, 0), (1, 10)], "c": [(0, 5)]}, title="t & u", x_label="x", y_label="y")
    )
    points = svg.find("polyline").get("points")  # type: ignore[union-attr]
    assert points == "72.0,236.0 416.0,14.0"
    circle = svg.find("circle")
    assert circle is not None and float(circle.get("cy", 0)) == pytest.approx((236 + 14) / 2)
    assert svg.get("aria-label") == "t & u"
    bars = ElementTree.fromstring(bar_chart([("one", 4, 1), ("two", 2, 0)], title="t", unit="u")).findall("rect")
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[2], abs=0.2) == pytest.approx(4 * widths[1], abs=0.4)
    assert widths[3] == 0
    long = [(float(x), 0.0) for x in range(10_000)]
    assert len(thinned(long)) <= 301 and thinned(long)[-1] == long[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    program = find_browser()
    if program is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program)
        yield opened
        opened.close()


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light")])
def test_in_a_browser(page: str, browser: Any, width: int, scheme: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    assert tab.title() == EVIL
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]

    # Nothing sticks out: neither the page, nor a part of it that does not scroll by itself.
    wide = tab.evaluate("""[...document.querySelectorAll("body *")].filter(part =>
        !part.closest(".scroll, svg") && part.getBoundingClientRect().right > innerWidth + 1
        ).map(part => part.outerHTML.slice(0, 80))""")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and wide == []
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("[...document.images].every(image => image.alt)")
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) is (scheme == "dark")

    # The slider, by keys alone.
    slider, name = tab.get_by_label("Stage", exact=True), tab.locator("#stage-name")
    shown = tab.locator(".frame:visible")
    assert name.inner_text() == "stage 2" and shown.count() == 2
    sources = {2: shown.first.locator("img").first.get_attribute("src")}
    slider.focus()
    for stage, label in ((1, "stage 1"), (0, "all patches")):
        tab.keyboard.press("ArrowLeft")
        assert name.inner_text() == label and slider.get_attribute("aria-valuetext") == label
        assert shown.count() == 2
        sources[stage] = shown.first.locator("img").first.get_attribute("src")
    assert len(set(sources.values())) == 3
    assert said == []
    context.close()


def test_on_paper_every_stage_is_seen(page: str, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    tab = browser.new_page()
    tab.goto(file.as_uri())
    tab.emulate_media(media="print")
    assert tab.locator(".frame:visible").count() == 6 and not tab.locator("#slider").is_visible()
    tab.close()


def test_without_scripts_every_stage_is_seen(page: str, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(file.as_uri())
    assert tab.locator(".frame:visible").count() == 6 and not tab.locator("#slider").is_visible()
    context.close()
