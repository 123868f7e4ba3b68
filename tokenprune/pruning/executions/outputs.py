"""What a vision tower returns, without the pruned tokens that are still in it after `mask` execution.

Shapes: B images, N patch tokens, n kept ones, Q suffix tokens, L all tokens, K those left, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.tokens import Layout, kept_indices, select


def without_pruned(
    output: Any, keep: Sequence[Tensor], num_keep: Sequence[int], stages: Sequence[int], num_suffix: int
) -> Any:
    """The output with every sequence of tokens cut down to those that `gather` execution leaves.

    Args:
        output: A tensor, or tensors in tuples and mappings. Hidden states are those in front of and
            after each block, a tuple one longer than there are blocks.
        keep: The decisions (B, N) of each stage, equally many kept in each image.
        num_keep: How many a stage.
        stages: For each block the last stage in front of it, -1 if there is none.
        num_suffix: Q.
    """

    def cut(tokens: Tensor, stage: int) -> Tensor:
        num_others = tokens.shape[1] - keep[-1].shape[1] if tokens.dim() == 3 else -1
        if stage < 0 or num_others < num_suffix or tokens.shape[0] != keep[-1].shape[0]:
            return tokens
        layout = Layout(num_others - num_suffix, keep[-1].shape[1], num_suffix)
        return select(tokens, layout.positions(kept_indices(keep[stage], num_keep[stage])))

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cut(value, len(keep) - 1)
        if isinstance(value, Mapping):
            return type(value)(**{name: walk(item) for name, item in value.items()})
        if isinstance(value, (tuple, list)):
            if len(value) == len(stages) + 1:  # hidden states; a model may leave out those that nobody asked for
                after = zip(value[1:], stages, strict=True)
                return type(value)([value[0], *(item if item is None else cut(item, stage) for item, stage in after)])
            return type(value)(walk(item) for item in value)
        return value

    return walk(output)
