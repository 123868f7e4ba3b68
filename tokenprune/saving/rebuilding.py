"""Whether, and from what, a base model can be built again without its checkpoint.

Adapters say what to build a model from; that the model so built is the same is proved here, by
building it without weights and comparing it module by module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from tokenprune.backbones.adapters import adapter, library_of
from tokenprune.errors import CheckpointError, TokenpruneError, UnsupportedModelError
from tokenprune.pruning.compilation import has_own_forward

# Attributes that are switched for a while, and do not make it another model.
_SWITCHES = frozenset({"training", "grad_checkpointing", "gradient_checkpointing", "name_or_path"})


@dataclass(frozen=True, kw_only=True)
class Identity:
    """From what a model is built again.

    Attributes:
        library: Root package of its library.
        fields: What the library's adapter builds it from.
        buffer_dtypes: dtypes that buffers outside the state dict have, where a new model has others.
    """

    library: str
    fields: Mapping[str, Any]
    buffer_dtypes: Mapping[str, str]


def identify(model: nn.Module, switches: Sequence[str] = ()) -> Identity:
    """From what ``model`` can be built again; proved by building it.

    Args:
        model: The model, sparsified or not.
        switches: Names of further attributes that may differ.

    Raises:
        UnsupportedModelError: It cannot be, or what is built is not the same; the message says why.
    """
    library = library_of(model)
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if library is None:
        raise UnsupportedModelError(f"no installed adapter can build a {name}.")
    fields = adapter(library).identity(model)
    try:
        same = json.loads(json.dumps(fields))
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"what the adapter would build this {name} from does not go into JSON: {error}"
        ) from error
    try:
        with torch.device("meta"):
            made = build(library, same)
    except (UnsupportedModelError, RuntimeError):  # some constructors look at the numbers that they make
        made = build(library, same)
    found = list(differences(made, model, {*_SWITCHES, *switches}))
    if found:
        listed = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        raise UnsupportedModelError(f"this {name} is not what its library builds by itself: {listed}.")
    buffers = _unsaved_buffers(made)
    dtypes = {
        name: _dtype_name(tensor.dtype)
        for name, tensor in _unsaved_buffers(model).items()
        if name in buffers and tensor.dtype != buffers[name].dtype
    }
    return Identity(library=library, fields=same, buffer_dtypes=dtypes)


def build(library: str, fields: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build a model from what `identify` found, and leave the random state as it was.

    Raises:
        UnsupportedModelError: There is no adapter for the library, it is not installed, or it refuses.
    """
    found = adapter(library)
    try:
        with torch.random.fork_rng(devices=[]):
            return found.build(dict(fields), pretrained=pretrained)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{library} is needed to build this model and cannot be imported: {error}"
        ) from error
    except TokenpruneError:
        raise
    except Exception as error:  # what a file says may be anything, and constructors fail in many ways
        raise UnsupportedModelError(
            f"{library} builds no model from what was saved ({type(error).__name__}: {error})."
        ) from error


def cast_buffers(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give buffers outside the state dict the dtypes they had.

    Raises:
        CheckpointError: A name or a dtype does not exist.
    """
    buffers = _unsaved_buffers(model)
    for name, dtype in dtypes.items():
        known = getattr(torch, str(dtype), None)
        if name not in buffers or not isinstance(known, torch.dtype):
            raise CheckpointError(f"the saved folder gives a buffer {name!r} the dtype {dtype!r}; this model has none.")
        buffers[name].data = buffers[name].data.to(known)


def differences(made: nn.Module, model: nn.Module, ignored: set[str]) -> Iterator[str]:
    """In what two models differ other than in their weights: modules, settings, shapes, ties."""
    ours, theirs = _modules(made), _modules(model)
    yield from (f"{name or 'the model'} has been added" for name in theirs if name not in ours)
    yield from (f"{name} has been removed" for name in ours if name not in theirs)
    for name, module in theirs.items():
        if name not in ours:
            continue
        new, where = ours[name], name or "the model"
        if type(new) is not type(module):
            yield f"{where} is a {type(module).__name__} instead of a {type(new).__name__}"
            continue
        if has_own_forward(module) and not has_own_forward(new):
            yield f"{where} has a forward of its own"
        before, after = _settings(new), _settings(module)
        for setting in before:
            if setting in after and setting not in ignored and before[setting] != after[setting]:
                yield f"{where}.{setting} is {after[setting]!r} instead of {before[setting]!r}"
        shapes, own_shapes = _shapes(new), _shapes(module)
        for parameter in sorted({*shapes, *own_shapes}):
            if shapes.get(parameter) != own_shapes.get(parameter):
                yield (f"{where}.{parameter} has shape {own_shapes.get(parameter)} instead of {shapes.get(parameter)}")
    if _ties(made) != _ties(model):
        yield "other parameters are tied"


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name.partition(".")[0] != "tokenprune"}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, words and functions among the attributes, and tuples of them."""
    return {
        name: _comparable(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_setting(value)
    }


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_setting(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, FunctionType, BuiltinFunctionType))


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(item) for item in value)
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tuple(tensor.shape) for name, tensor in own}


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def _unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    saved = set(model.state_dict())
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and not name.startswith("tokenprune.")
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
