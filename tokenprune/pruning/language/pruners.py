"""Pruners: which of an image's tokens go on, by their embeddings alone, and the table of pruners by name.

Shapes: N tokens of an image, k of them that are kept, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.functional import compute_dtype
from tokenprune.scorers import Candidates
from tokenprune.scorers.informative import Informative

Pruner = Callable[[Tensor, tuple[int, int] | None, int], Tensor]
"""``pruner(embeddings, grid, k)``: of (N, C) embeddings of an image, on a grid of (height, width) tokens or ``None``
where there is none, the positions of the ``k`` that go on: (k,) int64, ascending."""

_Pruner = TypeVar("_Pruner", bound=Pruner)
_PRUNERS: dict[str, Pruner] = {}


def register_pruner(name: str) -> Callable[[_Pruner], _Pruner]:
    """Decorate a pruner, to make it available as ``pruner=name``."""

    def add(pruner: _Pruner) -> _Pruner:
        _PRUNERS[name] = pruner
        return pruner

    return add


def pruner_names() -> tuple[str, ...]:
    """The names of all registered pruners."""
    return tuple(_PRUNERS)


def pruner_of(pruner: str | Pruner) -> Pruner:
    """The pruner of a name, or the one that was given.

    Raises:
        ValueError: None has that name.
        TypeError: It is neither a name nor a callable.
    """
    if isinstance(pruner, str):
        if pruner not in _PRUNERS:
            raise ValueError(f"pruner={pruner!r} is unknown; choose from {sorted(_PRUNERS)}, or pass a callable.")
        return _PRUNERS[pruner]
    if isinstance(pruner, type) or not callable(pruner):
        raise TypeError(
            f"pruner={pruner!r}: expected a name from {sorted(_PRUNERS)}, or a callable pruner(embeddings, grid, k) "
            "that returns k positions."
        )
    return pruner


def pruner_name(pruner: Pruner) -> str | None:
    """The name under which a pruner is registered; ``None`` for one without."""
    return next((name for name, one in _PRUNERS.items() if one is pruner), None)


def prune(pruner: Pruner, embeddings: Tensor, grid: tuple[int, int] | None, k: int) -> Tensor:
    """The positions (k,) that a pruner chooses.

    Raises:
        TypeError: It did not return a tensor of int64.
        ValueError: It did not return k different positions in ascending order.
    """
    number = embeddings.shape[0]
    if k >= number:
        return torch.arange(number, device=embeddings.device)
    chosen = pruner(embeddings.detach(), grid, k)
    name = pruner_name(pruner) or getattr(pruner, "__name__", type(pruner).__name__)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.int64:
        kind = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"the pruner {name} returned {kind}; expected a tensor of int64 positions, of shape ({k},).")
    chosen = chosen.to(embeddings.device)
    fits = chosen.shape == (k,) and bool((chosen[1:] > chosen[:-1]).all()) and int(chosen[0]) >= 0
    if not fits or int(chosen[-1]) >= number:
        raise ValueError(
            f"the pruner {name} returned positions of shape {tuple(chosen.shape)}; expected {k} different ones in "
            f"0 … {number - 1}, ascending."
        )
    return chosen


@register_pruner("random")
def random(embeddings: Tensor, grid: tuple[int, int] | None, k: int) -> Tensor:
    """The baseline: places that are drawn once for each number of tokens, so that every step of a generation agrees."""
    places = torch.randperm(embeddings.shape[0], generator=torch.Generator().manual_seed(0))[:k]
    return places.sort().values.to(embeddings.device)


@register_pruner("informative")
def informative(embeddings: Tensor, grid: tuple[int, int] | None, k: int) -> Tensor:
    """Importance × novelty × isolation, as the scorer of that name (`Informative`).

    Deviation: embeddings come without attention, so importance is the distance from the mean of the image's tokens.
    """
    tokens = embeddings.to(compute_dtype(embeddings)).unsqueeze(0)  # (1, N, C)
    importance = (tokens - tokens.mean(dim=1, keepdim=True)).norm(dim=-1)
    candidates = Candidates(tokens, tokens[:, :0], None, None, embeddings.shape[0], grid, attention=importance)
    return cast(Tensor, Informative()(candidates))[0].topk(k).indices.sort().values


@register_pruner("diverse")
def diverse(embeddings: Tensor, grid: tuple[int, int] | None, k: int) -> Tensor:
    """The greedy solution of the max-min diversity problem on cosine distances.

    DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175, algorithm 1): first
    the token whose nearest neighbour is farthest, then, k − 1 times, the one whose smallest distance to those chosen so
    far is largest.
    """
    units = F.normalize(embeddings.to(compute_dtype(embeddings)), dim=-1)
    distance = 1 - units @ units.T  # (N, N)
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(dim=1)  # (N,) to the nearest other token
    chosen: list[Tensor] = []
    for number in range(k):
        one = nearest.argmax()
        chosen.append(one)
        nearest = torch.minimum(nearest, distance[one]) if number else distance[one].clone()
        nearest[one] = -torch.inf
    return torch.stack(chosen).sort().values
