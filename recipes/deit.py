"""Reproduce DynamicViT's DeiT rows: a dense DeiT learns in 30 epochs which tokens it can drop.

DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Table 1.
Weights of the dense DeiT come from timm, or from --checkpoint. DeiT-S at ρ = 0.7 on eight GPUs:

accelerate launch --num_processes 8 -m recipes.deit --data-dir imagenet --batch-size 128
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from recipes.dense import SMOKE_HELP
from recipes.dynamicvit import SMOKE, SparseSettings, fine_tune
from recipes.engine.command_line import Preset, command

PRESETS = {
    "smoke": Preset(help=SMOKE_HELP, settings={**SMOKE, "model": "deit_tiny_patch16_224"}),
    "tiny": Preset(help="DeiT-Ti.", settings={"model": "deit_tiny_patch16_224"}),
    "256": Preset(help="DeiT-256; needs --checkpoint.", settings={"model": "deit_small_patch16_224", "width": 256}),
    "small": Preset(help="DeiT-S.", settings={"model": "deit_small_patch16_224"}),
    "small-384": Preset(help="DeiT-S at 384 pixels.", settings={"model": "deit_small_patch16_224", "image_size": 384}),
    "base": Preset(help="DeiT-B.", settings={"model": "deit_base_patch16_224", "ratio_weight": 5.0, "drop_path": 0.2}),
    "base-384": Preset(
        help="DeiT-B at 384 pixels.", settings={"model": "deit_base_patch16_384", "ratio_weight": 5.0, "drop_path": 0.2}
    ),
}


@dataclass(frozen=True, kw_only=True)
class DeitSettings(SparseSettings):
    """Settings of the DeiT rows."""

    model: str = "deit_small_patch16_224"
    output: Path = Path("runs/deit")


app = command(
    DeitSettings,
    lambda settings: fine_tune(settings, console=Console()),
    help_text=__doc__,
    presets=PRESETS,
)

if __name__ == "__main__":
    app()
