"""Official checkpoints of hierarchies: the same logits as the official inference, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.official_hierarchies import (
    CLASSES,
    State,
    convnext_state,
    infer_convnext,
    infer_swin,
    swin_state,
)
from tests.helpers.tolerances import OFFICIAL
from tokenprune import CheckpointError, load_dynamicvit

Inference = Callable[[State, Tensor, tuple[float, ...]], tuple[Tensor, list[Tensor]]]
FAMILIES = {"DynamicConvNeXt": (convnext_state, infer_convnext), "DynamicSwin": (swin_state, infer_swin)}
every_family = pytest.mark.parametrize(("make", "infer"), FAMILIES.values(), ids=FAMILIES)


def images() -> Tensor:
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(4))


@every_family
@pytest.mark.parametrize("keep_ratio", [0.7, 0.9, (0.5, 0.4, 0.2)], ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_official_inference(
    make: Callable[[], State], infer: Inference, keep_ratio: float | tuple[float, ...]
) -> None:
    state = make()
    model = load_dynamicvit({"model": state}, keep_ratio=keep_ratio)
    ratios = (
        keep_ratio if isinstance(keep_ratio, tuple) else tuple(round(keep_ratio - step, 6) for step in (0, 0.2, 0.4))
    )
    assert model.tokenprune.keep_ratio == pytest.approx(ratios)
    expected, kept = infer(state, images(), ratios)
    logits = model(images())
    assert logits.shape == (3, CLASSES) and (logits - expected).abs().max() <= OFFICIAL * expected.abs().max()
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.indices, kept, strict=True))
    assert len({tuple(row.tolist()) for row in kept[-1]}) > 1, "every image keeps the same positions"
    assert not model.training and model.tokenprune.plan.stages == (4, 5, 6) and model.tokenprune.pruned == "fast"


@every_family
def test_every_weight_is_loaded_or_none(make: Callable[[], State], infer: Inference) -> None:
    state = make()
    name = next(name for name in state if "score_predictor.1.out_conv.4.weight" in name)
    with pytest.raises(CheckpointError) as caught:
        load_dynamicvit({key: tensor for key, tensor in state.items() if key != name})
    assert caught.value.missing == ("tokenprune.stages.1.scorer.out_conv.4.weight",)
    with pytest.raises(CheckpointError) as caught:
        load_dynamicvit({**state, "stages.2.0.other": torch.zeros(1), "layers.2.blocks.0.other": torch.zeros(1)})
    assert len(caught.value.unexpected) == 2
    with pytest.raises(CheckpointError, match=r"has shape \(3,\) instead of \(5,\)"):
        load_dynamicvit({**state, "head.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"has fast paths in 5 blocks.*pass the stages that it was"):
        load_dynamicvit(state, stages=(5, 6, 7))


@torch.no_grad()
def test_the_authors_epsilon_is_saved_along(tmp_path: Path) -> None:
    """The norms of their ConvNeXts have 1e-6, with which a token of hardly any variance is another one."""
    model = load_dynamicvit(convnext_state())
    again = tokenprune.from_pretrained(tokenprune.save_pretrained(model, tmp_path / "saved"), model=_dense_convnext())
    assert epsilons(again.tokenprune) == epsilons(model.tokenprune) == {1e-6}
    assert torch.equal(again.eval()(images() * 1e-3), model(images() * 1e-3))
    beside = tokenprune.sparsify(
        _dense_convnext(), model.tokenprune.plan.stages, model.tokenprune.keep_ratio, pruned="fast"
    )
    assert epsilons(beside.tokenprune) == {1e-5}
    beside.load_state_dict(model.state_dict())
    assert epsilons(beside.tokenprune) == {1e-6}


def epsilons(module: nn.Module) -> set[float]:
    return {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}


def _dense_convnext() -> nn.Module:
    return tokenprune.unsparsify(load_dynamicvit(convnext_state()))


def test_a_layer_scale_of_zero_cannot_be_divided_by() -> None:
    state = convnext_state()
    state["stages.2.3.gamma"][2] = 0
    with pytest.raises(CheckpointError, match=r"stages\.2\.3\.fast_path_gamma .* without a 0 in it"):
        load_dynamicvit(state)


def test_what_was_loaded_trains_and_is_undone() -> None:
    model = load_dynamicvit(swin_state())
    assert tokenprune.verify(model, images()).passed
    dense = tokenprune.unsparsify(model)
    assert dense(images()).shape == (3, CLASSES)
