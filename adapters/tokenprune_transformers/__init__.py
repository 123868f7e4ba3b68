"""Describes the Vision Transformers of transformers to tokenprune.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`, and what to feed them in `example_inputs`.
"""

from tokenprune_transformers.loading import load
from tokenprune_transformers.models import describe
from tokenprune_transformers.pictures import preprocessing
from tokenprune_transformers.rebuilding import build, identity

__all__ = ["build", "describe", "identity", "load", "preprocessing"]
