"""The Trainer's arguments, made from the settings."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from recipes.huggingface.settings import HfSettings


def training_arguments(settings: HfSettings, num_images: int, **options: Any) -> Any:
    """`transformers.TrainingArguments` of a run on ``num_images`` training images.

    Raises:
        ValueError: transformers cannot do what the settings ask for on this machine.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Older versions of transformers have only the second name.
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        weight_decay=settings.weight_decay,
        label_smoothing_factor=settings.label_smoothing,
        max_grad_norm=settings.clip_gradient,
        lr_scheduler_type="cosine_with_min_lr",
        bf16=settings.mixed_precision == "bf16",
        fp16=settings.mixed_precision == "fp16",
        torch_compile=settings.compile,
        use_cpu=parse_flag_from_env("ACCELERATE_USE_CPU")
        or not (torch.accelerator.is_available() or "ACCELERATE_TORCH_DEVICE" in os.environ),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the last and the best
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
        logging_steps=settings.log_every,
        report_to=settings.tracker,
        seed=settings.seed,
        dataloader_num_workers=settings.num_workers,
        dataloader_persistent_workers=settings.num_workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the transform takes the columns
        **{checkpointing: settings.activation_checkpointing},
        **options,
    )
    # The number of processes is known only now.
    images_per_step = settings.images_per_step(arguments.world_size)
    arguments.learning_rate = settings.scaled_learning_rate(images_per_step)
    lowest = min(settings.min_learning_rate, arguments.learning_rate)
    # As a part of the rate, since transformers asks DeepSpeed's optimizer, which cannot answer, for a rate's whole.
    arguments.lr_scheduler_kwargs = {"min_lr_rate": lowest / arguments.learning_rate}
    arguments.warmup_steps = round(settings.warmup * -(-num_images // images_per_step))
    return arguments
