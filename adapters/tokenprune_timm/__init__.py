"""Describes timm's Vision Transformers to tokenprune.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`. LV-ViT, which timm lacks, is in `lvvit`, to be imported by
whoever wants its models registered with timm.
"""

from tokenprune_timm.checkpoints import from_state_dict
from tokenprune_timm.loading import load, names
from tokenprune_timm.models import describe
from tokenprune_timm.pictures import preprocessing
from tokenprune_timm.rebuilding import build, identity

__all__ = ["build", "describe", "from_state_dict", "identity", "load", "names", "preprocessing"]
