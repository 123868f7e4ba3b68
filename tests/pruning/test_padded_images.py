"""Images of different sizes as padded rows of patches: padding is no token, and each image keeps its own share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.census.entry import Entry
from tests.census.timm import naflex_dict
from tests.census.transformers import supported
from tests.helpers.tolerances import MASK_EQUALS_GATHER, VARLEN
from tokenprune.backbones.probing import named_outputs
from tokenprune.pruning.checks import layout_of

NAMES = ("Siglip2VisionModel", "Siglip2ForImageClassification")
PADDED = [*naflex_dict(), *(entry for entry in supported() if entry.name in NAMES)]
KEEP_RATIO = (0.6, 0.36)


def mask_of(arguments: dict[str, Any]) -> Tensor:
    """Which patches are there, (B, N)."""
    given = arguments.get("x", arguments)
    return next(value.flatten(1) for name, value in given.items() if "mask" in name or name == "patch_valid")


def image(arguments: dict[str, Any], number: int) -> dict[str, Any]:
    """Of the inputs of several images those of one."""
    return {
        name: image(value, number) if isinstance(value, dict) else value[number : number + 1]
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("entry", PADDED, ids=str)
@torch.no_grad()
def test_each_image_keeps_its_own_share_as_if_it_were_alone(entry: Entry) -> None:
    model, arguments = tokenprune.sparsify(entry.model(), (1, 2), KEEP_RATIO), entry.example()
    mask, plan = mask_of(arguments), model.tokenprune.plan
    together, trace = named_outputs(model(**arguments)), model.tokenprune.trace
    assert len({*mask.sum(dim=1).tolist()}) > 1
    for number, there in enumerate(mask):
        kept = [indices[number] for indices in trace.indices]
        assert [len(indices) for indices in kept] == [*plan.num_keep(int(there.sum()))]
        assert all(there[indices].all() for indices in kept)
        alone = named_outputs(model(**image(arguments, number)))
        for name, output in together.items():
            expected, found = alone[name][0], output[number]
            if output.dim() == 3 and len(expected) >= len(there):  # patch tokens, of which padding means nothing
                expected, found = (tokens[len(tokens) - len(there) :][there > 0] for tokens in (expected, found))
            scale = float(output.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=VARLEN[torch.float32] * scale)
    for execution in ("varlen", "mask"):
        model.tokenprune.execution = execution
        for name, output in named_outputs(model(**arguments)).items():
            scale = float(output.abs().max())
            torch.testing.assert_close(
                output,
                together[name],
                rtol=0,
                atol=MASK_EQUALS_GATHER[torch.float32] * scale,
                msg=f"{execution} {name}",
            )


@torch.no_grad()
def test_without_pruning_a_mask_is_seen_behind_a_pass_without_one() -> None:
    (entry,) = (entry for entry in PADDED if entry.name == "Siglip2VisionModel")
    model, arguments = tokenprune.sparsify(entry.model(), (1, 2), 1.0), entry.example()
    model(**{**arguments, "pixel_attention_mask": None})
    assert model.tokenprune.trace.images is None and model.tokenprune.trace.keep[0].all()
    model(**arguments)
    assert torch.equal(model.tokenprune.trace.images.present, mask_of(arguments))


@torch.no_grad()
def test_scorers_do_not_see_padding() -> None:
    (entry,) = (entry for entry in PADDED if entry.name == "Siglip2VisionModel")
    model, arguments = tokenprune.sparsify(entry.model(), (1, 2), KEEP_RATIO), entry.example()
    mask = mask_of(arguments)
    before = model(**arguments).pooler_output
    kept = model.tokenprune.trace.keep
    arguments["pixel_values"][mask == 0] += 5.0
    torch.testing.assert_close(model(**arguments).pooler_output, before, rtol=0, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.keep, kept, strict=True))


def test_a_mask_of_another_length_is_one_clear_error() -> None:
    (entry,) = (entry for entry in PADDED if entry.name == "Siglip2VisionModel")
    model, arguments = tokenprune.sparsify(entry.model(), (1, 2), KEEP_RATIO), entry.example()
    images = model.tokenprune.backbone.images(model, (), arguments)
    shorter = images._replace(present=images.present[:, :-1])
    block = model.tokenprune.backbone.blocks[0]
    tokens = torch.zeros(*images.present.shape, model.tokenprune.backbone.embed_dim)
    with pytest.raises(tokenprune.StateError, match="mask' says which of"):
        layout_of(block, tokens, model.tokenprune.backbone, shorter)
