"""Describes timm's Vision Transformers to tokenprune.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`.
"""

from tokenprune_timm.identity import build, identity
from tokenprune_timm.models import describe
from tokenprune_timm.names import load, names

__all__ = ["build", "describe", "identity", "load", "names"]
