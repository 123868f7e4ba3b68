"""What a sparsified model keeps of given images, and the scores by which it decides.

Shapes: B images, N patch tokens in a grid of R rows and C columns, n of them scored, S stages, K channels,
H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.api import sparsifier_of, unwrap
from tokenprune.backbones.adapters import preprocessing_of
from tokenprune.backbones.preprocessing import Picture, Preprocessing, name_of
from tokenprune.backbones.probing import eval_mode
from tokenprune.errors import PictureError, StateError, UnsupportedModelError


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptTokens:
    """What the stages of a model kept of images, and why.

    Attributes:
        pixels: (B, K, H, W), from 0 to 1: the images as the model sees them, before they are normalised.
        names: The images' file names; empty for those that come from no file.
        keep: For each stage, (B, R, C) bool: the patches that are kept.
        scores: For each stage, (B, R, C): the scorer's scores, higher = keep; NaN where nothing was scored, because
            an earlier stage had pruned the patch or the stage keeps all that it gets.
        stages: Indices of the blocks in front of which the stages stand.
        keep_ratios: The cumulative fractions that the stages were asked to keep.
        patch_size: Height and width of a patch in pixels; ``None`` where unknown.
    """

    pixels: Tensor
    names: tuple[str, ...]
    keep: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    stages: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    patch_size: tuple[int, int] | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows R and columns C of patches."""
        return self.keep[0].shape[1], self.keep[0].shape[2]

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return self.grid[0] * self.grid[1]

    def num_kept(self, stage: int) -> int:
        """How many patches of each image a stage keeps, rounded where it is a mean; stages count from 0."""
        return round(float(self.keep[stage].sum() / len(self.keep[stage])))

    def kept_pixels(self, stage: int) -> Tensor:
        """(B, H, W) bool: the pixels that belong to patches which a stage keeps."""
        height, width = self.pixels.shape[2:]
        rows, columns = self.grid
        patch_height, patch_width = self.patch_size or (height / rows, width / columns)
        # Where a side is no multiple of the patch, what is left over goes with the last one.
        row = (torch.arange(height) / patch_height).long().clamp(max=rows - 1)
        column = (torch.arange(width) / patch_width).long().clamp(max=columns - 1)
        return self.keep[stage][:, row][:, :, column]


def kept_tokens(
    model: nn.Module,
    images: Picture | Sequence[Picture],
    *,
    preprocessing: Preprocessing | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> KeptTokens:
    """Run a sparsified model on images and see which patches each stage keeps, and by what scores.

    Args:
        model: A sparsified model; its mode, weights and settings are left as they are.
        images: One or several pictures: files, Pillow images, arrays (h, w, 3) of bytes or of numbers from 0 to 1,
            all of which are resized, cut and normalised as the model's library does; or tensors (K, H, W) or
            (B, K, H, W), which are taken to be inputs of the model, normalised already.
        preprocessing: How pictures become inputs; ``None`` asks the adapter of the model's library.
        forward_kwargs: What the model is called with besides the images.

    Raises:
        StateError: The model is not sparsified, or runs dense.
        PictureError: There is no image, or one cannot be read or used.
        UnsupportedModelError: No adapter says how pictures become inputs, or the patches make no grid.
        MissingExtraError: Pillow is not installed, and pictures are given.
    """
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    if not sparsifier.enabled:
        raise StateError("the model runs dense here (inside tokenprune.dense), so that there is nothing to see.")
    chosen = preprocessing_of(inner) if preprocessing is None else preprocessing
    pictures = _several(images)
    inputs = _stacked([chosen.apply(picture) for picture in pictures])
    parameter = next(inner.parameters())
    with (
        eval_mode(inner),
        sparsifier.thawed(inner),
        sparsifier.executing(sparsifier.inference_execution),
        torch.no_grad(),
    ):
        inner(inputs.to(parameter.device, parameter.dtype), **(forward_kwargs or {}))
        trace = sparsifier.trace
    assert trace is not None
    if trace.grid is None:
        raise UnsupportedModelError(
            f"the {trace.num_patches} patches of this {type(inner).__name__} make no grid that is known; a Backbone "
            "with patch_size or grid_size says where they are."
        )
    rows, columns = trace.grid
    shape = (len(inputs), rows, columns)
    unscored = torch.full((len(inputs), trace.num_patches), torch.nan)
    plan = sparsifier.plan
    return KeptTokens(
        pixels=chosen.undo(inputs),
        names=tuple(name_of(picture) for picture in pictures),
        keep=tuple(keep.cpu().bool().reshape(shape) for keep in trace.keep),
        scores=tuple((unscored if scores is None else scores.cpu()).reshape(shape) for scores in trace.scores),
        stages=plan.stages,
        keep_ratios=plan.keep_ratios,
        patch_size=sparsifier.backbone.patch_size,
    )


def _several(images: Picture | Sequence[Picture]) -> list[Picture]:
    if isinstance(images, Tensor) and images.dim() == 4:
        images = list(images)
    pictures = list(images) if isinstance(images, (list, tuple)) else [cast(Picture, images)]
    if not pictures:
        raise PictureError("there is no image to look at; give at least one.")
    return pictures


def _stacked(inputs: list[Tensor]) -> Tensor:
    sizes = {tuple(one.shape[1:]) for one in inputs}
    if len(sizes) > 1:
        listed = ", ".join(f"{height} × {width}" for height, width in sorted(sizes))
        raise PictureError(f"the images are of several sizes: {listed}; all must have the same to be shown together.")
    return torch.stack(inputs)
