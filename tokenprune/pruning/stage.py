"""A stage: one point in the model at which tokens are scored and pruned.

Shapes: B images, N patch tokens, m of them that reach the stage, n kept ones, K tokens of the sequence as it is,
C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import StateError
from tokenprune.pruning.budget import Threshold
from tokenprune.pruning.executions import Execution
from tokenprune.pruning.reductions import Drop, Reduction, Split, check_reduced
from tokenprune.pruning.selection import Selection, compose_hosts
from tokenprune.pruning.trace import Trace
from tokenprune.scorers import Candidates, Scorer
from tokenprune.tokens import sizes


class Stage(nn.Module):
    """Scores the patch tokens in front of one block, and says what becomes of those that are pruned.

    Attributes:
        scorer: What gives the scores; replace or train it freely.
        reduction: What becomes of pruned tokens.
    """

    def __init__(self, scorer: Scorer, reduction: Reduction | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.reduction = Drop() if reduction is None else reduction

    def prune(
        self,
        tokens: Tensor,
        before: Selection,
        execution: Execution,
        trace: Trace,
        *,
        num_keep: int,
        num_reached: int,
        probability: float,
        attention: Tensor | None,
        threshold: Threshold | None = None,
    ) -> tuple[Tensor, Selection]:
        """Score, decide and apply: the sequence that goes on, and the selection behind the stage.

        Args:
            tokens: The sequence (B, K, C) that reaches the stage.
            before: What has been decided on it.
            execution: How the decision is carried out.
            trace: The record of the pass, for what is known of the images.
            num_keep: n, how many patch tokens to keep of each image, where decisions are not sampled.
            num_reached: m, how many the stage before has kept; N in front of the first one.
            probability: The fraction that is to be kept of those that reach the stage.
            attention: (B, m), what each of them received in the block before; ``None`` where it was not recorded.
            threshold: By which images keep different numbers, n of them on average; ``None`` where all keep n.
        """
        sampled = execution.trains and self.training and self.scorer.probabilistic
        if execution.keeps_all(num_keep, num_reached, probability=probability, sampled=sampled):
            return tokens, execution.pass_all(before, tokens).replace(attention=attention)
        candidates = Candidates(
            patches=execution.reached(before.layout.patches(tokens), before),
            prefix=before.layout.prefix(tokens),
            keep=before.left,
            indices=before.indices,
            num_patches=trace.num_patches,
            grid=trace.grid,
            attention=None if attention is None else execution.reached(attention, before),
        )
        scores = self.score(candidates)
        counts = num_keep if threshold is None else threshold.num_keep(scores, before.left)
        selection = execution.decide(scores, before, counts, sampled=sampled)
        selection = selection.replace(scores=scores, attention=attention)
        if not self.reduction.looks_at_pruned:
            return execution.remove(tokens, before, selection), selection
        return self._reduce(tokens, candidates.patches, before, selection, execution, trace)

    def _reduce(
        self,
        tokens: Tensor,
        patches: Tensor,
        before: Selection,
        selection: Selection,
        execution: Execution,
        trace: Trace,
    ) -> tuple[Tensor, Selection]:
        assert selection.scores is not None
        keep, pruned = selection.split(before, selection.scores.dtype)
        split = Split(patches, keep, pruned, self.scorer.importance(selection.scores))
        reduced = check_reduced(self.reduction(split), split, self.reduction)
        if reduced.patches is not patches:
            tokens = before.layout.with_patches(tokens, reduced.patches)
        tokens = execution.remove(tokens, before, selection)
        if reduced.summary is not None:
            tokens = selection.layout.with_summaries(tokens, reduced.summary)
            selection = selection.with_summaries(sizes(reduced.summary)[1], pruned)
        if trace.restored and reduced.hosts is not None:
            selection = selection.replace(hosts=compose_hosts(before, reduced.hosts, trace.num_patches))
        return tokens, selection

    def score(self, candidates: Candidates) -> Tensor:
        """The scores (B, m) of the candidates, in single precision at least.

        Raises:
            StateError: The scorer needs attention scores, and none were recorded.
            TypeError: The scorer gave no tensor, or one of numbers that have no order.
            ValueError: The scorer gave scores of another shape.
        """
        if self.scorer.needs_attention and candidates.attention is None:
            raise StateError(
                f"{type(self.scorer).__name__} needs attention scores of the block before its stage, but was assigned "
                "after sparsify(), so they are not recorded; pass it as tokenprune.sparsify(…, scorer=…)."
            )
        scores: Any = self.scorer(candidates)
        if not isinstance(scores, Tensor) or scores.is_complex():
            got = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(f"{type(self.scorer).__name__} returned {got}; expected scores, a tensor of real numbers.")
        expected = candidates.patches.shape[:2]
        if scores.shape != expected:
            raise ValueError(
                f"{type(self.scorer).__name__} returned scores of shape {tuple(scores.shape)}; "
                f"expected {tuple(expected)}, one for each patch token."
            )
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
