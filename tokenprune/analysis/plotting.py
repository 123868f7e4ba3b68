"""Pictures of what was counted, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.analysis.flop_counter import FlopReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def flops_curve(reports: Sequence[FlopReport], *, title: str = "") -> Figure:
    """Multiply-adds over the fraction of patch tokens that is left after the last stage, with the dense model's.

    Args:
        reports: Reports of one model at several keep ratios.
        title: Of the figure.

    Returns:
        A figure that belongs to no window: ``figure.savefig("curve.png")``, or the value of a notebook's cell.
    """
    from matplotlib.figure import Figure

    ordered = sorted(reports, key=lambda report: report.keep_ratios[-1])
    left = [report.keep_ratios[-1] for report in ordered]
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(left, [report.sparse_gmacs for report in ordered], marker="o", label="sparse")
    axes.axhline(ordered[0].dense_gmacs, color="gray", linestyle="--", label="dense")
    for share, report in zip(left, ordered, strict=True):
        axes.annotate(
            f"÷ {report.ratio:.2f}", (share, report.sparse_gmacs), xytext=(4, -10), textcoords="offset points"
        )
    axes.set(xlabel="patch tokens left after the last stage", ylabel="GMACs of one image", title=title)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)  # room for the last label
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend()
    return figure
