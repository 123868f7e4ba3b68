"""The parts of a report: what is known about runs and a model, as rows, charts and pictures for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tokenprune.analysis.benchmark import ThroughputReport
from tokenprune.analysis.flop_counter import FlopReport
from tokenprune.analysis.kept_tokens import KeptTokens
from tokenprune.analysis.overlays import coloured, heat_maps, pictures_of
from tokenprune.analysis.report.charts import bar_chart, line_chart
from tokenprune.analysis.report.runs import Run
from tokenprune.api import sparsifier_of, unwrap
from tokenprune.errors import extra
from tokenprune.pruning.stage import Stage

SMALL = 128  # pixels; pictures below are enlarged with sharp edges, and stored without loss


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; ``None`` where a figure is not known.

    Attributes:
        name: The model.
        sparse: Whether it prunes.
        gmacs: 10⁹ multiply-adds an image.
        top1: Accuracy as a fraction.
        top5: The same for five guesses.
        gmac_ratio: Dense ÷ own multiply-adds.
        images_per_second: As measured.
        speedup: As measured, median of pairs.
    """

    name: str
    sparse: bool
    gmacs: float
    top1: float | None = None
    top5: float | None = None
    gmac_ratio: float | None = None
    images_per_second: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with what stands above it and below it."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One position of the slider for one image: the picture, and the scores where there are any, as data URIs."""

    label: str
    picture: str
    text: str
    scores: str | None
    scores_text: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of kept tokens: for each image its name and a frame for each position of the slider."""

    labels: list[str]
    images: list[tuple[str, list[Frame]]]
    small: bool


def rows(runs: list[Run], counted: FlopReport | None, throughput: ThroughputReport | None) -> list[Row]:
    """The table of results: dense and sparse of every run, and of the model if it is not the one run's."""
    made: list[Row] = []
    for run in runs:
        of_model = throughput if len(runs) == 1 else None
        sparse = "sparse" in run.gmacs
        dense, prefix = run.gmacs.get("dense"), "dense_" if sparse else ""
        if dense is not None:
            one = Row(
                name="dense" if sparse else run.name,
                sparse=False,
                gmacs=dense,
                top1=run.scores.get(f"{prefix}top1"),
                top5=run.scores.get(f"{prefix}top5"),
                images_per_second=None if of_model is None else of_model.dense_images_per_second,
            )
            made += [] if one in made else [one]
        if sparse:
            made.append(
                Row(
                    name=run.name,
                    sparse=True,
                    gmacs=run.gmacs["sparse"],
                    top1=run.scores.get("top1"),
                    top5=run.scores.get("top5"),
                    gmac_ratio=None if dense is None else dense / run.gmacs["sparse"],
                    images_per_second=None if of_model is None else of_model.sparse_images_per_second,
                    speedup=None if of_model is None else of_model.speedup,
                )
            )
    if counted is not None and len(runs) != 1:
        fast = (None, None) if throughput is None else (throughput.dense_images_per_second, throughput.speedup)
        speed = None if throughput is None else throughput.sparse_images_per_second
        made += [
            Row(name="this model, dense", sparse=False, gmacs=counted.dense_gmacs, images_per_second=fast[0]),
            Row(name="this model, sparse", sparse=True, gmacs=counted.sparse_gmacs, gmac_ratio=counted.ratio,
                images_per_second=speed, speedup=fast[1]),
        ]  # fmt: skip
    return made


def facts(model: nn.Module) -> list[tuple[str, str]]:
    """What was done to a model, as terms and values; its last forward pass was counted."""
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    plan, trace = sparsifier.plan, sparsifier.trace
    stages = [cast(Stage, stage) for stage in sparsifier.stages]
    scorers = dict.fromkeys(type(stage.scorer).__name__ for stage in stages)
    reductions = dict.fromkeys(type(stage.reduction).__name__ for stage in stages)
    added = sum(parameter.numel() for parameter in sparsifier.parameters())
    own = sum(parameter.numel() for parameter in inner.parameters()) - added
    found = [
        ("Model", f"{type(inner).__module__.partition('.')[0]} {type(inner).__name__}"),
        ("Blocks", f"{len(sparsifier.backbone.blocks)} of width {sparsifier.backbone.embed_dim}"),
        ("Pruned at blocks", ", ".join(map(str, plan.stages))),
        ("Kept of the original patches", " → ".join(f"{ratio:.1%}" for ratio in plan.keep_ratios)),
    ]
    if trace is not None:
        total = int(trace.num_patches)
        found.append(("Patch tokens", " → ".join(map(str, (total, *plan.num_keep(total))))))
    return [
        *found,
        ("Scorer", ", ".join(scorers)),
        ("Pruned tokens", ", ".join(reductions)),
        ("Parameters", f"{own / 1e6:.2f} M, and {added / 1e6:.2f} M of the stages"),
    ]


def code(model: nn.Module) -> str:
    """Python code that sparsifies a model of the same kind in the same way."""
    sparsifier = sparsifier_of(model)
    plan, comma = sparsifier.plan, "," if len(sparsifier.stages) == 1 else ""
    ratios = ", ".join(f"{ratio:.6g}" for ratio in plan.keep_ratios)
    options = [f"stages={plan.stages}", f"keep_ratio=({ratios}{comma})"]
    options += [] if sparsifier.scorer is None else [f"scorer={sparsifier.scorer!r}"]
    options += [] if sparsifier.pruned in (None, "drop") else [f"pruned={sparsifier.pruned!r}"]
    return f"import tokenprune\n\ntokenprune.sparsify(model, {', '.join(options)})"


def accuracy_charts(table: list[Row], runs: list[Run]) -> list[Chart]:
    """Accuracy over multiply-adds, and over each run's training."""
    charts = []
    known = [row for row in table if row.top1 is not None]
    if len(known) > 1:
        curves = {
            name: sorted((row.gmacs, row.top1 or 0.0) for row in known if row.sparse is sparse)
            for name, sparse in (("sparse", True), ("dense", False))
        }
        curves = {name: curve for name, curve in curves.items() if curve}
        told = "; ".join(f"{row.name}: {row.top1:.2%} at {row.gmacs:.3g} GMACs" for row in known)
        svg = line_chart(
            curves, title=f"Accuracy over GMACs. {told}.", x_label="GMACs of one image", y_label="top-1 accuracy",
            y_format=_percent, points=True,
        )  # fmt: skip
        charts.append(Chart(title="Accuracy and cost", svg=svg, note="Farther left is cheaper, higher is better."))
    for run in runs:
        curves_of_run = run.accuracy()
        if any(len(curve) > 1 for curve in curves_of_run.values()):
            last = "; ".join(f"{name} ends at {curve[-1][1]:.2%}" for name, curve in curves_of_run.items())
            svg = line_chart(
                curves_of_run, title=f"Accuracy in training of {run.name}: {last}.", x_label="step",
                y_label="top-1 accuracy", y_format=_percent,
            )  # fmt: skip
            charts.append(Chart(title=f"Accuracy in training: {run.name}", svg=svg))
    return charts


def ratio_chart(counted: FlopReport | None, curve: list[tuple[float, float]]) -> list[Chart]:
    """Multiply-adds over ρ, of the model that was counted."""
    if counted is None or len(curve) < 2:
        return []
    dense = [(ratio, counted.dense_gmacs) for ratio, _ in (curve[0], curve[-1])]
    told = ", ".join(f"{gmacs:.3g} at {ratio:g}" for ratio, gmacs in curve)
    svg = line_chart(
        {"sparse": curve, "dense": dense}, title=f"GMACs over ρ: {told}; dense {counted.dense_gmacs:.3g}.",
        x_label="ρ: the stages keep ρ, ρ², ρ³ …", y_label="GMACs of one image", from_zero=True, points=True,
    )  # fmt: skip
    return [
        Chart(title="Cost at other keep ratios", svg=svg, note="The same model and stages, counted anew at each ρ.")
    ]


def kept_charts(runs: list[Run]) -> list[Chart]:
    """The share of tokens that each stage kept over each run's training."""
    charts = []
    for run in runs:
        curves = run.kept()
        if curves:
            last = "; ".join(f"{name} ends at {curve[-1][1]:.1%}" for name, curve in curves.items())
            svg = line_chart(
                curves, title=f"Kept ratio over the training of {run.name}: {last}.", x_label="step",
                y_label="patch tokens kept", y_format=_percent, from_zero=True,
            )  # fmt: skip
            note = "Of the original patch tokens, after each stage, as sampled in training."
            charts.append(Chart(title=f"Kept in training: {run.name}", svg=svg, note=note))
    return charts


def blocks(counted: FlopReport) -> Chart:
    """The multiply-adds of every block, before and after."""
    bars = [
        (f"block {index}", before / 1e6, after / 1e6)
        for index, (before, after) in enumerate(zip(counted.dense_blocks, counted.sparse_blocks, strict=True))
    ]
    for stage, block in reversed(list(enumerate(counted.stage_blocks))):
        bars.insert(block, (f"stage {stage + 1}", 0.0, counted.stages[stage] / 1e6))
    told = f"{counted.dense_gmacs:.4g} GMACs dense, {counted.sparse_gmacs:.4g} sparse, {counted.ratio:.2f} times fewer"
    svg = bar_chart(bars, title=f"Multiply-adds block by block: {told} in all.", unit="million multiply-adds")
    size = " × ".join(map(str, counted.input_size))
    return Chart(
        title="Block by block", svg=svg, note=f"One image of {size}: {told}, patch embedding and head included."
    )


def pictures(kept: KeptTokens) -> Pictures:
    """What `tokenprune.show` draws, as pictures inside of the page."""
    labels = ["all patches", *(f"stage {stage}" for stage in range(1, len(kept.keep) + 1))]
    small = kept.pixels.shape[-1] < SMALL
    images: list[tuple[str, list[Frame]]] = []
    for index, file in enumerate(kept.names):
        name = file or f"Image {index + 1}"
        frames = []
        for row, label in enumerate(labels):
            count = kept.num_patches if row == 0 else kept.num_kept(row - 1)
            share = f"{count} of {kept.num_patches} patches"
            text = f"{name}, whole" if row == 0 else f"{name} after {label}: {share} kept, the others veiled"
            maps = heat_maps(kept, row)
            frames.append(
                Frame(
                    label=f"{label}: {share}" if row else f"{kept.num_patches} patches",
                    picture=_data_uri(pictures_of(kept, row)[index], lossless=small),
                    text=text,
                    scores=None if maps is None else _data_uri(coloured(maps[index]), lossless=True),
                    scores_text=f"{name}: scores of {label}, a colour a patch",
                )
            )
        images.append((name, frames))
    return Pictures(labels=labels, images=images, small=small)


def _data_uri(pixels: Tensor, *, lossless: bool) -> str:
    """Pixels (H, W, channels), from 0 to 1, as a PNG or JPEG inside of a URI."""
    with extra("plots"):
        from PIL import Image
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
    picture.save(buffer, format=kind, optimize=True, **({} if lossless else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
