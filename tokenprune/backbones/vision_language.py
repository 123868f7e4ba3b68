"""What a vision-language model looks like: the module that puts image tokens into a prompt, in terms its adapter gives.

Shapes: b prompts, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Positions = Callable[[nn.Module, Mapping[str, Any], int], Tensor]
"""Of the merging module, a call's arguments by name and the number of tokens before it: positions (…, b or 1, L)."""


@dataclass(frozen=True, kw_only=True)
class VisionLanguage:
    """Where a vision-language model encodes its images, and where the image tokens take their places in the prompt.

    Attributes:
        model: The module whose forward pass puts image tokens in the places of placeholders and runs the language
            model, and whose method gives these tokens. Its argument names are those of transformers.
        language: The language model.
        tower: The vision tower.
        placeholder: The id of the tokens that hold the places of image tokens.
        block: The side of the square of patches that each image token is made of; 1 where an image token is a patch
            token. ``None`` where a token is made in another way, or the images are in several pieces.
        num_tokens: The number of tokens of each image or tile, where what ``encode`` gives does not tell where one
            ends and the next begins.
        encode: Name of the method that gives image tokens: as ``pooler_output``, or by itself.
        images: The parameters that bring images, any of which makes the model encode some.
        encoded: The parameter that takes what ``encode`` gives, by modality, if there is one.
        caches: Names that the cache may have among arguments and outputs.
        outputs: What the module puts out of the image tokens themselves: of those alone that went on.
        features: What ``encode`` gives with an entry for each image token, besides the tokens.
        token_arguments: The parameters with an entry for each token of the prompt, (b, L).
        positions: The positions that the model gives its tokens by itself; ``None`` means 0, 1, 2 ….
    """

    model: nn.Module
    language: nn.Module
    tower: nn.Module
    placeholder: int
    block: int | None = None
    num_tokens: int | None = None
    encode: str = "get_image_features"
    images: tuple[str, ...] = ("pixel_values",)
    encoded: str = "mm_encoder_outputs"
    features: tuple[str, ...] = ("deepstack_features",)
    caches: tuple[str, ...] = ("cache", "past_key_values")
    outputs: tuple[str, ...] = ("image_hidden_states", "image_outputs")
    token_arguments: tuple[str, ...] = ("input_ids", "token_type_ids", "mm_token_type_ids", "labels")
    positions: Positions | None = None

    def cache_in(self, values: Mapping[str, Any]) -> Any:
        """The cache among a call's arguments or outputs by name; ``None`` if there is none."""
        return next((values[name] for name in self.caches if values.get(name) is not None), None)
