"""What does a training step cost beside a dense one, masked and gathered? ``python -m benchmarks.training``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum
from functools import partial
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import recipes.digits.model  # noqa: F401  # registers digits_vit
import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, input_size, measure_pairs, report


class Schedule(str, Enum):
    """How a sparse model is trained."""

    masked = "masked"
    gathered = "gathered"


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm, or digits_vit.")] = "deit_small_patch16_224",
    schedule: Annotated[list[Schedule] | None, typer.Option(help="Give it several times. Default: masked.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Give it several times.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="ρ.")] = 0.7,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 21,
    name: Name = "training-cpu",
) -> None:
    """Time whole optimisation steps in turn: dense; sparse without the teacher; sparse with it.

    Masked, scorers and backbone learn, on all tokens; gathered, the backbone alone, with tokens removed.
    """
    rows, data = [], []
    chosen = [one.value for one in schedule or [Schedule.masked]]
    for batch in batch_size or [16, 1]:
        repeats = pairs if batch > 4 else 2 * pairs  # short ones scatter more
        for what, ratio in compare(
            partial(timm.create_model, model), batch, keep_ratio, device, dtype, repeats, schedules=chosen
        ).items():
            (sparse, dense), (lower, upper) = ratio.medians, ratio.quartiles
            rows.append(
                [
                    f"{batch}",
                    what if what.startswith("gathered") else f"masked, {what}",
                    f"{dense:.3f}",
                    f"{sparse:.3f}",
                    f"**{ratio.median:.2f}** ({lower:.2f} … {upper:.2f})",
                ]
            )
            data.append({"batch_size": batch, "what": what, "sparse_over_dense": ratio})
    report(
        name,
        f"{model}, ρ = {keep_ratio:g}, a step of AdamW, medians of {pairs} pairs ({2 * pairs} at batches up to 4)",
        environment(device, dtype),
        ("batch", "step", "dense, s", "sparse, s", "sparse ÷ dense (quartiles)"),
        rows,
        data,
    )


def compare(
    build: Callable[[], nn.Module],
    batch: int,
    keep_ratio: float,
    device: str,
    dtype: str,
    pairs: int,
    *,
    compiled: bool = False,
    schedules: Sequence[str] = ("masked",),
) -> dict[str, Ratio]:
    """Sparse ÷ dense steps at one batch size, without and with the teacher; both models compiled, or neither."""
    torch.manual_seed(0)
    dense: Any = build().train().to(device)
    images = torch.randn(batch, *input_size(dense), device=device)
    targets = torch.randint(dense.num_classes, (batch,), device=device)
    losses = {
        "teacher aside": tokenprune.DynamicViTLoss(copy.deepcopy(dense), kl_weight=0, distill_weight=0),
        "with teacher": tokenprune.DynamicViTLoss(copy.deepcopy(dense)),
    }
    if compiled:
        torch.compiler.reset()
    found: dict[str, Ratio] = {}
    for schedule in schedules:
        sparse: Any = tokenprune.sparsify(copy.deepcopy(dense), keep_ratio=keep_ratio)
        with ExitStack() as stack:
            if schedule == "gathered":
                stack.enter_context(tokenprune.gathered(sparse))
            # Only now, since compiling is wrapping.
            models: list[Any] = [torch.compile(one) if compiled else one for one in (dense, sparse)]
            dense_step = stepper(models[0], lambda outputs: F.cross_entropy(outputs, targets), images, dtype)
            for what, loss in losses.items():
                objective = partial(_loss, loss, models[1], images, targets)
                step = stepper(models[1], objective, images, dtype)
                found[what if schedule == "masked" else f"{schedule}, {what}"] = measure_pairs(
                    step, dense_step, pairs=pairs, device=device
                )
    return found


def _loss(
    loss: tokenprune.DynamicViTLoss, model: nn.Module, images: Tensor, targets: Tensor, outputs: Tensor
) -> Tensor:
    total: Tensor = loss(model, images, outputs, targets)["loss"]
    return total


def stepper(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> Callable[[], None]:
    """A function that takes one optimisation step of ``model`` with an AdamW of its own."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-6)
    half = dtype != "float32"

    def step() -> None:
        with torch.autocast(images.device.type, getattr(torch, dtype), enabled=half):
            total = loss(model(images))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    typer.run(main)
