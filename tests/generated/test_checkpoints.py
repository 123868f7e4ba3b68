"""Checkpoints by the thousand: saved folders, files of libraries and state dicts, whole and damaged."""

from __future__ import annotations

import copy
import io
import json
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

import tokenprune
from tests.generated.models import fresh, images_of, run
from tests.generated.outcomes import assert_clear, assert_unchanged, attempt, snapshot
from tests.generated.strategies.checkpoints import TIES, Files, damaged_bytes, damaged_state
from tests.generated.strategies.common import ODD, share
from tests.generated.strategies.json_trees import NO_JSON, damaged_json
from tests.helpers.official import Layout

MANIFEST, WEIGHTS = "tokenprune.json", "tokenprune.safetensors"
SAVED = st.sampled_from(["timm", "timm, registers, average", "torchvision", "transformers"])


@cache
def _saved(kind: str, form: str) -> Files:
    """The files of a saved model, by name."""
    model = tokenprune.sparsify(fresh(kind), (1, 3), 0.6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "saved"
        if form == "library":
            model.save_pretrained(folder)
        else:
            tokenprune.save_pretrained(model, folder, model_card=False, scorers_only=form == "scorers")
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _damaged(data: st.DataObject, files: Files) -> Files:
    """The files of a folder, of which one is not what it was."""
    name = data.draw(st.sampled_from(sorted(files)))
    kind = data.draw(st.sampled_from(["inside", "inside", "inside", "bytes", "missing", "folder"]))
    files = dict(files)
    if kind == "missing":
        del files[name]
    elif kind == "folder":
        files[f"{name}/file"] = files.pop(name)
    elif kind == "bytes":
        files[name] = data.draw(damaged_bytes(files[name]))
    elif name.endswith(".json"):
        text = data.draw(NO_JSON) if data.draw(st.integers(0, 7)) == 7 else None
        if text is None:
            fields = json.loads(files[name])
            # Of what is built anew nearly everything is in one place of many.
            identity = fields.get("model", {}).get("identity") if data.draw(st.booleans()) else None
            if identity is None:
                fields = data.draw(damaged_json(fields))
            else:
                fields["model"]["identity"] = data.draw(damaged_json(identity))
            text = json.dumps(fields)
        files[name] = text.encode(errors="replace")
    else:
        state, ties = load(files[name]), "{}"
        if data.draw(st.integers(0, 4)):
            state = data.draw(damaged_state(state))
        else:
            ties = data.draw(TIES)
        files[name] = save(state, {"format": "pt", "tokenprune.ties": ties})
    return files


def _load(files: Files, model: nn.Module | None) -> nn.Module:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, content in files.items():
            path = Path(name) / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return tokenprune.from_pretrained(name, model=model)


def _assert_loads_or_changes_nothing(files: Files, kind: str, *, given: bool, whole: bool) -> None:
    model = fresh(kind) if given else None
    before = None if model is None else snapshot(model)
    loaded, error = attempt(lambda: _load(files, model), valid=True if whole else None)
    if error is not None:
        if model is not None and before is not None:
            assert_unchanged(model, before)
        return
    assert model is None or loaded is model
    parameters = {parameter.dtype for parameter in loaded.parameters()}
    assert all(dtype.is_floating_point for dtype in parameters)
    if parameters == {torch.float32}:
        # Sizes that were changed to others that fit together make a model of other images.
        size = loaded.tokenprune.backbone.input_size(loaded)
        attempt(lambda: run(loaded, torch.randn(1, *size)))
    tokenprune.unsparsify(loaded)


@share(45)
@given(st.data(), SAVED, st.sampled_from(["all", "all", "scorers"]), st.booleans(), st.integers(0, 9))
def test_a_saved_folder_is_loaded_or_refused(
    data: st.DataObject, kind: str, form: str, given: bool, damage: int
) -> None:
    files = _saved(kind, form)
    given = given or form == "scorers"
    _assert_loads_or_changes_nothing(_damaged(data, files) if damage else files, kind, given=given, whole=not damage)


@share(15)
@given(st.data(), st.booleans(), st.integers(0, 9))
def test_a_folder_of_a_library_is_loaded_or_refused(data: st.DataObject, given: bool, damage: int) -> None:
    files = _saved("transformers", "library")
    files = _damaged(data, files) if damage else files
    _assert_loads_or_changes_nothing(files, "transformers", given=given, whole=not damage)


@cache
def _official() -> dict[str, Tensor]:
    return Layout(width=64, depth=4, heads=1, image_size=32, classes=5).state()


@share(30)
@given(st.data(), st.sampled_from(["mapping", "nested", "pickle", "safetensors"]), st.integers(0, 9))
def test_an_official_checkpoint_is_loaded_or_refused(data: st.DataObject, form: str, damage: int) -> None:
    state: Any = copy.deepcopy(_official())
    if damage:
        state = data.draw(damaged_state(state))
    if form == "nested":
        state = data.draw(st.sampled_from([
            {"model": state}, {"state_dict": {f"module.{name}": one for name, one in state.items()}},
            {"model": {"model": state}, "epoch": 3}, {"model_ema": state, "model": None}, {"weights": state},
            {"model": [state]}, {"model": {**state, "epoch": 3}}, {"model": {}}, {"model": {3: state}},
        ]))  # fmt: skip
    options = {} if damage else data.draw(st.sampled_from([{}, {"num_heads": 2}, {"keep_ratio": (0.9, 0.5, 0.5)}]))
    if damage > 5:
        options = data.draw(st.dictionaries(st.sampled_from(["num_heads", "keep_ratio", "stages"]), ODD))
    loaded, error = (
        attempt(lambda: _load_official(data, state, form, damage), valid=None if damage or form == "nested" else True)
        if not options
        else attempt(lambda: tokenprune.load_dynamicvit(state, **options))
    )
    if error is None and all(parameter.isfinite().all() for parameter in loaded.parameters()):
        assert run(loaded, torch.randn(2, 3, 32, 32)).isfinite().all()


def _load_official(data: st.DataObject, state: Any, form: str, damage: int) -> nn.Module:
    if form in ("mapping", "nested"):
        return tokenprune.load_dynamicvit(state)
    content = io.BytesIO()
    torch.save(dict(state), content)
    written = content.getvalue() if form == "pickle" else save(state)
    if damage > 7:
        written = data.draw(damaged_bytes(written))
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"official.{'pth' if form == 'pickle' else form}"
        file.write_bytes(written)
        return tokenprune.load_dynamicvit(file)


@share(10)
@given(st.data(), st.sampled_from(["timm", "torchvision"]))
def test_a_state_dict_is_loaded_or_reported(data: st.DataObject, kind: str) -> None:
    model = tokenprune.sparsify(fresh(kind), (1, 3), 0.6)
    state = model.state_dict()
    record = state["tokenprune._extra_state"]
    state["tokenprune._extra_state"] = data.draw(
        st.one_of(
            ODD,
            st.binary(max_size=20).map(lambda content: torch.tensor([*content], dtype=torch.uint8)),
            st.sampled_from(
                [record.float(), record[:100], record.int() - 300, torch.tensor(10**14), record[None], record]
            ),
            damaged_json(model.tokenprune.record.to_dict()).map(
                lambda fields: torch.tensor([*json.dumps(fields).encode()], dtype=torch.uint8)
            ),
        )
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        assert "Error(s) in loading state_dict" in str(error) and "tokenprune" in str(error).lower()
    except Exception as error:
        assert_clear(error)
    expected = run(fresh(kind), images_of(kind))
    assert torch.equal(run(tokenprune.unsparsify(model), images_of(kind)), expected)
