"""``tokenprune export``: a model as an ONNX file or a torch.export program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.options import ImageSize, Json, Model, Pruned, ScorerName, Stages, ratio, sparsified
from tokenprune.cli.output import show, show_json, step, working


def export(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file; .onnx or .pt2 says which kind.", show_default=False)
    ],
    keep_ratio: Annotated[
        str | None,
        typer.Option(
            "--keep-ratio",
            "-k",
            help="ρ, or one cumulative fraction a stage, as in 0.8,0.5,0.3. Default: 0.7, or what was saved.",
            show_default=False,
        ),
    ] = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: ScorerName = None,
    pruned: Pruned = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Whether a library's model has its trained weights.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write a model to a file for other runtimes, with a free batch size and fixed keep counts, and check it.

    The file is run beside the model at batch 1, 3 and 8, and not left if they disagree. A model that was not saved
    sparsified has a predictor that has learned nothing; --scorer cls_attention needs no training.

    In Python: tokenprune.export(model, path).
    """
    from tokenprune.saving.export import check_path
    from tokenprune.saving.export import export as write

    try:
        check_path(output)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(f"--output {error}") from None
    chosen = None if keep_ratio is None else ratio(keep_ratio)
    with working(f"loading {model}") as progress:
        loaded, size = sparsified(
            model,
            stages=stages,
            keep_ratio=chosen,
            image_size=image_size,
            scorer=scorer,
            pruned=pruned,
            pretrained=pretrained,
        )
        step(progress, "exporting and checking")
        report = write(loaded, output, input_size=size)
    if as_json:
        show_json({"model": model, **json.loads(report.to_json())})
    else:
        show(str(report))
