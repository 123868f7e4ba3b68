"""Fast paths that are fitted to the parts that they stand in for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.hierarchies import KEEP_RATIO, RESPONSE_NORM, SWIN, Hierarchy
from tests.helpers.zoo import BY_NAME


def fresh(case: Hierarchy) -> nn.Module:
    return tokenprune.sparsify(case.model(), keep_ratio=KEEP_RATIO, pruned="fast")


@torch.no_grad()
def test_a_fitted_path_is_the_least_squares_solution() -> None:
    model, images = fresh(SWIN), SWIN.images(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares = tokenprune.fit_fast_paths(model, images, ridge=0.0)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed and all(".paths.0.linear." in name for name in changed)
    block, path = model.tokenprune.backbone.blocks[3], model.tokenprune.stages[0].reduction.paths[0]
    given: list[Tensor] = []
    block.norm2.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    block.mlp.register_forward_hook(lambda module, args, output: given.append(output))
    with tokenprune.dense(model):
        SWIN.run(model, images)
    x, y = (one.reshape(-1, one.shape[-1]).double() for one in given)
    inputs = torch.cat([path.norm(x.float()).double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(inputs, y).solution
    fitted = torch.cat([path.linear.weight.T, path.linear.bias[None]]).double()
    # The norm's outputs sum to 0, so that weights are free along one direction; what they give is not.
    torch.testing.assert_close(inputs @ fitted, inputs @ expected, rtol=1e-3, atol=1e-3)
    error, variance = (inputs @ expected - y).square().sum(), (y - y.mean(0)).square().sum()
    assert shares[0] == pytest.approx(float(1 - error / variance), abs=1e-3) and 0 < shares[0] <= 1


@pytest.mark.parametrize("case", [SWIN, RESPONSE_NORM], ids=str)
@torch.no_grad()
def test_fitted_paths_are_nearer_to_the_dense_model(case: Hierarchy) -> None:
    model, images = fresh(case), case.images(8)
    with tokenprune.dense(model):
        dense = model(images)
    distance = []
    for _ in range(2):
        torch.manual_seed(0)
        distance.append((model(images) - dense).square().mean())
        tokenprune.fit_fast_paths(model, images.split(3))
    assert distance[1] < distance[0]
    assert not model.training and model.tokenprune.enabled


def test_what_cannot_be_fitted() -> None:
    model = BY_NAME["timm class token"].sparsified()
    with pytest.raises(tokenprune.StateError, match="no fast paths"):
        tokenprune.fit_fast_paths(model, torch.zeros(1, 3, 48, 48))
    with pytest.raises(tokenprune.StateError, match="not sparsified"):
        tokenprune.fit_fast_paths(SWIN.model(), SWIN.images())
    model = fresh(SWIN)
    with pytest.raises(ValueError, match="there are none"):
        tokenprune.fit_fast_paths(model, [])
    with pytest.raises(ValueError, match="ridge=-1 is negative"):
        tokenprune.fit_fast_paths(model, SWIN.images(), ridge=-1)


def test_predictors_are_calibrated_alone_where_paths_require_no_gradient() -> None:
    model = fresh(SWIN)
    paths = [parameter for stage in model.tokenprune.stages for parameter in stage.reduction.parameters()]
    for parameter in paths:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in model.tokenprune.parameters()]
    images = [SWIN.images(8) for _ in range(4)]
    report = tokenprune.calibrate(model, images, steps=3, validation_batches=1, progress=False)
    changed = {id(one) for one, old in zip(model.tokenprune.parameters(), before, strict=True) if not one.equal(old)}
    assert report.steps == 3 and len(paths) > 3
    assert not changed & set(map(id, paths)) and bool(changed) == bool(report.step_left)
