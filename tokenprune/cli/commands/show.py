"""``tokenprune show``: pictures of what each stage keeps of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.options import (
    ImageSize,
    Json,
    Model,
    OneKeepRatio,
    Pretrained,
    Pruned,
    Stages,
    TrainingFreeScorer,
    check_picture,
    ratio,
    sparsified,
)
from tokenprune.cli.output import show as say
from tokenprune.cli.output import show_json, step, working

Images = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE…", exists=True, dir_okay=False, help="Pictures.", show_default=False),
]


def show(
    model: Model,
    images: Images,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .png, .svg, .pdf …, or .gif for an animation.")
    ] = Path("kept_tokens.png"),
    keep_ratio: OneKeepRatio = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: TrainingFreeScorer = None,
    pruned: Pruned = None,
    scores: Annotated[bool, typer.Option(help="Draw the scores beside what is kept.")] = True,
    title: Annotated[str, typer.Option(help="Stands above the picture.")] = "",
    seconds: Annotated[float, typer.Option(min=0.02, help="How long an animation stays on each stage.")] = 1.0,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Draw images and, stage by stage, which patches are kept, and the scores behind it.

    In Python: tokenprune.show(model, images), and tokenprune.animate(model, images, file).
    """
    from tokenprune.analysis.kept_tokens import kept_tokens
    from tokenprune.analysis.overlays import drawn, write_animation
    from tokenprune.api import sparsifier_of

    chosen = None if keep_ratio is None else ratio(keep_ratio)
    check_picture("--output", output)
    with working(f"loading {model}") as progress:
        loaded, _ = sparsified(
            model,
            stages=stages,
            keep_ratio=chosen,
            image_size=image_size,
            scorer=scorer,
            pruned=pruned,
            pretrained=pretrained,
            default_scorer="cls_attention",
        )
        step(progress, "looking")
        kept = kept_tokens(loaded, images)
        step(progress, "drawing")
        try:
            if output.suffix.lower() == ".gif":
                write_animation(kept, output, seconds=seconds, scores=scores, title=title)
            else:
                drawn(kept, scores=scores, title=title).savefig(output)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--output {output}: {error}") from error
    counts = [kept.num_kept(stage) for stage in range(len(kept.keep))]
    if as_json:
        found = {"model": model, "output": str(output), "images": list(map(str, images)), "grid": kept.grid}
        decided = {"stages": kept.stages, "num_kept": counts, "scorer": sparsifier_of(loaded).scorer}
        show_json({**found, "num_patches": kept.num_patches, **decided})
    else:
        told = " → ".join(map(str, (kept.num_patches, *counts)))
        say(f"Of {kept.num_patches} patches the stages keep {told}. The picture is in {output}.")
