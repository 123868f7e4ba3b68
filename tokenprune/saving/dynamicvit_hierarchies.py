"""Official DynamicViT checkpoints of hierarchies: predictors and fast paths from the authors' layout to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenprune.api import sparsifier_of, sparsify
from tokenprune.backbones.adapters import model_of, official_weights
from tokenprune.errors import CheckpointError
from tokenprune.pruning.norms import set_norm_eps
from tokenprune.pruning.reductions import FastPath
from tokenprune.pruning.stage import Stage

_PREDICTOR = re.compile(r"(?:.+\.)?score_predictor\.(\d+)\.(.+)")
_PATH = re.compile(r"(.+)\.(?:fast_path|fastmlp\.fc1)\.([01])\.(weight|bias)")
_SCALE = re.compile(r"(.+)\.fast_path_gamma")
_STEP = 0.2
"""From stage to stage, by which the authors lower the keep ratio of a hierarchy."""
_EPS = 1e-6
"""Of the authors' norms where they are over (B, C, H, W)."""


class _Layout(NamedTuple):
    """The weights of an official checkpoint, by what they belong to.

    Attributes:
        dense: Of the dense model, under their own names.
        predictors: For each stage, by our names within a predictor.
        paths: For each block, by our names within a fast path; in the order of the blocks.
        channels_first: Whether predictors are convolutions.
    """

    dense: dict[str, Tensor]
    predictors: dict[int, dict[str, Tensor]]
    paths: dict[str, dict[str, Tensor]]
    channels_first: bool


def has_fast_paths(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is one of a hierarchy that was pruned."""
    return any(_PATH.fullmatch(name) for name in state)


def load_hierarchy(
    state: Mapping[str, Tensor], *, keep_ratio: float | Sequence[float], stages: Sequence[int] | None
) -> nn.Module:
    """The sparsified model of an official checkpoint of a hierarchy, in eval mode.

    Args:
        state: The weights.
        keep_ratio: A number ρ means the authors' ρ, ρ − 0.2, ρ − 0.4 …
        stages: As for `tokenprune.sparsify`.

    Raises:
        CheckpointError: Weights are missing, left over, or of another shape.
    """
    layout = _split(state)
    model = model_of(layout.dense, num_heads=None)
    dense = official_weights(model, layout.dense)
    if isinstance(keep_ratio, Real):
        keep_ratio = [round(float(keep_ratio) - _STEP * number, 6) for number in range(len(layout.predictors))]
    sparsify(model, stages, keep_ratio, pruned="fast")
    own = [cast(Stage, stage) for stage in sparsifier_of(model).stages]
    paths = [path for stage in own for path in stage.reduction.modules() if isinstance(path, FastPath)]
    if len(paths) != len(layout.paths):
        raise CheckpointError(
            f"this checkpoint has fast paths in {len(layout.paths)} blocks, {', '.join(layout.paths)}, and stages in "
            f"front of blocks {sparsifier_of(model).plan.stages} have {len(paths)}; pass the stages that it was "
            "trained with."
        )
    names = {module: name for name, module in model.named_modules()}
    converted = dict(dense)
    for path, weights in zip(paths, layout.paths.values(), strict=True):
        converted |= {f"{names[path]}.{name}": tensor for name, tensor in weights.items()}
    for number, stage in enumerate(own):
        weights = layout.predictors.get(number, {})
        converted |= {f"{names[stage.scorer]}.{name}": tensor for name, tensor in weights.items()}
    _load(model, converted)
    if layout.channels_first:
        set_norm_eps(sparsifier_of(model), _EPS)
    return model.eval()


def _split(state: Mapping[str, Tensor]) -> _Layout:
    dense: dict[str, Tensor] = {}
    predictors: dict[int, dict[str, Tensor]] = {}
    paths: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, Tensor] = {}
    channels_first = False
    for name, tensor in state.items():
        if match := _PREDICTOR.fullmatch(name):
            channels_first |= tensor.dim() == 4
            predictors.setdefault(int(match[1]), {})[match[2]] = tensor.flatten(1) if tensor.dim() == 4 else tensor
        elif match := _PATH.fullmatch(name):
            ours = f"{('norm', 'linear')[int(match[2])]}.{match[3]}"
            paths.setdefault(match[1], {})[ours] = tensor
        elif match := _SCALE.fullmatch(name):
            scales[match[1]] = tensor
        else:
            dense[name] = tensor
    for block, scale in scales.items():
        _rescale(paths.setdefault(block, {}), scale, dense.get(f"{block}.gamma"), block)
    ordered = sorted(paths, key=lambda block: [int(number) for number in re.findall(r"\d+", block)])
    return _Layout(dense, predictors, {block: paths[block] for block in ordered}, channels_first)


def _rescale(path: dict[str, Tensor], scale: Tensor, own: Tensor | None, block: str) -> None:
    """Put the layer scale of a fast path into its linear layer.

    Behind the part that it stands in for, the block multiplies what both paths give by its own layer scale.
    """
    if own is None or own.shape != scale.shape or bool((own == 0).any()):
        raise CheckpointError(
            f"{block}.fast_path_gamma scales a fast path whose block has no layer scale {block}.gamma of the same "
            "shape without a 0 in it."
        )
    for name in ("linear.weight", "linear.bias"):
        if name in path and len(path[name]) == len(scale):
            factor = (scale.double() / own.double()).to(torch.promote_types(path[name].dtype, torch.float32))
            path[name] = path[name] * (factor[:, None] if path[name].dim() == 2 else factor)


def _load(model: nn.Module, converted: Mapping[str, Tensor]) -> None:
    """Load every weight, or none."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("._extra_state")}
    missing = [name for name in wanted if name not in converted]
    unexpected = [name for name in converted if name not in wanted]
    differences = [
        f"{name} has shape {tuple(converted[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    if missing or unexpected or differences:
        raise CheckpointError(
            "\n  ".join([f"the weights are not those of a sparsified {type(model).__name__}.", *differences[:12]]),
            missing=missing,
            unexpected=unexpected,
        )
    model.load_state_dict(dict(converted))
