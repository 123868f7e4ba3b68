"""Describes timm's Vision Transformers to tokenprune.

Where a family stands in for the paper's models: An Image is Worth 16x16 Words (arXiv 2010.11929),
DeiT (arXiv 2012.12877), DeiT III (arXiv 2204.07118), DINOv2 with registers (arXiv 2309.16588).
"""

from tokenprune_timm.vision_transformer import SUPPORTED, describe

__all__ = ["SUPPORTED", "describe"]
