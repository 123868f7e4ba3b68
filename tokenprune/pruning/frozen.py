"""A stage as serving needs it: rank, choose, gather, and nothing else.

Shapes: B images, P prefix tokens, n patch tokens that reach a stage, k of them kept, N of the whole image, Q summary
and suffix tokens, K = P + n + Q, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.pruning.frozen_sequence import FrozenSequence
from tokenprune.pruning.recording import Recorded
from tokenprune.pruning.reductions import Reduced, Split, check_reduced
from tokenprune.pruning.stage import Stage
from tokenprune.scorers import Candidates, Ranking, Scored
from tokenprune.tokens import Layout


class FrozenImage(NamedTuple):
    """What stages of a frozen model have left of the images of a pass.

    Attributes:
        num_patches: N; 0 where no stage has been reached.
        indices: (B, n), where the patch tokens that are left stand in the grid; ``None`` = all in order, or unasked.
        num_summary: How many tokens stages have added.
    """

    num_patches: int = 0
    indices: Tensor | None = None
    num_summary: int = 0


class FrozenStage:
    """What a stage does in `gather` execution where nothing reads afterwards what it has decided.

    The kept tokens go on in no particular order, unless they are asked for in that of the grid.

    Args:
        stage: The stage, whose reduction drops tokens, or makes something of them once and for all.
        layout: Of a sequence that reaches it, for the numbers of prefix and suffix tokens.
        tracked: Whether blocks behind it, or adaptations, ask which tokens are left.
        ordered: Whether the kept tokens go on in the order of the grid.
    """

    def __init__(self, stage: Stage, layout: Layout, *, tracked: bool = False, ordered: bool = False) -> None:
        self.stage = stage
        self.num_prefix, self.num_suffix = layout.num_prefix, layout.num_suffix
        self.tracked, self.ordered = tracked, ordered
        self.forget()

    def forget(self) -> None:
        """Forget what was made of weights that have been replaced."""
        self._weights: tuple[nn.Parameter, ...] = ()
        self._ranking: Ranking | None = None
        self._ranked_with: tuple[Any, ...] | None = None
        self._sequence: FrozenSequence | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("stage", "num_prefix", "num_suffix", "tracked", "ordered")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    @property
    def needs_recording(self) -> bool:
        """Whether it needs something of the attention of the block before it."""
        return self.stage.scorer.needs_recording

    @property
    def num_summary(self) -> int:
        """How many tokens it adds."""
        return self.stage.reduction.num_summary

    def num_patches(self, tokens: Tensor, num_summary: int) -> int:
        """n, of a sequence (B, K, C) with so many summary tokens."""
        return int(tokens.shape[1]) - self.num_prefix - self.num_suffix - num_summary

    def prune(
        self,
        tokens: Tensor,
        number: int,
        num_keep: int,
        *,
        indices: Tensor | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        recorded: Recorded,
    ) -> tuple[Tensor, Tensor | None]:
        """What goes on of a sequence.

        Args:
            tokens: (B, K, C).
            number: n.
            num_keep: k.
            indices: (B, n), where the patch tokens that reach the stage stand in the grid; ``None`` = all in order.
            num_patches: N.
            grid: Rows and columns of the image, if known.
            recorded: What was recorded of attention for the scorer.

        Returns:
            (B, P + k + Q, C), with the summary tokens that the reduction adds, and where its patch tokens stand in the
            grid, if anybody may ask.
        """
        ranking = self._current(tokens)
        if ranking is not None:
            kept, chosen = self._ranked(ranking, tokens, number, num_keep)
        else:
            prefix, patches = tokens[:, : self.num_prefix], tokens.narrow(1, self.num_prefix, number)
            candidates = Candidates(
                patches=patches, prefix=prefix, keep=None, indices=indices, num_patches=num_patches, grid=grid,
                num_left=number, num_keep=num_keep, **recorded._asdict(),
            )  # fmt: skip
            kept, chosen = self._scored(candidates, tokens, number, num_keep)
        if chosen is None:
            return kept, None
        return kept, chosen if indices is None else indices.gather(1, chosen)

    def _ranked(self, ranking: Ranking, tokens: Tensor, number: int, num_keep: int) -> tuple[Tensor, Tensor | None]:
        """What goes on where a ranking chooses, and the chosen ones (B, k) of so many patch tokens, if asked for."""
        sequence = self._sequence_of(tokens, number, num_keep)
        ranks = sequence.ranks(ranking, tokens)  # (B·K,)
        if not (self.tracked or self.ordered):
            return sequence.best(tokens, ranks), None
        chosen = sequence.positions(ranks)  # (B, k)
        if self.ordered:
            chosen = chosen.sort(dim=1).values
        return sequence.gather(tokens, chosen), chosen - self.num_prefix

    def _scored(self, candidates: Candidates, tokens: Tensor, number: int, num_keep: int) -> tuple[Tensor, Tensor]:
        """The same where scores themselves are asked for."""
        patches, end = candidates.patches, self.num_prefix + number
        scored = self.stage.score(candidates)
        chosen = scored.scores.topk(num_keep, dim=1, sorted=False).indices  # (B, k)
        if self.ordered:
            chosen = chosen.sort(dim=1).values
        summary = None
        if self.stage.reduction.looks_at_pruned:
            reduced = self._reduced(patches, scored, chosen)
            summary = reduced.summary
            if reduced.patches is not patches:
                tokens = torch.cat([candidates.prefix, reduced.patches, tokens[:, end:]], dim=1)
        kept = self._sequence_of(tokens, number, num_keep).gather(tokens, chosen + self.num_prefix)
        if summary is not None:
            end = kept.shape[1] - self.num_suffix
            kept = torch.cat([kept[:, :end], summary, kept[:, end:]], dim=1)
        return kept, chosen

    def _current(self, tokens: Tensor) -> Ranking | None:
        """The scorer's ranking with its weights as they are now; ``None`` where scores themselves are asked for."""
        scorer = self.stage.scorer
        if self.stage.reduction.looks_at_pruned:
            return None
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return scorer.ranking()  # a part of what is compiled, and of weights as they are in each pass
        version = 0
        for weight in self._weights:
            version += weight._version
        ranked_with = scorer, tokens.device, tokens.dtype, version
        if ranked_with != self._ranked_with:
            self._weights = tuple(scorer.parameters())
            with torch.inference_mode(False), torch.no_grad():  # a later pass may ask for gradients
                self._ranking = scorer.ranking()
            self._ranked_with = (*ranked_with[:3], sum(weight._version for weight in self._weights))
        return self._ranking

    def _reduced(self, patches: Tensor, scored: Scored, chosen: Tensor) -> Reduced:
        """What the reduction makes of the patch tokens (B, n, C), of which (B, k) were chosen."""
        scores = scored.scores
        keep = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        split = Split(patches, keep, 1 - keep, self.stage.scorer.importance(scores), None, scored.hosts)
        reduced: Reduced = self.stage.reduction(split)
        return check_reduced(reduced, split, self.stage.reduction)

    def _sequence_of(self, tokens: Tensor, number: int, num_keep: int) -> FrozenSequence:
        """What is known of sequences such as (B, K, C), of which so many of so many patch tokens go on."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return FrozenSequence(self.num_prefix, tokens, number, num_keep, lasting=False)
        if self._sequence is None or not self._sequence.fits(tokens, number, num_keep):
            self._sequence = FrozenSequence(self.num_prefix, tokens, number, num_keep, lasting=True)
        return self._sequence


class CutStage(FrozenStage):
    """Cuts the sequence off at the number of tokens that the stage keeps, whichever they are.

    That is the speed there is to have: what choosing and gathering tokens cost comes on top.
    """

    needs_recording, num_summary = False, 0

    def prune(self, tokens: Tensor, number: int, num_keep: int, **others: Any) -> tuple[Tensor, Tensor | None]:
        end, indices = self.num_prefix + num_keep, None
        if self.tracked:
            indices = torch.arange(num_keep, device=tokens.device).expand(tokens.shape[0], -1)
        if not self.num_suffix:
            return tokens.narrow(1, 0, end).contiguous(), indices
        return torch.cat([tokens[:, :end], tokens[:, -self.num_suffix :]], dim=1), indices
