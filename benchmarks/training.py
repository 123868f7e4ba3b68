"""What does a training step with masked tokens cost beside a dense one? ``python -m benchmarks.training``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, input_size, measure_pairs, report


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm.")] = "deit_small_patch16_224",
    batch_size: Annotated[list[int] | None, typer.Option(help="Give it several times.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="ρ.")] = 0.7,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 21,
    name: Name = "training-cpu",
) -> None:
    """Time whole optimisation steps in turn: dense; sparse without the teacher; sparse with it."""
    rows, data = [], []
    for batch in batch_size or [16, 1]:
        repeats = pairs if batch > 4 else 2 * pairs  # short ones scatter more
        for what, ratio in compare(
            partial(timm.create_model, model), batch, keep_ratio, device, dtype, repeats
        ).items():
            (sparse, dense), (lower, upper) = ratio.medians, ratio.quartiles
            rows.append(
                [
                    f"{batch}",
                    what,
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
        ("batch", "loss", "dense, s", "sparse, s", "sparse ÷ dense (quartiles)"),
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
) -> dict[str, Ratio]:
    """Sparse ÷ dense steps at one batch size, without and with the teacher; both models compiled, or neither."""
    torch.manual_seed(0)
    dense: Any = build().train().to(device)
    sparse: Any = tokenprune.sparsify(copy.deepcopy(dense), keep_ratio=keep_ratio)
    images = torch.randn(batch, *input_size(dense), device=device)
    targets = torch.randint(dense.num_classes, (batch,), device=device)
    losses = {
        "teacher aside": tokenprune.DynamicViTLoss(copy.deepcopy(dense), kl_weight=0, distill_weight=0),
        "with teacher": tokenprune.DynamicViTLoss(copy.deepcopy(dense)),
    }
    if compiled:
        torch.compiler.reset()
        dense, sparse = torch.compile(dense), torch.compile(sparse)
    dense_step = stepper(dense, lambda outputs: F.cross_entropy(outputs, targets), images, dtype)

    def sparse_step(loss: tokenprune.DynamicViTLoss) -> Callable[[], None]:
        return stepper(sparse, lambda outputs: loss(sparse, images, outputs, targets)["loss"], images, dtype)

    return {
        what: measure_pairs(sparse_step(loss), dense_step, pairs=pairs, device=device) for what, loss in losses.items()
    }


def stepper(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> Callable[[], None]:
    """A function that takes one optimisation step of ``model`` with an AdamW of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
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
