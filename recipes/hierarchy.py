"""Fine-tune DynamicSwin and DynamicConvNeXt: a dense hierarchy learns which tokens can skip its MLPs.

Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks (arXiv 2207.01580).
Stages stand in the third level and keep ρ, ρ − 0.2, ρ − 0.4 of its positions, each scored anew; the loss is
cross-entropy + 0.5 KL + 0.5 squared error over all positions of the final map + (10/3)·Σ (ratio − target)².
Deviation: fast paths start as the best linear stand-ins for their MLPs; --fast-paths has the authors' starts.
Weights of the dense model come from timm, or from --checkpoint. Swin-T at ρ = 0.7 on eight GPUs:

accelerate launch --num_processes 8 -m recipes.hierarchy --swin-tiny --data-dir imagenet --batch-size 128
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from accelerate import PartialState
from rich.console import Console
from torch import nn

import tokenprune
from recipes.dense import SMOKE_HELP
from recipes.dynamicvit import SMOKE, SparseSettings, attached, fine_tune
from recipes.engine.command_line import Preset, command
from recipes.engine.data import first_batches, loader, open_images
from recipes.engine.fitting import Outcome
from recipes.engine.models import data_config
from recipes.engine.options import Pruning
from recipes.engine.settings import TrainingSettings

REDUCTION = "fast"
PUBLISHED = {
    ("swin-tiny", 0.7): (80.91, 4.0),
    ("swin-small", 0.7): (83.21, 6.9),
    ("swin-base", 0.7): (83.43, 12.1),
    ("convnext-tiny", 0.7): (81.59, 3.6),
    ("convnext-small", 0.7): (82.57, 5.8),
    ("convnext-base", 0.7): (83.45, 10.2),
    ("convnext-tiny", 0.9): (82.06, 3.9),
    ("convnext-small", 0.9): (83.12, 6.8),
    ("convnext-base", 0.9): (83.96, 11.9),
}
"""Top-1 accuracy on ImageNet-1k in per cent and multiply-adds in 10⁹ that the authors report, by preset and ρ."""
_MODELS = {
    "swin-tiny": ("DynamicSwin-T.", "swin_tiny_patch4_window7_224"),
    "swin-small": ("DynamicSwin-S.", "swin_small_patch4_window7_224"),
    "swin-base": ("DynamicSwin-B.", "swin_base_patch4_window7_224"),
    "convnext-tiny": ("DynamicConvNeXt-T.", "convnext_tiny.fb_in1k"),
    "convnext-small": ("DynamicConvNeXt-S.", "convnext_small.fb_in1k"),
    "convnext-base": ("DynamicConvNeXt-B.", "convnext_base.fb_in1k"),
}
PRESETS = {
    "smoke": Preset(help=SMOKE_HELP, settings={**SMOKE, "model": "test_convnext"}),
    **{name: Preset(help=help_text, settings={"model": model}) for name, (help_text, model) in _MODELS.items()},
}


def keep_ratios(ratio: float) -> list[float]:
    """The authors' ρ, ρ − 0.2, ρ − 0.4."""
    return [round(ratio - 0.2 * stage, 6) for stage in range(3)]


@dataclass(frozen=True, kw_only=True)
class HierarchySettings(SparseSettings):
    """Settings of the hierarchies; those that the authors' code does not name are DynamicViT's."""

    model: str = "swin_tiny_patch4_window7_224"
    keep_ratio: list[float] | None = field(default_factory=lambda: keep_ratios(0.7))
    fast_paths: Annotated[
        Literal["fitted", "zero", "random"],
        Pruning(
            help="How fast paths start. fitted: by least squares, on training images without labels. zero: a pruned "
            "token skips the MLP, as at first in the authors' ConvNeXt. random: drawn as in their Swin."
        ),
    ] = "fitted"
    fitted_images: Annotated[int, Pruning(min=1, help="On how many training images they are fitted.")] = 512
    # The mean over three stages, where the authors take (10 / 3) times the sum.
    ratio_weight: float = 10.0
    output: Path = Path("runs/hierarchy")


def train_hierarchy(
    settings: HierarchySettings, *, console: Console | None = None, description: str | None = None
) -> Outcome:
    """Sparsify a dense hierarchy with fast paths and fine-tune it; see `recipes.dynamicvit.fine_tune`."""
    start = partial(start_fast_paths, settings=settings)
    return fine_tune(settings, pruned=REDUCTION, start=start, console=console, description=description)


def start_fast_paths(model: nn.Module, settings: HierarchySettings) -> None:
    """Give the fast paths of a sparsified model the weights that training starts from."""
    if settings.fast_paths == "fitted":
        model.to(PartialState().device)
        tokenprune.fit_fast_paths(model, training_images(settings, model, settings.fitted_images))
    elif settings.fast_paths == "random":
        for stage in attached(model).stages:
            for path in cast(Any, stage).reduction.paths:
                nn.init.trunc_normal_(path.linear.weight, std=0.02)


def training_images(settings: TrainingSettings, model: nn.Module, number: int) -> Iterator[Any]:
    """Shuffled batches of training images, at least so many in all, without their labels."""
    batches = loader(open_images(settings, training=True), settings, data_config(settings, model), training=True)
    device = PartialState().device
    for images, _ in first_batches(batches, -(-number // settings.batch_size)):
        yield images.to(device)


app = command(
    HierarchySettings,
    lambda settings: train_hierarchy(settings, console=Console()),
    help_text=__doc__,
    presets=PRESETS,
)

if __name__ == "__main__":
    app()
