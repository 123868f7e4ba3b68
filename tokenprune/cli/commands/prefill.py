"""``tokenprune prefill``: what reading a prompt with an image costs a vision-language model, dense and sparse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import DeviceName, Json, KeepRatios, Model, device_named, ratios, stage_indices
from tokenprune.cli.output import show, show_json, step, working

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.analysis.prefill import PrefillReport, PrefillTimes

_STAGES = "Blocks of the tower in front of which tokens are pruned. Default: none, pruning behind the tower alone."


def prefill(
    model: Model,
    keep_ratio: KeepRatios = None,
    stages: Annotated[str | None, typer.Option(help=_STAGES, show_default=False)] = None,
    pruner: Annotated[
        str | None,
        typer.Option(help="Which tokens go on. Default: diverse, or with stages tower.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Prompts, each with an image.")] = 1,
    words: Annotated[int, typer.Option(min=2, help="Tokens of a prompt besides those of its image.")] = 32,
    pairs: Annotated[int, typer.Option(min=2, help="Rounds of dense, random and pruned passes that count.")] = 8,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that run before and do not.")] = 2,
    device: DeviceName = None,
    as_json: Json = False,
) -> None:
    """Count and time the first pass of a vision-language model over prompts with images, dense and sparse.

    By part: vision tower, projector, language model, head. Times are medians over rounds in turn, with random tokens
    beside the pruner's. Weights and images are random.

    In Python: tokenprune.prefill_flops(model, inputs) and tokenprune.prefill_times(model, inputs).
    """
    from tokenprune.analysis.prefill import prefill_flops, prefill_times
    from tokenprune.api import attached_to, sparsify
    from tokenprune.backbones.adapters import example_prompts_of, vision_language_of
    from tokenprune.saving.named import load_from_library

    chosen, where, blocks = ratios(keep_ratio) or [0.5], device_named(device), stage_indices(stages) or ()
    results: list[tuple[PrefillReport, PrefillTimes]] = []
    with working(f"loading {model}") as progress:
        loaded = load_from_library(model).eval().to(where)
        described = vision_language_of(loaded)
        if described is None:
            raise typer.BadParameter(f"{model} is no vision-language model that is known; use flops and bench.")
        inputs = example_prompts_of(loaded, described, num_prompts=batch_size, num_words=words)
        try:
            sparsify(loaded, blocks, chosen[0], pruner=pruner)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from None
        for one in chosen:
            attached_to(loaded).keep_ratio = one
            step(progress, "counting multiply-adds")
            counted = prefill_flops(loaded, inputs)
            timed = prefill_times(
                loaded,
                inputs,
                pairs=pairs,
                warmup=warmup,
                progress=lambda done, total: step(progress, "measuring", done, total),
            )
            results.append((counted, timed))
    if as_json:
        reports = [{**json.loads(counted.to_json()), **json.loads(timed.to_json())} for counted, timed in results]
        show_json({"model": model, "device": str(where), "reports": reports})
        return
    for counted, timed in results:
        show(counted.table(), _table(timed, counted.ratio))


def _table(timed: PrefillTimes, expected: float) -> Table:
    from rich.table import Table

    table = Table(title=f"Seconds of a pass, {len(timed.dense_seconds)} rounds, multiply-adds {expected:.2f} × fewer")
    for column in ("tokens", "speed-up", "quartiles"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    for name, speedup, random in (
        (timed.pruner or "pruner", timed.speedup, False),
        ("random", timed.random_speedup, True),
    ):
        lower, upper = timed.spread(random=random)
        table.add_row(name, f"{speedup:.2f}", f"{lower:.2f} … {upper:.2f}")
    return table
