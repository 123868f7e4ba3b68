"""Options that several commands share, and the sparsified model that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

MODEL_HELP = (
    "A timm or torchvision name, the folder or Hub id of a transformers or timm model, or of a saved tokenprune model. "
    "library:name asks one library alone."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
KeepRatios = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-ratio",
        "-k",
        help="ρ: the fraction of its patch tokens that each stage keeps; or one cumulative fraction a stage, as in "
        "0.8,0.5,0.3. Give it several times to compare. Default: 0.7, or what was saved.",
        show_default=False,
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(
        help="Blocks in front of which tokens are pruned, as in 3,6,9. Default: each quarter of the depth, or what was "
        "saved.",
        show_default=False,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Pixels, as in 224 or 224x320. Default: the model's own.", show_default=False),
]
ScorerName = Annotated[
    str | None,
    typer.Option("--scorer", help="The scorer. Default: predictor, or what was saved.", show_default=False),
]
Pruned = Annotated[
    str | None,
    typer.Option(
        "--pruned",
        help="What becomes of pruned tokens: drop, fuse, merge, preserve, … Default: drop, or what was saved.",
        show_default=False,
    ),
]
TrainingFreeScorer = Annotated[
    str | None,
    typer.Option(
        "--scorer",
        help="The scorer. Default: cls_attention, which needs no training, or what was saved.",
        show_default=False,
    ),
]
OneKeepRatio = Annotated[
    str | None,
    typer.Option(
        "--keep-ratio",
        "-k",
        help="ρ: the fraction of its patch tokens that each stage keeps; or one cumulative fraction a stage, as in "
        "0.8,0.5,0.3. Default: 0.7, or what was saved.",
        show_default=False,
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="Such as cpu or cuda. Default: the accelerator if there is one.", show_default=False),
]
Pretrained = Annotated[bool, typer.Option(help="Load trained weights; with random ones, what is kept means nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]


def sparsified(
    name: str,
    *,
    stages: str | None,
    keep_ratio: float | tuple[float, ...] | None,
    image_size: str | None,
    scorer: str | None = None,
    pruned: str | None = None,
    pretrained: bool = False,
    default_scorer: str = "predictor",
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model of a name, sparsified if it was not saved so, and the size of its images.

    Args:
        name: What `tokenprune.saving.resolve.load_model` takes.
        stages: As given on the command line.
        keep_ratio: From `ratio`; ``None`` means the default.
        image_size: As given on the command line.
        scorer: A registered name; ``None`` means the default.
        pruned: The registered name of a reduction; ``None`` means the default.
        pretrained: Whether a library's model needs its trained weights.
        default_scorer: The scorer of a model that was not saved sparsified, where none is given.

    Returns:
        The model in eval mode; channels, height and width.
    """
    from tokenprune.api import sparsifier_of, sparsify
    from tokenprune.pruning.sparsifier import Sparsifier
    from tokenprune.saving.resolve import load_model

    size, chosen = _size(image_size), stage_indices(stages)
    if scorer is not None:
        check_scorer(scorer)
    if pruned is not None:
        check_reduction(pruned)
    model = load_model(name, pretrained=pretrained, image_size=size).eval()
    saved = getattr(model, "tokenprune", None)
    if isinstance(saved, Sparsifier):
        _check_saved(saved, chosen, scorer, pruned)
        if keep_ratio is not None:
            saved.keep_ratio = keep_ratio
    else:
        ratio = 0.7 if keep_ratio is None else keep_ratio
        sparsify(model, chosen, ratio, scorer=scorer or default_scorer, pruned=pruned or "drop")
    channels, *own = sparsifier_of(model).backbone.input_size(model)
    height, width = size or own
    if image_size is not None:
        _check_size(model, (channels, height, width), image_size)
    return model, (channels, height, width)


def ratio(text: str) -> float | tuple[float, ...]:
    """One ρ, or one fraction a stage.

    Raises:
        typer.BadParameter: It is neither.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--keep-ratio {text}: expected a number such as 0.7, or 0.8,0.5,0.3.") from None
    if any(not 0 < number <= 1 for number in numbers):
        raise typer.BadParameter(f"--keep-ratio {text}: expected numbers above 0 and up to 1.")
    return numbers[0] if len(numbers) == 1 else numbers


def ratios(texts: list[str] | None) -> list[float | tuple[float, ...]]:
    """Every ratio that was given."""
    return [ratio(text) for text in texts or []]


def check_scorer(name: str) -> None:
    """Refuse a name that no scorer has.

    Raises:
        typer.BadParameter: None has it.
    """
    from tokenprune.scorers import scorer_builder

    try:
        scorer_builder(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def check_reduction(name: str) -> None:
    """Refuse a name that no reduction has.

    Raises:
        typer.BadParameter: None has it.
    """
    from tokenprune.pruning.reductions import reduction_builder

    try:
        reduction_builder(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_saved(saved: Any, stages: tuple[int, ...] | None, scorer: str | None, pruned: str | None) -> None:
    if stages is not None and stages != saved.plan.stages:
        raise typer.BadParameter(
            f"--stages: the saved model's scorers are at {saved.plan.stages}, which cannot change."
        )
    if scorer is not None and scorer != saved.scorer:
        raise typer.BadParameter(f"--scorer {scorer}: the saved model has {saved.scorer or 'one of its own'}.")
    if pruned is not None and pruned != saved.pruned:
        raise typer.BadParameter(f"--pruned {pruned}: the saved model has {saved.pruned or 'one of its own'}.")


def _check_size(model: nn.Module, size: tuple[int, int, int], text: str) -> None:
    """Run the dense model once, which alone knows whether it takes images of another size than its own."""
    import torch

    from tokenprune.api import dense
    from tokenprune.backbones.probing import random_inputs

    try:
        with torch.no_grad(), dense(model):
            model(random_inputs(model, image=(1, *size))["image"])
    except Exception as error:  # whatever a model says of images that it does not take
        reason = " ".join(str(error).split()) or type(error).__name__
        raise typer.BadParameter(f"--image-size {text}: the model takes no such images: {reason}") from error


def check_picture(option: str, file: Path) -> None:
    """Refuse a file that no picture can be written to, before anything is done.

    Raises:
        typer.BadParameter: It is a folder, stands in none, or does not say of which kind it is.
    """
    if file.is_dir():
        raise typer.BadParameter(f"{option} {file} is a folder; name a file, such as {file}/picture.png.")
    if not file.parent.is_dir():
        raise typer.BadParameter(f"{option} {file}: there is no folder {file.parent}.")
    if not file.suffix:
        raise typer.BadParameter(f"{option} {file}: the name must say which kind of file, as in {file}.png or .svg.")


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything is done.

    Raises:
        typer.BadParameter: It, or one that it is to stand in, is a file.
    """
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise typer.BadParameter(f"{option} {folder}: {file} is a file; name a folder.")


def device_named(name: str | None) -> torch.device:
    """The device of a name; ``None`` means the accelerator, or the CPU where there is none.

    Raises:
        typer.BadParameter: There is no such device, or nothing can be run on it.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise typer.BadParameter("--device meta: nothing can be run there.")
    return device


def stage_indices(text: str | None) -> tuple[int, ...] | None:
    """Block indices, ``None`` where none are given.

    Raises:
        typer.BadParameter: They are not numbers.
    """
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--stages {text}: expected block numbers such as 3,6,9.") from None


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or any(not part.isdecimal() or int(part) == 0 for part in parts):
        raise typer.BadParameter(
            f"--image-size {text}: expected pixels such as 224, or height x width such as 224x320."
        )
    height, width = int(parts[0]), int(parts[-1])
    return height, width
