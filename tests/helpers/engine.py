"""Runs of the training engine that are over in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from typer.testing import CliRunner

from recipes.dynamicvit import SparseSettings, fine_tune
from recipes.engine.data import loader, open_images
from recipes.engine.logbook import read_log
from recipes.engine.optimization import parameter_groups
from recipes.engine.randomness import seed_everything
from recipes.engine.settings import TrainingSettings
from recipes.engine.training import make_accelerator, train

# Two epochs of three steps of 20 images: enough for an end of an epoch in the middle of a run.
TINY: dict[str, Any] = {
    "image_size": 64,
    "model": "test_vit",
    "pretrained": False,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "batch_size": 20,
    "num_workers": 0,
    "log_every": 1,
    "tracker": "none",
}


def sparse(folder: Path, output: Path, **changes: Any) -> SparseSettings:
    return SparseSettings(**{**TINY, "frozen_epochs": 0.5, "data_dir": folder, "output": output, **changes})


def invoke(module: Any, *arguments: Any) -> Any:
    return CliRunner().invoke(module.app, [str(argument) for argument in arguments])


def restart_accelerate() -> None:
    """Accelerate keeps precision and compilation for the life of a process; tests begin a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def losses_of(folder: Path, output: Path, **changes: Any) -> list[float]:
    restart_accelerate()
    try:
        fine_tune(sparse(folder, output, ema_decay=0.0, **changes))
    finally:
        restart_accelerate()
    return [line["loss"] for line in read_log(output, "training")]


def broken(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"loss": outputs.sum() * float("nan")}


def run_plain(folder: Path, output: Path, loss: Any, **changes: Any) -> nn.Module:
    settings = TrainingSettings(
        **{**TINY, "mixup": 0.0, "cutmix": 0.0, "data_dir": folder, "output": output, **changes}
    )
    seed_everything(settings.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    images = open_images(settings, training=True)
    batches = loader(images, settings, resolve_data_config({"img_size": 64}), training=True)
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0)
    train(make_accelerator(settings), model, loss, groups, batches, None, settings, description="", num_classes=10)
    return model


def command(module: str, folder: Path, output: Path, *arguments: str) -> list[str]:
    return ["-m", f"recipes.{module}", "--smoke", "--data-dir", str(folder), "--output", str(output), *arguments]


def weights_of(output: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(output / "tokenprune.safetensors")
    return found
