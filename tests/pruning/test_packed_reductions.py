"""What packed towers make of pruned tokens: they are merged within their image, and count by their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.census.lookup import entry_of
from tests.helpers.packed_towers import (
    CLASSIFIED,
    CONVOLVING,
    DEEP,
    KEEP_RATIO,
    MERGING,
    RASTER,
    WINDOWED,
    Numbered,
    assert_joined,
    merged,
    one_by_one,
    pruned,
)
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tokenprune.backbones.probing import named_outputs


def output_states(model: Any, arguments: dict[str, Any]) -> Tensor:
    """What the last pruned block gives, (T, C)."""
    seen: list[Tensor] = []
    backbone = model.tokenprune.backbone
    block = backbone.blocks[backbone.reach[-1]]
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output))
    model(**arguments)
    handle.remove()
    tokens = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return tokens.squeeze(0)


MERGED = [
    pytest.param(
        name, reduction, marks=() if name in (WINDOWED, CLASSIFIED) or reduction == "merge" else pytest.mark.slow
    )
    for name in (WINDOWED, CLASSIFIED, DEEP, RASTER, MERGING, CONVOLVING, "PixtralVisionModel")
    for reduction in ("merge", "merge_sizes")
]


@pytest.mark.parametrize(("name", "reduction"), MERGED)
@torch.no_grad()
def test_pruned_tokens_are_merged_within_their_image(name: str, reduction: str) -> None:
    model, arguments = pruned(entry_of(name))
    dropped = merged(model(**arguments))
    tokenprune.unsparsify(model)
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned=reduction, scorer=lambda _: Numbered())
    together, trace = named_outputs(model(**arguments)), model.tokenprune.trace
    hosts, places = trace.selections[-1].hosts, trace.images.places
    for image, (length, kept) in enumerate(zip(trace.images.lengths, trace.indices[-1], strict=True)):
        assert torch.equal(hosts[image, :length].unique(), kept)
    # A pruned token comes back in the state of its host.
    found = output_states(model, arguments)
    source = places[:, trace.images.num_prefix :].gather(1, hosts)[trace.images.present > 0]
    target = places[:, trace.images.num_prefix :][trace.images.present > 0]
    assert torch.equal(found[target], found[source]) and not torch.equal(target, source)
    assert_joined(together, [named_outputs(model(**inputs)) for inputs in one_by_one(arguments)])
    model.tokenprune.execution = "mask"
    for key, output in named_outputs(model(**arguments)).items():
        scale = float(output.abs().max())
        torch.testing.assert_close(output, together[key], rtol=0, atol=MASK_EQUALS_GATHER[torch.float32] * scale)
    assert (merged(model(**arguments)) - dropped).abs().max() > 1e-4 * dropped.abs().max()


@torch.no_grad()
def test_tokens_count_by_their_sizes_segment_by_segment() -> None:
    """A group that is merged into one that is the same counts as both, which changes nothing; with `merge` it does."""
    entry = entry_of("Ernie4_5_VLMoeVisionTransformerPretrainedModel")
    model, arguments = entry.model(), entry.example()
    model.rotary_pos_emb.inv_freq.zero_()  # so that places do not matter
    patches = arguments["hidden_states"].view(18, 4, -1)
    patches[1::2] = patches[::2]  # of two groups the second one is the first one again
    arguments["grid_thw"] = torch.tensor([[1, 6, 8], [1, 4, 6]])
    before = merged(model(**arguments))

    class Again(tokenprune.Scorer):
        """Of 2 · n groups, two thirds are kept: the second one is pruned of the first pairs, not of the last ones."""

        def forward(self, candidates: tokenprune.Candidates) -> tokenprune.Scored:
            place = torch.arange(candidates.patches.shape[1]).expand(len(candidates.patches), -1)
            again = place // 4 % 2
            return tokenprune.Scored(-again * (1000.0 - place), hosts=place - 4 * again)

    differences = []
    for reduction in ("merge_sizes", "merge"):
        tokenprune.sparsify(model, (1,), 2 / 3, scorer=lambda _: Again(), pruned=reduction)
        differences.append(float((merged(model(**arguments)) - before).abs().max() / before.abs().max()))
        assert len(model.tokenprune.trace.selections[0].rows) == 48
        tokenprune.unsparsify(model)
    assert differences[0] < IDENTITY < 100 * IDENTITY < differences[1]


def test_gradients_reach_predictors_through_merged_tokens() -> None:
    for reduction in ("merge", "merge_sizes"):
        model, arguments = pruned(entry_of(WINDOWED), pruned=reduction)
        report = tokenprune.verify(model, arguments)
        assert not report.failures and all(gradient > 0 for gradient in report.gradients)


@pytest.mark.parametrize("reduction", ["fuse", "fast", "fuse_preserve"])
def test_reductions_that_need_rows_are_refused(reduction: str) -> None:
    model = entry_of(DEEP).model()
    with pytest.raises(tokenprune.UnsupportedModelError, match="one sequence"):
        tokenprune.sparsify(model, pruned=reduction)
    assert not hasattr(model, "tokenprune")
