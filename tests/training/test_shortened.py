"""Masked training leaves out tokens that an earlier stage has pruned; values and gradients stay the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenprune
from tests.helpers.tolerances import MASK_EQUALS_GATHER
from tokenprune.pruning.executions.mask import Mask
from tokenprune.pruning.selection import Selection

SIZE = 64


def vit(**options: Any) -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", img_size=SIZE, num_classes=5, **options)
    return model


def of_transformers() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=SIZE, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=2, num_labels=5, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": vit,
    "average pool, no class token": lambda: vit(class_token=False, global_pool="avg"),
    "maximum pool": lambda: vit(global_pool="max"),
    "attention pool": lambda: vit(global_pool="map"),
    "registers, q/k norm": lambda: vit(reg_tokens=2, qk_norm=True),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=SIZE, num_classes=5, depth=6),
    "rotary positions": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, num_classes=5, depth=6),
    "transformers": of_transformers,
}


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many patch tokens were left by each stage that was asked."""
    seen: list[int] = []
    shorten = Mask.shorten

    def noted(self: Mask, selection: Selection, before: Selection) -> Selection:
        shortened = shorten(self, selection, before)
        seen.append(shortened.layout.num_patches)
        return shortened

    monkeypatch.setattr(Mask, "shorten", noted)
    return seen


def sparse(dense: nn.Module, **options: Any) -> Any:
    model = tokenprune.sparsify(copy.deepcopy(dense), (1, 2, 4), 0.6, **options).train()
    torch.manual_seed(1)
    for parameter in model.tokenprune.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def pixels(model: nn.Module) -> Tensor:
    size = 56 if "Eva" in type(model).__name__ else SIZE
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def trained(dense: nn.Module, images: Tensor, prepare: Callable[[Any], None] | None = None) -> tuple[Tensor, Any]:
    """The loss of a step, and the model with its gradients."""
    model, loss = sparse(dense), tokenprune.DynamicViTLoss(copy.deepcopy(dense))
    if prepare is not None:
        prepare(model)
    torch.manual_seed(3)
    parts = loss(model, images, model(images), torch.tensor([0, 1, 2]))
    parts["loss"].backward()
    return parts["loss"].detach(), model


def assert_equal_steps(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> None:
    tolerance = MASK_EQUALS_GATHER[torch.float64]
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=tolerance)
    theirs = dict(other[1].named_parameters())
    for name, parameter in one[1].named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=tolerance, msg=name)
    for kept, expected in zip(one[1].tokenprune.trace.keep, other[1].tokenprune.trace.keep, strict=True):
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_values_and_gradients_are_those_of_whole_sequences(
    name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]().double()
    images = pixels(dense)
    shortened = trained(dense, images)
    trace = shortened[1].tokenprune.trace
    most = [int(keep.sum(dim=1).max()) for keep in trace.keep]
    assert lengths == [trace.num_patches, *most[:2]] and most[1] < most[0] < trace.num_patches
    assert trace.layout == trace.full_layout and not trace.indices
    assert any(parameter.grad.abs().max() > 1e-5 for parameter in shortened[1].tokenprune.stages[2].parameters())
    monkeypatch.setattr(Mask, "shorten", lambda self, selection, before: selection)
    assert_equal_steps(shortened, trained(dense, images))


def test_blocks_that_are_run_again_find_the_same_rows(lengths: list[int]) -> None:
    dense = vit().double()
    images = pixels(dense)
    once = trained(dense, images)
    again = trained(dense, images, lambda model: model.set_grad_checkpointing())
    assert_equal_steps(again, once)
    first, second = lengths[:3], lengths[3:]
    assert second == [*first, *reversed(first)]  # forward, then backward


def test_blocks_run_on_what_is_left_and_all_tokens_come_out() -> None:
    model = sparse(vit(final_norm=False, fc_norm=False))
    given: list[int] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: given.append(args[0].shape[1] - 1))
    model(torch.randn(3, 3, SIZE, SIZE))
    trace = model.tokenprune.trace
    most = [int(keep.sum(dim=1).max()) for keep in trace.keep]
    assert given == [16, 16, most[0], most[0], most[1], most[1]] and most[1] < most[0] < 16
    there = trace.layout.patches(trace.tokens).abs().sum(dim=-1) > 0  # (B, N); what was left out is 0
    assert there.shape[1] == 16 and there[trace.keep[1] > 0].all()
    assert there.sum(dim=1).tolist() == [most[1]] * 3  # where an image has fewer left, pruned ones fill its row


@pytest.mark.parametrize(
    "prepare",
    [lambda model: model.eval(), lambda model: setattr(model.tokenprune.stages[1], "scorer", Random())],
    ids=["eval mode", "a scorer whose scores are no odds"],
)
def test_decisions_that_are_not_sampled_leave_the_sequence_whole(
    prepare: Callable[[Any], Any], lengths: list[int]
) -> None:
    model = sparse(vit())
    prepare(model)
    model.tokenprune.execution = "mask"
    model(torch.randn(3, 3, SIZE, SIZE))
    assert model.tokenprune.trace.keep[-1].sum(dim=1).max() < 16
    assert len(lengths) == (0 if not model.training else 2)


class Random(nn.Module):
    probabilistic = needs_attention = needs_keys = needs_recording = inside_block = False

    def forward(self, candidates: Any) -> Tensor:
        return torch.rand(candidates.patches.shape[:2])


@pytest.mark.parametrize("pruned", ["preserve", "fuse", "merge"])
def test_pruned_tokens_that_are_looked_at_stay(pruned: str, lengths: list[int]) -> None:
    model = sparse(vit(), pruned=pruned)
    model(torch.randn(3, 3, SIZE, SIZE))
    assert not lengths


def test_tables_by_position_keep_the_sequence_whole(lengths: list[int]) -> None:
    model = sparse(timm.create_model("beit_base_patch16_224", img_size=SIZE, embed_dim=32, num_heads=2, depth=6))
    model(torch.randn(3, 3, SIZE, SIZE))
    assert set(lengths) == {16}
