"""Proofs: what is proved of a model, what it says of itself, and which model is not proved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from tests.helpers.installed import install_toys
from tokenprune import Example, HostError, ProofError, SupportedModel
from tokenprune.analysis import proof
from tokenprune.backbones.supported import merge_examples

INVARIANTS = ("identity", "mask = gather", "undo", "training step")
ROTARY = SupportedModel(
    library="toy_vits",
    family="toys",
    name="rotary_tiny",
    model_class="RotaryViT",
    pooling="mean or maximum",
    position_encoding="rotary",
    side_inputs=("rope",),
    passes=INVARIANTS,
)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return install_toys(monkeypatch, tmp_path)


@pytest.fixture
def toys(adapter: Any) -> dict[str, Example]:
    """The examples of a third party's adapter, by name."""
    return {example.name: example for example in adapter.ToyAdapter().examples()}


prove = partial(tokenprune.prove, library="toy_vits")


def test_what_is_proved_is_described(toys: dict[str, Example]) -> None:
    assert prove(toys["rotary_tiny"]) == ROTARY


def test_what_is_compiled_and_exported_is_said_so(toys: dict[str, Example]) -> None:
    example = replace(toys["rotary_tiny"], compiled=True)
    assert prove(example) == replace(ROTARY, passes=(*INVARIANTS, "compile", "export"))
    assert prove(example, compiled=False) == ROTARY


def test_what_the_dense_model_cannot_be_compiled_to_is_left_out(
    toys: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(proof._COMPILERS, "compile", fails)
    assert prove(toys["rotary_tiny"], compiled=True).passes == (*INVARIANTS, "export")


def test_nothing_is_drawn_of_the_caller_s_random_numbers(toys: dict[str, Example]) -> None:
    state = torch.random.get_rng_state()
    prove(toys["rotary_tiny"])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("forgotten", [{}, {"rope": ("b n i d -> b n i d",)}], ids=["no pattern", "another pattern"])
def test_an_adapter_that_forgets_the_rotary_tables_proves_nothing(
    forgotten: dict[str, Any], toys: dict[str, Example], adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter.ToyAdapter, "token_inputs", forgotten)
    with pytest.raises(ProofError, match=r"^rotary_tiny:\nfor the same decisions, executions differ by \d"):
        prove(toys["rotary_tiny"])


def test_a_model_that_no_pruning_changes_is_not_proved(toys: dict[str, Example]) -> None:
    import toy_vits

    with pytest.raises(ProofError, match=r"pruning changes the outputs by no more than 0\.0e\+00"):
        prove(replace(toys["rotary_tiny"], build=toy_vits.BlindViT))


def changed_report(**changes: Any) -> Callable[..., tokenprune.VerificationReport]:
    return lambda *args, **options: replace(tokenprune.verify(*args, **options), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": 1.5e-5}, "with nothing pruned, outputs differ from the dense model's by 1.5e-05"),
        ({"mask_equals_gather": 3e-5}, "executions differ by 3.0e-05"),
        ({"effect": 1e-4}, "no more than 1.0e-04"),
        ({"effect": float("nan")}, "no more than nan"),
        ({"gradients": (0.1, float("nan"))}, "a parameter of stage 1 gets no finite gradient"),
        ({"gradients": (0.1,)}, "1 of 2 scorers were trained"),
        ({"not_compared": ("output.maps",)}, "output.maps: the shape differs"),
    ],
)
def test_what_verify_finds_is_held_against_the_tolerances(
    changes: dict[str, Any], message: str, toys: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "verify", changed_report(**changes))
    with pytest.raises(ProofError, match=message):
        prove(toys["rotary_tiny"])


def test_a_hook_that_is_left_behind_is_found(toys: dict[str, Example], monkeypatch: pytest.MonkeyPatch) -> None:
    def unsparsify(model: nn.Module) -> None:
        tokenprune.unsparsify(model)
        model.get_submodule("blocks.3").register_forward_pre_hook(lambda *_: None)

    monkeypatch.setattr(proof, "unsparsify", unsparsify)
    with pytest.raises(ProofError, match=r"unsparsify\(\) left hooks, or keys of the state dict, behind"):
        prove(toys["rotary_tiny"])


def test_a_model_that_is_not_what_it_was_is_found(toys: dict[str, Example], monkeypatch: pytest.MonkeyPatch) -> None:
    def unsparsify(model: nn.Module) -> None:
        tokenprune.unsparsify(model)
        with torch.no_grad():
            model.get_parameter("head.bias")[0] += 1e-6

    monkeypatch.setattr(proof, "unsparsify", unsparsify)
    with pytest.raises(ProofError, match=r"after unsparsify\(\) output differ from the dense model's"):
        prove(toys["rotary_tiny"])


def fails(*args: object) -> None:
    raise ValueError("a fault")


def fails_where_sparsified(model: nn.Module, arguments: dict[str, Any]) -> Any:
    return fails() if hasattr(model, "tokenprune") else model(**arguments)


def differs_where_sparsified(model: nn.Module, arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**arguments) * (1.01 if hasattr(model, "tokenprune") else 1.0)


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (fails_where_sparsified, "export takes the dense model, and not the pruned one: ValueError: a fault"),
        (differs_where_sparsified, r"output differs by \S+ after export"),
    ],
)
def test_what_takes_the_dense_model_must_take_the_pruned_one(
    export: Callable[..., Any], message: str, toys: dict[str, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_COMPILERS", {"export": export})
    with pytest.raises(ProofError, match=message):
        prove(toys["rotary_tiny"], compiled=True)


def test_a_model_of_another_library_proves_nothing_of_this_one(toys: dict[str, Example]) -> None:
    with pytest.raises(ProofError, match=r"rotary_tiny is a toy_vits\.RotaryViT, of which the adapter for timm knows"):
        tokenprune.prove(toys["rotary_tiny"], library="timm")


def test_one_entry_for_several_examples_of_a_model() -> None:
    padded = replace(ROTARY, side_inputs=("mask",), passes=("identity", "mask = gather", "undo", "export"))
    other = replace(ROTARY, name="another")
    assert merge_examples([ROTARY, other, padded]) == (
        replace(ROTARY, side_inputs=("mask", "rope"), passes=(*INVARIANTS, "export")),
        other,
    )


# Whose fault it is that a dense model fails


def test_a_model_that_its_library_cannot_run_is_that_library_s_fault(toys: dict[str, Example]) -> None:
    with pytest.raises(HostError) as caught:
        prove(toys["forgotten"])
    said = "toy_vits 1.5: the dense model fails: forgotten: AttributeError: 'ForgottenViT' object has no attribute"
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, AttributeError)


def test_arguments_that_a_model_does_not_take_are_refused_by_the_library(toys: dict[str, Example]) -> None:
    with pytest.raises(HostError, match="dense model fails: rotary_tiny: RuntimeError"):
        prove(replace(toys["rotary_tiny"], inputs=lambda number, generator: {"images": torch.zeros(number, 1, 8, 8)}))


@pytest.mark.parametrize("part", ["build", "inputs"])
@pytest.mark.parametrize("function", [fails, partial(fails, 1)], ids=["function", "partial"])
def test_an_example_that_fails_by_itself_is_no_fault_of_the_library(
    part: str, function: Any, toys: dict[str, Example]
) -> None:
    with pytest.raises(ValueError, match="a fault"):
        prove(replace(toys["rotary_tiny"], **{part: function}))


def test_code_of_the_adapter_is_no_fault_of_the_library(
    toys: dict[str, Example], adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_vits

    monkeypatch.setattr(toy_vits, "rotate", lambda x, rope: adapter.images(x, rope))
    with pytest.raises(TypeError, match="randn"):
        prove(toys["rotary_tiny"])


@pytest.mark.parametrize(("module", "expected"), [("toy_vits.adapter", HostError), ("toy_vits", ValueError)])
def test_of_a_library_with_an_adapter_of_its_own_only_that_is_ours(
    module: str, expected: type[Exception], toys: dict[str, Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_vits

    (tmp_path / "toy_vits-1.5.dist-info" / "entry_points.txt").write_text(
        f"[tokenprune.adapters]\ntoy_vits = {module}:ToyAdapter\n"
    )
    inner = ModuleType("toy_vits.layers")
    exec("def rotate(x, rope):\n    raise ValueError('a fault')", vars(inner))
    monkeypatch.setitem(sys.modules, inner.__name__, inner)
    monkeypatch.setattr(toy_vits, "rotate", inner.rotate)
    with pytest.raises(expected, match="a fault"):
        prove(toys["rotary_tiny"])
