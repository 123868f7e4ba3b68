"""Gathered training: what is removed, what is held, what the loss makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.helpers.zoo import BY_NAME, Case, models

CASES = models("timm class token", "timm LV-ViT", "transformers ViT classifier", "torchvision")
TARGETS = torch.tensor([1, 2, 3])


def student_and_loss(case: Case, **options: Any) -> tuple[Any, tokenprune.DynamicViTLoss]:
    model = case.sparsified(**options).train()
    return model, tokenprune.DynamicViTLoss(case.model())


@CASES
def test_tokens_are_removed_and_the_backbone_learns(case: Case) -> None:
    model, loss = student_and_loss(case)
    images = case.images(3)
    lengths = []
    last = model.tokenprune.backbone.blocks[-1]
    last.register_forward_pre_hook(lambda block, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    with tokenprune.gathered(model):
        parts = loss(model, images, model(images), TARGETS)
        parts["loss"].backward()
    kept = model.tokenprune.plan.num_keep(case.num_patches)[-1]
    assert lengths == [case.num_prefix_tokens + kept]
    assert parts["ratio"] == 0 and all(parts[name] > 0 for name in ("classification", "kl", "distill"))
    scorers = list(model.tokenprune.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in scorers)
    learned = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert len(learned) > 20 and all(parameter.grad.isfinite().all() for parameter in learned)
    assert model.tokenprune.execution == "auto"


def test_the_loss_is_that_of_a_masked_pass_with_the_same_decisions() -> None:
    case = BY_NAME["timm class token"]
    model, loss = student_and_loss(case)
    images = case.images(3)
    with tokenprune.gathered(model):
        gathered = loss(model, images, model(images), TARGETS)
    model.tokenprune.eval()  # top-k instead of sampled decisions
    model.tokenprune.execution = "mask"
    model.tokenprune.requires_grad_(False)
    masked = loss(model, images, model(images), TARGETS)
    for name in ("classification", "kl", "distill"):
        torch.testing.assert_close(gathered[name], masked[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruned", ["preserve", "fuse", "merge"])
def test_reductions_and_their_losses(pruned: str) -> None:
    model, loss = student_and_loss(BY_NAME["timm class token"], pruned=pruned)
    images = BY_NAME["timm class token"].images(3)
    with tokenprune.gathered(model):
        parts = loss(model, images, model(images), TARGETS)
    assert all(value.isfinite() for value in parts.values()) and parts["distill"] > 0


def test_flags_and_execution_come_back_also_after_an_error() -> None:
    model, _ = student_and_loss(BY_NAME["timm class token"])
    model.tokenprune.execution = "mask"
    first, *_ = model.tokenprune.parameters()
    first.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), tokenprune.gathered(model):
        assert not any(parameter.requires_grad for parameter in model.tokenprune.parameters())
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert model.tokenprune.execution == "mask"
    with pytest.raises(tokenprune.StateError, match="is not sparsified"), tokenprune.gathered(torch.nn.Linear(1, 1)):
        pass


def test_outside_of_it_the_loss_refuses_a_pass_in_which_scorers_cannot_learn() -> None:
    model, loss = student_and_loss(BY_NAME["timm class token"])
    images = BY_NAME["timm class token"].images(3)
    model.tokenprune.execution = "gather"
    with pytest.raises(tokenprune.StateError, match="or train inside of"):
        loss(model, images, model(images), TARGETS)
    with tokenprune.gathered(model.eval()), pytest.raises(tokenprune.StateError, match=r"Call model.train\(\)"):
        loss(model, images, model(images), TARGETS)


def test_activation_checkpointing_is_refused() -> None:
    model, _ = student_and_loss(BY_NAME["timm class token"])
    model.set_grad_checkpointing()
    images = BY_NAME["timm class token"].images(3)
    with tokenprune.gathered(model), pytest.raises(tokenprune.StateError, match="activation checkpointing"):
        model(images).sum().backward()


def test_class_attention_needs_no_context_to_be_trained_around() -> None:
    model, loss = student_and_loss(BY_NAME["timm class token"], scorer="cls_attention")
    images = BY_NAME["timm class token"].images(3)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tokenprune.gathered(model):
        loss(model, images, model(images), TARGETS)["loss"].backward()
    optimizer.step()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if _floats(value))


def _floats(value: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
