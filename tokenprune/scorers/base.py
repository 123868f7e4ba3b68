"""What a scorer is, what it is given, and the table of scorers by name.

Shapes: B images, n patch tokens a stage looks at, N patch tokens of the whole image, P prefix
tokens, C channels, D channels of a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from tokenprune.scorers.rows import Ranking


class Candidates(NamedTuple):
    """The patch tokens that a scorer is to score.

    Attributes:
        patches: (B, n, C). In `gather` execution the tokens that are left, in `mask` execution all, in `varlen`
            execution those that are left and, of images with fewer than others, further ones to fill the row.
        prefix: (B, P, C), the class, distillation and register tokens, for reference only.
        keep: (B, n), 1 = not pruned yet, 0 = pruned by an earlier stage or there to fill the row; ``None`` means
            all are left.
        indices: (B, n) int64, each token's position in the image's row-major order; ``None`` means
            all N in order.
        num_patches: N, the patch tokens of the image before any pruning.
        grid: Rows and columns of patches in the image, ``None`` where unknown.
        attention: (B, n), for scorers with ``needs_attention``: what each patch token received in the
            block before, the mean over heads of the class token's attention weights or, where there is
            no class token, of those of all tokens left. Tokens pruned earlier have 0. No gradient.
        keys: (B, n, D), for scorers with ``needs_keys``: the mean over heads of each patch token's keys in the block
            before or, for a scorer with ``inside_block``, in that very block. No gradient.
        num_left: How many of the candidates an image has left, and
        num_keep: how many of them are to be kept, the same for every image where decisions are not sampled.
        notes: (B, n), what the scorer of the stage before has noted of each, see `Scored`; ``None`` if nothing.
        lengths: (B,), how many patch tokens each image had before any pruning; ``None`` where all had N.
    """

    patches: Tensor
    prefix: Tensor
    keep: Tensor | None
    indices: Tensor | None
    num_patches: int
    grid: tuple[int, int] | None
    attention: Tensor | None = None
    keys: Tensor | None = None
    num_left: int | None = None
    num_keep: int | None = None
    notes: Tensor | None = None
    lengths: Tensor | None = None

    def at_candidates(self, values: Tensor) -> Tensor:
        """Values (B, N) for the whole image, in row-major order, as those of the candidates: (B, n)."""
        return values if self.indices is None else values.gather(1, self.indices)

    def mean(self, values: Tensor) -> Tensor:
        """The mean (B, 1, C) of values (B, n, C) over the candidates that are not pruned yet."""
        if self.keep is None:
            return values.mean(dim=1, keepdim=True)
        weights = self.keep.to(values.dtype).unsqueeze(-1)  # (B, n, 1)
        return (values * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)


class Scored(NamedTuple):
    """What a scorer may return instead of scores alone.

    Attributes:
        scores: (B, n), higher = keep.
        hosts: (B, n) int64, for each candidate the position among them of the one that it is to be merged into if it
            is pruned, for reductions that merge; it has to be one that is kept. ``None`` leaves it to the reduction.
        notes: (B, n), a number for each candidate that its stage hands on to the scorer of the next one, with the
            candidates that are kept.
    """

    scores: Tensor
    hosts: Tensor | None = None
    notes: Tensor | None = None


class ScorerContext(NamedTuple):
    """What is known of a stage when its scorer is built.

    Attributes:
        embed_dim: Width C of the tokens.
        keep_probability: Fraction of the tokens reaching the stage that it is to keep, in (0, 1].
        grid_size: Rows and columns of patches at the model's nominal image size, if known.
    """

    embed_dim: int
    keep_probability: float
    grid_size: tuple[int, int] | None


class Scorer(nn.Module):
    """Gives every patch token a score; higher = keep.

    A subclass implements `forward`. With ``probabilistic = True`` a score is the log-odds of keeping
    the token, log p − log(1 − p), and in training decisions are sampled from it, with a gradient.
    With ``False`` scores only rank, and the top k are kept in training too. With
    ``needs_attention = True`` the attention of the block before the stage is recorded, and
    `Candidates` carries what each token received; ``needs_keys = True`` does the same with keys. With
    ``inside_block = True`` a stage does not stand in front of its block but inside, between attention and MLP, where
    the attention and the keys of that block itself are known.
    """

    probabilistic: bool = False
    needs_attention: bool = False
    needs_keys: bool = False
    inside_block: bool = False

    @property
    def needs_recording(self) -> bool:
        """Whether it needs something of a block's attention."""
        return self.needs_attention or self.needs_keys

    def forward(self, candidates: Candidates) -> Tensor | Scored:
        """Score the candidates.

        Returns:
            (B, n) floating point; what it says of tokens that are already pruned is ignored. Or these in a `Scored`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(candidates)")

    def ranking(self) -> Ranking | None:
        """How to rank tokens in a frozen model in fewer operations than `forward`, with the weights as they are now.

        Weights may be folded into one another: `tokenprune.freeze` asks again when a parameter has changed, always
        without gradients. In a model that is compiled or exported it is asked in every pass
        (``torch.compiler.is_compiling()``), and what it folds becomes a part of that pass. ``None``, the default,
        leaves it to `forward`.
        """
        return None

    def importance(self, scores: Tensor) -> Tensor:
        """Scores (B, n) as weights that are not negative, for reductions that weight tokens with them.

        The probability of keeping a token, for a ``probabilistic`` scorer; otherwise the score itself, or 0 where that
        is negative.
        """
        return scores.sigmoid() if self.probabilistic else scores.clamp(min=0)


ScorerBuilder = Callable[[ScorerContext], Scorer]
_Builder = TypeVar("_Builder", bound=ScorerBuilder)
_BUILDERS: dict[str, ScorerBuilder] = {}


def register_scorer(name: str) -> Callable[[_Builder], _Builder]:
    """Decorate a function that builds a scorer, to make it available as ``scorer=name``."""

    def add(builder: _Builder) -> _Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def scorer_builder(scorer: str | ScorerBuilder) -> ScorerBuilder:
    """The builder of a scorer given by name, or the one that was given.

    Raises:
        ValueError: No scorer has that name.
        TypeError: It is neither a name nor a callable.
    """
    if isinstance(scorer, str):
        if scorer not in _BUILDERS:
            raise ValueError(f"scorer={scorer!r} is unknown; choose from {sorted(_BUILDERS)}, or pass a callable.")
        return _BUILDERS[scorer]
    if isinstance(scorer, nn.Module) or not callable(scorer):
        raise TypeError(
            f"scorer={type(scorer).__name__}: expected a name from {sorted(_BUILDERS)}, or a callable that takes a "
            "ScorerContext and returns a new Scorer for a stage."
        )
    return scorer


def scorer_name(scorer: str | ScorerBuilder) -> str | None:
    """The name under which a scorer is registered; ``None`` for a builder without one."""
    if isinstance(scorer, str):
        return scorer
    return next((name for name, builder in _BUILDERS.items() if builder is scorer), None)


def log_odds(probability: float) -> float:
    """Log p − log(1 − p), with p held within 0.001 … 0.999 so that it stays finite and trainable."""
    probability = min(max(probability, 1e-3), 1 - 1e-3)
    return math.log(probability / (1 - probability))
