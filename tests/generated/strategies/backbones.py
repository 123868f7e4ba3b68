"""Descriptions of timm's Vision Transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tokenprune import Adaptation, Setting, TokenTable

Field = Callable[[Any], Any]
"""Of a model what a field of its description is to hold."""


def _always(*values: Any) -> list[Field]:
    return [partial(_itself, value) for value in values]


def _itself(value: Any, model: Any) -> Any:
    return value


def _attentions(model: Any) -> list[list[nn.Module]]:
    return [[block.attn] for block in model.blocks]


def _norm(model: Any) -> nn.Module:
    norm: nn.Module = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return norm


_NO_SIDES = (8, 8.0, "8", "88", (8,), (8, 8, 8), (0, 8), (8, -8), ("8", "8"), (8.0, 8.0), (None, 8), {8: 8}, True)
TRUE_FIELDS: dict[str, list[Field]] = {
    "blocks": [lambda model: model.blocks, lambda model: [*model.blocks], lambda model: (*model.blocks,)],
    "num_prefix_tokens": [lambda model: model.num_prefix_tokens, lambda model: np.int64(model.num_prefix_tokens)],
    "embed_dim": [lambda model: model.embed_dim, lambda model: np.int32(model.embed_dim)],
    "num_suffix_tokens": _always(0),
    "class_token": _always(True, False),
    "patch_size": _always(None, (8, 8), [8, 8]),
    "grid_size": [lambda model: model.patch_embed.grid_size, lambda model: None],
    "final_norm": [_norm, lambda model: None],
    "downstream": _always("pooled", "all tokens"),
    "attentions": [lambda model: None, _attentions, lambda model: tuple(map(tuple, _attentions(model)))],
    "token_inputs": _always({}, {"attn_mask": None}, {"rope": ["n d -> b 1 n d", "b n d -> b n d"]}),
    "adaptations": [
        lambda model: (),
        lambda model: [Adaptation()],
        lambda model: [Setting(owner=model.blocks[1].attn, name="fused_attn", value=False)],
    ],
    "tower": [lambda model: None, lambda model: model],
}
"""For each field of a `Backbone` what is right of a model, in several forms."""
FALSE_FIELDS: dict[str, list[Field]] = {
    "blocks": [
        *_always(None, (), [], 7, "blocks", [None], ["blocks.0"], nn.ModuleDict({"a": nn.Linear(2, 2)}), {}),
        lambda model: iter(model.blocks), lambda model: model.blocks[0], lambda model: model,
        lambda model: [[block] for block in model.blocks], lambda model: [*model.blocks, model.blocks[0]],
        lambda model: [nn.Identity(), *model.blocks], lambda model: [model.blocks, [1]],
    ],
    "num_prefix_tokens": _always(-1, 1.5, 1.0, "1", None, [1], math.nan, True, torch.tensor(1)),
    "embed_dim": _always(0, -16, 16.0, "16", None, (16,), math.inf, True),
    "num_suffix_tokens": _always(-1, 0.0, "0", None, [], False),
    "class_token": _always(None, "yes", 1, []),
    "patch_size": _always(*_NO_SIDES),
    "grid_size": _always(*_NO_SIDES),
    "final_norm": [
        *_always("norm", 3, [], nn.LayerNorm(16)), lambda model: type(model.norm), lambda model: [model.norm],
    ],
    "downstream": _always("none", "", None, [], 3, True),
    "attentions": [
        *_always(7, "attn", [], [[]], [None] * 4, [None] * 5, {}, [[3]] * 4, [[3]] * 5),
        lambda model: [block.attn for block in model.blocks], lambda model: _attentions(model)[1:],
        lambda model: [*_attentions(model), []], lambda model: [[nn.Identity()] for _ in model.blocks],
        lambda model: [[block.attn, block.attn] for block in model.blocks],
        lambda model: [[block, block.attn] for block in model.blocks],
        lambda model: [["attn"] for _ in model.blocks], lambda model: [[[block.attn]] for block in model.blocks],
    ],
    "token_inputs": _always(
        None, 3, ["attn_mask"], "attn_mask", {3: None}, {"attn_mask": "b n -> b n"}, {"attn_mask": 3},
        {"attn_mask": [3]}, {"attn_mask": ["nonsense"]}, {"attn_mask": ["b d -> b d"]}, {"attn_mask": [""]},
    ),
    "adaptations": [
        *_always(None, 3, "settings", [3], [None], [Adaptation]), lambda model: Adaptation(),
        lambda model: [Setting(owner=model, name="nonsense", value=1)],
        lambda model: Setting(owner=model.blocks[1].attn, name="fused_attn", value=False),
        lambda model: [TokenTable(owner=nn.Identity(), name="table", pattern="n d -> b n d", build=torch.zeros)],
    ],
    "tower": [
        *_always("model", 3, [], nn.Identity()), lambda model: model.head, lambda model: model.blocks[0],
        lambda model: type(model), lambda model: [model],
    ],
}  # fmt: skip
"""What must be refused."""
WRONG_FIELDS: dict[str, list[Field]] = {
    "blocks": [
        lambda model: model.blocks[1:], lambda model: model.blocks[:-1], lambda model: model.blocks[::2],
        lambda model: [*reversed(model.blocks)], lambda model: [model.blocks[1], model.blocks[0], *model.blocks[2:]],
        lambda model: [block.attn for block in model.blocks], lambda model: [block.mlp for block in model.blocks],
        lambda model: [model.head, *model.blocks], lambda model: [*model.blocks, model.head],
        lambda model: [*model.blocks[:2], model.blocks[3], model.blocks[2]], lambda model: [model.blocks],
        lambda model: [model.patch_embed, *model.blocks],
    ],
    "num_prefix_tokens": _always(0, 1, 2, 3, 4, 12, 17, 27, 200, 10**400),
    "embed_dim": _always(1, 4, 8, 12, 15, 18, 32, 64, 10**6),
    "num_suffix_tokens": _always(1, 2, 13, 15, 16, 24, 100),
    "patch_size": _always((4, 4), (16, 16), (1, 1), (8, 4), (7, 7), (10**6, 1)),
    "grid_size": _always((1, 1), (4, 4), (2, 8), (5, 5), (100, 1), [6, 4]),
    "final_norm": [lambda model: model.blocks[2].norm1, lambda model: model.head, lambda model: model.patch_embed,
                   lambda model: model],
    "downstream": _always("any number"),
    "attentions": [
        lambda model: [[] for _ in model.blocks], lambda model: [[block.mlp] for block in model.blocks],
        lambda model: [[model.head] for _ in model.blocks], lambda model: [[block] for block in model.blocks],
        lambda model: [*reversed(_attentions(model))], lambda model: [[block.attn.qkv] for block in model.blocks],
        lambda model: [_attentions(model)[1] for _ in model.blocks],
        lambda model: [[model.blocks], *_attentions(model)[1:]],
    ],
    "token_inputs": _always({"nonsense": None}, {"x": ["b n d -> b n d"]}),
}  # fmt: skip
"""What nobody can see is wrong before the model runs, or even then."""
