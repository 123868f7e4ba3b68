"""Reproduce DynamicViT's LV-ViT rows: a dense LV-ViT learns in 30 epochs which tokens it can drop.

DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Table 1.
The student's auxiliary head, which classifies patch tokens, is distilled from the dense model's.
Neither MixToken nor token labels are used. The dense weights are an official LV-ViT checkpoint:

python -m recipes.lvvit --data-dir imagenet --checkpoint lvvit_s-26M-224-83.3.pth.tar
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tokenprune_timm.lvvit  # noqa: F401  # registers the models
from rich.console import Console

from recipes.dense import SMOKE_HELP
from recipes.dynamicvit import SMOKE, SparseSettings, fine_tune
from recipes.engine.command_line import Preset, command
from recipes.engine.options import Model

HEADS = ("head", "aux_head")
PRESETS = {
    "smoke": Preset(help=SMOKE_HELP, settings={**SMOKE, "model": "lvvit_t"}),
    "tiny": Preset(help="LV-ViT-T.", settings={"model": "lvvit_t"}),
    "small": Preset(help="LV-ViT-S.", settings={"model": "lvvit_s"}),
    "medium": Preset(help="LV-ViT-M.", settings={"model": "lvvit_m"}),
    "large": Preset(help="LV-ViT-L.", settings={"model": "lvvit_l"}),
}


@dataclass(frozen=True, kw_only=True)
class LvvitSettings(SparseSettings):
    """Settings of the LV-ViT rows."""

    model: Annotated[str, Model(help="lvvit_t, lvvit_s, lvvit_m or lvvit_l.")] = "lvvit_s"
    output: Path = Path("runs/lvvit")


app = command(
    LvvitSettings,
    lambda settings: fine_tune(settings, heads=HEADS, console=Console()),
    help_text=__doc__,
    presets=PRESETS,
)

if __name__ == "__main__":
    app()
