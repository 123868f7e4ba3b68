"""The package as a whole: what importing it loads, which way its arrows point, what its names are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import tokenprune

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_loads_no_backbone_library_and_nothing_heavy() -> None:
    script = """
import sys
import torch
before = set(sys.modules)
import tokenprune
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    loaded = set(run_python("-c", script).split())
    unwanted = {"timm", "transformers", "torchvision", "fvcore", "matplotlib", "accelerate", "rich", "sklearn",
                "safetensors", "huggingface_hub", "typer"}  # fmt: skip
    assert "tokenprune" in loaded and not loaded & unwanted


def test_what_needs_other_libraries_is_imported_by_nobody_else() -> None:
    script = """
import sys, tokenprune
print([name for name in sys.modules if name.startswith(("tokenprune.integrations", "tokenprune.kernels"))])
"""
    assert run_python("-c", script).strip() == "[]"


def test_importing_is_silent() -> None:
    assert run_python("-W", "error", "-c", "import tokenprune") == ""


@pytest.mark.parametrize("adapter", ["timm", "transformers", "torchvision"])
def test_an_adapter_loads_its_library_only_when_a_model_comes(adapter: str) -> None:
    script = f"import sys; from tokenprune_{adapter} import adapter; print(adapter, '{adapter}' in sys.modules)"
    assert run_python("-c", script).strip().endswith("False")


def test_only_the_library_of_the_model_is_loaded() -> None:
    script = """
import sys, torch, tokenprune
from torchvision.models import VisionTransformer
tokenprune.sparsify(VisionTransformer(16, 8, 4, 2, 32, 64))
print([name for name in ("timm", "transformers") if name in sys.modules])
"""
    assert run_python("-c", script).strip() == "[]"


def test_the_arrows_of_the_design() -> None:
    assert "0 broken" in run_python("-c", "import sys; from importlinter.cli import lint_imports; lint_imports()")


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function, relative names in full."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else ())))
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


def test_no_test_file_imports_from_another() -> None:
    files = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "tests").rglob("conftest.py")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    assert len(files) > 30
    crossing = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / "tests").rglob("*.py")
        for name in imported(file) & modules.keys()
    }
    assert not crossing, "what several tests need is in tests/helpers"


def test_no_file_is_longer_than_450_lines() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for folder in ("tokenprune", "adapters", "recipes", "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
    }
    assert len(lengths) > 150
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_the_top_of_the_library_can_be_taken_in_at_a_glance() -> None:
    top = [path for path in (ROOT / "tokenprune").iterdir() if path.name != "__pycache__"]
    assert sum(path.is_dir() for path in top) <= 8 and sum(path.is_file() for path in top) <= 8, sorted(top)


def test_our_adapters_come_through_the_entry_points() -> None:
    entries = {entry.name: entry.module for entry in entry_points(group="tokenprune.adapters")}
    ours = {name: f"tokenprune_{name}" for name in ("timm", "transformers", "torchvision")}
    assert ours.items() <= entries.items()
    assert version("tokenprune") == tokenprune.__version__


def test_oldest_versions_stand_in_pyproject_alone() -> None:
    """There ``make test-oldest`` finds them, and the docs say the same."""
    text = (ROOT / "pyproject.toml").read_text()
    tables = text[text.index("\ndependencies = [") : text.index("[project.entry-points")]
    requirements = [name for name in re.findall(r'"([^"]+)"', tables) if not name.startswith("tokenprune[")]
    bounds = [re.match(r"([\w-]+)(?:\[[a-z]+\])?>=([\w.]+)(?:,|$)", requirement) for requirement in requirements]
    assert bounds and all(bounds), requirements
    oldest = {match[1]: match[2] for match in bounds if match}
    assert len(oldest) == len(bounds), "a dependency has one bound"
    page = (ROOT / "docs" / "getting-started.md").read_text()
    for name, title in {
        "torch": "PyTorch",
        "timm": "timm",
        "transformers": "transformers",
        "torchvision": "torchvision",
    }.items():
        assert f"{title} {oldest[name]}" in page


def test_the_public_names_are_these() -> None:
    """A name is added or taken away on purpose, with an issue, or not at all."""
    assert tokenprune.__all__ == [
        "Adaptation", "Adapter", "Backbone", "BudgetReport", "CalibrationReport", "Candidates", "CheckpointError",
        "CountingError", "DynamicViTLoss", "Example", "ExportError", "ExportReport", "FlopReport", "Hierarchy",
        "HostError", "InterceptionError", "KeptTokens", "LanguagePruning", "LanguageTrace", "Level",
        "MissingExtraError", "Packed", "PictureError", "Plan", "PlanError", "PrefillReport", "PrefillTimes",
        "Preprocessing", "PromptError", "ProofError", "Reduced", "Reduction", "ReductionContext", "Scored", "Scorer",
        "ScorerContext", "Selection", "Setting", "Sparsifier", "Split", "StateError", "SupportedModel",
        "ThroughputReport", "TokenTable", "TokenWise", "TokenpruneError", "Trace", "UnknownModelError",
        "UnsupportedModelError", "VerificationReport", "VisionLanguage", "animate", "calibrate", "calibrate_budget",
        "dense", "export", "fit_fast_paths", "flops", "freeze", "from_pretrained", "functional", "gathered",
        "kept_tokens", "load_dynamicvit", "plan_for", "prefill_flops", "prefill_times", "prove", "push_to_hub",
        "register_pruner", "register_reduction", "register_scorer", "report", "save_pretrained", "show", "sparsify",
        "supported", "throughput", "tome_keep_ratios", "unfreeze", "unsparsify", "verify",
    ]  # fmt: skip
    for name in tokenprune.__all__:
        assert getattr(tokenprune, name).__doc__, name


def test_every_public_name_stands_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    missing = [name for name in tokenprune.__all__ if f"::: tokenprune.{name}\n" not in page]
    assert not missing
