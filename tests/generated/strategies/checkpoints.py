"""Weights and files that are damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.generated.strategies.json_trees import SMALL_JSON

Files = dict[str, bytes]


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that is cut off, overwritten somewhere, or something else."""
    kind = draw(st.sampled_from(["cut off", "overwritten", "longer", "empty", "else"]))
    if kind == "cut off":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "overwritten":
        # Mostly at the front, where a header tells what follows.
        start = draw(st.one_of(st.integers(0, min(400, len(content) - 1)), st.integers(0, len(content) - 1)))
        part = draw(st.binary(min_size=1, max_size=8))
        return content[:start] + part + content[start + len(part) :]
    if kind == "longer":
        return content + draw(st.binary(min_size=1, max_size=8))
    return b"" if kind == "empty" else draw(st.binary(max_size=40))


def _can_be_written(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors knows such numbers."""
    try:
        return bool(safetensors.torch.save({"tensor": torch.zeros(1, dtype=dtype)}))
    except KeyError:
        return False


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda tensor: tensor.flatten()[:-1] if tensor.numel() > 1 else tensor.new_zeros(3),
    "deeper": lambda tensor: tensor.unsqueeze(0),
    "a number": lambda tensor: tensor.flatten().sum(),
    "nothing": lambda tensor: tensor.new_zeros(0),
    "turned": lambda tensor: tensor.T if tensor.dim() == 2 else tensor.unsqueeze(-1),
    "whole numbers": lambda tensor: (tensor * 100).to(torch.int64),
    "bytes": lambda tensor: tensor.to(torch.uint8),
    "yes and no": lambda tensor: tensor > 0,
    "double": lambda tensor: tensor.double(),
    "half": lambda tensor: tensor.half(),
    "eight bits": lambda tensor: tensor.to(torch.float8_e4m3fn),
    **({"complex": lambda tensor: tensor.to(torch.complex64)} if _can_be_written(torch.complex64) else {}),
    "no numbers": lambda tensor: torch.full_like(tensor, math.nan if tensor.is_floating_point() else 0),
    "endless": lambda tensor: torch.full_like(tensor, math.inf if tensor.is_floating_point() else 1),
}
NUMBERS_ALONE = ("double", "half", "no numbers", "endless")
"""Changes after which weights are still weights."""


class Weights(dict[str, Tensor]):
    """A state dict that is told in few words."""

    def __repr__(self) -> str:
        return f"Weights({[(name, value.dtype, tuple(value.shape)) for name, value in self.items()][:3]} …)"


@st.composite
def damaged_state(draw: st.DrawFn, state: dict[str, Tensor]) -> Weights:
    """Weights of which some are missing, too many, or something else."""
    state = Weights(state)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(state)))
        kind = draw(st.sampled_from(["changed", "changed", "missing", "renamed", "too many", "all of them"]))
        if kind == "changed":
            state[name] = _CHANGES[draw(st.sampled_from(sorted(_CHANGES)))](state[name]).contiguous()
        elif kind == "missing":
            del state[name]
        elif kind == "renamed":
            state[draw(st.sampled_from([f"module.{name}", name[1:] or "x", "tokenprune._extra_state"]))] = state.pop(
                name
            )
        elif kind == "too many":
            more = draw(st.sampled_from(["more", "blocks.99.norm1.weight", f"{name}.more", "tokenprune.more"]))
            state[more] = state[name].clone()
        else:
            change = _CHANGES[draw(st.sampled_from(sorted(_CHANGES)))]
            state = Weights({name: change(tensor).contiguous() for name, tensor in state.items()})
    return state


TIES = st.one_of(
    SMALL_JSON.map(json.dumps),
    st.text(max_size=5),
    st.sampled_from(
        ['{"norm.weight": "norm.bias"}', '{"more": "norm.bias"}', '{"a": "b"}', '{"a": ["b"]}', "[[1, 2]]"]
    ),
)
"""What the file of weights says of tied ones."""
