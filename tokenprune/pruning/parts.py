"""The parts of blocks that treat tokens one by one, for reductions that give pruned tokens another path around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tokenprune.backbones.adapters import example_inputs_of
from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.backbones.token_wise_probe import Probe
from tokenprune.errors import UnsupportedModelError
from tokenprune.pruning.places import stage_before
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.reductions import Reduction


class Parts:
    """The token-wise parts of a model's blocks, found when they are first asked for.

    Args:
        model: The model, which is not sparsified yet.
        backbone: What it looks like.

    Attributes:
        described: The same, with the parts once they are found.
    """

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        self.model, self.described = model, backbone

    def behind(self, plan: Plan, stage: int) -> list[tuple[int, TokenWise]]:
        """The parts of the blocks from a stage to the next one, each with the number of its block.

        Raises:
            UnsupportedModelError: The model could not be run, or one of these blocks has none.
        """
        if self.described.token_wise is None:
            self.described = replace(self.described, token_wise=_found(self.model, self.described))
        return parts_behind(self.described, plan, stage)


def parts_behind(backbone: Backbone, plan: Plan, stage: int) -> list[tuple[int, TokenWise]]:
    """The parts of the blocks from a stage to the next one, each with the number of its block.

    Raises:
        UnsupportedModelError: None of these blocks has any.
    """
    blocks = [block for block in backbone.reach if stage_before(plan, block) == stage]
    assert backbone.token_wise is not None
    found = [(block, part) for block in blocks for part in backbone.token_wise[block]]
    if not found:
        kinds = ", ".join(sorted({type(backbone.blocks[block]).__name__ for block in blocks}))
        raise UnsupportedModelError(
            f"the blocks behind stage {stage} ({kinds}) have no part that treats tokens one by one, for which pruned "
            "tokens could take another path; name it in Backbone.token_wise, or take another reduction."
        )
    return found


def scored_shares(plan: Plan, reductions: Sequence[Reduction]) -> tuple[float, ...]:
    """For each stage the fraction that it keeps of the tokens that it scores, in (0, 1].

    Raises:
        UnsupportedModelError: Some reductions keep the sequence whole and others do not.
    """
    if len({(reduction.whole, reduction.whole and reduction.anew) for reduction in reductions}) > 1:
        raise UnsupportedModelError(
            "the reductions of the stages differ in whether pruned tokens stay in the sequence and are scored anew; "
            "pass pruned= a builder that makes the same kind for all stages."
        )
    return plan.keep_ratios if reductions[0].whole and reductions[0].anew else plan.keep_probabilities


def _found(model: nn.Module, backbone: Backbone) -> tuple[tuple[TokenWise, ...], ...]:
    """For each block its token-wise parts, found in the running model."""
    if backbone.packed is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has all images of a batch in one sequence, in which tokens that stay cannot take "
            "another path; choose pruned='drop'."
        )
    tower = model if backbone.tower is None else backbone.tower
    probe = Probe(tower, example_inputs_of(tower, backbone.input_size(model)))
    recording = probe.record()
    found = probe.parts(backbone.blocks, recording)
    return tuple(
        tuple(
            one.part
            for one in found[block]
            if one.part.embed_dim == backbone.embed_dim and one.shape == recording.calls[block].shape
        )
        for block in backbone.blocks
    )
