"""Describes timm's Vision Transformers to tokenprune.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`.
"""

from tokenprune_timm.loading import load, names
from tokenprune_timm.models import describe
from tokenprune_timm.rebuilding import build, identity

__all__ = ["build", "describe", "identity", "load", "names"]
