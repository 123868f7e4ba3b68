"""Pruners: what they choose, by their formulas, and what they have to return."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenprune
from tests.helpers.vision_language import CASES
from tokenprune.pruning.language.pruners import prune, pruner_names, pruner_of
from tokenprune.scorers import Candidates
from tokenprune.scorers.informative import Informative


def embeddings(number: int = 30, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", pruner_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_pruner_keeps_k_places_and_the_same_ones_each_time(name: str, dtype: torch.dtype) -> None:
    given = embeddings().to(dtype)
    for k in (1, 2, 15, 29):
        found = pruner_of(name)(given, (5, 6), k)
        assert found.dtype == torch.int64 and found.shape == (k,)
        assert torch.equal(found, found.unique(sorted=True)) and found.min() >= 0 and found.max() < 30
        assert torch.equal(found, pruner_of(name)(given, None, k))
    assert torch.equal(prune(pruner_of(name), given, None, 30), torch.arange(30))


def test_diverse_is_the_greedy_max_min_choice() -> None:
    given = embeddings(12, 4).double()
    distance = 1 - F.cosine_similarity(given[:, None], given[None], dim=-1)
    others = [[distance[i, j] for j in range(12) if j != i] for i in range(12)]
    chosen = [max(range(12), key=lambda i: min(others[i]))]
    while len(chosen) < 7:
        left = [i for i in range(12) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i, j] for j in chosen)))
        assert pruner_of("diverse")(given, None, len(chosen)).tolist() == sorted(chosen)
    # Of two equal tokens one says all.
    doubled = torch.cat([given[:4], given[:4]])
    assert len({place % 4 for place in pruner_of("diverse")(doubled, None, 4).tolist()}) == 4


def test_informative_is_the_scorer_with_the_distance_from_the_mean() -> None:
    given = embeddings()
    importance = (given - given.mean(0)).norm(dim=1)[None]
    scores = Informative()(Candidates(given[None], given[None, :0], None, None, 30, None, attention=importance))
    assert pruner_of("informative")(given, None, 9).tolist() == sorted(scores[0].topk(9).indices.tolist())


def test_random_does_not_look_at_the_tokens() -> None:
    found = pruner_of("random")(embeddings(seed=1), None, 10)
    assert torch.equal(found, pruner_of("random")(embeddings(seed=2), None, 10))
    assert not torch.equal(found, torch.arange(10))


def test_what_a_pruner_returns_is_checked() -> None:
    given = embeddings(8)
    for returned, error, words in (
        (torch.tensor([0, 1]), ValueError, r"shape \(2,\); expected 3 different ones in 0 … 7, ascending"),
        (torch.tensor([2, 1, 0]), ValueError, "ascending"),
        (torch.tensor([0, 1, 1]), ValueError, "different"),
        (torch.tensor([0, 1, 8]), ValueError, "0 … 7"),
        (torch.tensor([-1, 1, 2]), ValueError, "0 … 7"),
        (torch.tensor([0.0, 1, 2]), TypeError, "returned torch.float32"),
        ([0, 1, 2], TypeError, "returned list"),
    ):
        with pytest.raises(error, match=words):
            prune(lambda *_, returned=returned: returned, given, None, 3)


def test_a_callable_gets_the_embeddings_the_grid_and_k() -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, int] | None, int, bool]] = []

    def first(tokens: Tensor, grid: tuple[int, int] | None, k: int) -> Tensor:
        seen.append((tuple(tokens.shape), grid, k, tokens.requires_grad))
        return torch.arange(k)

    for case in CASES:
        if case.family in ("internvl", "llava_next", "qwen3_vl"):
            model = tokenprune.sparsify(case.model(), (), 0.5, pruner=first)
            model(**case.inputs())
            assert model.tokenprune.pruner_name is None
            assert all(torch.equal(kept, torch.arange(len(kept))) for kept in model.tokenprune.trace.indices)
    square, tiled, packed = seen[:3], seen[3:6], seen[6:]
    assert square == [((9, 32), (3, 3), 4, False)] * 3
    assert [grid for _, grid, _, _ in tiled] == [None] * 3
    assert packed == [((n, 32), grid, n // 2, False) for n, grid in ((6, (3, 2)), (8, (2, 4)), (4, (2, 2)))]


def test_a_pruner_can_be_registered() -> None:
    @tokenprune.register_pruner("last of all")
    def last(tokens: Tensor, grid: tuple[int, int] | None, k: int) -> Tensor:
        return torch.arange(len(tokens) - k, len(tokens))

    case = CASES[0]
    model = tokenprune.sparsify(case.model(), (), 0.25, pruner="last of all")
    model(**case.inputs())
    assert model.tokenprune.trace.indices[0].tolist() == list(range(27, 36))
    assert model.tokenprune.language.pruner_name == "last of all"
