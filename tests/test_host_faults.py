"""Models that their own library cannot run: skipped and named, while faults of ours stay red."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from tokenprune_timm.lvvit import LVViT
from torch import nn

import tokenprune
from tests.census import hosts
from tests.census.entry import Entry
from tests.census.hosts import assert_most_run, host_fault, installed_release, skip_host_fault
from tests.census.lookup import entry_of
from tests.census.torchvision import supported
from tokenprune.scorers.predictor import Predictor

ROOT = Path(__file__).parent.parent
WHOLE = supported()[0]
SAID = (
    f"torchvision {version('torchvision')}: the dense model fails: vit_broken: NotImplementedError: "
    'Module [Module] is missing the required "forward" function'
)


def without_a_norm() -> nn.Module:
    """As if torchvision had forgotten what its norm does."""
    model = WHOLE.build()
    model.encoder.ln = nn.Module()
    return model


BROKEN = replace(WHOLE, name="vit_broken", build=without_a_norm)


def fails(*args: object) -> None:
    raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("double", [False, True])
def test_a_model_that_its_library_cannot_run_is_skipped_and_named(double: bool) -> None:
    with pytest.raises(pytest.skip.Exception) as caught:
        skip_host_fault(BROKEN, double=double)
    assert str(caught.value) == SAID


def test_what_fails_behind_the_dense_model_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "forward", fails)
    assert host_fault(WHOLE) is None
    with pytest.raises(RuntimeError, match="a fault of ours"):
        tokenprune.prove(WHOLE, library="torchvision")


def test_a_dense_model_of_ours_that_fails_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(entry_of("lvvit_t"), name="lvvit_broken")
    monkeypatch.setattr(LVViT, "forward_features", lambda self, x: self.blocks[0](x, x, x))
    with pytest.raises(TypeError, match="attn_mask"):
        host_fault(entry)


def test_code_of_ours_on_the_way_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "recorded_release", lambda library: Version("9999"))
    with pytest.raises(tokenprune.UnsupportedModelError):
        host_fault(replace(WHOLE, name="vit_pruned", build=lambda: tokenprune.sparsify(nn.Sequential())))


def test_tables_that_are_wrong_are_ours_on_all_but_older_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    mistaken = replace(WHOLE, name="vit_mistaken", build=fails)
    monkeypatch.setattr(hosts, "recorded_release", lambda library: Version("0"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        host_fault(mistaken)
    monkeypatch.setattr(hosts, "recorded_release", lambda library: Version("9999"))
    assert "the dense model fails: vit_mistaken: RuntimeError: a fault of ours" in (host_fault(mistaken) or "")


@pytest.mark.parametrize(("recorded", "allowed"), [(str(installed_release("torchvision")), 1), ("0", 10), ("9999", 10)])
def test_faults_cannot_hide_everything(recorded: str, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "recorded_release", lambda library: Version(recorded))

    def entries(num_broken: int) -> list[Entry]:
        return [BROKEN] * num_broken + [WHOLE] * (20 - num_broken)

    assert_most_run("torchvision", entries(allowed))
    with pytest.raises(AssertionError, match=rf"{allowed + 1} of 20 models:\s+{re.escape(SAID)}"):
        assert_most_run("torchvision", entries(allowed + 1))


CENSUS = """
import pytest
import tokenprune
from tests.test_host_faults import BROKEN, WHOLE, fails
from tokenprune.scorers.predictor import Predictor

@pytest.mark.parametrize("ours", ["works", "fails"])
@pytest.mark.parametrize("entry", [BROKEN, WHOLE], ids=["broken", "whole"])
def test_an_entry(entry, ours, monkeypatch, record_property):
    if ours == "fails":
        monkeypatch.setattr(Predictor, "forward", fails)
    tokenprune.prove(entry, library="torchvision")
    record_property("supported torchvision", entry.name)
"""


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_run_of_the_census_lists_the_one_and_fails_by_the_other(workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_small_census.py").write_text(CENSUS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", workers, "-rfs", "--rootdir", tmp_path]
    run = subprocess.run(
        [*command, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 1 passed, 2 skipped" in run.stdout
    assert re.search(r"FAILED \S+\[whole-fails\] - RuntimeError: a fault of ours", run.stdout)
    lines = run.stdout.splitlines()
    said = lines.index(f"torchvision {version('torchvision')}: skipped 1, whose dense model fails")
    assert lines[said + 1] == f"  {SAID}"
    assert f"torchvision {version('torchvision')}: 1 models proved, 0 refused" in lines[:said]
