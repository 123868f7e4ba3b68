"""timm with the models in its registry that are ours."""

from __future__ import annotations

from typing import Any


def timm_with_lvvit() -> Any:
    """The package timm, imported now, whose registry knows LV-ViT, too."""
    import timm

    import tokenprune_timm.lvvit  # noqa: F401  # its import registers the models

    return timm
