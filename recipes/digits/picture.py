"""The picture of kept tokens: test images and what each stage leaves of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import repeat
from torch import Tensor, nn

from recipes.dynamicvit import attached
from recipes.engine.checkpoints import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRUNED = np.array([0.80, 0.84, 0.90])  # what pruned patches are veiled with


@torch.no_grad()
def kept_tokens_picture(model: nn.Module, images: Tensor, output: Path, title: str) -> None:
    """Draw a column an image: the image on top, then what is left of it after each stage.

    Args:
        model: A sparsified model.
        images: (B, 3, H, W), normalised to −1 … 1.
        output: The PNG file to write.
        title: What stands above.
    """
    model.eval()
    model(images)
    sparsifier = attached(model)
    trace = sparsifier.trace
    assert trace is not None and trace.grid is not None
    rows, columns = trace.grid
    pixels = (images.mean(dim=1) * 0.5 + 0.5).clamp(0, 1).numpy()  # (B, H, W)
    patch = pixels.shape[1] // rows
    labels = ["image", *(f"stage {stage}: {ratio:.0%}" for stage, ratio in enumerate(sparsifier.keep_ratio))]
    size = (1.5 * len(images) + 0.4, 1.5 * len(labels) + 0.6)
    figure, axes = plt.subplots(len(labels), len(images), figsize=size, squeeze=False)
    for column, picture in enumerate(pixels):
        for row, label in enumerate(labels):
            axis = axes[row][column]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            shown = repeat(picture, "h w -> h w 3")
            if row > 0:
                keep = trace.keep[row - 1][column].numpy()
                keep = repeat(keep, "(r c) -> (r y) (c x) 1", r=rows, c=columns, y=patch, x=patch)
                shown = keep * shown + (1 - keep) * (0.25 * shown + 0.75 * PRUNED)
            axis.imshow(shown, vmin=0, vmax=1, interpolation="nearest")
            if column == 0:
                axis.set_ylabel(label, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    write_whole(output, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
