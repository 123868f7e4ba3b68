"""Packed towers with something beside their patches or between their blocks: class tokens, convolutions, a merger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.census.lookup import entry_of
from tests.helpers.packed_towers import CLASSIFIED, CONVOLVING, KEEP_RATIO, MERGING, Numbered, pruned


@torch.no_grad()
def test_prefix_tokens_of_packed_images_stay() -> None:
    """A class token in front of each image's patches: never scored, never pruned, and seen by scorers as what it is."""
    entry = entry_of(CLASSIFIED)
    seen: list[tokenprune.Candidates] = []

    class Looking(Numbered):
        def forward(self, candidates: tokenprune.Candidates) -> Tensor:
            seen.append(candidates)
            return super().forward(candidates)

    model, arguments = pruned(entry, scorer=lambda _: Looking())
    got: list[Tensor] = []
    model.layers[1].register_forward_pre_hook(lambda block, args: got.append(args[0]), prepend=True)
    output = model(**arguments)
    images = model.tokenprune.trace.images
    assert images.lengths == (4 * 36, 4 * 24, 4 * 12) and images.num_groups == (36, 24, 12)
    places = [0, 145, 242]  # behind those of the images before
    assert seen[0].prefix.shape == (3, 1, 32) and torch.equal(seen[0].prefix.squeeze(1), got[0][places])
    for place, length, patches in zip(places, images.lengths, seen[0].patches, strict=True):
        assert torch.equal(patches[:length], got[0][place + 1 : place + 1 + length])
    for selection in model.tokenprune.trace.selections:
        assert torch.isin(torch.tensor(places), selection.rows).all()
    with tokenprune.dense(model):
        dense = model(**arguments)
    changed = (output.last_hidden_state - dense.last_hidden_state)[places].abs().amax(dim=1)
    assert (changed > 1e-5).all()  # they attend to fewer patches
    sparse = tokenprune.sparsify(tokenprune.unsparsify(model), (1, 2), KEEP_RATIO, scorer="cls_attention")
    sparse(**arguments)
    received = sparse.tokenprune.trace.scores[0]  # of the class token's attention, times the tokens of the segment
    paid = received.nansum(dim=1) / (torch.tensor(images.lengths) + 1)
    assert ((paid > 0.9) & (paid < 1)).all()  # what is left of 1 it pays to itself


@torch.no_grad()
def test_modules_that_do_not_attend_stand_between_blocks_and_see_every_token() -> None:
    model, arguments = pruned(entry_of(CONVOLVING))
    blocks = model.tokenprune.backbone.blocks
    assert [*blocks] == [layer for layer in model.layers if layer.is_attention_layer] and len(blocks) == 4
    lengths: list[int] = []
    for layer in model.layers:
        layer.feed_forward.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0])))
    model(**arguments)
    kept = [len(selection.rows) for selection in model.tokenprune.trace.selections]
    assert lengths == [72, 72, 72, kept[0], 72, kept[1], 72, kept[1]]
    assert kept[1] < kept[0] < 72


@torch.no_grad()
def test_stages_stand_on_one_side_of_a_merger_between_blocks() -> None:
    entry = entry_of(MERGING)
    arguments = entry.example()
    lengths: list[int] = []
    for stages, tokens, expected in (((1, 2), 72, [72, 36, 24, 24, 18, 18]), ((4, 5), 18, [72, 72, 72, 72, 9, 6])):
        model = tokenprune.sparsify(entry.model(), stages, KEEP_RATIO)
        lengths.clear()
        for layer in model.encoder.layers:
            layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        output = model(**arguments).last_hidden_state
        images = model.tokenprune.trace.images
        assert images.num_groups == (9, 6, 3) and sum(images.lengths) == tokens and output.shape == (1, 18, 32)
        assert lengths == expected
    model = entry.model()
    with pytest.raises(tokenprune.PlanError, match=r"merges tokens between its blocks.*0 … 3 or 4 … 5"):
        tokenprune.sparsify(model, (1, 4), KEEP_RATIO)
    assert not hasattr(model, "tokenprune")
    assert tokenprune.sparsify(model).tokenprune.plan.stages == (1, 2, 3)
    front = tokenprune.sparsify(tokenprune.unsparsify(model), (1, 2), KEEP_RATIO)
    assert front(**arguments, use_vit_merger=False).last_hidden_state.shape == (1, 72, 32)
    behind = tokenprune.sparsify(tokenprune.unsparsify(model), (4, 5), KEEP_RATIO)
    with pytest.raises(tokenprune.StateError, match="the images' grids say that there are 18"):
        behind(**arguments, use_vit_merger=False)
