"""Class attention: tokens matter as much as the class token attends to them; nothing is learned."""

from __future__ import annotations

from torch import Tensor

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, register_scorer


class ClassAttention(Scorer):
    """The attention that a token receives in the block before the stage, mean over heads.

    From the class token; in models without one from all tokens that are left. The "class attention"
    row of DynamicViT's ablation (arXiv 2106.02034), and the score of Not All Patches are What You Need:
    Expediting Vision Transformers via Token Reorganizations (EViT, arXiv 2202.07800). There is
    nothing to train, so it prunes a trained model at once; the model can be fine-tuned around it.

    Deviation: EViT prunes inside a block, between its attention and its MLP; here tokens are pruned between blocks, as
    with every other scorer. That EViT fuses what it prunes into one token is a reduction, ``pruned="fuse"``.
    """

    needs_attention = True

    def forward(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None
        return candidates.attention


@register_scorer("cls_attention")
def build(context: ScorerContext) -> ClassAttention:
    """A `ClassAttention` scorer, the same for every stage."""
    return ClassAttention()
