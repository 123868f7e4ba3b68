"""Decisions: sampled with a gradient and never revived, or the top k."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.zoo import BY_NAME
from tokenprune.pruning.sampling import sample, top_k
from tokenprune.scorers import Random


def test_samples_are_exactly_zero_or_one_and_follow_the_odds() -> None:
    probability = 0.7
    log_odds = torch.full((400, 50), probability).logit().requires_grad_()
    keep = sample(log_odds, None)
    assert torch.equal(keep, keep.round()) and keep.unique().tolist() == [0.0, 1.0]
    # 20 000 draws: the standard error is 0.003.
    assert keep.mean().item() == pytest.approx(probability, abs=0.015)


def test_the_gradient_is_that_of_the_soft_decision() -> None:
    log_odds = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    keep = sample(log_odds, None)
    (grad,) = torch.autograd.grad(keep.sum(), log_odds)
    torch.manual_seed(1)
    uniform = torch.rand_like(log_odds)
    soft = torch.sigmoid(log_odds + uniform.log() - (-uniform).log1p())
    torch.testing.assert_close(grad, soft * (1 - soft))
    assert torch.equal(keep > 0, soft > 0.5)


def test_the_noise_is_that_of_two_gumbels() -> None:
    log_odds = torch.zeros(1, 200_000)
    uniform_share = sample(log_odds + 1.5, None).mean().item()
    gumbel = -torch.log(-torch.log(torch.rand(2, 200_000)))
    # 200 000 draws: the standard error of either is 0.001.
    assert uniform_share == pytest.approx((1.5 + gumbel[0] > gumbel[1]).float().mean().item(), abs=0.006)


def test_no_token_is_revived() -> None:
    before = (torch.rand(50, 20) < 0.5).float()
    before[:, 0] = 1
    before.requires_grad_()
    log_odds = torch.full((50, 20), 5.0, requires_grad=True)
    after = sample(log_odds, before)
    assert (after <= before).all()
    grad_before, grad_odds = torch.autograd.grad(after.sum(), (before, log_odds))
    assert (grad_odds[before == 0] == 0).all(), "a token that is gone has nothing left to learn here"
    assert grad_before.abs().max() > 0


def test_the_likeliest_token_left_is_always_kept() -> None:
    before = torch.zeros(3, 5)
    before[:, 2] = 1
    log_odds = torch.full((3, 5), -50.0)
    assert sample(log_odds, None).sum(dim=1).tolist() == [1.0] * 3
    assert torch.equal(sample(log_odds, before), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_odds_stay_finite(dtype: torch.dtype) -> None:
    log_odds = torch.tensor([[1e4, -1e4, 0.0] * 2000], dtype=dtype, requires_grad=True)
    keep = sample(log_odds, None)
    keep.sum().backward()
    assert keep.isfinite().all() and log_odds.grad.isfinite().all()


def test_top_k_skips_what_is_gone_and_is_ascending() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert top_k(scores, None, 3).tolist() == [[0, 2, 4], [2, 3, 4]]
    keep = torch.tensor([[0.0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert top_k(scores, keep, 2).tolist() == [[2, 4], [2, 3]]


def test_no_token_comes_back_behind_a_stage_that_sampled() -> None:
    """A stage that ranks may be asked for more tokens than are left, in training."""
    case = BY_NAME["timm class token"]
    model = case.sparsified().train()
    model.tokenprune.stages[0].scorer.out_conv[-1].bias.data[0] = -60.0  # one is kept
    model.tokenprune.stages[1].scorer = Random()
    model(case.images())
    first, second = model.tokenprune.trace.keep
    assert (first.sum(dim=1) == 1).all() and (second <= first).all()
