"""The report: what is known about a model and about runs, on one page."""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.analysis.benchmark import ThroughputReport
from tokenprune.analysis.flop_counter import FlopReport, flops
from tokenprune.analysis.kept_tokens import kept_tokens
from tokenprune.analysis.report import sections
from tokenprune.analysis.report.runs import Run, read_run
from tokenprune.api import sparsifier_of, unwrap
from tokenprune.backbones.preprocessing import Picture, Preprocessing
from tokenprune.errors import PictureError, extra

KEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)


def report(
    model: nn.Module | None = None,
    *,
    runs: str | Path | Sequence[str | Path] = (),
    images: Picture | Sequence[Picture] = (),
    throughput: ThroughputReport | None = None,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    title: str = "",
    commands: Sequence[str] = (),
    input_size: Sequence[int] | None = None,
    preprocessing: Preprocessing | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Write a page about a sparsified model, about training runs, or about a model and the run it came from.

    The page is one HTML file that loads nothing from elsewhere. It has what was done, a table of accuracy, GMACs and
    throughput, curves, the pictures that `show` draws with a slider through the stages, the multiply-adds block by
    block, versions, and commands; each as far as it is known from what is given.

    Args:
        model: A sparsified model; it is counted, and left as it is.
        runs: Folders that the recipes wrote, one or several to compare. With a model and one run, the model is
            taken to be that run's.
        images: Pictures to show kept tokens on, as `kept_tokens` takes them; they need the model.
        throughput: What `tokenprune.throughput(model)` measured.
        keep_ratios: Values ρ at which the model's multiply-adds are counted for a curve; empty for no curve.
        title: Of the page.
        commands: Commands that made the model, in addition to those that the runs recorded.
        input_size: Channels, height and width of the images to count for; ``None`` means the model's own.
        preprocessing: How pictures become inputs; ``None`` asks the adapter of the model's library.
        forward_kwargs: What the model is called with besides the images.

    Returns:
        The page: ``Path("report.html").write_text(page, encoding="utf-8")``.

    Raises:
        PictureError: There is neither model nor run, a run cannot be read, images or measurements are given without
            a model, or an image cannot be used.
        StateError: The model is not sparsified.
        UnsupportedModelError, CountingError: As `kept_tokens` and `flops`.
        MissingExtraError: Jinja2 or matplotlib is not installed.
    """
    read = [read_run(folder) for folder in ([runs] if isinstance(runs, (str, Path)) else runs)]
    without_images = isinstance(images, (list, tuple)) and not images
    if model is None:
        if not read:
            raise PictureError("there is nothing to report on; give a sparsified model, or folders of runs, or both.")
        if throughput is not None or not without_images:
            raise PictureError("images and throughput belong to a model; give it, too.")
        counted, curve = None, list[tuple[float, float]]()
    else:
        size = tuple(input_size or sparsifier_of(model).backbone.input_size(unwrap(model)))
        counted, curve = _counted(model, size, keep_ratios, forward_kwargs)
    kept = None
    if model is not None and not without_images:
        kept = kept_tokens(model, images, preprocessing=preprocessing, forward_kwargs=forward_kwargs)
    rows = sections.rows(read, counted, throughput)
    return _page(
        title=title or _title(model, read),
        facts=[] if model is None else sections.facts(model),
        runs=read,
        rows=rows,
        throughput=throughput,
        charts=[
            *sections.accuracy_charts(rows, read),
            *sections.ratio_chart(counted, curve),
            *sections.kept_charts(read),
        ],
        pictures=None if kept is None else sections.pictures(kept),
        blocks=None if counted is None else sections.blocks(counted),
        versions=_versions(model, read),
        commands=[*commands, *(run.command for run in read if run.command)],
        code="" if model is None else sections.code(model),
    )


def _counted(
    model: nn.Module, size: tuple[int, ...], keep_ratios: Sequence[float], forward_kwargs: Mapping[str, Any] | None
) -> tuple[FlopReport, list[tuple[float, float]]]:
    """The model's multiply-adds, and the GMACs of the pruned model over ρ."""
    sparsifier = sparsifier_of(model)
    before = sparsifier.keep_ratio
    curve: list[tuple[float, float]] = []
    try:
        for ratio in sorted(keep_ratios):
            sparsifier.keep_ratio = ratio
            curve.append((ratio, flops(model, size, forward_kwargs=forward_kwargs).sparse_gmacs))
    finally:
        sparsifier.keep_ratio = before
    return flops(model, size, forward_kwargs=forward_kwargs), curve


def _title(model: nn.Module | None, runs: list[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    if model is None:
        return f"Run {names}" if len(runs) == 1 else f"Runs {names}"
    return f"{type(unwrap(model)).__name__} with fewer tokens" + (f": {names}" if names else "")


def _versions(model: nn.Module | None, runs: list[Run]) -> list[tuple[str, str, str]]:
    """Name, version, and of what: the page, or a run."""
    names = ["tokenprune", "torch"]
    if model is not None:
        names += [base.__module__.partition(".")[0] for base in type(unwrap(model)).__mro__[:1]]
    made = [("Python", platform.python_version(), "this page")]
    for name in dict.fromkeys(names):
        try:
            made.append((name, version(name), "this page"))
        except PackageNotFoundError:
            continue
    return made + [(name, one, f"run {run.name}") for run in runs for name, one in run.versions.items()]


def _page(**content: Any) -> str:
    with extra("plots"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
    environment = Environment(
        loader=PackageLoader("tokenprune.analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (files("tokenprune.analysis.report") / "templates" / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(**content, script=script, script_digest=digest)
