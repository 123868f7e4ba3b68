"""What may become of any input: it works, or it ends in one clear error, and the model is as it was."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tests.generated.models import run
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tokenprune.pruning.sparsifier import Sparsifier

_OURS = tuple(str(Path(tokenprune.__file__).parents[1] / name) for name in ("tokenprune", "adapters"))


class Users(Exception):
    """Raised by a callable of the user's, and no fault of ours: it must come through as it is."""


def attempt(call: Callable[[], Any], *, valid: bool | None = None) -> tuple[Any, Exception | None]:
    """What a call returns, or the clear error in which it ended.

    Args:
        call: What to try.
        valid: Whether it has to work (``True``) or to be refused (``False``); ``None`` if either will do.
    """
    try:
        result = call()
    except Exception as error:
        if valid:
            raise AssertionError(f"refused: {type(error).__name__}: {error}") from error
        assert_clear(error)
        return None, error
    assert valid is not False, "went through, and should have been refused"
    return result, None


def assert_clear(error: Exception) -> None:
    """That an error is one of ours, or the user's, and says something."""
    if isinstance(error, Users):
        return
    assert str(error).strip(), f"{type(error).__name__} says nothing"
    if isinstance(error, tokenprune.TokenpruneError):
        return
    assert isinstance(error, (ValueError, TypeError)) and _on_purpose(error), (
        f"no error of ours: {type(error).__name__}: {error}"
    )


def _on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` of the library raised it."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = code.co_code[trace.tb_lasti] in (dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"])
    return code.co_filename.startswith(_OURS) and raised


def assert_holds(model: nn.Module, images: Tensor, dense: Tensor, before: dict[Any, Any]) -> None:
    """The invariants of a sparsified model, which is dense again and as it was when they have been shown.

    Args:
        model: In eval mode.
        images: That fit.
        dense: What it gave before it was sparsified.
        before: Its `snapshot` then.
    """
    sparsifier: Any = model.tokenprune
    with torch.no_grad():
        outputs, kept = {}, {}
        for execution in ("gather", "mask"):
            sparsifier.execution = execution
            outputs[execution] = run(model, images)
            kept[execution] = sparsifier.trace.keep
            _assert_counts(sparsifier, len(images))
        same = all(torch.equal(one, other) for one, other in zip(*kept.values(), strict=True))
        if same:  # scores that differ by rounding alone may be ranked otherwise
            _close(outputs["mask"], outputs["gather"], MASK_EQUALS_GATHER[torch.float32])
        with tokenprune.dense(model):
            _close(run(model, images), dense, IDENTITY)
        sparsifier.keep_ratio = 1
        for execution in ("gather", "mask"):
            sparsifier.execution = execution
            _close(run(model, images), dense, IDENTITY)
        assert_undone(model, images, dense, before)


def assert_undone(model: nn.Module, images: Tensor, dense: Tensor, before: dict[Any, Any]) -> None:
    """That `tokenprune.unsparsify` leaves the model as it was."""
    tokenprune.unsparsify(model)
    assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(run(model, images), dense)


def _assert_counts(sparsifier: Sparsifier, batch: int) -> None:
    trace = sparsifier.trace
    assert trace is not None
    left = torch.ones(batch, trace.num_patches)
    for keep, number in zip(trace.keep, sparsifier.plan.num_keep(trace.num_patches), strict=True):
        assert keep.sum(dim=1).tolist() == [number] * batch
        assert (keep <= left).all(), "a pruned token came back"
        left = keep
    for indices in trace.indices:
        assert (indices.diff(dim=1) > 0).all(), "the order of patches has changed"


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_close({"logits": actual}, {"logits": expected}, tolerance)


def snapshot(model: nn.Module) -> dict[Any, Any]:
    """Everything there is to a model: modules, weights to the bit, hooks, modes and attributes."""
    found: dict[Any, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name, type] = type(module)
        for attribute, value in vars(module).items():
            found[name, attribute] = _copied(value)
    return found


def assert_unchanged(model: nn.Module, before: dict[Any, Any]) -> None:
    """That a model is what it was."""
    after = snapshot(model)
    assert list(before) == list(after), sorted(map(str, set(before) ^ set(after)))
    changed = [key for key in before if not _same(before[key], after[key])]
    assert not changed, changed


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value, value.detach().clone(), value.requires_grad, value.grad is None
    if isinstance(value, (nn.Module, type, types.FunctionType)):
        return value
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    if hasattr(value, "__dict__"):  # such as a config
        return value, dict(vars(value))
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one is other or (one.shape == other.shape and _bits(one) == _bits(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
