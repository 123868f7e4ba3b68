"""What training needs where Accelerate shards it over processes: by FSDP2, or by DeepSpeed's ZeRO 1 and 2."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipes.engine.settings import SettingsError, TrainingSettings


def prepare_sharding(accelerator: Accelerator, settings: TrainingSettings) -> None:
    """Refuse ways to shard that cannot be had, and tell DeepSpeed what the settings say.

    Raises:
        SettingsError: Accelerate would not shard although it is asked to, or shards in a way that is not supported.
    """
    kind = accelerator.distributed_type
    for flag, asked in (("ACCELERATE_USE_FSDP", DistributedType.FSDP),
                        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED)):  # fmt: skip
        if parse_flag_from_env(flag) and kind != asked:
            raise SettingsError(
                f"Accelerate is asked for {asked.value}, and would train as {kind.value} here: it shards between "
                "accelerators, not between CPUs. Leave it out of its configuration."
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise SettingsError(
            "FSDP 1 flattens parameters, so that scorers and backbone cannot have two learning rates; set "
            "fsdp_version: 2 in Accelerate's configuration."
        )
    if kind == DistributedType.FSDP:
        # Weights are read on every process anyway, and Accelerate deals them out by a method that timm's models lack.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        # Accelerate would cast weights, tokens between blocks and summed gradients; autocast is enough, as everywhere.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if kind == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, settings)


def _configure_deepspeed(accelerator: Accelerator, settings: TrainingSettings) -> None:
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2):
        raise SettingsError(
            f"DeepSpeed's zero_stage={stage} is not supported: take 1 or 2, which leave weights whole, or FSDP2."
        )
    if settings.mixed_precision == "fp16":
        raise SettingsError("mixed_precision=fp16 with DeepSpeed would halve the weights themselves; take bf16.")
    config["train_micro_batch_size_per_gpu"] = settings.batch_size
    config["gradient_accumulation_steps"] = settings.accumulation
    config["gradient_clipping"] = settings.clip_gradient
    if settings.mixed_precision == "bf16":  # autocast, as everywhere else, in place of weights in bfloat16
        config["bf16"] = {"enabled": False}
        # With no module named, gradients are summed in float32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The autocast in which a batch runs with its loss; that of DeepSpeed ends with the model."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
        enabled = bool(config.get("torch_autocast", {}).get("enabled"))
        return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)
    return cast(AbstractContextManager[Any], accelerator.autocast())


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the prepared model or its optimiser is spread over the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with every sharded tensor gathered; to be called on every process."""
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


class Average(ModelEmaV3):  # type: ignore[misc]
    """timm's moving average of the weights, whole on every process although the model may be sharded."""

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Average in the model's weights."""
        super().update(cast(nn.Module, _Whole(model)), step)


class _Whole:
    """All that an average asks of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._state = whole_state(model)

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


class Unsharded:
    """A copy of a model as it was before it was sharded, to end with.

    FSDP changes the classes of modules and leaves its hooks, and DeepSpeed lays weights out anew; what comes out of a
    training is to be saved, counted and used like any other model.

    Args:
        model: Not prepared yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).cpu()

    def with_weights_of(self, model: nn.Module) -> nn.Module:
        """The copy, on the model's device, with its weights; to be called on every process."""
        state = whole_state(model)
        self._model.load_state_dict(state)
        return self._model.to(next(iter(state.values())).device)
