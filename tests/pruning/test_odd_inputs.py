"""What generated inputs had found wrong in the engine: odd scores, odd returns, blocks that run out of order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.zoo import BY_NAME
from tokenprune import Backbone, Plan, PlanError, Reduced, Reduction, Scorer, Split, StateError
from tokenprune.pruning.reductions.fuse import weighted_mean
from tokenprune.pruning.sampling import top_k

VIT = BY_NAME["timm class token"]


def test_a_score_of_minus_infinity_does_not_revive_a_pruned_token() -> None:
    scores = torch.full((1, 40), -math.inf)
    keep = torch.zeros(1, 40)
    keep[0, -3:] = 1
    assert top_k(scores, keep, 3).tolist() == [[37, 38, 39]]


def test_an_infinite_score_leaves_the_weights_of_the_others() -> None:
    patches, pruned = torch.tensor([[[1.0], [2.0], [5.0]]]), torch.tensor([[1.0, 1.0, 0.0]])
    mean = weighted_mean(patches, pruned, torch.tensor([[3.0, 1.0, math.inf]]))
    assert mean.item() == pytest.approx(1.25)


@pytest.mark.parametrize("ratio", [10**400, -(10**400), [0.5, 10**400]])
def test_a_number_that_is_no_float_is_no_ratio(ratio: Any) -> None:
    with pytest.raises(PlanError, match="is outside"):
        Plan.build(depth=12, stages=(3, 6), keep_ratio=ratio)


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000, b"\xff\xfe", None])
def test_what_is_no_json_is_no_plan(text: Any) -> None:
    with pytest.raises(PlanError, match="the text is not JSON"):
        Plan.from_json(text)


@pytest.mark.parametrize("fields", [{"stages": 3, "keep_ratios": (0.5,)}, {"stages": (3,), "keep_ratios": 0.5}])
def test_a_plan_takes_sequences(fields: Any) -> None:
    with pytest.raises(PlanError, match="expected a sequence of numbers"):
        Plan(**fields)


@pytest.mark.parametrize("pruned", ["drop", "fuse", "merge", "merge_preserve"])
@torch.no_grad()
def test_a_batch_without_images_gives_no_logits(pruned: str) -> None:
    model = tokenprune.sparsify(VIT.model(), (2, 4), 0.5, pruned=pruned)
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        assert model(VIT.images(0)).shape == (0, 7)


class Odd(Scorer, Reduction):
    """Returns what it is told to."""

    def __init__(self, make: Callable[[Any], Any], num_summary: int = 0) -> None:
        super().__init__()
        self.make, self.num_summary = make, num_summary

    def forward(self, given: Any) -> Any:
        return self.make(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda candidates: [0.5], "Odd returned a list; expected scores"),
        (lambda candidates: candidates.patches[..., 0].to(torch.complex64), "a tensor of torch.complex64"),
    ],
)
def test_what_a_scorer_returns_is_checked(make: Callable[[Any], Any], message: str) -> None:
    model = tokenprune.sparsify(VIT.model(), (2,), 0.5, scorer=lambda context: Odd(make))
    with pytest.raises(TypeError, match=message):
        model(VIT.images())


def narrower(split: Split) -> Tensor:
    return split.patches[..., 1:]


@pytest.mark.parametrize(
    ("make", "num_summary", "error", "message"),
    [
        (lambda split: None, 0, TypeError, "Odd returned a NoneType; expected a tokenprune.Reduced"),
        (lambda split: Reduced(None), 0, TypeError, "a Reduced with NoneType, NoneType, NoneType"),
        (
            lambda split: Reduced(narrower(split)),
            0,
            ValueError,
            r"patches of shape \(3, 36, 31\); expected \(3, 36, 32",
        ),
        (lambda split: Reduced(split.patches), 1, ValueError, "no summary tokens; by its num_summary=1"),
        (lambda split: Reduced(split.patches, split.patches[:, :2]), 1, ValueError, r"summary of shape \(3, 2, 32\)"),
        (
            lambda split: Reduced(split.patches, None, split.keep),
            0,
            ValueError,
            r"hosts of shape \(3, 36\) and torch.fl",
        ),
    ],
)
def test_what_a_reduction_returns_is_checked(
    make: Callable[[Split], Any], num_summary: int, error: type[Exception], message: str
) -> None:
    model = tokenprune.sparsify(VIT.model(), (2,), 0.5, pruned=lambda context: Odd(make, num_summary))
    with pytest.raises(error, match=message):
        model(VIT.images())


@pytest.mark.parametrize(("option", "built"), [("scorer", "ScorerContext"), ("pruned", "ReductionContext")])
def test_a_class_in_the_place_of_a_builder_is_named(option: str, built: str) -> None:
    with pytest.raises(TypeError, match=f"{option}=<class 'float'> cannot be called with a {built}"):
        tokenprune.sparsify(VIT.model(), (2,), 0.5, **{option: float})


def described(blocks: Any, **fields: Any) -> Backbone:
    return Backbone(blocks=blocks, num_prefix_tokens=1, embed_dim=32, **fields)


@pytest.mark.parametrize("pruned", ["drop", "preserve"])
def test_blocks_that_run_in_another_order_than_they_are_named_are_refused(pruned: str) -> None:
    model: Any = VIT.model()
    backbone = described([*reversed(model.blocks)])
    tokenprune.sparsify(model, (1, 3), 0.5, backbone=backbone, pruned=pruned)
    for _ in range(2):
        with pytest.raises(StateError, match="runs before blocks that are named before it"):
            model(VIT.images())
    with tokenprune.dense(model):
        model(VIT.images())


@pytest.mark.parametrize("pruned", ["drop", "fuse", "preserve"])
@torch.no_grad()
def test_a_block_that_is_called_by_itself_runs_as_it_is(pruned: str) -> None:
    model: Any = VIT.model()
    tokens = torch.randn(2, 9, 32)
    expected = [block(tokens) for block in model.blocks[1:]]
    tokenprune.sparsify(model, (1, 3), 0.5, pruned=pruned)
    model(VIT.images())
    assert all(torch.equal(block(tokens), one) for block, one in zip(model.blocks[1:], expected, strict=True))


def test_attention_modules_inside_of_each_other_are_refused() -> None:
    model: Any = VIT.model()
    nested = described(model.blocks, attentions=[[block, block.attn] for block in model.blocks])
    with pytest.raises(tokenprune.UnsupportedModelError, match="one inside of another"):
        tokenprune.sparsify(model, (1, 3), 0.5, backbone=nested)
    shared = described(model.blocks, attentions=[[model.blocks[3].attn]] * 6)
    tokenprune.sparsify(model, (1, 3), 0.5, backbone=shared)
    model.tokenprune.execution = "mask"
    with pytest.raises(tokenprune.InterceptionError):
        model(VIT.images())
    assert torch._C._len_torch_function_stack() == 0, "an interception is left on"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 8, r"Backbone\(patch_size=8\): expected height and width"),
        ("grid_size", (0, 4), r"grid_size=\(0, 4\)"),
        ("num_suffix_tokens", 1.5, "a whole number from 0"),
        ("token_inputs", {"rope": "n d -> b n d"}, "expected for names of parameters patterns such as"),
        ("adaptations", [3], "tokenprune.Adaptation objects"),
        ("tower", nn.Identity(), "not part of this"),
    ],
)
def test_fields_of_another_kind_are_refused(field: str, value: Any, message: str) -> None:
    model: Any = VIT.model()
    with pytest.raises(tokenprune.UnsupportedModelError, match=message):
        tokenprune.sparsify(model, (1, 3), 0.5, backbone=described(model.blocks, **{field: value}))


def test_a_tower_that_does_not_run_the_blocks_is_refused() -> None:
    model: Any = VIT.model()
    with pytest.raises(tokenprune.UnsupportedModelError, match="expected the part of this VisionTransformer that runs"):
        tokenprune.sparsify(model, (1, 3), 0.5, backbone=described(model.blocks, tower=model.head))
