"""timm's `VisionTransformer` and `VisionTransformerDistilled`, in all their forms."""

from __future__ import annotations

from torch import nn

from tokenprune import Backbone, Setting, UnsupportedModelError

SUPPORTED = ("VisionTransformer", "VisionTransformerDistilled")


def describe(model: nn.Module) -> Backbone:
    """The description of a timm model.

    Raises:
        UnsupportedModelError: It is no `VisionTransformer`, or has a part that pruned tokens break.
    """
    from timm.models import VisionTransformer

    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"timm's {name} is not supported yet; supported are {' and '.join(SUPPORTED)} and their subclasses. If its "
            "blocks take and return (B, L, C) tokens, pass tokenprune.sparsify(model, backbone=tokenprune.Backbone(…))."
        )
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        raise UnsupportedModelError(f"{name}'s attention pool adds position embeddings of its own to a full grid.")
    height, width = model.patch_embed.feat_ratio(as_scalar=False)  # pixels a token stands for, also in hybrids
    return Backbone(
        blocks=tuple(model.blocks),
        num_prefix_tokens=model.num_prefix_tokens,
        embed_dim=model.embed_dim,
        patch_size=(int(height), int(width)),
        grid_size=model.patch_embed.grid_size,
        final_norm=model.norm,
        settings=tuple(
            Setting(owner=module, name="fused_attn", value=True)
            for module in model.modules()
            if getattr(module, "fused_attn", True) is False
        ),
        grid_methods=("forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers"),
    )
