"""Command lines by the thousand, with options that are right and wrong, on models that are whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import tokenprune
from tests.generated.models import fresh
from tests.generated.strategies.command_lines import COMMANDS, MODELS, Option
from tests.generated.strategies.common import share
from tests.generated.strategies.json_trees import damaged_json
from tests.helpers.official import Layout
from tests.helpers.runs import write_run
from tokenprune.cli import app

Places = dict[str, Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """The files and folders that command lines name."""
    root = tmp_path_factory.mktemp("command-lines")
    names = ("saved", "damaged", "no_weights", "no_manifest", "dense", "empty", "out", "run")
    found = {name: root / name for name in (*names, "no")}
    for name in ("saved", "damaged", "no_weights", "no_manifest"):
        model = tokenprune.sparsify(fresh("timm"), (1, 3), 0.6)
        tokenprune.save_pretrained(model, found[name], model_card=False)
    (found["damaged"] / "tokenprune.json").write_text('{"format": "tokenprune"')
    (found["no_weights"] / "tokenprune.safetensors").unlink()
    (found["no_manifest"] / "tokenprune.json").unlink()
    fresh("transformers").save_pretrained(found["dense"])
    found["empty"].mkdir()
    write_run(found["run"])
    found |= {"photo": root / "photo.png", "text": root / "text.png", "official": root / "official.pth"}
    Image.new("RGB", (50, 40), (200, 30, 90)).save(found["photo"])
    found["text"].write_text("no picture")
    torch.save({"model": Layout(width=64, depth=4, heads=1, image_size=32, classes=5).state()}, found["official"])
    return found


@pytest.fixture(autouse=True, scope="module")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is written where no place is named goes into a folder that is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("working-directory"))
        yield


def _run(places: Places, arguments: Sequence[str], *, valid: bool | None) -> None:
    """Run a command line, and look at how it ends and at what it leaves behind."""
    for file in [*places["out"].rglob("*")] if places["out"].is_dir() else []:
        file.unlink() if file.is_file() else None
    places["out"].mkdir(exist_ok=True)
    given_files = _content(places)
    line = [_named(argument, places) for argument in arguments]
    result = CliRunner().invoke(app, line)
    told = (line, result.exit_code, result.stdout[:300], result.stderr)
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert _content(places) == given_files, told
    if result.exit_code == 0:
        assert valid is not False and result.stdout.strip(), told
        if "--json" in line:
            json.loads(result.stdout)
        return
    assert valid is not True, told
    assert result.exit_code == 2 or (result.exit_code == 1 and valid is None), told
    error = result.stderr.rpartition("Error: ")[2]
    assert error.strip() and result.stdout == "", told
    assert "Traceback" not in result.stderr and "--debug" not in result.stderr, told
    if result.exit_code == 2:
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, told


def _named(argument: str, places: Places) -> str:
    for name, path in places.items():
        argument = argument.replace(f"{{{name}}}", str(path))
    return argument


def _content(places: Places) -> dict[Path, bytes]:
    """What must not change."""
    files = (file for place in places.values() if place != places["out"] for file in [place, *place.rglob("*")])
    return {file: file.read_bytes() for file in files if file.is_file()}


def _settled(options: Sequence[Option]) -> bool | None:
    """Whether a command must take several options at once; of two faults either may be found first."""
    verdicts = {option.valid for option in options}
    return None if None in verdicts else False not in verdicts


FAST = ("flops", "bench", "show")


@share(60)
@given(data=st.data(), command=st.sampled_from(FAST), as_json=st.booleans())
def test_a_command_line_works_or_ends_in_one_line(
    places: Places, data: st.DataObject, command: str, as_json: bool
) -> None:
    drawn = data.draw(st.lists(st.sampled_from(COMMANDS[command]), max_size=3, unique_by=lambda one: one.arguments[0]))
    options = [data.draw(st.sampled_from(MODELS)), *drawn]
    arguments = [command, *(argument for option in options for argument in option.arguments)]
    if command == "show":
        arguments += ["{photo}"]
    if command == "bench" and not {"--pairs", "-b"} & {*arguments}:
        arguments += ["--pairs", "2", "-b", "1"]
    _run(places, [*arguments, *(["--json"] if as_json else [])], valid=_settled(options))


@share(20)
@given(data=st.data(), command=st.sampled_from(["report", "export", "models", "nonsense", ""]), as_json=st.booleans())
def test_commands_that_take_longer(places: Places, data: st.DataObject, command: str, as_json: bool) -> None:
    drawn = data.draw(
        st.lists(st.sampled_from(COMMANDS.get(command, COMMANDS["flops"])), min_size=1,
                 max_size=1 if command == "models" else 2, unique_by=lambda one: one.arguments[0])
    )  # fmt: skip
    options = list(drawn)
    if command in ("report", "export"):
        options.insert(0, data.draw(st.sampled_from(MODELS)))
    arguments = [command, *(argument for option in options for argument in option.arguments)]
    valid = _settled(options)
    if command not in COMMANDS or (command == "export" and "-o" not in arguments):
        valid = False  # no such command, and no place to write to
    _run(places, [*arguments, *(["--json"] if as_json else [])], valid=valid)


@share(10)
@given(data=st.data(), as_json=st.booleans())
def test_checkpoints_are_converted_or_refused(places: Places, data: st.DataObject, as_json: bool) -> None:
    checkpoints = [Option(("{official}",), True)] * 6
    checkpoints += [Option((name,), None) for name in ("{photo}", "{text}")]
    checkpoints += [Option((name,), False) for name in ("{no}", "{empty}", "")]
    drawn = data.draw(
        st.lists(st.sampled_from(COMMANDS["convert"]), max_size=2, unique_by=lambda one: one.arguments[0])
    )
    options = [data.draw(st.sampled_from(checkpoints)), *drawn]
    arguments = ["convert", *(argument for option in options for argument in option.arguments)]
    if "-o" not in arguments:
        arguments += ["-o", "{out}/converted"]
    _run(places, [*arguments, *(["--json"] if as_json else [])], valid=_settled(options))


@share(10)
@given(data=st.data(), damage=st.booleans())
def test_a_page_of_a_run_is_written_or_refused(places: Places, data: st.DataObject, damage: bool) -> None:
    results = places["run"] / "results.json"
    whole = results.read_text()
    try:
        if damage:
            fields: Any = data.draw(damaged_json(json.loads(whole)))
            results.write_text(data.draw(st.sampled_from([json.dumps(fields), whole[:40], "", "[]", "1" * 5000])))
        _run(places, ["report", "{run}", "-o", "{out}/page.html"], valid=None if damage else True)
    finally:
        results.write_text(whole)
