"""``tokenprune calibrate``: the scorers of a model, trained on images without labels."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.options import (
    DeviceName,
    ImageSize,
    Json,
    Model,
    OneKeepRatio,
    Pretrained,
    Pruned,
    ScorerName,
    Stages,
    check_folder,
    device_named,
    ratio,
    sparsified,
)
from tokenprune.cli.output import show, show_json, working

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES…",
        help="Folders, searched with all that is in them, or pictures; or the tar files of a WebDataset, also as "
        "'shard-{000..099}.tar'. Labels are not looked at.",
        show_default=False,
    ),
]


class Train(str, Enum):
    """What is trained."""

    scorers = "scorers"
    all = "all"


class Autocast(str, Enum):
    """dtypes that a model may be run in beside its own."""

    none = "none"
    bfloat16 = "bfloat16"
    float16 = "float16"


def calibrate(
    model: Model,
    images: Images,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to save the model in.", show_default=False)
    ],
    keep_ratio: OneKeepRatio = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: ScorerName = None,
    pruned: Pruned = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps that train the scorers, one batch each.")] = 100,
    train: Annotated[
        Train, typer.Option(help="all goes on with the rest of the model, with tokens really removed.")
    ] = Train.scorers,
    backbone_steps: Annotated[int, typer.Option(min=1, help="With --train all: steps that train the rest.")] = 150,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a step.")] = 64,
    ratio_range: Annotated[
        str,
        typer.Option(
            "--keep-ratio-range",
            help="Lowest and highest ρ, one of which is drawn in each step; 'own' trains at the model's ratios alone.",
        ),
    ] = "0.4,0.7",
    learning_rate: Annotated[float, typer.Option(help="Of the scorers.")] = 3e-3,
    backbone_learning_rate: Annotated[float, typer.Option(help="Of the rest.")] = 2e-4,
    autocast: Annotated[Autocast, typer.Option(help="Run the model in this dtype.")] = Autocast.none,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 2,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: DeviceName = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Train what pruning adds to a model, on images without labels, and save it.

    The model itself, unpruned, is the teacher; its weights stay as they are, unless --train all. One calibration serves
    every keep ratio. Ctrl-C ends it early, and saves the best so far.

    In Python: tokenprune.calibrate(model, images).
    """
    import torch

    from tokenprune.api import sparsifier_of
    from tokenprune.backbones.adapters import preprocessing_of
    from tokenprune.saving import save_pretrained
    from tokenprune.training.calibration import calibrate as run
    from tokenprune.training.pictures import picture_loader

    check_folder("--output", output)
    chosen, bounds, target = (
        None if keep_ratio is None else ratio(keep_ratio),
        _bounds(ratio_range),
        device_named(device),
    )
    with working(f"loading {model}"):
        torch.manual_seed(seed)  # for scorers that start from random numbers
        loaded, _ = sparsified(
            model,
            stages=stages,
            keep_ratio=chosen,
            image_size=image_size,
            scorer=scorer,
            pruned=pruned,
            pretrained=pretrained,
        )
        pictures = picture_loader(
            images, preprocessing_of(loaded), batch_size=batch_size, num_workers=num_workers, seed=seed
        )
    try:
        report = run(
            loaded.to(target),
            pictures,
            steps=steps,
            train=train.value,
            backbone_steps=backbone_steps,
            keep_ratio_range=bounds,
            learning_rate=learning_rate,
            backbone_learning_rate=backbone_learning_rate,
            autocast=None if autocast is Autocast.none else getattr(torch, autocast.value),
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with working(f"saving {output}"):
        try:
            save_pretrained(loaded.cpu(), output)
        except OSError as error:
            raise typer.BadParameter(f"--output {output}: {error.strerror}.") from error
    if as_json:
        plan = sparsifier_of(loaded).plan
        show_json(
            {
                "model": model,
                "output": str(output),
                "stages": list(plan.stages),
                "keep_ratios": list(plan.keep_ratios),
                "report": json.loads(report.to_json()),
            }
        )
        return
    show(report, f'It is in {output}: tokenprune.from_pretrained("{output}").')


def _bounds(text: str) -> tuple[float, float] | None:
    if text == "own":
        return None
    numbers = ratio(text)
    if not isinstance(numbers, tuple) or len(numbers) != 2:
        raise typer.BadParameter(f"--keep-ratio-range {text}: expected two numbers such as 0.4,0.7, or 'own'.")
    return numbers
