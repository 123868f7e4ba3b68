"""How fast are DynamicViT and ToMe, written out from their papers, beside ours? ``python -m benchmarks.peers``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn

import tokenprune
from benchmarks import measuring
from benchmarks.frozen import SCORERS
from benchmarks.inference import shortened
from benchmarks.measuring import Device, DType, Name, Ratio, environment, input_size, report
from benchmarks.written_out import DynamicViT, ToMe
from tokenprune.analysis.runtimes import in_turn, runtime_named, twin

RUNTIMES = ("eager", "compile", "onnx")
PICTURES = Path(__file__).parents[1] / "docs" / "images"
CUT = "sequence cut off, no more"
COLUMNS = ("runtime", "batch", "what runs", "ms a batch", "speed-up over dense", "of the cut sequence's speed")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One of the models beside the dense one.

    Attributes:
        runtime: What ran it.
        batch_size: Images a batch.
        what: Which it is.
        dense_over_it: Seconds of the dense model, and its own.
        of_limit: The cut sequence's seconds ÷ its own, the median of the rounds.
        take: Which of the times that all was measured.
    """

    runtime: str
    batch_size: int
    what: str
    dense_over_it: Ratio
    of_limit: float
    take: int = 1


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm with a class token.")] = (
        "deit_small_patch16_224"
    ),
    runtime: Annotated[
        list[str] | None, typer.Option(help="Of eager, compile, pt2, onnx; give it several times.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Images a pass; give it several times.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="ρ: ρ, ρ², ρ³ of the patch tokens are kept.")] = 0.7,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Annotated[int, typer.Option(min=4, help="Rounds; four times as many at batches up to 4.")] = 11,
    take: Annotated[int, typer.Option(min=1, help="A number for this time; figures of other times stay.")] = 1,
    at_once: Annotated[
        int, typer.Option(min=0, help="Models beside dense and cut at once, to save memory; 0: all.")
    ] = 0,
    name: Name = "peers-cpu",
) -> None:
    """Time in turn: dense, cut off, the peers, and ours with the three predictors, frozen and not.

    Each runtime in a process of its own. The results file keeps what other runs have measured.
    """
    runtimes, batches = runtime or RUNTIMES, batch_size or [1, 16]
    if len(runtimes) > 1:
        for one in runtimes:
            options = {"model": model, "keep-ratio": keep_ratio, "device": device, "dtype": dtype, "pairs": pairs,
                       "take": take, "at-once": at_once, "name": name}  # fmt: skip
            given = [f"--{option}={value}" for option, value in options.items()]
            given += [f"--batch-size={batch}" for batch in batches]
            subprocess.run([sys.executable, "-m", "benchmarks.peers", f"--runtime={one}", *given], check=True)
        return
    torch.manual_seed(0)
    dense = timm.create_model(model).eval()
    found = measure(
        dense, keep_ratio, runtime=runtimes[0], batch_sizes=batches, device=device, dtype=dtype, pairs=pairs,
        take=take, at_once=at_once,
    )  # fmt: skip
    file = measuring.RESULTS / f"{name}.json"
    before = [read(entry) for entry in json.loads(file.read_text())["data"]] if file.exists() else []
    new = {(one.take, one.runtime, one.batch_size) for one in found}
    kept = [one for one in before if (one.take, one.runtime, one.batch_size) not in new]
    every = sorted([*kept, *found], key=lambda one: ((*RUNTIMES, "pt2").index(one.runtime), one.batch_size))
    write(name, every, f"{model}, ρ = {keep_ratio:g}", environment(device, dtype))


def write(name: str, every: Sequence[Measured], what: str, where: dict[str, Any]) -> None:
    """Write results files, table and picture of all that was measured."""
    counts = {one.batch_size: len(one.dense_over_it.first_seconds) for one in every}
    rounds = ", ".join(f"{count} at batch {batch}" for batch, count in sorted(counts.items()))
    times = {1: "once", 2: "twice"}.get(most := max(one.take for one in every), f"{most} times")
    title = f"{what}, medians of so many rounds: {rounds}; taken {times}"
    report(name, title, where, COLUMNS, table(every), every)
    draw(every, what).savefig(PICTURES / f"{name}.png", dpi=110)


def models(dense: Any, keep_ratio: float) -> dict[str, nn.Module]:
    """What runs beside a dense model, in float32 on the CPU, by name; all share its weights."""

    def ours(scorer: str) -> Any:
        return tokenprune.sparsify(twin(dense), keep_ratio=keep_ratio, scorer=scorer)

    official = ours("predictor")
    plan, num_patches = official.tokenprune.plan, dense.patch_embed.num_patches
    counted = tokenprune.flops(official, input_size(dense))
    scorers = [stage.scorer.state_dict() for stage in official.tokenprune.stages]
    r = merged_by_block(dense, counted.sparse / counted.dense)
    num_keep = dict(zip(plan.stages, plan.num_keep(num_patches), strict=True))
    made: dict[str, nn.Module] = {
        CUT: shortened(dense, plan, num_patches),
        "DynamicViT, written out": DynamicViT(twin(dense), num_keep, dict(zip(plan.stages, scorers, strict=True))),
        f"ToMe, r = {r}, written out": ToMe(twin(dense), r),
    }
    for scorer, label in SCORERS.items():
        made[f"ours, {label} predictor"] = official if scorer == "predictor" else ours(scorer)
        made[f"ours, {label} predictor, frozen"] = tokenprune.freeze(ours(scorer))
    return {what: model.eval() for what, model in made.items()}


def merged_by_block(model: Any, share: float) -> int:
    """The r with which ToMe takes the nearest to a share of the dense model's multiply-adds in its blocks."""

    def cost(r: int) -> float:
        length, width, every = model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim, 0.0
        for block in model.blocks:
            every += 4 * length * width**2 + 2 * length**2 * width
            length -= min(r, (length - model.num_prefix_tokens) // 2)
            every += 2 * length * width * block.mlp.fc1.out_features
        return every

    return min(range(model.patch_embed.num_patches), key=lambda r: abs(cost(r) / cost(0) - share))


def measure(
    dense: Any,
    keep_ratio: float,
    *,
    runtime: str,
    batch_sizes: Sequence[int],
    device: str,
    dtype: str,
    pairs: int,
    take: int = 1,
    at_once: int = 0,
) -> list[Measured]:
    """Time all models in turn in one runtime.

    Args:
        dense: A Vision Transformer of timm with a class token, in float32 on the CPU.
        keep_ratio: ρ.
        runtime: A name that `tokenprune.throughput` knows.
        batch_sizes: Images in a batch, each.
        device: Where to measure.
        dtype: Of weights and images.
        pairs: Rounds; four times as many at batches up to 4, which scatter more.
        take: A number for this time.
        at_once: How many models are in memory at a time, besides the dense one and the cut sequence, which are timed
            again beside each group of them; 0 means all.
    """
    beside = models(dense, keep_ratio)
    for model in (dense, *beside.values()):
        model.to(device, getattr(torch, dtype))
    names, found = [what for what in beside if what != CUT], []
    size = at_once or len(names)
    for start in range(0, len(names), size):
        group = [CUT, *names[start : start + size]]
        every = [dense, *(beside[what] for what in group)]
        with torch.no_grad(), runtime_named(runtime)(every, input_size(dense)) as timers:
            for batch in batch_sizes:
                images = torch.rand(batch, *input_size(dense), device=device, dtype=getattr(torch, dtype))
                rounds, warmup = pairs if batch > 4 else 4 * pairs, 3 if batch < 64 else 1
                first, limit, *others = in_turn(timers(images), rounds=rounds, warmup=warmup)
                found += [
                    Measured(
                        runtime=runtime,
                        batch_size=batch,
                        what=what,
                        dense_over_it=Ratio(first_seconds=first, second_seconds=seconds),
                        of_limit=Ratio(first_seconds=limit, second_seconds=seconds).median,
                        take=take,
                    )
                    for what, seconds in zip(group, (limit, *others), strict=True)
                    if what != CUT or start == 0
                ]
    return found


def read(entry: dict[str, Any]) -> Measured:
    """An entry of the results file."""
    seconds = {name: tuple(values) for name, values in entry["dense_over_it"].items()}
    return Measured(**{**entry, "dense_over_it": Ratio(**seconds)})


def table(measured: Sequence[Measured]) -> list[list[str]]:
    """A line for each model in each runtime and at each batch size, with the figures of every take."""
    rows = []
    for (runtime, batch, what), takes in by_row(measured).items():
        figures = [(f"{1e3 * one.dense_over_it.medians[1]:.1f}", f"{one.dense_over_it.median:.3f}",
                    f"{one.of_limit:.3f}") for one in takes]  # fmt: skip
        rows.append([runtime, f"{batch}", what, *(" / ".join(column) for column in zip(*figures, strict=True))])
    return rows


def by_row(measured: Sequence[Measured]) -> dict[tuple[str, int, str], list[Measured]]:
    """What was measured by runtime, batch size and model, in the order of takes."""
    rows: dict[tuple[str, int, str], list[Measured]] = {}
    for one in measured:
        rows.setdefault((one.runtime, one.batch_size, one.what), []).append(one)
    return {row: sorted(takes, key=lambda one: one.take) for row, takes in rows.items()}


def draw(measured: Sequence[Measured], title: str) -> Any:
    """What is gained on the dense model, a panel for each runtime and batch size; the line is the cut sequence's."""
    from matplotlib.figure import Figure

    rows = by_row(measured)
    runtimes, batches = [*dict.fromkeys(key[0] for key in rows)], [*dict.fromkeys(key[1] for key in rows)]
    names = [*dict.fromkeys(key[2] for key in rows)]
    figure = Figure(figsize=(3 + 2.7 * len(runtimes), 1 + 2.1 * len(batches)), layout="constrained")
    panels = figure.subplots(len(batches), len(runtimes), sharex=True, sharey=True, squeeze=False)
    for line, batch in zip(panels, batches, strict=True):
        for axes, runtime in zip(line, runtimes, strict=True):
            if not any(key[:2] == (runtime, batch) for key in rows):
                axes.set_visible(False)
                continue
            axes.set_title(f"{runtime}, batch {batch}", fontsize=10)
            axes.axvline(1, color="gray", linewidth=0.8)
            for place, what in enumerate(names):
                speeds = [one.dense_over_it.median for one in rows.get((runtime, batch, what), [])]
                if not speeds:
                    continue
                color = "gray" if what == CUT else "tab:blue" if what.startswith("ours") else "tab:orange"
                axes.barh(place, sum(speeds) / len(speeds) - 1, left=1, color=color, alpha=0.75)
                axes.plot(speeds, [place] * len(speeds), "k.", markersize=4)
                if what == CUT:
                    axes.axvline(sum(speeds) / len(speeds), color="gray", linestyle="--", linewidth=0.8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
    panels[0][0].invert_yaxis()
    figure.supxlabel("speed-up over the dense model; dots: each time it was measured", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


if __name__ == "__main__":
    typer.run(main)
