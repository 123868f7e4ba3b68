"""timm's hierarchies: what their structure does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokenprune import Backbone
from tokenprune.backbones.hierarchy import observe_hierarchy

# Tokens stand in the order of their mask units, not in that of rows (Hiera, arXiv 2306.00989).
_OUT_OF_ORDER = ("Hiera",)


def describe_hierarchy(
    model: nn.Module, inputs: Mapping[str, Any], image_size: tuple[int, int], obstacle: str
) -> Backbone:
    """The description of a hierarchy.

    Args:
        model: The model.
        inputs: Two images, as it takes them.
        image_size: Their height and width.
        obstacle: Why it is no flat list of blocks.

    Raises:
        UnsupportedModelError: It has no blocks with a part that treats tokens one by one.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    num_prefix = 0 if getattr(model, "cls_token", None) is None else 1
    found = observe_hierarchy(
        model,
        inputs,
        image_size=image_size,
        num_prefix_tokens=num_prefix,
        row_major=not names & {*_OUT_OF_ORDER},
        obstacle=obstacle,
    )
    return Backbone(**found._asdict(), num_prefix_tokens=num_prefix)
