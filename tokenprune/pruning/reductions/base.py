"""What a reduction is, what it is given, and the table of reductions by name.

Shapes: B images, m patch tokens that reach a stage, S summary tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.errors import UnsupportedModelError
from tokenprune.pruning.executions.paths import Paths


class Split(NamedTuple):
    """The patch tokens that reached a stage, and what it has decided on them.

    Some of them may have been pruned by earlier stages, or be no tokens of the image at all where images have different
    numbers of them, and be there all the same: those have 0 in ``keep`` and in ``pruned``, and must leave no trace in
    what is returned for the others. Shapes are the same in every execution, so that one implementation serves all.

    Attributes:
        patches: (B, m, C).
        keep: (B, m), 1 = kept; in training a gradient reaches it.
        pruned: (B, m), 1 = pruned by this stage; in training a gradient reaches it.
        importance: (B, m), not negative, higher = matters more: what the scorer makes of its scores.
        sizes: (B, m), how many patches each stands for, in single precision at least; ``None`` where each stands for
            one.
        hosts: (B, m) int64, for each the position among them of the one that it is to be merged into if it is pruned,
            as the scorer chose it; ``None`` where it chose none.
    """

    patches: Tensor
    keep: Tensor
    pruned: Tensor
    importance: Tensor
    sizes: Tensor | None = None
    hosts: Tensor | None = None


class Reduced(NamedTuple):
    """What a reduction has made of the patch tokens.

    Attributes:
        patches: (B, m, C), of which the kept ones go on.
        summary: (B, S, C), tokens that go on besides; ``None`` for none.
        hosts: (B, m) int64, for each patch token the position among them of the kept one whose state it takes when
            it is restored, its own position if kept or pruned earlier; ``None`` where it takes its own old state.
        sizes: (B, m), how many patches each kept one stands for now, at least 1: it is attended to in proportion.
            ``None`` where each counts as one.
    """

    patches: Tensor
    summary: Tensor | None = None
    hosts: Tensor | None = None
    sizes: Tensor | None = None


def _no_parts() -> Sequence[tuple[int, TokenWise]]:
    return ()


class ReductionContext(NamedTuple):
    """What is known of a stage when its reduction is built.

    Attributes:
        embed_dim: Width C of the tokens.
        keep_probability: Fraction of the tokens reaching the stage that it is to keep, in (0, 1].
        parts: Gives the parts that treat tokens one by one, of the blocks from the stage to the next one, each with the
            number of its block. They may have to be found first, by running the model.
    """

    embed_dim: int
    keep_probability: float
    parts: Callable[[], Sequence[tuple[int, TokenWise]]] = _no_parts


class WholeModel(Protocol):
    """What a reduction that keeps the sequence whole may ask of a model while it runs."""

    def paths(self, block: int) -> Paths | None:
        """How a block's tokens are split into two paths; ``None`` where all of them are kept."""
        ...


class Reduction(nn.Module):
    """What becomes of the tokens that a stage prunes.

    A subclass implements `forward`, and may have parameters. It is part of its stage, so that they are saved with it.

    Attributes:
        restores: Whether pruned tokens are restored behind every block, so that whatever stands there gets all of
            them, while the block itself runs without them. In models that need every token they are restored in any
            case.
        num_summary: S, how many tokens it adds at every stage; the same for all stages.
        looks_at_pruned: Whether `forward` is to be called; ``False`` where kept tokens go on as they are.
        whole: Whether every token stays in the sequence, in every execution, and what becomes of pruned ones is up to
            the hooks of `install`. All stages of a model must agree on it.
        anew: Where the sequence stays whole, whether a stage scores all patch tokens, and not only those that the stage
            before it has kept.
    """

    restores: bool = False
    whole: bool = False
    anew: bool = False
    num_summary: int = 0
    looks_at_pruned: bool = True

    def check(self, backbone: Backbone, name: str) -> None:
        """Refuse a model in which this reduction has no meaning.

        Args:
            backbone: The model.
            name: What the reduction is called, for the message.

        Raises:
            UnsupportedModelError: The message says why, and what can be done instead.
        """
        if backbone.packed is not None and (self.whole or self.num_summary):
            what = "lets pruned tokens stay in the sequence" if self.whole else "adds a token that is in no segment"
            raise UnsupportedModelError(
                f"pruned={name!r} {what}, and this model has all images of a batch in one sequence, and attends "
                "segment by segment; choose 'drop', 'merge' or 'merge_sizes'."
            )
        if self.num_summary and backbone.summary_obstacles:
            raise UnsupportedModelError(
                f"pruned={name!r} adds a token that stands for several places in the image and has none of its own, "
                f"but in this model {'; '.join(backbone.summary_obstacles)}. Choose a reduction that adds no token, "
                "such as 'merge', 'drop' or 'preserve'."
            )

    def install(self, model: WholeModel) -> Iterator[RemovableHandle]:
        """Install hooks of its own in the blocks behind its stage."""
        yield from ()

    def forward(self, split: Split) -> Reduced:
        """What goes on, of the patch tokens that reached the stage.

        Those of an image of which nothing is pruned must come back as they are: where a stage prunes nothing at all,
        an execution may not ask.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(split)")


def check_reduced(reduced: Any, split: Split, reduction: Reduction) -> Reduced:
    """What a reduction has made of ``split``, in the dtype of the patch tokens.

    Raises:
        TypeError, ValueError: It is not what a reduction returns, or not of the shape or number it says.
    """
    name, (patches, summary, hosts, token_sizes) = type(reduction).__name__, _parts(reduced, reduction)
    shape, number = split.patches.shape, 0 if summary is None else summary.shape[1] if summary.dim() == 3 else -1
    if patches.shape != shape:
        raise ValueError(
            f"{name} returned patches of shape {tuple(patches.shape)}; expected {tuple(shape)}, all of them."
        )
    if number != reduction.num_summary or (summary is not None and summary.shape != (shape[0], number, shape[2])):
        given = "no summary tokens" if summary is None else f"a summary of shape {tuple(summary.shape)}"
        raise ValueError(
            f"{name} returned {given}; by its num_summary={reduction.num_summary} it is "
            f"{(shape[0], reduction.num_summary, shape[2]) if reduction.num_summary else None}."
        )
    if hosts is not None and (hosts.shape != shape[:2] or hosts.dtype != torch.int64):
        raise ValueError(
            f"{name} returned hosts of shape {tuple(hosts.shape)} and {hosts.dtype}; expected {tuple(shape[:2])} of "
            "torch.int64, a position for each patch token."
        )
    if token_sizes is not None and token_sizes.shape != shape[:2]:
        raise ValueError(
            f"{name} returned sizes of shape {tuple(token_sizes.shape)}; expected {tuple(shape[:2])}, one for each "
            "patch token."
        )
    dtype = split.patches.dtype
    return Reduced(patches.to(dtype), None if summary is None else summary.to(dtype), hosts, token_sizes)


def _parts(reduced: Any, reduction: Reduction) -> Reduced:
    """What was returned, if it is tensors in a `Reduced`."""
    tensors = isinstance(reduced, Reduced) and isinstance(reduced.patches, Tensor)
    if not tensors or not all(isinstance(one, (Tensor, type(None))) for one in reduced):
        held = f" with {', '.join(type(one).__name__ for one in reduced)}" if isinstance(reduced, Reduced) else ""
        raise TypeError(
            f"{type(reduction).__name__} returned a {type(reduced).__name__}{held}; expected a tokenprune.Reduced with "
            "tensors."
        )
    return cast(Reduced, reduced)


ReductionBuilder = Callable[[ReductionContext], Reduction]
_Builder = TypeVar("_Builder", bound=ReductionBuilder)
_BUILDERS: dict[str, ReductionBuilder] = {}


def register_reduction(name: str) -> Callable[[_Builder], _Builder]:
    """Decorate a function that builds a reduction, to make it available as ``pruned=name``."""

    def add(builder: _Builder) -> _Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def reduction_names() -> tuple[str, ...]:
    """The names of all registered reductions."""
    return tuple(_BUILDERS)


def reduction_builder(pruned: str | ReductionBuilder) -> ReductionBuilder:
    """The builder of a reduction given by name, or the one that was given.

    Raises:
        ValueError: No reduction has that name.
        TypeError: It is neither a name nor a callable.
    """
    if isinstance(pruned, str):
        if pruned not in _BUILDERS:
            raise ValueError(f"pruned={pruned!r} is unknown; choose from {sorted(_BUILDERS)}, or pass a callable.")
        return _BUILDERS[pruned]
    if isinstance(pruned, nn.Module) or not callable(pruned):
        raise TypeError(
            f"pruned={type(pruned).__name__}: expected a name from {sorted(_BUILDERS)}, or a callable that takes a "
            "ReductionContext and returns a new Reduction for a stage."
        )
    return pruned


def reduction_name(pruned: str | ReductionBuilder) -> str | None:
    """The name under which a reduction is registered; ``None`` for a builder without one."""
    if isinstance(pruned, str):
        return pruned
    return next((name for name, builder in _BUILDERS.items() if builder is pruned), None)
