"""Describes the Vision Transformers of transformers to tokenprune.

ViT (arXiv 2010.11929), DeiT (arXiv 2012.12877), DINOv2 (arXiv 2304.07193) with and without
registers (arXiv 2309.16588), CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343).
"""

from tokenprune_transformers.vision import SUPPORTED, describe

__all__ = ["SUPPORTED", "describe"]
