"""The same cost divided among the stages, as `plan_for` with images does: ``python -m recipes.frontier.division``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import tokenprune
from recipes.dynamicvit import attached
from recipes.engine.checkpoints import write_text
from recipes.engine.tables import Table
from recipes.frontier.grid import COSTS
from recipes.frontier.tasks import TASKS, Task

NUM_IMAGES = 512

console = Console()
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def division(
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("runs/frontier"),
    scorer: Annotated[str, typer.Option(help="A scorer that needs no training.")] = "informative",
    pruned: Annotated[str, typer.Option(help="What becomes of pruned tokens.")] = "drop",
) -> None:
    """Find plans at each cost on training images, without labels, and compare them on the validation images."""
    made = Table(
        title=f"{scorer}, {pruned}: the pruning divided among the stages",
        columns=("data", "cost", "plan", "ratios", "cost counted", "agreement", "top-1"),
    )
    for name, task in TASKS.items():
        searched = list(_batches(task))
        model = tokenprune.sparsify(task.load_dense_model().eval(), scorer=scorer, pruned=pruned)
        size = attached(model).backbone.input_size(model)
        dense = tokenprune.flops(model, size).dense_gmacs
        with tokenprune.dense(model):
            known = classes(model, task)
        for cost in COSTS:
            plans = {
                "ρ, ρ², ρ³": tokenprune.plan_for(model, gmacs=cost * dense),
                "divided": tokenprune.plan_for(model, searched, gmacs=cost * dense),
            }
            for label, plan in plans.items():
                attached(model).keep_ratio = plan.keep_ratios
                found = classes(model, task)
                made.add(
                    name, f"{cost:.0%}", label, ", ".join(f"{ratio:.2f}" for ratio in plan.keep_ratios),
                    f"{tokenprune.flops(model, size).sparse_gmacs / dense:.1%}",
                    f"{_share(found, known):.2f}", f"{_share(found, task.validation[1]):.2f}",
                )  # fmt: skip
    console.print(made.rich())
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "division.md", made.markdown())


def _batches(task: Task) -> Iterator[Tensor]:
    """Training images, without labels."""
    left = NUM_IMAGES
    for images, _ in islice(task.training_batches(0), NUM_IMAGES):
        yield images[:left]
        left -= len(images)
        if left <= 0:
            return


@torch.no_grad()
def classes(model: nn.Module, task: Task) -> Tensor:
    """The class (B,) that a model finds likeliest for each validation image."""
    parts: Any = [model(part).argmax(dim=1) for part in task.validation[0].split(250)]
    return torch.cat(parts)


def _share(found: Tensor, known: Tensor) -> float:
    return 100 * float((found == known).float().mean())


if __name__ == "__main__":
    app()
