"""``tokenprune report``: one self-contained page about a run, several runs, or a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenprune.cli.options import (
    MODEL_HELP,
    ImageSize,
    Json,
    OneKeepRatio,
    Pretrained,
    Pruned,
    Stages,
    TrainingFreeScorer,
    ratio,
    sparsified,
)
from tokenprune.cli.output import show, show_json, step, working

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN_OR_MODEL…",
        help=f"Folders that recipes wrote, to compare if several; or one model. {MODEL_HELP}",
        show_default=False,
    ),
]


def report(
    context: typer.Context,
    sources: Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", exists=True, dir_okay=False, help="A picture to show kept tokens on; repeat."),
    ] = None,
    keep_ratio: OneKeepRatio = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: TrainingFreeScorer = None,
    pruned: Pruned = None,
    bench: Annotated[bool, typer.Option("--bench", help="Measure throughput, too.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a measured batch.")] = 16,
    pairs: Annotated[int, typer.Option(min=2, help="Measured pairs of batches, dense and sparse.")] = 15,
    title: Annotated[str, typer.Option(help="Of the page.")] = "",
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Write one self-contained page: what was done, accuracy, GMACs, throughput, curves, pictures of kept tokens.

    In Python: tokenprune.report(model, runs=…, images=…).
    """
    from tokenprune.analysis.benchmark import throughput
    from tokenprune.analysis.report import report as write
    from tokenprune.analysis.report.runs import is_run
    from tokenprune.errors import TokenpruneError

    chosen = None if keep_ratio is None else ratio(keep_ratio)
    runs = [source for source in sources if is_run(source)]
    if runs and len(runs) != len(sources):
        raise typer.BadParameter("give folders of runs, or one model; some of these hold no results.json.")
    if not runs and len(sources) > 1:
        raise typer.BadParameter("several models cannot be compared on one page; folders of runs can.")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"--output {output}: there is no folder {output.parent}.")
    wanted = [name for name, value in (("--image", images), ("--bench", bench), ("--keep-ratio", chosen)) if value]
    if len(runs) > 1 and wanted:
        raise typer.BadParameter(f"{wanted[0]}: for one run or model, and not for {len(runs)}.")
    given: dict[str, Any] = {"runs": runs, "images": images or (), "title": title}
    given["commands"] = [shlex.join(["tokenprune", *map(str, context.obj or ())])]
    with working(f"loading {sources[0]}") as progress:
        model, without = None, ""
        if len(sources) == 1:
            try:
                model, size = sparsified(
                    sources[0],
                    stages=stages,
                    keep_ratio=chosen,
                    image_size=image_size,
                    scorer=scorer,
                    pruned=pruned,
                    pretrained=pretrained and not runs,
                    default_scorer="cls_attention",
                )
            except TokenpruneError as error:
                # A dense run, or one of a model that is not known here: the page has what was written down.
                if not runs or wanted:
                    raise
                without = " ".join(str(error).split())
        if model is not None:
            given["input_size"] = size
            if bench:
                step(progress, "measuring")
                given["throughput"] = throughput(model, size, batch_size=batch_size, pairs=pairs)
        step(progress, "counting and drawing")
        page = write(model, **given)
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"--output {output}: {error.strerror}") from error
    if as_json:
        show_json({"output": str(output), "bytes": len(page.encode()), "runs": runs, "has_model": model is not None})
    else:
        show(f"The page is in {output}." + (f" It is of the run alone: {without}" if without else ""))
