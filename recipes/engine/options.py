"""How fields of settings are declared: as options of the command line, whose ranges hold in Python too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from inspect import get_annotations
from typing import Annotated, Any, Literal, get_args, get_origin

from typer import Option
from typer.models import OptionInfo

# One for each group of ``--help``.
Data = partial(Option, rich_help_panel="Data")
Augmentation = partial(Option, rich_help_panel="Augmentation")
Model = partial(Option, rich_help_panel="Model")
Pruning = partial(Option, rich_help_panel="Pruning")
Optimisation = partial(Option, rich_help_panel="Optimisation")
Machine = partial(Option, rich_help_panel="Machine")
Run = partial(Option, rich_help_panel="Run")


def annotations_of(settings_class: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, with its option where there is one.

    A class that declares a field again, for another default or a narrower type, inherits its option unless it
    gives one of its own.
    """
    found: dict[str, Any] = {}
    for owner in reversed(settings_class.__mro__):
        for name, annotation in get_annotations(owner, eval_str=True).items():
            inherited = _option(found.get(name))
            if inherited is not None and _option(annotation) is None:
                annotation = Annotated[annotation, inherited]
            found[name] = annotation
    return {field.name: found[field.name] for field in fields(settings_class)}


def violations(settings: Any) -> Iterator[str]:
    """A sentence for each value of a dataclass that the option of its field does not allow."""
    for name, annotation in annotations_of(type(settings)).items():
        value, option = getattr(settings, name), _option(annotation)
        choices = get_args(_bare(annotation)) if get_origin(_bare(annotation)) is Literal else None
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if choices is not None and item not in choices:
                yield f"{name}={item!r}: choose one of {', '.join(map(repr, choices))}."
            elif isinstance(item, (int, float)):
                low, high = (None, None) if option is None else (option.min, option.max)
                if not (math.isfinite(item) and (low is None or item >= low) and (high is None or item <= high)):
                    yield f"{name}={item}: give a finite number{_bounds(low, high)}."


def _option(annotation: Any) -> OptionInfo | None:
    return next((item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, OptionInfo)), None)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _bounds(low: float | None, high: float | None) -> str:
    bounds = (("of at least", low), ("of at most", high))
    return "".join(f", {words} {bound:g}" for words, bound in bounds if bound is not None)
