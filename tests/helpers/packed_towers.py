"""Towers that are given all images of a batch as one sequence, sparsified, and what goes into and out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tokenprune
from tests.census.entry import Entry
from tests.census.transformers_inputs import PATCH_SIZE
from tests.helpers.tolerances import VARLEN

WINDOWED, DEEP, RASTER = (
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
    "Kimi_K25VisionModel",
)
MERGING, CLASSIFIED, CONVOLVING = "MiniCPMV4_6VisionModel", "Inkling2VisionModel", "Lfm3VlVisionModel"
KEEP_RATIO = (0.6, 0.36)


class Numbered(tokenprune.Scorer):
    """Keeps those that come first among an image's patches, as they are given."""

    def forward(self, candidates: tokenprune.Candidates) -> Tensor:
        number = torch.arange(candidates.num_patches, dtype=torch.float32).expand(len(candidates.patches), -1)
        return -candidates.at_candidates(number)


def pruned(entry: Entry, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The tower of an entry, sparsified, and what it is given."""
    return tokenprune.sparsify(entry.model(), entry.stages, KEEP_RATIO, **settings), entry.example()


def merged(found: Any) -> Tensor:
    """What a tower puts out; before transformers 5, that is all."""
    if isinstance(found, Tensor):
        return found
    made: Tensor = found.last_hidden_state if found.get("pooler_output") is None else found.pooler_output
    return made


def one_by_one(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the inputs of several images those of each."""
    (grids,) = (
        value for name, value in arguments.items() if name.endswith(("grid_thw", "image_sizes", "target_sizes"))
    )
    lengths = grids.prod(dim=1).tolist()
    for image, (start, length) in enumerate(zip(torch.tensor([0, *lengths]).cumsum(0), lengths, strict=False)):

        def of_image(value: Tensor, image: int = image, start: int = int(start), length: int = length) -> Tensor:
            if len(value) == len(lengths):
                return value[image : image + 1]
            if value.dim() == 4 and len(value) == 1:  # patches side by side
                return value[..., start * PATCH_SIZE : (start + length) * PATCH_SIZE]
            return value.narrow(0 if len(value) == sum(lengths) else 1, start, length)

        yield {name: of_image(value) for name, value in arguments.items()}


def assert_joined(together: Mapping[str, Tensor], alone: Sequence[Mapping[str, Tensor]]) -> None:
    """The outputs of a batch are those of its images one after the other."""
    for name, output in together.items():
        parts = [outputs[name] for outputs in alone]
        of_first_token = parts[0].shape == output.shape
        expected = parts[0] if of_first_token else torch.cat(parts, dim=int(output.shape[0] == 1))
        scale = float(output.abs().max())
        torch.testing.assert_close(output, expected, rtol=0, atol=VARLEN[torch.float32] * scale)
