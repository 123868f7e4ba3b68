"""Sparsify the demo's dense model and fine-tune it against itself: one run, for one scorer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tokenprune
from recipes.digits.data import IMAGE_SIZE
from recipes.digits.model import WEIGHTS, build_model, load_dense_model
from recipes.engine import LossFunction, Schedule, evaluate, image_folder_loader, train, write_whole

# A step of Adam moves a weight by about the learning rate. The static scorer has one weight a
# position and has to carry it to ±2 by itself; the predictor's weights add up.
SCORER_LEARNING_RATES = {"predictor": 3e-3, "static": 5e-2, "random": 0.0}
BACKBONE_LEARNING_RATE = 5e-5


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """What decides a fine-tuning run; stored beside its results.

    Attributes:
        scorer: What scores the tokens: ``"predictor"``, ``"random"`` or ``"static"``.
        keep_ratio: ρ; the three stages keep ρ, ρ², ρ³ of the patch tokens.
        steps: Optimisation steps.
        batch_size: Images a step.
        seed: Seed of the scorers' weights, the order of images and the sampled decisions.
    """

    scorer: str
    keep_ratio: float
    steps: int
    batch_size: int = 128
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for files of this run."""
        return f"{self.scorer}-{self.keep_ratio:g}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class SparseResult:
    """What a run reached.

    Attributes:
        config: The run.
        dense_sha256: Digest of the dense model's weights file that it started from.
        run_sha256: Digest of all that decides the run: configuration, dense weights, images.
        accuracy: Validation accuracy of the pruned model, as a fraction.
        kept: Share of the patch tokens kept after the last stage, by step, as sampled in training
            since the run was last started.
    """

    config: SparseConfig
    dense_sha256: str
    run_sha256: str
    accuracy: float
    kept: list[float]


def sparse_model(config: SparseConfig, dense: nn.Module) -> nn.Module:
    """``dense`` itself, sparsified as ``config`` says."""
    torch.manual_seed(config.seed)
    return tokenprune.sparsify(dense, keep_ratio=config.keep_ratio, scorer=config.scorer)


def fine_tuned_model(config: SparseConfig, output: Path) -> nn.Module:
    """The model that `fine_tune` left in ``output``."""
    model = sparse_model(config, build_model())
    model.load_state_dict(load_file(output / f"{config.name}.safetensors"))
    return model


def attached(model: nn.Module) -> tokenprune.Sparsifier:
    """``model.tokenprune``, with its type."""
    return cast(tokenprune.Sparsifier, model.tokenprune)


def fine_tune(
    config: SparseConfig, data: Path, output: Path, validation: DataLoader[Any], dense_weights: Path = WEIGHTS
) -> SparseResult:
    """Make one run, or read it if it has been made.

    Args:
        config: The run.
        data: The digits image folder.
        output: Where ``<name>.safetensors`` and ``<name>.json`` are written.
        validation: The images to evaluate on.
        dense_weights: The dense model to start from, and to be taught by.

    Raises:
        Interrupted: Ctrl-C was pressed; the same call goes on where it stopped.
    """
    weights, report = output / f"{config.name}.safetensors", output / f"{config.name}.json"
    digest = hashlib.sha256(dense_weights.read_bytes()).hexdigest()
    images = (data / "digits.json").read_text()
    run = hashlib.sha256(f"{asdict(config)} {digest} {images}".encode()).hexdigest()
    if report.exists() and weights.exists():
        stored = json.loads(report.read_text())
        if stored.get("run_sha256") == run:
            return SparseResult(**{**stored, "config": config})

    model = sparse_model(config, load_dense_model(dense_weights))
    kept: list[float] = []
    train(
        model,
        _objective(model, load_dense_model(dense_weights)),
        image_folder_loader(data, "train", image_size=IMAGE_SIZE, batch_size=config.batch_size, seed=config.seed),
        parameter_groups(model, SCORER_LEARNING_RATES[config.scorer]),
        Schedule(steps=config.steps, warmup_steps=config.steps // 10),
        state_folder=output / f"{config.name}-{run[:8]}.state",
        description=f"{config.scorer}, ρ {config.keep_ratio:g}",
        seed=config.seed,
        on_step=lambda step, logged: kept.append(round(logged["kept"], 4)),
    )
    result = SparseResult(
        config=config, dense_sha256=digest, run_sha256=run, accuracy=evaluate(model, validation), kept=kept
    )
    write_whole(weights, lambda partial: save_file(model.state_dict(), partial))
    write_whole(report, lambda partial: partial.write_text(json.dumps(asdict(result), indent=2) + "\n"))
    return result


def parameter_groups(model: nn.Module, scorer_learning_rate: float) -> list[dict[str, Any]]:
    """The scorers' parameters at their rate, and the backbone's at the backbone's.

    Biases, norms, and what the model exempts itself, are not decayed.
    """
    scorers = set(attached(model).parameters())
    groups = []
    exempt = cast(Any, model).no_weight_decay()
    for group in param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=exempt):
        for chosen, rate in ((True, scorer_learning_rate), (False, BACKBONE_LEARNING_RATE)):
            parameters = [parameter for parameter in group["params"] if (parameter in scorers) == chosen]
            if parameters:
                groups.append({**group, "params": parameters, "lr": rate})
    return groups


def _objective(sparse: nn.Module, teacher: nn.Module) -> LossFunction:
    """The full loss, and the share of tokens kept after the last stage, for the log."""
    loss = tokenprune.DynamicViTLoss(teacher)

    def parts(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        trace = attached(sparse).trace
        assert trace is not None
        return {**loss(model, inputs, outputs, targets), "kept": trace.keep[-1].mean()}

    return parts
