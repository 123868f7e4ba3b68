"""What a vision tower returns, without the pruned tokens that are still in it.

Shapes: B images, L tokens of a sequence, K those that are left, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.pruning.selection import Selection
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import of_length, select


def without_pruned(output: Any, trace: Trace, num_keep: Sequence[int], stages: Sequence[int]) -> Any:
    """The output with every sequence of tokens cut down to those that are kept.

    Args:
        output: A tensor, or tensors in tuples and mappings.
        trace: The pass that made it; with equally many tokens kept in each image.
        num_keep: How many a stage.
        stages: For each block the last stage in front of it, -1 if there is none.
    """

    def cut(tokens: Tensor, stage: int) -> Tensor:
        return tokens if stage < 0 else _kept(tokens, trace, trace.selections[stage], num_keep[stage])

    return of_blocks(output, cut, stages)


def of_blocks(output: Any, change: Callable[[Tensor, int], Tensor], stages: Sequence[int]) -> Any:
    """The output with every tensor changed by what is known of the stage behind which it was made.

    Args:
        output: A tensor, or tensors in tuples and mappings. Hidden states are those in front of and
            after each block, a tuple one longer than there are blocks.
        change: What is made of a tensor, given the stage; -1 if it stands in front of the first one.
        stages: For each block the last stage in front of it, -1 if there is none.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value, stages[-1])
        if isinstance(value, Mapping):
            return type(value)(**{name: walk(item) for name, item in value.items()})
        if isinstance(value, (tuple, list)):
            if len(value) == len(stages) + 1:  # hidden states; a model may leave out those that nobody asked for
                after = zip(value[1:], stages, strict=True)
                return type(value)(
                    [value[0], *(item if item is None else change(item, stage) for item, stage in after)]
                )
            return type(value)(walk(item) for item in value)
        return value

    return walk(output)


def _kept(tokens: Tensor, trace: Trace, selection: Selection, num_keep: int) -> Tensor:
    """The kept tokens, where ``tokens`` are a sequence behind a stage, with prefix tokens or without."""
    assert selection.keep is not None
    if tokens.dim() != 3 or tokens.shape[0] != selection.keep.shape[0]:
        return tokens
    with_prefix = selection.layout.replace(num_prefix=trace.num_prefix_tokens)
    layout = of_length((selection.layout, with_prefix, selection.layout.replace(num_prefix=0)), tokens.shape[1])
    return tokens if layout is None else select(tokens, layout.positions(selection.indices_of_grid(num_keep)))
