"""A stage: one point in the model at which tokens are scored and pruned.

Shapes: B images, N patch tokens, m of them that reach the stage, n kept ones, K tokens of the sequence as it is,
C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import StateError
from tokenprune.pruning.budget import Counts, Threshold
from tokenprune.pruning.executions import Execution
from tokenprune.pruning.recording import Recorded
from tokenprune.pruning.reductions import Drop, Reduction, Split, check_reduced
from tokenprune.pruning.selection import Selection, compose_hosts
from tokenprune.pruning.trace import Trace
from tokenprune.scorers import Candidates, Scored, Scorer
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
        recorded: Recorded,
        threshold: Threshold | Counts | None = None,
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
            recorded: What was recorded of attention for the scorer.
            threshold: By which images keep different numbers, n of them on average; ``None`` where all keep n.
        """
        sampled = execution.trains and self.training and self.scorer.probabilistic
        if execution.keeps_all(num_keep, num_reached, probability=probability, sampled=sampled):
            return tokens, execution.pass_all(before, tokens).replace(**recorded._asdict())
        candidates = Candidates(
            patches=execution.reached(before.layout.patches(tokens), before),
            prefix=before.layout.prefix(tokens),
            keep=before.left,
            indices=before.indices,
            num_patches=trace.num_patches,
            grid=trace.grid,
            attention=None if recorded.attention is None else execution.reached(recorded.attention, before),
            keys=None if recorded.keys is None else execution.reached(recorded.keys, before),
            num_left=num_reached,
            num_keep=num_keep,
            notes=before.notes,
            lengths=None if trace.images is None else trace.images.present.sum(dim=1),
        )
        scored = self.score(candidates)
        counts = num_keep if threshold is None else threshold.num_keep(scored.scores, before.left)
        if isinstance(counts, Tensor) and isinstance(threshold, Counts):
            selection = execution.decide_up_to(scored.scores, before, counts, num_keep, sampled=sampled)
        else:
            selection = execution.decide(scored.scores, before, counts, sampled=sampled)
        if sampled and trace.images is None and not (self.reduction.looks_at_pruned or trace.restored or trace.whole):
            selection = execution.shorten(selection, before)
        selection = selection.replace(scores=scored.scores, **recorded._asdict())
        selection = selection.replace(sizes=selection.of_kept(before.sizes), notes=selection.of_kept(scored.notes))
        if not self.reduction.looks_at_pruned:
            return execution.remove(tokens, before, selection), selection
        return self._reduce(tokens, candidates.patches, before, selection, execution, trace, scored.hosts)

    def _reduce(
        self,
        tokens: Tensor,
        patches: Tensor,
        before: Selection,
        selection: Selection,
        execution: Execution,
        trace: Trace,
        hosts: Tensor | None,
    ) -> tuple[Tensor, Selection]:
        assert selection.scores is not None
        keep, pruned = selection.split(before, selection.scores.dtype)
        split = Split(patches, keep, pruned, self.scorer.importance(selection.scores), before.sizes, hosts)
        reduced = check_reduced(self.reduction(split), split, self.reduction)
        if reduced.patches is not patches:
            tokens = before.layout.with_patches(tokens, reduced.patches)
        tokens = execution.remove(tokens, before, selection)
        if reduced.summary is not None:
            tokens = selection.layout.with_summaries(tokens, reduced.summary)
            selection = selection.with_summaries(sizes(reduced.summary)[1], pruned)
        if reduced.sizes is not None:
            selection = selection.replace(sizes=selection.of_kept(reduced.sizes))
        if trace.restored and reduced.hosts is not None:
            selection = selection.replace(hosts=compose_hosts(before, reduced.hosts, trace.num_patches))
        return tokens, selection

    def score(self, candidates: Candidates) -> Scored:
        """What the scorer says of the candidates, with scores (B, m) in single precision at least.

        Raises:
            StateError: The scorer needs something of attention, and nothing was recorded.
            TypeError: The scorer gave no tensor, or one of numbers that have no order.
            ValueError: The scorer gave scores of another shape.
        """
        for needed, what, given in (
            (self.scorer.needs_attention, "attention scores", candidates.attention),
            (self.scorer.needs_keys, "keys", candidates.keys),
        ):
            if needed and given is None:
                raise StateError(
                    f"{type(self.scorer).__name__} needs {what} of the block before its stage, but was assigned "
                    "after sparsify(), so they are not recorded; pass it as tokenprune.sparsify(…, scorer=…)."
                )
        returned: Any = self.scorer(candidates)
        scored = returned if isinstance(returned, Scored) else Scored(returned)
        scores, hosts, notes = scored
        if not isinstance(scores, Tensor) or scores.is_complex():
            got = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(f"{type(self.scorer).__name__} returned {got}; expected scores, a tensor of real numbers.")
        expected = candidates.patches.shape[:2]
        for what, values in zip(Scored._fields, scored, strict=True):
            if values is None:
                continue
            if not isinstance(values, Tensor) or values.shape != expected:
                got = (
                    f"of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"as a {type(values).__name__}"
                )
                raise ValueError(
                    f"{type(self.scorer).__name__} returned {what} {got}; expected {tuple(expected)}, one for each "
                    "patch token."
                )
        if hosts is not None and hosts.dtype != torch.int64:
            raise TypeError(f"{type(self.scorer).__name__} returned hosts of {hosts.dtype}; expected torch.int64.")
        return Scored(scores.to(torch.promote_types(scores.dtype, torch.float32)), hosts, notes)
