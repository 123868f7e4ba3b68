"""The table and the picture of what was found, of as many points as there are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.engine.checkpoints import write_text, write_whole
from recipes.engine.tables import Table
from recipes.frontier.grid import COSTS, TRAININGS, Method
from recipes.frontier.runs import Runs

COLORS = {
    "random": "#9aa0a6", "static": "#c77700", "cls_attention": "#2a9d8f", "redundancy": "#8e6bbf",
    "informative": "#1f6fd0", "predictor": "#c62828", "tome": "#6d4c41",
}  # fmt: skip
LINES = {"none": ":", "calibrated": "-", "gathered": "--", "masked": "-."}
MARKERS = {"drop": "o", "fuse": "s", "merge": "^", "merge_sizes": "v"}

# Method -> cost -> accuracies, one a seed.
Found = dict[Method, dict[float, list[float]]]


def gathered_by_method(runs: Runs) -> Found:
    """The accuracies of a data set, in the order in which methods were run."""
    found: Found = {}
    for point in runs.found.values():
        if "method" in point:
            method = Method(**point["method"])
            found.setdefault(method, {}).setdefault(point["cost"], []).append(point["accuracy"])
    return found


def table(runs: Runs) -> Table:
    """Mean and spread of every method at every cost."""
    dense = runs.dense()
    made = Table(
        title=f"{runs.task.name}: dense {dense['accuracy']:.2%} at {dense['gmacs']:.4f} GMACs",
        columns=("training", "scorer", "pruned tokens", *(f"{cost:.0%} of the GMACs" for cost in COSTS)),
    )
    found = gathered_by_method(runs)
    best = {cost: max((_mean(row[cost]) for row in found.values() if cost in row), default=0.0) for cost in COSTS}
    for training, label in TRAININGS.items():
        for method, row in found.items():
            if method.training == training:
                cells = [_cell(row.get(cost, []), best[cost]) for cost in COSTS]
                made.add(label, method.scorer, method.pruned, *cells)
    return made


def _mean(accuracies: Sequence[float]) -> float:
    return statistics.fmean(accuracies)


def _cell(accuracies: Sequence[float], best: float) -> str:
    """Mean ± half of the range, in percent; the best of a column is bold."""
    if not accuracies:
        return "–"
    mean = f"{100 * _mean(accuracies):.2f}"
    spread = f" ± {50 * (max(accuracies) - min(accuracies)):.2f}" if len(accuracies) > 1 else ""
    return f"**{mean}**{spread}" if _mean(accuracies) == best else mean + spread


def front(found: Found) -> list[tuple[float, float, Method]]:
    """Cost, mean accuracy and method of what no other method beats at its cost or below, from cheap to expensive."""
    means = [(cost, _mean(row[cost]), method) for method, row in found.items() for cost in row]
    best: list[tuple[float, float, Method]] = []
    for cost, mean, method in sorted(means, key=lambda one: (one[0], -one[1])):
        if not best or mean > best[-1][1]:
            best.append((cost, mean, method))
    return best


def picture(all_runs: Sequence[Runs]) -> Figure:
    """Accuracy over cost, a panel for each data set, with the Pareto front."""
    figure = Figure(figsize=(6.2 * len(all_runs), 5.4), layout="constrained")
    for axes, runs in zip(figure.subplots(1, len(all_runs), squeeze=False)[0], all_runs, strict=True):
        _panel(axes, runs)
    legend: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _panel(axes: Any, runs: Runs) -> None:
    found, dense = gathered_by_method(runs), 100 * runs.dense()["accuracy"]
    lowest = dense
    for method, row in found.items():
        costs = sorted(row)
        means = [100 * _mean(row[cost]) for cost in costs]
        spread = [50 * (max(row[cost]) - min(row[cost])) for cost in costs]
        axes.errorbar(
            [100 * cost for cost in costs], means, yerr=spread, color=COLORS.get(method.scorer, "black"),
            linestyle=LINES[method.training], marker=MARKERS.get(method.pruned, "D"), markersize=4, linewidth=1,
            label=f"{method.label} ({TRAININGS[method.training]})",
        )  # fmt: skip
        if method.scorer not in ("random", "static"):
            lowest = min(lowest, *means)
    best = front(found)
    axes.plot(
        [100 * cost for cost, _, _ in best], [100 * mean for _, mean, _ in best], color="black", alpha=0.15,
        linewidth=9, solid_capstyle="round", zorder=0, label="Pareto front",
    )  # fmt: skip
    axes.axhline(dense, color="black", linewidth=0.8)
    axes.annotate("dense", (0.99, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_ylim(lowest - 2, dense + 0.07 * (dense - lowest))  # random and static scores may lie far below
    axes.set(title=runs.task.name, xlabel="multiply-adds, % of dense", ylabel="top-1, %")
    axes.grid(alpha=0.2)


def write_report(all_runs: Sequence[Runs], output: Path) -> list[Table]:
    """Write ``frontier.md`` and ``frontier.png``; returns the tables."""
    tables = [table(runs) for runs in all_runs]
    write_text(output / "frontier.md", "\n".join(f"## {one.title}\n\n{one.markdown()}" for one in tables))
    drawn = picture(all_runs)
    write_whole(output / "frontier.png", lambda partial: drawn.savefig(partial, format="png", dpi=110))
    return tables
