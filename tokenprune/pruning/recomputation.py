"""What was decided when a block ran first, for activation checkpointing, which runs it once more.

In the backward pass blocks run again, the last one first, when later stages have decided already. A block must then
find what was in force in front of it, also if another pass of the same execution, plan and image size has been made
since. A pass of another kind between a forward pass and its backward pass cannot be recomputed, and ends in an error.

Shapes: B images, S summary tokens, C channels.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenprune.pruning.selection import Selection
from tokenprune.tokens import replaced


class State(NamedTuple):
    """What a block finds decided when it runs.

    Attributes:
        selections: Those of the stages in front of it.
        summaries: (B, S, C), summary tokens that go from block to block beside the sequence; ``None`` if none do.
    """

    selections: tuple[Selection, ...] = ()
    summaries: Tensor | None = None

    def replace(self, **changes: Any) -> State:
        """A state with other entries."""
        return replaced(self, changes)


NOTHING = State()
"""Where nothing has been decided."""


class Recomputing(Protocol):
    """Something that finds here what a block that is run again had found."""

    recomputed: State


def remember(owner: Recomputing, tokens: Tensor, state: State) -> None:
    """Have ``owner`` find ``state`` while the block that gave ``tokens`` is run again.

    The gradient of these tokens is the first thing known of the block in the backward pass. The reference is weak: a
    hook lives as long as the graph.
    """
    if tokens.requires_grad:
        tokens.register_hook(partial(_restore, weakref.ref(owner), state))


def _restore(owner: weakref.ref[Recomputing], state: State, grad: Tensor) -> None:
    alive = owner()
    if alive is not None:
        alive.recomputed = state


def recomputing() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
