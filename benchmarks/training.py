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
    checkpointing: Annotated[bool, typer.Option(help="Run all blocks again in the backward pass.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile models and teacher.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 21,
    name: Name = "training-cpu",
) -> None:
    """Time whole optimisation steps in turn: dense; sparse without the teacher; sparse with it.

    Masked, scorers and backbone learn, on all tokens; gathered, the backbone alone, with tokens removed. Compiled, a
    teacher that is not stands beside the one that is.
    """
    rows, data = [], []
    how = ", activation checkpointing" if checkpointing else ""
    how += ", compiled" if compiled else ""
    chosen = [one.value for one in schedule or [Schedule.masked]]
    for batch in batch_size or [16, 1]:
        repeats = pairs if batch > 4 else 2 * pairs  # short ones scatter more
        build = partial(_build, model, checkpointing)
        # What a compiler keeps for the backward pass is up to it.
        held = {} if compiled else memory(build, batch, keep_ratio, device, dtype, chosen)
        found = compare(
            build, batch, keep_ratio, device, dtype, repeats, compiled=compiled, beside_eager_teacher=compiled,
            schedules=chosen,
        )  # fmt: skip
        for what, ratio in found.items():
            (sparse, dense), (lower, upper) = ratio.medians, ratio.quartiles
            rows.append(
                [
                    f"{batch}",
                    what if what.startswith("gathered") else f"masked, {what}",
                    f"{dense:.3f}",
                    f"{sparse:.3f}",
                    f"**{ratio.median:.2f}** ({lower:.2f} … {upper:.2f})",
                    *([f"{held[what][0] / held[what][1]:.2f}"] if held else []),
                ]
            )
            data.append({"batch_size": batch, "what": what, "sparse_over_dense": ratio, "held_bytes": held.get(what)})
    report(
        name,
        f"{model}, ρ = {keep_ratio:g}{how}, a step of AdamW, medians of {pairs} pairs ({2 * pairs} at batches up to 4)",
        environment(device, dtype),
        (
            "batch",
            "step",
            "dense, s",
            "sparse, s",
            "sparse ÷ dense (quartiles)",
            *(() if compiled else ("memory, sparse ÷ dense",)),
        ),
        rows,
        data,
        notes=[]
        if compiled
        else ["Memory is what a forward pass with its loss leaves for the backward pass, weights aside."],
    )


def _build(name: str, checkpointing: bool) -> Any:
    model = timm.create_model(name)
    model.set_grad_checkpointing(checkpointing)
    return model


def compare(
    build: Callable[[], nn.Module],
    batch: int,
    keep_ratio: float,
    device: str,
    dtype: str,
    pairs: int,
    *,
    compiled: bool = False,
    beside_eager_teacher: bool = False,
    schedules: Sequence[str] = ("masked",),
) -> dict[str, Ratio]:
    """Sparse ÷ dense steps at one batch size, without and with the teacher; models and teacher compiled, or none."""
    dense, images, targets, losses = parts(build, batch, device)
    if compiled:
        torch.compiler.reset()
        teacher: Any = torch.compile(copy.deepcopy(dense))
        if beside_eager_teacher:
            losses["with teacher, not compiled"] = losses["with teacher"]
        losses["with teacher"] = tokenprune.DynamicViTLoss(teacher)
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


def parts(
    build: Callable[[], nn.Module], batch: int, device: str
) -> tuple[Any, Tensor, Tensor, dict[str, tokenprune.DynamicViTLoss]]:
    """A dense model in training mode, images and targets for it, and the losses of its sparse copies."""
    torch.manual_seed(0)
    dense: Any = build().train().to(device)
    images = torch.randn(batch, *input_size(dense), device=device)
    targets = torch.randint(dense.num_classes, (batch,), device=device)
    losses = {
        "teacher aside": tokenprune.DynamicViTLoss(copy.deepcopy(dense), kl_weight=0, distill_weight=0),
        "with teacher": tokenprune.DynamicViTLoss(copy.deepcopy(dense)),
    }
    return dense, images, targets, losses


def memory(
    build: Callable[[], nn.Module], batch: int, keep_ratio: float, device: str, dtype: str, schedules: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Bytes held for the backward pass, sparse and dense, under the names of `compare`."""
    dense, images, targets, losses = parts(build, batch, device)
    found: dict[str, tuple[int, int]] = {}
    dense_bytes = held_bytes(dense, lambda outputs: F.cross_entropy(outputs, targets), images, dtype)
    for schedule in schedules:
        sparse: Any = tokenprune.sparsify(copy.deepcopy(dense), keep_ratio=keep_ratio)
        with ExitStack() as stack:
            if schedule == "gathered":
                stack.enter_context(tokenprune.gathered(sparse))
            for what, loss in losses.items():
                objective = partial(_loss, loss, sparse, images, targets)
                sparse_bytes = held_bytes(sparse, objective, images, dtype)
                found[what if schedule == "masked" else f"{schedule}, {what}"] = sparse_bytes, dense_bytes
    return found


def held_bytes(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> int:
    """What a forward pass and its loss leave for the backward pass, every storage once, weights aside."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = _objective(model, loss, images, dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = sum(number for pointer, number in storages.items() if pointer not in weights)
    del total  # only now: it holds all of them, so that no address was given away twice
    return held


def _objective(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> Tensor:
    with torch.autocast(images.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        return loss(model(images))


def _loss(
    loss: tokenprune.DynamicViTLoss, model: nn.Module, images: Tensor, targets: Tensor, outputs: Tensor
) -> Tensor:
    total: Tensor = loss(model, images, outputs, targets)["loss"]
    return total


def stepper(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> Callable[[], None]:
    """A function that takes one optimisation step of ``model`` with an AdamW of its own."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-6)

    def step() -> None:
        _objective(model, loss, images, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    typer.run(main)
