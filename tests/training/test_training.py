"""Training: across processes, and for long enough at a low ratio to find what is unstable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tokenprune
from tests.helpers.zoo import BY_NAME, Case, some_models

NUM_PROCESSES = 2


def step(
    case: Case,
    model: nn.Module,
    loss: tokenprune.DynamicViTLoss,
    images: Tensor,
    targets: Tensor,
    autocast: bool = False,
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(images, **case.forward_arguments)
        total = loss(model, images, outputs, targets)["loss"]
    total.backward()
    return total.detach()


def train_one_process(rank: int, name: str, scorer: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=NUM_PROCESSES
    )
    case = BY_NAME[name]
    model, teacher = case.sparsified(scorer=scorer).train(), case.model()
    wrapped = DistributedDataParallel(model)
    loss, images = tokenprune.DynamicViTLoss(teacher), case.images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for index in range(3):
        torch.manual_seed(10 * index + rank)
        half = slice(2 * rank, 2 * rank + 2)
        optimizer.zero_grad()
        step(case, wrapped, loss, images[half], torch.tensor([1, 2, 3, 4])[half])
        optimizer.step()
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "scorer"),
    [
        ("timm class token", "predictor"),
        pytest.param("timm class token", "cls_attention", marks=pytest.mark.slow),
        pytest.param("transformers ViT classifier", "predictor", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_one_model(name: str, scorer: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_one_process, (name, scorer, tmp_path), nprocs=NUM_PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(NUM_PROCESSES))
    assert all(torch.equal(first[key], second[key]) for key in first)

    # The same three steps in one process: each half of the batch with its own random numbers, gradients averaged.
    case = BY_NAME[name]
    model, loss = case.sparsified(scorer=scorer).train(), tokenprune.DynamicViTLoss(case.model())
    images = case.images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for index in range(3):
        optimizer.zero_grad()
        for rank in range(NUM_PROCESSES):
            torch.manual_seed(10 * index + rank)
            half = slice(2 * rank, 2 * rank + 2)
            step(case, model, loss, images[half], torch.tensor([1, 2, 3, 4])[half])
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= NUM_PROCESSES
        optimizer.step()
    for key, value in model.state_dict().items():
        # Sums in another order, over three steps.
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm class token", "timm no class token, average"])
def test_three_hundred_steps_at_a_tenth_of_the_tokens_in_bfloat16(name: str) -> None:
    case = BY_NAME[name]
    torch.manual_seed(0)
    teacher = case.build().eval()
    model = tokenprune.sparsify(case.build(), (2, 4), 0.1).train()
    loss = tokenprune.DynamicViTLoss(teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for index in range(300):
        images, targets = torch.randn(8, 3, *case.image_size), torch.randint(7, (8,))
        optimizer.zero_grad()
        total = step(case, model, loss, images, targets, autocast=True)
        assert total.isfinite(), index
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients), index
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.tokenprune.trace.keep[-1].sum(dim=1).min() >= 1


@some_models
def test_a_few_steps_lower_the_loss(case: Case) -> None:
    if "classifier" not in case.name and not case.name.startswith(("timm", "torchvision")):
        pytest.skip("puts out no logits")
    torch.manual_seed(0)
    teacher = case.build().eval()
    model = tokenprune.sparsify(case.build(), (2, 4), 0.6).train()
    loss = tokenprune.DynamicViTLoss(teacher, ratio_weight=0)
    images, targets = torch.randn(16, 3, *case.image_size), torch.randint(7, (16,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        history.append(step(case, model, loss, images, targets))
        optimizer.step()
    # Random labels of 16 images are learned by heart within some tens of steps.
    assert torch.stack(history[-5:]).mean() < 0.5 * history[0]
