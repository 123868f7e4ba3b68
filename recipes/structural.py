"""Structural downsampling, a baseline that ignores the content: 2 x 2 patches become one.

DynamicViT (arXiv 2106.02034), Table 3: average pooling after the sixth block of a DeiT, which costs
as much as dynamic pruning at ρ = 0.7.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from torch import Tensor, nn

import tokenprune
from recipes.dense import criterion
from recipes.dynamicvit import SparseSettings, freeze_embeddings
from recipes.engine.fitting import Job, Outcome, fit
from recipes.engine.optimization import parameter_groups
from recipes.engine.settings import SettingsError


class StructuralDownsampling:
    """A forward pre-hook of a block that pools its patch tokens 2 x 2 and keeps prefix tokens.

    Args:
        grid: Rows and columns of patches; even numbers.
        num_prefix_tokens: Class, distillation and register tokens.
    """

    def __init__(self, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        if any(size % 2 for size in grid):
            raise SettingsError(
                f"a grid of {grid[0]} x {grid[1]} patches cannot be pooled 2 x 2; take another image size."
            )
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the tokens (B, P + N, C) by (B, P + N/4, C)."""
        tokens: Tensor = args[0]
        rows, columns = self.grid
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        grid = rearrange(patches, "b (r c) d -> b d r c", r=rows, c=columns)
        pooled = rearrange(F.avg_pool2d(grid, kernel_size=2), "b d r c -> b (r c) d")
        return torch.cat((prefix, pooled), dim=1), *args[1:]


def fine_tune_downsampled(
    settings: SparseSettings,
    *,
    model_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
    description: str = "structural",
) -> Outcome:
    """Pool after half of the blocks; teacher and learning rates are those of `recipes.dynamicvit.fine_tune`.

    There are no decisions and no matching tokens, so only the classification and KL losses are left.
    """
    counted: dict[str, float] = {}

    def prepare(model: nn.Module, images_per_step: int) -> Job:
        teacher = copy.deepcopy(model)
        counted.update(count(model))
        blocks, grid, num_prefix_tokens = _layout(model)
        blocks[len(blocks) // 2].register_forward_pre_hook(StructuralDownsampling(grid, num_prefix_tokens))
        freeze_embeddings(model)
        return Job(
            model=model,
            loss_function=TaughtCrossEntropy(teacher, settings),
            parameter_groups=parameter_groups(
                model,
                learning_rate=settings.scaled_learning_rate(images_per_step) * settings.backbone_factor,
                weight_decay=settings.weight_decay,
            ),
        )

    return fit(settings, prepare, description=description, model_options=model_options, console=console, gmacs=counted)


class TaughtCrossEntropy(nn.Module):
    """Cross-entropy, and λ_KL times KL(student ‖ teacher) of the class probabilities, averaged over the batch."""

    def __init__(self, teacher: nn.Module, settings: SparseSettings) -> None:
        super().__init__()
        self.teacher = teacher.eval()
        self.criterion = criterion(settings)
        self.kl_weight = settings.kl_weight

    def forward(self, model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, by name."""
        with torch.no_grad():
            teacher = self.teacher(inputs).float().log_softmax(dim=-1)
        student = outputs.float().log_softmax(dim=-1)
        parts = {
            "classification": self.criterion(outputs, targets),
            "kl": F.kl_div(teacher, student, log_target=True, reduction="batchmean"),
        }
        return {"loss": parts["classification"] + self.kl_weight * parts["kl"], **parts}


def count(model: nn.Module) -> dict[str, float]:
    """GMACs per image, before and after pooling, of a model that does not pool yet.

    Pooling 2 x 2 costs as much as keeping any quarter of the patches.
    """
    blocks, _, _ = _layout(model)
    quarter = tokenprune.sparsify(model, (len(blocks) // 2,), 0.25, scorer="random")
    report = tokenprune.flops(quarter, (3, *cast(Any, model).patch_embed.img_size))
    tokenprune.unsparsify(quarter)
    return {"dense": report.dense_gmacs, "sparse": report.sparse_gmacs}


def _layout(model: nn.Module) -> tuple[nn.ModuleList, tuple[int, int], int]:
    """The blocks of a timm ViT, its grid of patches, and its number of prefix tokens."""
    timm_model = cast(Any, model)
    return timm_model.blocks, timm_model.patch_embed.grid_size, timm_model.num_prefix_tokens
