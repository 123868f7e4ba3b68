"""Describes timm's Vision Transformers to tokenprune.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`.
"""

from tokenprune_timm.models import describe

__all__ = ["describe"]
