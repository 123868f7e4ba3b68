"""``tokenprune convert``: an official DynamicViT checkpoint becomes a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.options import Json, check_folder, ratio, stage_indices
from tokenprune.cli.output import show, show_json, working


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="The authors' file of a DeiT or LV-ViT.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to save the model in.", show_default=False)
    ],
    keep_ratio: Annotated[
        str, typer.Option("--keep-ratio", "-k", help="ρ, which the file does not say; or a fraction a stage.")
    ] = "0.7",
    stages: Annotated[
        str | None, typer.Option(help="Blocks in front of which the model prunes. Default: each quarter of the depth.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of the attention. Default: the published models', width / 64.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn an official DynamicViT checkpoint into a saved model.

    In Python: tokenprune.save_pretrained(tokenprune.load_dynamicvit(checkpoint), output).
    """
    from tokenprune.api import sparsifier_of
    from tokenprune.saving import save_pretrained
    from tokenprune.saving.dynamicvit import load_dynamicvit

    chosen, blocks = ratio(keep_ratio), stage_indices(stages)
    check_folder("--output", output)
    with working(f"converting {checkpoint.name}"):
        model = load_dynamicvit(checkpoint, keep_ratio=chosen, num_heads=num_heads, stages=blocks)
        try:
            save_pretrained(model, output)
        except OSError as error:
            raise typer.BadParameter(f"--output {output}: {error.strerror}.") from error
    plan = sparsifier_of(model).plan
    if as_json:
        show_json(
            {
                "output": str(output),
                "model_class": type(model).__name__,
                "stages": list(plan.stages),
                "keep_ratios": list(plan.keep_ratios),
            }
        )
        return
    kept = ", ".join(f"{one:.1%}" for one in plan.keep_ratios)
    show(
        f"{type(model).__name__} with stages in front of blocks {', '.join(map(str, plan.stages))}, which keep {kept}.",
        f'It is in {output}: tokenprune.from_pretrained("{output}").',
    )
