"""Whether the fields of a `Backbone` hold what they are said to hold, before anything relies on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args

from torch import nn

from tokenprune.backbones.adaptations import Adaptation
from tokenprune.backbones.levels import Hierarchy, Level
from tokenprune.backbones.packed import Packed
from tokenprune.backbones.patterns import is_pattern
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.errors import UnsupportedModelError


def check_fields(values: Mapping[str, Any], downstream: Any) -> None:
    """Refuse a description in which a field holds something of another kind.

    Args:
        values: The fields by name.
        downstream: The type that lists what its field of that name may be.

    Raises:
        UnsupportedModelError: The message names the field, what it holds, and what it may hold.
    """
    choices = get_args(downstream)
    listed = ", ".join(map(repr, choices))
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "blocks": (_are_modules, "expected the blocks of the model, in a sequence such as its ModuleList"),
        "num_prefix_tokens": (_is_count, "expected a whole number from 0"),
        "embed_dim": (lambda value: _is_count(value) and value > 0, "expected a whole number from 1"),
        "num_suffix_tokens": (_is_count, "expected a whole number from 0"),
        "class_token": (lambda value: isinstance(value, bool), "expected True or False"),
        "patch_size": (_is_pair, "expected height and width, such as (16, 16), or None"),
        "grid_size": (_is_pair, "expected rows and columns, such as (14, 14), or None"),
        "final_norm": (_is_module_or_none, "expected a module of the model, or None"),
        "downstream": (lambda value: isinstance(value, str) and value in choices, f"choose from {listed}"),
        "attentions": (_are_attentions, "expected for each block a sequence of modules, or None to have them found"),
        "token_inputs": (_are_inputs, "expected for names of parameters patterns such as ('b n d -> b n d',), or None"),
        "neutral_inputs": (_are_neutral, "expected for names of parameters numbers such as (0.0, 1.0)"),
        "adaptations": (_are_adaptations, "expected a sequence of tokenprune.Adaptation objects"),
        "tower": (_is_module_or_none, "expected a module of the model, or None"),
        "packed": (
            lambda value: value is None or isinstance(value, Packed),
            "expected a tokenprune.Packed, or None where each image has a row of its own",
        ),
        "patch_mask": (
            lambda value: value is None or isinstance(value, str),
            "expected the name of a parameter, or None",
        ),
        "token_wise": (_are_parts, "expected for each block a sequence of tokenprune.TokenWise, or None"),
        "hierarchy": (_is_hierarchy, "expected a tokenprune.Hierarchy of tokenprune.Level objects, or None"),
    }
    for name, (holds, expected) in rules.items():
        if not holds(values[name]):
            raise UnsupportedModelError(f"Backbone({name}={_shortened(values[name])}): {expected}.")


def _shortened(value: Any) -> str:
    text = f"{type(value).__name__}(…)" if isinstance(value, nn.Module) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (Sequence, nn.ModuleList, nn.Sequential)) and not isinstance(value, (str, bytes))


def _are_modules(value: Any) -> bool:
    return _is_sequence(value) and all(isinstance(one, nn.Module) for one in value)


def _is_module_or_none(value: Any) -> bool:
    return value is None or isinstance(value, nn.Module)


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0


def _is_pair(value: Any) -> bool:
    return value is None or (_is_sequence(value) and len(value) == 2 and all(_is_count(one) and one for one in value))


def _are_attentions(value: Any) -> bool:
    return value is None or (_is_sequence(value) and all(_are_modules(modules) for modules in value))


def _are_parts(value: Any) -> bool:
    return value is None or (
        _is_sequence(value)
        and all(_is_sequence(parts) and all(isinstance(part, TokenWise) for part in parts) for parts in value)
    )


def _is_hierarchy(value: Any) -> bool:
    return value is None or (
        isinstance(value, Hierarchy)
        and _is_sequence(value.levels)
        and all(isinstance(level, Level) for level in value.levels)
        and _is_count(value.number)
        and (value.obstacle is None or isinstance(value.obstacle, str))
    )


def _are_inputs(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (patterns is None or (_is_sequence(patterns) and all(map(is_pattern, patterns))))
        for name, patterns in value.items()
    )


def _are_neutral(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_sequence(numbers) and all(isinstance(one, Real) for one in numbers)
        for name, numbers in value.items()
    )


def _are_adaptations(value: Any) -> bool:
    return _is_sequence(value) and all(isinstance(one, Adaptation) for one in value)
