"""Running a model as its library made it, and telling faults of that library from faults of ours.

A model that its library cannot run is no fault of ours. Only the untouched model decides: built afresh, and run before
anything is sparsified. What fails later is ours, and so is what fails in code of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import dropwhile
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.backbones.entry_points import adapter_entries, installed_version
from tokenprune.backbones.examples import Example
from tokenprune.backbones.probing import named_outputs
from tokenprune.errors import HostError


class DenseRun(NamedTuple):
    """An untouched model that its library can run.

    Attributes:
        model: The model.
        arguments: The keyword arguments it was run with.
        outputs: Every floating-point tensor that it put out, by where it stands.
    """

    model: nn.Module
    arguments: dict[str, Any]
    outputs: dict[str, Tensor]


def run_dense(example: Example, *, library: str, double: bool = False) -> DenseRun:
    """Build the model of an example and run it untouched.

    Args:
        example: The example.
        library: Root package of the library.
        double: Whether in double precision.

    Raises:
        HostError: The library cannot build it, or cannot run it.
        Exception: Whatever is raised, where code of ours has a part in it: of tokenprune, of the library's adapter,
            or of the example itself.
    """
    model = None
    try:
        with torch.no_grad():
            model, arguments = example.model(double=double), example.arguments(double=double)
            return DenseRun(model, arguments, named_outputs(model(**arguments)))
    except Exception as error:
        if _is_ours(error, model, example, library):
            raise
        raise HostError(dense_fault(example, library, error)) from error


def dense_fault(example: Example, library: str, error: Exception) -> str:
    """What is wrong with a library's own model, in one line."""
    first_line = next(iter(str(error).splitlines()), "")
    release = f"{library} {installed_version(library) or '(no version)'}"
    return f"{release}: {DENSE_MODEL_FAILS}: {example.name}: {type(error).__name__}: {first_line}"


DENSE_MODEL_FAILS = "the dense model fails"


def _is_ours(error: Exception, model: nn.Module | None, example: Example, library: str) -> bool:
    """Whether an error comes from a model of our own, passed code of ours, or was raised by the example itself."""
    named = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    passed = [*dropwhile(lambda name: name in (__name__, Example.__module__), named)]
    classes = [] if model is None else [type(module).__module__ for module in model.modules()]
    if any(_is_inside(name, package) for name in (*passed, *classes) for package in _ours(library)):
        return True
    raised_in = _root(passed[-1]) if passed else ""
    return raised_in != library and raised_in in {_root(_module(made)) for made in (example.build, example.inputs)}


def _ours(library: str) -> tuple[str, ...]:
    """The packages of tokenprune and of a library's adapter, which may be a part of that library."""
    entry = adapter_entries().get(library)
    if entry is None:
        return ("tokenprune",)
    package = _root(entry.module)
    return "tokenprune", entry.module if package == library else package


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _root(module: str) -> str:
    return module.partition(".")[0]


def _module(function: Callable[..., Any]) -> str:
    """The module that a function was written in."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__module__", None) or ""
