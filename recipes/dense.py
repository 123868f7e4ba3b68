"""Train a dense model, or fine-tune a pre-trained one on other classes: where every sparse model starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from torch import Tensor, nn

from recipes.engine.command_line import Preset, command
from recipes.engine.fitting import Job, Outcome, fit
from recipes.engine.optimization import parameter_groups
from recipes.engine.options import Model
from recipes.engine.settings import TrainingSettings

SMOKE_HELP = "A few steps at 64 pixels from random weights, to check that everything works here."
SMOKE = {
    "image_size": 64,
    "pretrained": False,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "steps_per_epoch": 4,
    "batch_size": 8,
    "num_workers": 1,
    "validation_batches": 4,
    "log_every": 1,
}


@dataclass(frozen=True, kw_only=True)
class DenseSettings(TrainingSettings):
    """Settings of dense training; the defaults are DeiT's (arXiv 2012.12877)."""

    model: str = "deit_small_patch16_224"
    pretrained: Annotated[bool, Model(help="Start from timm's weights for ImageNet.")] = False
    epochs: int = 300
    drop_path: float = 0.1
    output: Path = Path("runs/dense")


def train_dense(
    settings: TrainingSettings,
    *,
    model_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
    description: str | None = None,
) -> Outcome:
    """Train with cross-entropy; weights for other classes get a new head.

    Other arguments and errors are those of `recipes.engine.fitting.fit`.
    """

    def prepare(model: nn.Module, images_per_step: int) -> Job:
        rate = settings.scaled_learning_rate(images_per_step)
        return Job(
            model=model,
            loss_function=CrossEntropy(settings),
            parameter_groups=parameter_groups(model, learning_rate=rate, weight_decay=settings.weight_decay),
        )

    return fit(
        settings,
        prepare,
        description=description or settings.model,
        model_options=model_options,
        new_head=True,
        console=console,
    )


class CrossEntropy(nn.Module):
    """Cross-entropy with class indices, or with the soft targets of mixup."""

    def __init__(self, settings: TrainingSettings) -> None:
        super().__init__()
        self.criterion = criterion(settings)

    def forward(self, model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss, by name."""
        return {"loss": self.criterion(outputs, targets)}


def criterion(settings: TrainingSettings) -> nn.CrossEntropyLoss:
    """Cross-entropy; labels are smoothed by mixup if that is on."""
    mixes = settings.mixup or settings.cutmix
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixes else settings.label_smoothing)


app = command(
    DenseSettings,
    lambda settings: train_dense(settings, console=Console()),
    help_text=__doc__,
    presets={"smoke": Preset(help=SMOKE_HELP, settings=SMOKE)},
)

if __name__ == "__main__":
    app()
