"""Scorers: the predictor's formula and parameters, the baselines, and the way to add one's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import tokenprune
from tests.helpers.zoo import BY_NAME, NUM_PATCHES
from tokenprune.scorers import (
    Candidates,
    Predictor,
    PredictorLinear,
    PredictorSlim,
    Random,
    Rows,
    Scorer,
    ScorerContext,
    Static,
    scorer_builder,
)


def candidates(keep: torch.Tensor | None = None, indices: torch.Tensor | None = None, dim: int = 16) -> Candidates:
    length = NUM_PATCHES if indices is None else indices.shape[1]
    return Candidates(torch.randn(2, length, dim), torch.randn(2, 1, dim), keep, indices, NUM_PATCHES, (6, 6))


def test_predictor_is_the_papers_formula() -> None:
    predictor = Predictor(16, 0.7)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # wider, and log-softmax rounds to 0, where nothing ranks
    keep = (torch.rand(2, NUM_PATCHES) < 0.5).float()
    given = candidates(keep)
    weights = dict(predictor.named_parameters())

    x = F.layer_norm(given.patches, (16,), weights["in_conv.0.weight"], weights["in_conv.0.bias"])
    z = F.gelu(x @ weights["in_conv.1.weight"].T + weights["in_conv.1.bias"])
    local, other = z[..., :8], z[..., 8:]
    total = torch.stack([(other[b] * keep[b, :, None]).sum(0) / keep[b].sum() for b in range(2)])
    y = torch.cat([local, total[:, None].expand(-1, NUM_PATCHES, -1)], dim=-1)
    for index in (0, 2):
        y = F.gelu(y @ weights[f"out_conv.{index}.weight"].T + weights[f"out_conv.{index}.bias"])
    pi = F.log_softmax(y @ weights["out_conv.4.weight"].T + weights["out_conv.4.bias"], dim=-1)
    torch.testing.assert_close(predictor(given), pi[..., 0] - pi[..., 1], rtol=1e-5, atol=1e-4)
    # Ranking by the difference is ranking by the keep log-probability, as the paper does.
    assert torch.equal(predictor(given).argsort(dim=1), pi[..., 0].argsort(dim=1))


def test_the_slim_predictor_is_its_formula() -> None:
    predictor = PredictorSlim(16, 0.7)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    keep = (torch.rand(2, NUM_PATCHES) < 0.5).float()
    given = candidates(keep)
    weights = dict(predictor.named_parameters())

    x = F.layer_norm(given.patches, (16,), weights["norm.weight"], weights["norm.bias"])
    z = (x @ weights["inner.weight"].T + weights["inner.bias"]).clamp(min=0)
    mean = torch.stack([(z[b] * keep[b, :, None]).sum(0) / keep[b].sum() for b in range(2)])
    shared = mean @ weights["mean.weight"].T + weights["mean.bias"]
    hidden = (z @ weights["local.weight"].T + shared[:, None]).clamp(min=0)
    expected = (hidden @ weights["last.weight"].T + weights["last.bias"])[..., 0]
    torch.testing.assert_close(predictor(given), expected, rtol=1e-5, atol=1e-5)


def test_the_linear_predictor_is_its_formula() -> None:
    predictor = PredictorLinear(16, 0.7)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given, weight = candidates(), predictor.linear.weight[0]
    centred = given.patches - given.patches.mean(dim=2, keepdim=True)
    expected = centred @ weight / (centred.square().mean(dim=2) + 1e-5).sqrt() + predictor.linear.bias
    torch.testing.assert_close(predictor(given), expected, rtol=1e-5, atol=1e-5)


def test_what_the_slim_predictor_costs() -> None:
    width, inner = 384, 48
    sizes = {name: parameter.numel() for name, parameter in PredictorSlim(width).named_parameters()}
    per_token = sizes["inner.weight"] + sizes["local.weight"] + sizes["last.weight"]
    assert per_token == width * inner + inner**2 + inner  # and those of the mean once an image
    official = sum(p.numel() for name, p in Predictor(width).named_parameters() if "weight" in name and p.dim() == 2)
    assert 11 < official / per_token < 12.5


@pytest.mark.parametrize("build", [Predictor, PredictorSlim, PredictorLinear])
def test_a_short_ranking_ranks_as_scores_do(build: type[Scorer]) -> None:
    scorer = build(16, 0.7)  # type: ignore[call-arg]
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given, ranking = candidates(), scorer.ranking()
    assert ranking is not None and Static((6, 6)).ranking() is None
    batch, number, _ = given.patches.shape
    others, shares = torch.zeros(number + 2), torch.full((1, number + 2), 1 / number)
    others[[0, -1]], shares[:, [0, -1]] = -torch.inf, 0
    sequences = F.pad(given.patches, (0, 0, 1, 1), value=9)  # a prefix and a suffix token
    with torch.no_grad():
        scores = scorer(given)
        ranks = ranking(Rows(sequences.flatten(0, 1), batch, others.repeat(batch), shares)).view(batch, -1)
        alone = [ranking(Rows(one, 1, others, shares)) for one in sequences]
        compiled = ranking(Rows(sequences, batch, others, shares))
    torch.testing.assert_close(ranks, torch.stack(alone), rtol=0, atol=1e-4)
    torch.testing.assert_close(ranks, compiled, rtol=0, atol=1e-4)
    assert ranks[:, [0, -1]].isneginf().all()
    short = ranks[:, 1:-1]
    assert isinstance(scores, torch.Tensor)
    difference = scores - short  # the same number for all tokens: the last bias, which is left out
    torch.testing.assert_close(difference, difference[:1, :1].expand_as(difference), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "millions"), [(384, 0.724), (512, 1.284), (768, 2.885)])
def test_parameters_of_three_predictors(width: int, millions: float) -> None:
    count = 3 * sum(parameter.numel() for parameter in Predictor(width).parameters())
    assert round(count / 1e6, 3) == millions


def test_a_fresh_predictor_keeps_the_stages_own_share() -> None:
    given = Candidates(torch.randn(4, 50, 64), torch.zeros(4, 0, 64), None, None, 50, None)
    for fresh in (Predictor(64, 0.7), PredictorSlim(64, 0.7)):
        assert torch.sigmoid(fresh(given)).mean().item() == pytest.approx(0.7, abs=0.01)
    odds = Predictor(64, 0.7)(given)
    assert torch.sigmoid(odds).mean().item() == pytest.approx(0.7, abs=0.01)
    assert math.isfinite(Predictor(64, 1.0).out_conv[-1].bias[0].item())


def test_a_width_that_cannot_be_halved_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="embed_dim=30"):
        Predictor(30)


def test_random_positions_differ_between_images_and_calls() -> None:
    scorer, given = Random(), candidates()
    first, second = scorer(given), scorer(given)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


@pytest.mark.parametrize("scorer", [Random(), Static((6, 6), 0.5)], ids=["random", "static"])
def test_random_and_static_look_scores_up_by_position(scorer: tokenprune.Scorer) -> None:
    whole = candidates()
    indices = torch.stack([torch.randperm(NUM_PATCHES)[:10] for _ in range(2)])
    left = whole._replace(patches=whole.patches[:, :10], indices=indices)
    torch.manual_seed(4)
    of_all = scorer(whole)
    torch.manual_seed(4)
    assert torch.equal(scorer(left), of_all.gather(1, indices))


def test_static_positions_are_the_same_for_every_image_and_learned() -> None:
    case = BY_NAME["timm class token"]
    model = tokenprune.sparsify(case.model(), (2, 4), 0.6, scorer="static")
    with torch.no_grad():
        model(case.images())
    indices = model.tokenprune.trace.indices[1]
    assert torch.equal(indices[0], indices[1]) and torch.equal(indices[0], indices[2])
    model.train()(case.images()).square().sum().backward()
    assert all(stage.scorer.log_odds.grad.abs().max() > 0 for stage in model.tokenprune.stages)


def test_static_resizes_its_map_to_another_grid() -> None:
    case = BY_NAME["timm non-square, dynamic size"]
    model = tokenprune.sparsify(case.model(), (2, 4), 0.6, scorer="static")
    with torch.no_grad():
        model(case.images())
    assert model.tokenprune.trace.grid == (4, 8)
    assert [kept.shape[1] for kept in model.tokenprune.trace.indices] == [19, 11]
    unknown = candidates()._replace(num_patches=20, grid=None)
    with pytest.raises(ValueError, match="whose grid is unknown"):
        Static((6, 6))(unknown)


@pytest.mark.parametrize("scorer", ["random", "static", "cls_attention"])
def test_mask_equals_gather_for_other_scorers(scorer: str) -> None:
    case = BY_NAME["timm no class token, average"]
    model, images = case.sparsified(scorer=scorer), case.images()
    with torch.no_grad():
        torch.manual_seed(1)
        gathered, kept = model(images), model.tokenprune.trace.keep
        model.tokenprune.execution = "mask"
        torch.manual_seed(1)
        masked = model(images)
    assert torch.equal(kept[1], model.tokenprune.trace.keep[1])
    torch.testing.assert_close(masked, gathered, rtol=0, atol=1e-4)


def test_random_keeps_exact_counts_in_training() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified(scorer="random").train()
    model(case.images()).sum().backward()
    assert [keep.sum(dim=1).tolist() for keep in model.tokenprune.trace.keep] == [[21.0] * 3, [12.0] * 3]


def test_scorers_by_name_or_by_hand() -> None:
    with pytest.raises(ValueError, match=r"scorer='best' is unknown; choose from \['cls_attention', 'informative', "):
        scorer_builder("best")
    with pytest.raises(TypeError, match="a callable that takes a ScorerContext"):
        scorer_builder(Random())  # type: ignore[arg-type]
    case = BY_NAME["timm class token"]
    with pytest.raises(TypeError, match=r"built a Linear; expected a tokenprune\.Scorer"):
        tokenprune.sparsify(case.model(), scorer=lambda context: torch.nn.Linear(1, 1))
    seen: list[ScorerContext] = []

    def build(context: ScorerContext) -> Random:
        seen.append(context)
        return Random()

    tokenprune.sparsify(case.model(), (2, 4), (0.5, 0.25), scorer=build)
    assert seen == [ScorerContext(32, 0.5, (6, 6))] * 2


def test_a_wrong_shape_of_scores_is_stated() -> None:
    class Wrong(tokenprune.Scorer):
        def forward(self, candidates: Candidates) -> torch.Tensor:
            return candidates.patches

    case = BY_NAME["timm class token"]
    model = tokenprune.sparsify(case.model(), scorer=lambda context: Wrong())
    with pytest.raises(ValueError, match=r"Wrong returned scores of shape \(3, 36, 32\); expected \(3, 36\)"):
        model(case.images())
