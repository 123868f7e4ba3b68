"""torchvision's `VisionTransformer`.

An Image is Worth 16x16 Words (arXiv 2010.11929).
"""

from __future__ import annotations

from torch import nn

from tokenprune import Backbone, UnsupportedModelError


def describe(model: nn.Module) -> Backbone:
    """The description of a torchvision model.

    Raises:
        UnsupportedModelError: It is no `VisionTransformer`.
    """
    from torchvision.models import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"torchvision's {type(model).__name__} has no flat list of blocks over tokens; supported is "
            "VisionTransformer (vit_b_16 and its relatives)."
        )
    return Backbone(
        blocks=tuple(model.encoder.layers),
        num_prefix_tokens=model.class_token.shape[1],
        embed_dim=model.hidden_dim,
        patch_size=(model.patch_size, model.patch_size),
        grid_size=(model.image_size // model.patch_size,) * 2,
        final_norm=model.encoder.ln,
    )
