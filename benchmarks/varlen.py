"""What does one sequence for all images cost beside a rectangle? ``python -m benchmarks.varlen``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor

import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, input_size, measure_rounds, report
from tokenprune.pruning.executions import Varlen, register_execution
from tokenprune.pruning.selection import Selection

SPREAD = 0.4


class Spread(Varlen):
    """`Varlen` with numbers of tokens spread evenly over ± 40 % of the plan's, whatever the scores."""

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        factors = torch.linspace(1 - SPREAD, 1 + SPREAD, len(scores), device=scores.device)
        return super().decide(scores, before, (factors * num_keep).round().long(), sampled=sampled)


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm.")] = "deit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(min=2, help="Images a pass.")] = 16,
    keep_ratio: Annotated[float, typer.Option(help="ρ: ρ, ρ², ρ³ of the patch tokens are kept.")] = 0.7,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 31,
    name: Name = "varlen-cpu",
) -> None:
    """Time forward passes in turn: `gather`, `varlen` at equal numbers of tokens, and at numbers that differ."""
    register_execution("spread")(Spread)  # not where the module is imported: `verify` tries all executions
    torch.manual_seed(0)
    pruned = tokenprune.sparsify(timm.create_model(model), keep_ratio=keep_ratio).eval()
    pruned.to(device, getattr(torch, dtype))
    images = torch.randn(batch_size, *input_size(pruned), device=device, dtype=getattr(torch, dtype))

    def run(execution: str) -> Callable[[], Any]:
        def forward() -> None:
            with torch.inference_mode(), pruned.tokenprune.executing(execution):
                pruned(images)

        return forward

    names = ("gather", "varlen", "spread")
    seconds = dict(zip(names, measure_rounds([run(one) for one in names], rounds=pairs, device=device), strict=True))
    run("spread")()
    kept = [[len(indices) for indices in stage] for stage in pruned.tokenprune.trace.indices]
    ratios = {one: Ratio(first_seconds=seconds[one], second_seconds=seconds["gather"]) for one in ("varlen", "spread")}
    labels = {"varlen": "equal", "spread": "; ".join(f"{min(counts)} … {max(counts)}" for counts in kept)}
    rows = [
        [
            f"{batch_size}",
            labels[one],
            f"{ratio.medians[1]:.3f}",
            f"{ratio.medians[0]:.3f}",
            f"**{ratio.median:.3f}** ({ratio.quartiles[0]:.3f} … {ratio.quartiles[1]:.3f})",
        ]
        for one, ratio in ratios.items()
    ]
    report(
        name,
        f"{model}, ρ = {keep_ratio}, a forward pass, medians of {pairs} pairs",
        environment(device, dtype),
        ("batch", "tokens kept of an image, by stage", "`gather`, s", "`varlen`, s", "`varlen` ÷ `gather` (quartiles)"),
        rows,
        [{"batch_size": batch_size, "kept": kept, "ratios": ratios}],
        notes=("The mean number of tokens is that of `gather` in both lines.",),
    )


if __name__ == "__main__":
    typer.run(main)
