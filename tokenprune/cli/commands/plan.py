"""``tokenprune plan``: the keep ratios that meet a budget."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import (
    DeviceName,
    ImageSize,
    Json,
    Model,
    Pretrained,
    Pruned,
    Stages,
    device_named,
    sparsified,
)
from tokenprune.cli.output import show, show_json, step, working

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.analysis.flop_counter import FlopReport

Images = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGES…]",
        help="Pictures to search the ratios of single stages on, some hundred of them: folders, files, or the tar "
        "files of a WebDataset. Labels are not looked at.",
        show_default=False,
    ),
]


BATCH_SIZE = 64


def plan(
    model: Model,
    images: Images = None,
    gmacs: Annotated[
        float | None, typer.Option(help="Multiply-adds of one image at most, in 10⁹.", show_default=False)
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Dense ÷ pruned time of a batch, measured here.", show_default=False)
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(help="Least share of IMAGES that get the dense model's class.", show_default=False),
    ] = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="The scorer. Default: predictor, with IMAGES cls_attention, or what was saved."),
    ] = None,
    pruned: Pruned = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a timed batch.")] = 16,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of batches, dense and pruned, of a measurement.")] = 15,
    most_images: Annotated[int, typer.Option(min=2, help="Look at no more than so many of IMAGES.")] = 512,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 2,
    device: DeviceName = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Find the keep ratios that meet a budget: --gmacs, --speedup or --agreement.

    Without IMAGES the stages keep ρ, ρ², ρ³ … of the patches; with them, the pruning is divided among the stages in the
    way that stays nearest to the dense model. Scorers should be those that the model will run with: calibrate first.

    In Python: tokenprune.plan_for(model, images, gmacs=3.0).
    """
    from tokenprune.analysis.flop_counter import flops
    from tokenprune.analysis.planning import plan_for
    from tokenprune.api import sparsifier_of
    from tokenprune.backbones.adapters import preprocessing_of
    from tokenprune.training.pictures import picture_loader

    target = device_named(device)
    with working(f"loading {model}") as progress:
        # Neither multiply-adds nor speed depend on weights.
        loaded, size = sparsified(
            model,
            stages=stages,
            keep_ratio=None,
            image_size=image_size,
            scorer=scorer,
            pruned=pruned,
            pretrained=pretrained and bool(images),
            default_scorer="cls_attention" if images else "predictor",
        )
        pictures = None
        if images:
            number = min(BATCH_SIZE, most_images)
            reader = picture_loader(images, preprocessing_of(loaded), batch_size=number, num_workers=num_workers)
            pictures = islice(reader, most_images // number)
        found = plan_for(
            loaded.to(target),
            pictures,
            gmacs=gmacs,
            speedup=speedup,
            agreement=agreement,
            input_size=size,
            batch_size=batch_size,
            pairs=pairs,
            progress=lambda what: step(progress, what),
        )
        step(progress, "counting multiply-adds")
        sparsifier_of(loaded).keep_ratio = found.keep_ratios
        counted = flops(loaded, size)
    if as_json:
        fields = {"model": model, "stages": found.stages, "keep_ratios": found.keep_ratios}
        show_json({**fields, "dense_gmacs": counted.dense_gmacs, "sparse_gmacs": counted.sparse_gmacs})
        return
    ratios = ",".join(map(str, found.keep_ratios))
    show(
        _table(model, counted),
        f"Take it with --keep-ratio {ratios}, or model.tokenprune.keep_ratio = {found.keep_ratios}.",
    )


def _table(model: str, counted: FlopReport) -> Table:
    from rich.table import Table

    table = Table(title=f"{model}, pruned in front of blocks {', '.join(map(str, counted.stage_blocks))}")
    for column in ("kept after each stage", "dense GMACs", "pruned", "dense ÷ pruned"):
        table.add_column(column, justify="right")
    kept = " → ".join(f"{ratio:.1%}" for ratio in counted.keep_ratios)
    table.add_row(kept, f"{counted.dense_gmacs:.4g}", f"{counted.sparse_gmacs:.4g}", f"{counted.ratio:.2f}")
    return table
