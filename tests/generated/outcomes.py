"""What may become of any input: it works, or it ends in one clear error, and the model is as it was."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenprune
from tests.generated.models import run
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tokenprune.pruning.sparsifier import Sparsifier

_OURS = tuple(str(Path(tokenprune.__file__).parents[1] / name) for name in ("tokenprune", "adapters"))
_TESTS = str(Path(__file__).parent)


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
    if isinstance(error, Users) or _frame(error).filename.startswith(_TESTS):
        return
    assert str(error).strip(), f"{type(error).__name__} says nothing"
    if isinstance(error, tokenprune.TokenpruneError):
        return
    assert isinstance(error, (ValueError, TypeError, NotImplementedError)) and _on_purpose(error), (
        f"no error of ours: {type(error).__name__}: {error}"
    )


class _Frame(NamedTuple):
    """Where an error comes from.

    Attributes:
        filename: The file.
        raised: Whether a ``raise`` stands there, and not something that failed.
    """

    filename: str
    raised: bool


def _frame(error: Exception) -> _Frame:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return _Frame(code.co_filename, code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"])


def _on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` of the library raised it."""
    frame = _frame(error)
    return frame.filename.startswith(_OURS) and frame.raised


def assert_holds(
    model: nn.Module, images: Tensor, dense: Tensor, before: dict[Any, Any], *, copied: bool = False
) -> None:
    """The invariants of a sparsified model, which is dense again and as it was when they have been shown.

    Args:
        model: In eval mode.
        images: That fit.
        dense: What it gave before it was sparsified.
        before: Its `snapshot` then.
        copied: Whether it is a copy of the model that was.
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
        assert_undone(model, images, dense, before, copied=copied)


def assert_undone(
    model: nn.Module, images: Tensor, dense: Tensor, before: dict[Any, Any], *, copied: bool = False
) -> None:
    """That `tokenprune.unsparsify` leaves the model as it was."""
    tokenprune.unsparsify(model)
    assert_unchanged(model, before, copied=copied)
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


def assert_unchanged(model: nn.Module, before: dict[Any, Any], *, copied: bool = False) -> None:
    """That a model is what it was, of the very same parts unless it was ``copied``, and nothing is switched on."""
    assert torch._C._len_torch_function_stack() == 0
    after = snapshot(model)
    assert list(before) == list(after), sorted(map(str, set(before) ^ set(after)))
    changed = [key for key in before if not _same(before[key], after[key], copied)]
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


def _same(one: Any, other: Any, copied: bool) -> bool:
    if isinstance(one, Tensor):
        return one is other or (one.shape == other.shape and _bits(one) == _bits(other))
    if isinstance(one, nn.Module):
        return one is other or (copied and type(one) is type(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key], copied) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(*pair, copied) for pair in zip(one, other, strict=True))
    return one is other or bool(one == other) or (copied and repr(one) == repr(other))


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
