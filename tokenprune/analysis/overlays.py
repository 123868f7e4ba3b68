"""Pictures of what a sparsified model keeps: matplotlib figures, and animations.

Shapes: B images, R rows and C columns of patches, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.analysis.kept_tokens import KeptTokens, kept_tokens
from tokenprune.backbones.preprocessing import Picture, Preprocessing
from tokenprune.errors import PictureError, extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VEIL = (0.55, 0.58, 0.64)  # laid over pruned patches: in the middle, to stand out from bright and dark ones
VEIL_OPACITY = 0.8
COLOURS = "viridis"  # of scores, from the lowest to the highest
UNSCORED = (0.5, 0.5, 0.5, 0.25)
CELL = 1.7  # inches


def show(
    model: nn.Module,
    images: Picture | Sequence[Picture],
    *,
    scores: bool = True,
    title: str = "",
    preprocessing: Preprocessing | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw images and, stage by stage, which patches a sparsified model keeps of them, and the scores behind it.

    Each image stands on top of a column; below it is what each stage leaves, pruned patches veiled, and beside
    that the scores of the stage's scorer, from the lowest to the highest of that image and stage (the two per cent
    at either end share a colour). Grey patches were not scored: they had been pruned before.

    Args:
        model: A sparsified model; its mode, weights and settings are left as they are.
        images: One or several, as `kept_tokens` takes them.
        scores: Whether scores are drawn.
        title: Of the figure.
        preprocessing: How pictures become inputs; ``None`` asks the adapter of the model's library.
        forward_kwargs: What the model is called with besides the images.

    Returns:
        A figure that belongs to no window: ``figure.savefig("kept.png")``, or the value of a notebook's cell.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StateError, PictureError, UnsupportedModelError: As `kept_tokens`.
    """
    kept = kept_tokens(model, images, preprocessing=preprocessing, forward_kwargs=forward_kwargs)
    return drawn(kept, scores=scores, title=title)


def animate(
    model: nn.Module,
    images: Picture | Sequence[Picture],
    output: str | Path,
    *,
    seconds: float = 1.0,
    scores: bool = True,
    title: str = "",
    preprocessing: Preprocessing | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write an animated GIF that steps through the stages: the images, then what each stage leaves of them.

    Args:
        model: A sparsified model; its mode, weights and settings are left as they are.
        images: One or several, as `kept_tokens` takes them.
        output: The file to write.
        seconds: How long each step stands, at least 0.02.
        scores: Whether the scores are drawn below, as by `show`.
        title: Of the figure.
        preprocessing: How pictures become inputs; ``None`` asks the adapter of the model's library.
        forward_kwargs: What the model is called with besides the images.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PictureError: ``seconds`` is too short for a GIF; and as `kept_tokens`.
        StateError, UnsupportedModelError: As `kept_tokens`.
        OSError: The file cannot be written.
    """
    kept = kept_tokens(model, images, preprocessing=preprocessing, forward_kwargs=forward_kwargs)
    write_animation(kept, output, seconds=seconds, scores=scores, title=title)


def drawn(kept: KeptTokens, *, scores: bool = True, title: str = "") -> Figure:
    """The figure of `show`, of kept tokens."""
    with extra("plots"):
        from matplotlib.figure import Figure
    labels = stage_labels(kept)
    width = 2 if scores else 1
    num_columns = width * len(kept.pixels)
    height, wide = kept.pixels.shape[2:]
    size = (CELL * num_columns + (0.9 if scores else 0.4), CELL * height / wide * len(labels) + (0.7 if title else 0.3))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(labels), num_columns, squeeze=False)
    for row, label in enumerate(labels):
        axes[row][0].set_ylabel(label, fontsize=9)
        shown = pictures_of(kept, row)
        for index in range(len(kept.pixels)):
            axis = axes[row][width * index]
            axis.imshow(shown[index].numpy(), interpolation="nearest")
            if row == 0:
                axis.set_title(kept.names[index], fontsize=8, parse_math=False)
            if scores:
                _draw_scores(axes[row][width * index + 1], kept, row, index)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    if scores:
        _add_scale(figure, axes)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def write_animation(
    kept: KeptTokens, output: str | Path, *, seconds: float = 1.0, scores: bool = True, title: str = ""
) -> None:
    """The GIF of `animate`, of kept tokens."""
    with extra("plots"):
        from matplotlib.animation import PillowWriter
        from matplotlib.figure import Figure
    if seconds < 0.02:
        raise PictureError(f"seconds={seconds}: a GIF shows a picture for at least 0.02 s.")
    num_rows, num_images = (2 if scores else 1), len(kept.pixels)
    height, wide = kept.pixels.shape[2:]
    size = (1.5 * CELL * num_images, 1.5 * CELL * height / wide * num_rows + 0.5)
    figure = Figure(figsize=size, dpi=100)
    writer = PillowWriter(fps=1 / seconds)  # type: ignore[arg-type]  # which takes fractions, too
    with writer.saving(figure, str(output), dpi=100):
        for row, label in enumerate(stage_labels(kept)):
            figure.clear()
            axes = figure.subplots(num_rows, num_images, squeeze=False)
            figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.45 / size[1], wspace=0.02, hspace=0.02)
            for index, shown in enumerate(pictures_of(kept, row)):
                axes[0][index].imshow(shown.numpy(), interpolation="nearest")
                if scores:
                    _draw_scores(axes[1][index], kept, row, index)
            for axis in axes.flat:
                axis.set_axis_off()
            heading = label.replace("\n", ", ")
            figure.suptitle(f"{title} — {heading}" if title else heading, fontsize=10, parse_math=False)
            writer.grab_frame()


def stage_labels(kept: KeptTokens) -> list[str]:
    """What the rows of a picture are called: the image, then every stage."""
    counts = [kept.num_kept(stage) for stage in range(len(kept.keep))]
    stages = [f"stage {stage}\nkeeps {count / kept.num_patches:.0%}" for stage, count in enumerate(counts, start=1)]
    return [f"{kept.num_patches} patches", *stages]


def pictures_of(kept: KeptTokens, row: int) -> Tensor:
    """(B, H, W, 3) from 0 to 1: the images for row 0, else what stage ``row`` leaves of them, the rest veiled."""
    pixels = kept.pixels.expand(-1, 3, -1, -1).movedim(1, -1)
    if row == 0:
        return pixels
    visible = kept.kept_pixels(row - 1).unsqueeze(-1)  # (B, H, W, 1)
    veiled = (1 - VEIL_OPACITY) * pixels + VEIL_OPACITY * pixels.new_tensor(VEIL)
    return torch.where(visible, pixels, veiled)


def heat_maps(kept: KeptTokens, row: int) -> Tensor | None:
    """(B, R, C) from 0 to 1: the scores of stage ``row`` from the lowest to the highest; NaN where there is none.

    Linear between the 2nd and the 98th percentile of each image, so that one outlier does not leave all others
    in one colour. ``None`` for row 0, which is the image.
    """
    if row == 0:
        return None
    scores = kept.scores[row - 1].flatten(1)  # (B, N)
    lowest = scores.nanquantile(0.02, dim=1, keepdim=True)
    highest = scores.nanquantile(0.98, dim=1, keepdim=True)
    scaled = (scores - lowest) / (highest - lowest).clamp(min=torch.finfo(scores.dtype).tiny)
    return scaled.clamp(0, 1).reshape(kept.scores[row - 1].shape)


def coloured(heat_map: Tensor) -> Tensor:
    """(R, C, 4): red, green, blue and opacity of a heat map (R, C)."""
    with extra("plots"):
        from matplotlib import colormaps
    colours = torch.from_numpy(colormaps[COLOURS](heat_map.nan_to_num().numpy())).float()
    return torch.where(heat_map.isnan().unsqueeze(-1), colours.new_tensor(UNSCORED), colours)


def _draw_scores(axis: Axes, kept: KeptTokens, row: int, index: int) -> None:
    maps = heat_maps(kept, row)
    if maps is not None:
        height, width = kept.pixels.shape[2:]
        axis.imshow(coloured(maps[index]).numpy(), interpolation="nearest", extent=(0, width, height, 0))


def _add_scale(figure: Figure, axes: Any) -> None:
    from matplotlib.cm import ScalarMappable

    scale = figure.colorbar(ScalarMappable(cmap=COLOURS), ax=axes[1:, -1], shrink=0.6, pad=0.03, ticks=[0, 1])
    scale.set_ticklabels(["lowest\nscore", "highest\nscore"], fontsize=8)
    scale.outline.set_visible(False)
