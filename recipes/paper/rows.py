"""The rows of the papers' main table: published figures, and the computed cost of the architectures.

DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), and its
extension (arXiv 2207.01580). Published throughput is that of an RTX 3090 at batch 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.engine.models import num_heads


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense model of the table.

    Attributes:
        title: Its name in the papers.
        model: timm's name.
        width: Embedding width, if not that model's.
        image_size: Height and width of the images.
    """

    title: str
    model: str
    width: int | None = None
    image_size: int = 224

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `timm.create_model`."""
        options: dict[str, Any] = {} if self.image_size == 224 else {"img_size": self.image_size}
        if self.width is not None:
            options |= {"embed_dim": self.width, "num_heads": num_heads(self.width)}
        return options

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.image_size, self.image_size


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        architecture: Key of `ARCHITECTURES`.
        ratio: ρ; 1 is the dense model.
        top1: Published top-1 accuracy on ImageNet-1k, per cent.
        gmacs: Published GMACs.
        images_per_second: Published throughput.
        computed: GMACs computed by hand from the architecture.
    """

    architecture: str
    ratio: float
    top1: float | None = None
    gmacs: float | None = None
    images_per_second: float | None = None
    computed: float | None = None

    @property
    def name(self) -> str:
        """The name of the row on the command line."""
        return f"{self.architecture}/{self.ratio}"


ARCHITECTURES = {
    "deit_tiny": Architecture(title="DeiT-Ti", model="deit_tiny_patch16_224"),
    "deit_256": Architecture(title="DeiT-256", model="deit_small_patch16_224", width=256),
    "deit_288": Architecture(title="DeiT-288", model="deit_small_patch16_224", width=288),
    "deit_320": Architecture(title="DeiT-320", model="deit_small_patch16_224", width=320),
    "deit_small": Architecture(title="DeiT-S", model="deit_small_patch16_224"),
    "deit_small_384": Architecture(title="DeiT-S, 384 px", model="deit_small_patch16_224", image_size=384),
    "deit_base": Architecture(title="DeiT-B", model="deit_base_patch16_224"),
    "lvvit_t": Architecture(title="LV-ViT-T", model="lvvit_t"),
    "lvvit_s": Architecture(title="LV-ViT-S", model="lvvit_s"),
    "lvvit_m": Architecture(title="LV-ViT-M", model="lvvit_m"),
}

# By architecture and ρ: published top-1, GMACs and images per second, and computed GMACs.
_FIGURES: dict[str, dict[float, tuple[float | None, float | None, float | None, float | None]]] = {
    "deit_small": {
        1.0: (79.8, 4.6, 1337.7, 4.60),
        0.9: (79.8, 4.0, 1524.8, 4.04),
        0.8: (79.6, 3.4, 1774.6, 3.46),
        0.7: (79.3, 2.9, 2062.1, 2.98),
        0.6: (78.5, 2.5, None, 2.56),
        0.5: (77.5, 2.2, None, 2.23),
    },
    "lvvit_s": {
        1.0: (83.3, 6.6, 993.3, 6.55),
        0.9: (83.3, 5.8, 1108.3, 5.88),
        0.8: (83.2, 5.1, 1255.6, 5.21),
        0.7: (83.0, 4.6, 1417.6, 4.65),
        0.5: (81.97, 3.7, None, 3.79),
    },
    "lvvit_m": {
        1.0: (84.0, 12.7, 589.5, 12.68),
        0.9: (83.9, 11.1, 688.5, 11.21),
        0.8: (83.9, 9.6, 791.2, 9.78),
        0.7: (83.8, 8.5, 888.2, 8.59),
    },
    "deit_base": {1.0: (81.8, 17.5, None, 17.56), 0.7: (81.3, 11.2, None, 11.48)},
    "deit_small_384": {1.0: (81.6, 15.5, None, 15.49), 0.7: (81.4, 9.5, None, 9.65), 0.5: (80.3, 7.0, None, 7.19)},
    "deit_256": {1.0: (None, None, None, 2.14), 0.7: (76.53, 1.3, None, 1.37)},
    # Not in the main table: the widths of the width-scaling figure, and the smallest LV-ViT.
    "deit_tiny": {1.0: (None, None, None, 1.25), 0.7: (None, None, None, 0.80)},
    "deit_288": {1.0: (None, None, None, 2.66), 0.7: (None, None, None, 1.72)},
    "deit_320": {1.0: (None, None, None, 3.25), 0.7: (None, None, None, 2.10)},
    "lvvit_t": {1.0: (None, None, None, 2.87), 0.7: (None, None, None, 2.26)},
}

ROWS = {
    row.name: row
    for architecture, figures in _FIGURES.items()
    for ratio, (top1, gmacs, images_per_second, computed) in figures.items()
    for row in [
        Row(
            architecture=architecture,
            ratio=ratio,
            top1=top1,
            gmacs=gmacs,
            images_per_second=images_per_second,
            computed=computed,
        )
    ]
}


def deviation(ours: float, other: float) -> float:
    """How much larger our figure is, as a fraction of the other."""
    return ours / other - 1


def published_speedup(row: Row) -> float | None:
    """Published throughput of a row ÷ that of its dense model."""
    dense = ROWS[f"{row.architecture}/1.0"].images_per_second
    return None if dense is None or row.images_per_second is None else row.images_per_second / dense
