"""The sequences of one shape that reach a stage of a frozen model, ranked and gathered.

Shapes: B images, P prefix tokens, n patch tokens that reach the stage, k of them kept, Q tokens behind them,
K = P + n + Q, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.scorers import Ranking, Rows


class FrozenSequence:
    """Sequences of one shape, and which of the tokens of all images go on, where these stand one below the other.

    Args:
        num_prefix: P.
        tokens: (B, K, C).
        number: n.
        num_keep: k.
        lasting: Whether it is for passes to come, too, so that one tensor is filled again and again with the numbers of
            the rows that go on. Compiled code would take it for a constant, and autograd would remember it.
    """

    def __init__(self, num_prefix: int, tokens: Tensor, number: int, num_keep: int, *, lasting: bool) -> None:
        batch, length, _ = tokens.shape
        self._num_keep, self._num_left, self._checked = num_keep, length - number + num_keep, not lasting
        num_behind = length - num_prefix - number
        around = num_prefix, num_behind
        self._others = F.pad(tokens.new_zeros(number), around, value=-torch.inf)  # (K,)
        if not torch.compiler.is_compiling():
            self._others = self._others.repeat(batch)
        self._shares = F.pad(tokens.new_full((1, number), 1 / number), around)
        everything = torch.arange(batch * length, device=tokens.device).view(batch, length)
        self._first, self._prefix = everything[:, :1], everything[:, :num_prefix]
        self._suffix = everything[:, length - num_behind :]
        self._filled: Tensor | None = None
        if lasting:
            self._for = self._fitting(tokens, number, num_keep)
            filled = torch.cat([self._prefix, everything[:, :num_keep], self._suffix], dim=1)
            self._filled, self._middle = filled.view(-1), filled.narrow(1, num_prefix, num_keep)
            self._of_one = self._middle[0]
            self._values = tokens.new_empty(num_keep)

    @staticmethod
    def _fitting(tokens: Tensor, number: int, num_keep: int) -> tuple[Any, ...]:
        return tokens.shape, number, num_keep, tokens.device, tokens.dtype, torch.is_inference_mode_enabled()

    def fits(self, tokens: Tensor, number: int, num_keep: int) -> bool:
        """Whether it is for such a sequence."""
        return self._for == self._fitting(tokens, number, num_keep)

    def ranks(self, ranking: Ranking, tokens: Tensor) -> Tensor:
        """(B·K,), or (B, K) in what a compiler makes: how the tokens (B, K, C) rank, with −inf for those of no patch.

        Raises:
            ValueError: The ranking gives something else.
        """
        batch, _, width = tokens.shape
        given = tokens if torch.compiler.is_compiling() else tokens.reshape(-1, width)
        ranks = ranking(Rows(given, batch, self._others, self._shares))
        if not self._checked:
            if ranks.shape != self._others.shape or not ranks[self._others < 0].isneginf().all():
                raise ValueError(
                    f"a ranking returned numbers of shape {tuple(ranks.shape)}; expected {tuple(self._others.shape)}, "
                    "with −inf for tokens that are no patch tokens: add rows.others to them."
                )
            self._checked = True
        return ranks

    def positions(self, ranks: Tensor) -> Tensor:
        """(B, k), where in the sequence the tokens are that rank highest."""
        ranks = ranks if ranks.dim() == 2 else ranks.view(self._first.shape[0], -1)
        return ranks.topk(self._num_keep, dim=1, sorted=False).indices

    def best(self, tokens: Tensor, ranks: Tensor) -> Tensor:
        """(B, P + k + Q, C), of the sequence (B, K, C) the patch tokens that rank highest, and all others."""
        if self._filled is None or tokens.shape[0] > 1:
            return self.gather(tokens, self.positions(ranks))
        if self._values.dtype != ranks.dtype:
            self._values = ranks.new_empty(self._num_keep)
        torch.topk(ranks, self._num_keep, sorted=False, out=(self._values, self._of_one))
        return tokens.index_select(1, self._filled)

    def gather(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The same of chosen ones (B, k), positions in the sequence."""
        if self._filled is None:
            filled = torch.cat([self._prefix, chosen + self._first, self._suffix], dim=1).flatten()
        else:
            torch.add(chosen, self._first, out=self._middle)
            filled = self._filled
            if tokens.shape[0] == 1:
                return tokens.index_select(1, filled)
        return tokens.reshape(-1, tokens.shape[2]).index_select(0, filled).view(-1, self._num_left, tokens.shape[2])
