"""Official DynamicViT checkpoints: from the authors' layout to a sparsified model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from tokenprune.api import sparsifier_of, sparsify
from tokenprune.backbones.adapters import model_of
from tokenprune.errors import CheckpointError, PlanError
from tokenprune.saving.dynamicvit_hierarchies import has_fast_paths, load_hierarchy
from tokenprune.saving.state_files import read_state
from tokenprune.saving.weights import alike
from tokenprune.scorers import Predictor

_NUM_DEFAULT_STAGES = 3
# Where stage s has its predictor's weights in the authors' files, and where in ours.
_PREDICTORS = "score_predictor."
_STAGE = re.compile(r"score_predictor\.(\d+)\.")
_OURS = re.compile(r"tokenprune\.stages\.(\d+)\.scorer\.")


def load_dynamicvit(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    keep_ratio: float | Sequence[float] = 0.7,
    num_heads: int | None = None,
    stages: Sequence[int] | None = None,
) -> nn.Module:
    """The sparsified model of an official DynamicViT checkpoint.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034).

    Sizes are read from the weights: width, depth, classes, patches, image size and number of stages. Every
    weight is loaded, and none is left over. The predictors' two outputs are kept as they are, so the
    decisions are those of the official code. Of hierarchies (DynamicSwin, DynamicConvNeXt, arXiv 2207.01580) the fast
    paths are loaded too, a ConvNeXt's with its layer scale in the linear layer.

    Args:
        source: The file, a PyTorch or .safetensors one, or what was loaded from it. The state dict may be
            nested under ``model``, ``state_dict``, ``model_ema`` or ``state_dict_ema`` (averaged
            weights go first) and its keys may start with ``module.``. No code in a file is ever run.
        keep_ratio: As for `sparsify`; it is not in the weights, and 0.7 is the authors' default. For a hierarchy, a
            number ρ means the authors' ρ, ρ − 0.2, ρ − 0.4.
        num_heads: Heads of the attention, which are not in the weights either; ``None`` means those of the
            published models, which is width // 64 for most.
        stages: As for `sparsify`; ``None`` for where the authors' three stages are, as `sparsify` has them too.

    Returns:
        The model, in eval mode, on the CPU, in float32.

    Raises:
        CheckpointError: The file is damaged, holds code or another model; the message names the keys that are
            missing and unexpected.
        PlanError: Stages or ratios make no plan for this model.
        FileNotFoundError: There is no such file.
    """
    _check_number(num_heads)
    state = read_state(source)
    if any(_OURS.match(name) for name in state):
        raise CheckpointError(
            "this is the state dict of a model that tokenprune sparsified, not one in the authors' layout; sparsify a "
            "model as that one was, and call model.load_state_dict(state)."
        )
    if has_fast_paths(state):
        return load_hierarchy(state, keep_ratio=keep_ratio, stages=stages)
    dense = {name: tensor for name, tensor in state.items() if not name.startswith(_PREDICTORS)}
    model = model_of(dense, num_heads=num_heads)
    num_stages = _num_stages(state)
    if num_stages == 0:
        raise CheckpointError(
            f"this is the checkpoint of a dense {type(model).__name__}, without predictors. Load it into its model as "
            "usual, sparsify that with tokenprune.sparsify(model), and train it.",
            missing=[
                f"{_PREDICTORS}{stage}.{name}"
                for stage in range(_NUM_DEFAULT_STAGES)
                for name in Predictor(embed_dim=4).state_dict()
            ],
        )
    if stages is None and num_stages != _NUM_DEFAULT_STAGES:
        raise CheckpointError(
            f"this checkpoint has {num_stages} predictor(s), and does not say in front of which blocks; pass "
            f"stages=(…) with {num_stages} block indices."
        )
    chosen = sparsifier_of(sparsify(model, stages, keep_ratio)).plan.stages
    if len(chosen) != num_stages:
        raise PlanError(
            f"stages={chosen}: this checkpoint has {num_stages} predictor(s), one a stage; name as many blocks."
        )
    _load(model, state)
    return model.eval()


def _check_number(num_heads: Any) -> None:
    if num_heads is not None and (isinstance(num_heads, bool) or not isinstance(num_heads, Integral)):
        raise CheckpointError(f"num_heads={num_heads!r}: expected a whole number from 1, or None.")


def _num_stages(state: Iterable[str]) -> int:
    found = {int(match[1]) for match in map(_STAGE.match, state) if match}
    if gaps := sorted(set(range(len(found))) - found):
        raise CheckpointError(
            f"there are predictors of stages {sorted(found)}, and not of every one from 0 on.",
            missing=[f"{_PREDICTORS}{number}.*" for number in gaps],
        )
    return len(found)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load every weight, or none."""
    # By the names they have in the file, which are those that an error has to name.
    wanted = {
        _OURS.sub(rf"{_PREDICTORS}\1.", name): (name, tensor)
        for name, tensor in model.state_dict().items()
        if not name.endswith("._extra_state")  # what sparsify itself was asked for, no weight
    }
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    differences = [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, (_, tensor) in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    differences += [
        f"{name} holds numbers of {state[name].dtype} instead of {tensor.dtype}"
        for name, (_, tensor) in wanted.items()
        if name in state and not alike(state[name], tensor)
    ]
    if missing or unexpected or differences:
        raise CheckpointError(
            "\n  ".join([f"the weights are not those of a sparsified {type(model).__name__}.", *differences[:12]]),
            missing=missing,
            unexpected=unexpected,
        )
    model.load_state_dict({name: state[official] for official, (name, _) in wanted.items()})
