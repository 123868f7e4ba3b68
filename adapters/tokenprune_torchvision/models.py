"""torchvision's `VisionTransformer`, and its hierarchies.

An Image is Worth 16x16 Words (arXiv 2010.11929); Swin Transformer (arXiv 2103.14030) and its second version (arXiv
2111.09883); A ConvNet for the 2020s (arXiv 2201.03545).
"""

from __future__ import annotations

from torch import nn

from tokenprune import Backbone, UnsupportedModelError
from tokenprune.backbones.hierarchy import observe_hierarchy
from tokenprune.backbones.probing import random_inputs


def describe(model: nn.Module) -> Backbone:
    """The description of a torchvision model.

    Raises:
        UnsupportedModelError: It is no `VisionTransformer`, and no hierarchy with blocks over tokens.
    """
    from torchvision.models import VisionTransformer

    if not isinstance(model, VisionTransformer):
        flat = f"torchvision's {type(model).__name__} has no flat list of blocks over tokens."
        inputs, image_size = random_inputs(model, x=(2, 3, 224, 224)), (224, 224)
        try:
            found = observe_hierarchy(model, inputs, image_size=image_size, obstacle=flat)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"torchvision's {type(model).__name__} has no flat list of blocks over tokens; supported are "
                f"VisionTransformer (vit_b_16 and its relatives) and hierarchies. {error}"
            ) from error
        return Backbone(**found._asdict(), num_prefix_tokens=0)
    return Backbone(
        blocks=tuple(model.encoder.layers),
        num_prefix_tokens=model.class_token.shape[1],
        embed_dim=model.hidden_dim,
        patch_size=(model.patch_size, model.patch_size),
        grid_size=(model.image_size // model.patch_size,) * 2,
        final_norm=model.encoder.ln,
    )
