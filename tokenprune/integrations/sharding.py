"""What a Trainer needs where Accelerate shards over processes: by FSDP2, or by DeepSpeed's ZeRO 1 and 2."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn


def prepare_sharding(accelerator: Any, model: nn.Module, args: Any, options: Mapping[str, Any]) -> None:
    """Refuse ways to shard that cannot be had, and complete the configuration of those that can.

    Args:
        accelerator: Of the trainer.
        model: The sparsified model, which is not prepared yet.
        args: The `TrainingArguments`.
        options: What the trainer was given besides.

    Raises:
        ValueError: It says which, and what to take.
    """
    kind = accelerator.distributed_type.value
    for what, flag, asked in (("FSDP", "ACCELERATE_USE_FSDP", args.fsdp), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED",
                               args.deepspeed)):  # fmt: skip
        if kind != what and (asked or os.environ.get(flag, "false").lower() in ("1", "true", "yes")):
            raise ValueError(
                f"Accelerate is asked for {what}, and would train as {kind} here: it shards between accelerators, one "
                "process each, and not between CPUs. Leave it out."
            )
    if getattr(accelerator.state, "parallelism_config", None) is not None:
        raise ValueError(
            "parallelism_config would cut up tokens or weights in ways that pruned tokens have not been tried with; "
            "leave it out, and shard by FSDP2 or by DeepSpeed's ZeRO 1 or 2."
        )
    if kind == "FSDP":
        _check_fsdp(accelerator)
        _wrap_blocks(accelerator.state.fsdp_plugin, model)
        # Accelerate would cast weights, tokens between blocks and summed gradients; autocast is enough, as everywhere.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if kind == "DEEPSPEED":
        described = accelerator.state.deepspeed_plugin.hf_ds_config
        _check_deepspeed(described.config, args, options)
        _configure_deepspeed(described, args)


def _check_fsdp(accelerator: Any) -> None:
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP 1 flattens parameters, so that predictors and backbone cannot have two learning rates; set the "
            "version to 2: fsdp_version in Accelerate's configuration, or 'version' in fsdp_config."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading leaves the models of all processes but one without weights, and they cannot be "
            "sparsified or taught; set it to false in Accelerate's configuration (fsdp_cpu_ram_efficient_loading), or "
            "in fsdp_config."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP's own activation checkpointing draws new random numbers where blocks run again, and so other "
            "decisions; leave it out of its configuration, and take that of the TrainingArguments."
        )


def _wrap_blocks(plugin: Any, model: Any) -> None:
    """Have each block sharded by itself, where the configuration names no classes.

    Those that a model of transformers names may hold one another, and Accelerate would shard weights twice.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(one).__name__ for one in model.tokenprune.backbone.blocks})


def _check_deepspeed(config: dict[str, Any], args: Any, options: Mapping[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise ValueError(
            f"DeepSpeed's ZeRO stage {stage} is not supported: take 1 or 2, which leave weights whole, or FSDP2."
        )
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError("DeepSpeed's tensor_parallel would cut up the weights of attention; leave it out.")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError("fp16 with DeepSpeed would halve the weights themselves; take bf16.")
    for part in ("optimizer", "scheduler"):
        if part in config:
            raise ValueError(
                f"an {part!r} of DeepSpeed's configuration has one learning rate for predictors and backbone; leave it "
                "out, and let the TrainingArguments name it."
            )
    if (options.get("optimizers") or (None,))[0] is not None:
        raise ValueError("with DeepSpeed the Trainer makes the optimizer; let args.optim name it.")


def _configure_deepspeed(described: Any, args: Any) -> None:
    config: dict[str, Any] = described.config
    # The Trainer fills in only what stands there as "auto", and otherwise clips nothing.
    config.setdefault("gradient_clipping", args.max_grad_norm)
    if config.get("bf16", {}).get("enabled") is True:  # autocast in place of weights in bfloat16
        config["bf16"] = {"enabled": False}
        # With no module named, gradients are summed in float32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        described._dtype = torch.float32  # to which the Trainer casts images


def autocast_of(accelerator: Any) -> AbstractContextManager[Any]:
    """The autocast in which a batch runs: model, teacher and loss.

    Accelerate gives one to models that it does not shard, and DeepSpeed one to the model alone.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.hf_ds_config.config.get("torch_autocast", {}).get("enabled"):
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    autocast: AbstractContextManager[Any] = accelerator.autocast()
    return autocast


def save_whole(trainer: Any, output_dir: str | None) -> None:
    """Save the whole model of a `Trainer` whose checkpoints hold it in parts, at which the Trainer itself leaves it.

    Args:
        trainer: It need not be a `SparseTrainer`. All processes have to call this.
        output_dir: A folder; ``None`` for that of its arguments.
    """
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
        trainer._save(output_dir, state_dict=trainer.accelerator.get_state_dict(trainer.model))


def share_weights(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give every process the weights and buffers of the first one, tensor by tensor over ``device``.

    `DistributedDataParallel` and DeepSpeed do so by themselves; FSDP2 deals out what each process happens to have.
    """
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            there = tensor.detach().to(device).contiguous()
            torch.distributed.broadcast(there, src=0)
            if there.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(there)


@contextmanager
def left_unprepared(trainer: Any) -> Iterator[None]:
    """While it lasts, a model may be evaluated that is to be trained, and it is then prepared as if it had not been.

    The Trainer cannot evaluate it sharded, as FSDP2 needs an optimiser, and DeepSpeed evaluates under ZeRO-3 only. It
    runs whole. And Accelerate 1.15 takes a model that was prepared for an evaluation for one that needs no
    `DistributedDataParallel` in a training either: processes would train apart.
    """
    model = trainer.model
    before = {name: model.__dict__.get(name) for name in ("forward", "_original_forward", "_is_accelerate_prepared")}
    flags = {name: getattr(trainer, name) for name in ("is_fsdp_enabled", "is_deepspeed_enabled")}
    trainer.__dict__.update(dict.fromkeys(flags, False))
    try:
        yield
    finally:
        trainer.__dict__.update(flags)
        trainer.accelerator.free_memory()
        trainer.model_wrapped = model
        for name, value in before.items():
            model.__dict__.pop(name, None)
            if value is not None:
                model.__dict__[name] = value
