"""The docs: every block of Python runs, every command exists, and generated pages are up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from typer.testing import CliRunner

from recipes.digits.__main__ import app
from tests import supported_models
from tokenprune.cli import app as cli
from tokenprune.scorers import base

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_every_block_of_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Trained weights are a download. Everything else is as it stands on the page, one block after the other.
    create_model = timm.create_model

    def untrained(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return create_model(name, **options)

    def from_config(name: str) -> torch.nn.Module:
        config = transformers.ViTConfig(hidden_size=192, intermediate_size=384, num_attention_heads=3)
        return transformers.ViTForImageClassification(config)

    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", staticmethod(from_config))
    monkeypatch.setattr(base, "_BUILDERS", dict(base._BUILDERS))  # a page may register a scorer
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def tokenprune_help(command: str) -> str:
    result = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, command
    return result.output


def test_commands_on_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    help_text = {name: CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
                 for name in ("demo", "dense", "study")}  # fmt: skip
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for line in "".join(blocks(page, "bash")).splitlines():
            command = line.partition("#")[0].replace(".venv/bin/", "").split()
            if command[:1] == ["make"]:
                assert command[1] in targets, line
            if command[:3] == ["python", "-m", "recipes.digits"]:
                assert all(word in help_text[command[3]] for word in command[4:] if word.startswith("--")), line
            if command[:1] == ["tokenprune"]:
                assert all(word in tokenprune_help(command[1]) for word in command[2:] if word.startswith("--")), line
            if command[:2] == ["python", "-m"]:
                assert any((ROOT / command[2].replace(".", "/")).with_suffix(suffix).exists() for suffix in ("", ".py"))


def test_the_page_of_supported_models_is_up_to_date() -> None:
    assert supported_models.PAGE.read_text() == supported_models.page(), "run python -m tests.supported_models"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
