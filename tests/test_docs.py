"""The docs: every block of Python runs, every command exists, and generated pages are up to date."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from typer.testing import CliRunner

from tests.census.hosts import is_older
from tests.helpers import supported_models
from tests.helpers.official import Layout
from tokenprune.cli import app as cli
from tokenprune.pruning.executions import base as executions
from tokenprune.pruning.hooks import PruningHooks
from tokenprune.pruning.reductions import base as reductions
from tokenprune.scorers import base as scorers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Files that the pages load and that are downloads: made here, with random weights.
DOWNLOADS: dict[str, dict[str, tuple[str, Layout]]] = {
    "official-checkpoints": {
        "dynamic_deit_small_0.7.pth": ("model", Layout(width=384, depth=12, heads=6, image_size=224, classes=1000)),
        "lvvit_s-26M-224-83.3.pth.tar": (
            "state_dict",
            Layout(width=384, depth=16, heads=6, image_size=224, classes=1000, mlp_ratio=3, stem_channels=64,
                   num_stages=0),
        ),
    },
}  # fmt: skip
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_every_block_of_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if page.stem == "vision-language-models" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("before transformers 5 prompts are not shortened")
    # Trained weights are a download. Everything else is as it stands on the page, one block after the other.
    create_model = timm.create_model

    def untrained(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        from_file = pretrained and "pretrained_cfg_overlay" in options
        return create_model(name, pretrained=from_file, **options)

    def from_config(name: str) -> torch.nn.Module:
        config = transformers.ViTConfig(hidden_size=192, intermediate_size=384, num_attention_heads=3)
        return transformers.ViTForImageClassification(config)

    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", staticmethod(from_config))
    monkeypatch.setattr(scorers, "_BUILDERS", dict(scorers._BUILDERS))  # a page may register a scorer,
    monkeypatch.setattr(reductions, "_BUILDERS", dict(reductions._BUILDERS))  # a reduction,
    monkeypatch.setattr(executions, "_EXECUTIONS", dict(executions._EXECUTIONS))  # or an execution
    monkeypatch.chdir(tmp_path)
    for name, (nest, layout) in DOWNLOADS.get(page.stem, {}).items():
        torch.save({nest: layout.state()}, name)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command on a page, those behind a backslash with the line before."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].replace(".venv/bin/", "").split() for line in lines]


def tokenprune_help(command: str) -> str:
    result = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, command
    return result.output


def test_commands_on_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    seen = set()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for words in commands(page):
            if words[:1] == ["make"]:
                assert words[1] in targets, words
            if words[:1] == ["tokenprune"]:
                assert all(word in tokenprune_help(words[1]) for word in words[2:] if word.startswith("--")), words
            if "-m" not in words:
                continue
            name, *arguments = words[words.index("-m") + 1 :]
            module = importlib.import_module(name)
            if hasattr(module, "__path__"):
                module = importlib.import_module(f"{name}.__main__")
            if name.startswith("recipes.") and arguments:
                seen.add(name)
                subcommand = [] if arguments[0].startswith("-") else arguments[:1]
                text = CliRunner().invoke(module.app, [*subcommand, "--help"], env={"COLUMNS": "200"}).output
                assert not [word for word in arguments if word.startswith("--") and word not in text], words
    assert {"recipes.deit", "recipes.dense", "recipes.digits"} <= seen


@pytest.mark.skipif(is_older("transformers"), reason="the page is written for a later release of transformers")
def test_the_page_of_supported_models_is_up_to_date() -> None:
    assert supported_models.PAGE.read_text() == supported_models.page(), "run python -m tests.helpers.supported_models"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_walk_through_the_code_names_what_is_there() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    walk = page[page.index("## From `sparsify` to logits") :]
    paths = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", walk)) - {"recipes/", "tests/", "tokenprune/"}
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "tokenprune" / path).exists(), path
    hooks = set(re.findall(r"`(_[a-z_]+)`", walk))
    assert len(hooks) >= 9
    assert [name for name in hooks if not callable(getattr(PruningHooks, name, None))] == []
    rooms = {path.name for path in (ROOT / "tokenprune").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {path.rstrip("/") for path in paths}


NAMED = (
    "structure.observe",
    "structure.Structure",
    "probing.random_inputs",
    "plotting.flops_curve",
    "cli.app",
    "saving.resolve.load_model",
    "integrations.transformers.SparseTrainer",
    "functional.masked_attention",
)


def test_import_paths_that_the_documentation_has_named_stay_valid() -> None:
    names = [f"tokenprune.{name}".rpartition(".") for name in NAMED]
    lines = [f"from {module} import {name}; import {module}; {module}.{name}" for module, _, name in names]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
