"""``tokenprune convert``: an official checkpoint becomes a saved model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokenprune
from tests.helpers.command_line import fields, run
from tests.helpers.official import Layout


def test_an_official_checkpoint_is_converted(tmp_path: Path) -> None:
    layout = Layout(width=64, depth=4, heads=1, image_size=64, classes=10)
    official = tmp_path / "official.pth"
    torch.save({"model": layout.state()}, official)
    told = fields("convert", str(official), "-o", str(tmp_path / "saved"), "-k", "0.5")
    assert (told["stages"], told["keep_ratios"]) == ([1, 2, 3], [0.5, 0.25, 0.125])
    images = torch.randn(2, 3, 64, 64)
    expected = tokenprune.load_dynamicvit(official, keep_ratio=0.5)(images)
    assert torch.equal(tokenprune.from_pretrained(tmp_path / "saved").eval()(images), expected)
    assert "from_pretrained" in run("convert", str(official), "-o", str(tmp_path / "saved")).stdout


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["no.pth", "-o", "out"], "does not exist", 2),
        (["official.pth"], "--output", 2),
        (["official.pth", "-o", "official.pth"], "is a file; name a folder", 2),
        (["official.pth", "-o", "out", "-k", "2"], "expected numbers above 0", 2),
        (["broken.pth", "-o", "out"], "broken.pth", 1),
    ],
)
def test_what_cannot_be_converted(
    arguments: list[str], said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Layout(width=64, depth=4, heads=1, image_size=64, classes=10).state()}, "official.pth")
    Path("broken.pth").write_bytes(Path("official.pth").read_bytes()[:500])
    result = run("convert", *arguments)
    assert result.exit_code == code and said in result.stderr and "Traceback" not in result.stderr
    assert not Path("out").exists()
