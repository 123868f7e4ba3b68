"""``tokenprune prove``: what it proves of an adapter by somebody else, what it writes, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tokenprune
from tests.helpers.installed import install_toys
from tokenprune.backbones.supported import SupportTable, write_supported
from tokenprune.cli import app

FORGOTTEN = "toy_vits 1.5: the dense model fails: forgotten: AttributeError: 'ForgottenViT' object has no attribute"


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An adapter by somebody else, and a working directory of theirs."""
    monkeypatch.chdir(tmp_path)
    return install_toys(monkeypatch, tmp_path)


@pytest.fixture
def forgets(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter has forgotten that blocks are given rotary tables."""
    monkeypatch.setattr(adapter.ToyAdapter, "token_inputs", {})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["prove", *arguments], env={"COLUMNS": "200"})


def table(file: Path) -> SupportTable:
    return SupportTable.from_json(file.read_text(), library="toy_vits", where=str(file))


def names(file: Path) -> list[str]:
    return [model.name for model in table(file).models]


def test_it_writes_the_table_of_the_models_that_were_proved(adapter: Any, tmp_path: Path) -> None:
    file = tmp_path / "supported.json"
    result = run("toy_vits", "-o", str(file))
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows[0] == ["proved", "2", ""] and rows[1] == ["failed", "0", ""]
    assert rows[2][:2] == ["not run by the library itself", "1"] and rows[2][2].startswith(FORGOTTEN)
    assert "Examples of toy_vits 1.5" in result.stdout and f"The table is in {file}." in result.stdout
    written = table(file)
    assert written.library_version == "1.5" and [model.name for model in written.models] == [
        "rotary_deep",
        "rotary_tiny",
    ]
    example = next(iter(adapter.ToyAdapter().examples()))
    assert written.models[1] == tokenprune.prove(example, library="toy_vits")


def test_json(adapter: Any) -> None:
    result = run("tokenprune_toy_vits", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["library"] == "toy_vits" and told["library_version"] == "1.5" and told["output"] is None
    assert [model["name"] for model in told["proved"]] == ["rotary_tiny", "rotary_deep"] and told["failed"] == []
    assert told["proved"][0]["passes"] == ["identity", "mask = gather", "undo", "training step"]
    (fault,) = told["host_faults"]
    assert fault["name"] == "forgotten" and fault["reason"].startswith(FORGOTTEN)


def test_a_fault_of_the_library_hides_none_of_the_adapter(forgets: None, tmp_path: Path) -> None:
    file = tmp_path / "supported.json"
    result = run("toy_vits", "-o", str(file), "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1 and told["proved"] == [] and told["output"] is None
    assert [fault["name"] for fault in told["failed"]] == ["rotary_tiny", "rotary_deep"]
    assert all("executions differ by" in fault["reason"] for fault in told["failed"])
    assert [fault["name"] for fault in told["host_faults"]] == ["forgotten"]
    assert not file.exists()
    result = run("toy_vits", "-o", str(file))
    assert result.exit_code == 1 and f"{file} was not written." in result.stdout and FORGOTTEN in result.stdout
    assert "rotary_deep: rotary_deep: for the same decisions, executions differ by" not in result.stdout
    assert "rotary_deep: for the same decisions, executions differ by" in result.stdout


def test_one_that_fails_leaves_a_table_as_it_is(adapter: Any, tmp_path: Path) -> None:
    file = tmp_path / "supported.json"
    assert run("toy_vits", "-o", str(file)).exit_code == 0
    before = file.read_bytes()
    (tmp_path / "one_that_fails.py").write_text(ONE_THAT_FAILS)
    result = run("toy_vits", "--examples", "one_that_fails:examples", "-o", str(file), "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1 and [model["name"] for model in told["proved"]] == ["rotary_tiny"]
    assert told["failed"] == [{"name": "mistaken", "reason": "ZeroDivisionError: division by zero"}]
    assert file.read_bytes() == before


ONE_THAT_FAILS = """
import tokenprune_toy_vits
from dataclasses import replace

def examples():
    rotary, *_ = tokenprune_toy_vits.ToyAdapter().examples()
    yield replace(rotary, name="mistaken", build=lambda: 1 / 0)
    yield rotary
"""


def test_nothing_proved_is_a_failure(adapter: Any, tmp_path: Path) -> None:
    result = run("toy_vits", "--only", "forgotten", "-o", str(tmp_path / "supported.json"))
    assert result.exit_code == 1 and FORGOTTEN in result.stdout
    assert not (tmp_path / "supported.json").exists()


def test_compiling_is_asked_for_by_the_example_and_can_be_left_out(adapter: Any, tmp_path: Path) -> None:
    (tmp_path / "one_to_compile.py").write_text(ONE_THAT_FAILS.replace("build=lambda: 1 / 0", "compiled=True"))
    arguments = ("toy_vits", "--examples", "one_to_compile:examples", "--json")
    compiled, plain = json.loads(run(*arguments).stdout)["proved"]
    assert compiled["passes"] == [*plain["passes"], "compile", "export"]
    compiled, plain = json.loads(run(*arguments, "--no-compile").stdout)["proved"]
    assert compiled["passes"] == plain["passes"]


def test_one_model_is_proved_again_and_the_others_stay(adapter: Any, tmp_path: Path) -> None:
    file = tmp_path / "supported.json"
    assert run("toy_vits", "-o", str(file), "--only", "rotary_deep").exit_code == 0
    assert names(file) == ["rotary_deep"]
    (deep,) = table(file).models
    write_supported(file, [deep, replace(deep, name="rotary_tiny", pooling="?")], library_version="1.5")
    assert run("toy_vits", "-o", str(file), "--only", "rotary_tiny").exit_code == 0
    assert names(file) == ["rotary_deep", "rotary_tiny"] and table(file).models[1].pooling == "mean or maximum"
    write_supported(file, [deep], library_version="1.4")
    result = run("toy_vits", "-o", str(file), "--only", "rotary_tiny")
    assert result.exit_code == 2 and "proved on toy_vits 1.4, and 1.5 is installed; prove all" in result.stderr
    assert names(file) == ["rotary_deep"]
    assert run("toy_vits", "-o", str(file)).exit_code == 0 and table(file).library_version == "1.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["keras"], "there is no adapter 'keras'; installed are those for timm, "),
        (["toy_vits", "-o", "nowhere/supported.json"], "there is no folder nowhere"),
        (["toy_vits", "--only", "rotary_tny"], "no example has that name; there are rotary_tiny, rotary_deep …"),
        (["toy_vits", "--examples", "no_such_module:examples"], "expected MODULE:FUNCTION; No module named 'no_such"),
        (
            ["toy_vits", "--examples", "toy_vits:examples"],
            "expected MODULE:FUNCTION; module 'toy_vits' has no attribute",
        ),
        (["toy_vits", "--examples", "toy_vits"], "expected MODULE:FUNCTION; "),
        (["toy_vits", "--examples", "toy_vits:RotaryViT"], "expected tokenprune.Examples, got a RotaryViT."),
        (["toy_vits", "--examples", "builtins:list"], "expected tokenprune.Examples, got nothing."),
        (["toy_vits", "--examples", "toy_vits:GRID"], "GRID is not a function"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str, adapter: Any) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_adapter_without_examples_says_what_to_do() -> None:
    result = run("torchvision")
    assert result.exit_code == 1
    assert "names no examples to prove; pass a function that does, as in --examples" in result.stderr


def test_our_own_examples_are_found_from_the_root_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = run("torchvision", "--examples", "tests.census.torchvision:examples", "--only", "vit_b_32", "--json")
    assert result.exit_code == 0, result.stderr
    assert [model["model_class"] for model in json.loads(result.stdout)["proved"]] == ["VisionTransformer"]


def test_help() -> None:
    result = run("--help")
    assert result.exit_code == 0 and "In Python: tokenprune.prove(example, library=…)." in result.stdout
