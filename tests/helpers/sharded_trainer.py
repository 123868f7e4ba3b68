"""A training by `SparseTrainer` that does not depend on how many processes share it.

``python -m tests.helpers.sharded_trainer FOLDER '{"arguments": …, "options": …, "seed": 0}'``, alone or under
``tests.helpers.sharded_on_cpu``. Goes on with the newest complete checkpoint in the folder if there is one. Leaves
``log.jsonl``, ``trained/`` and, after all of it, ``after.json`` there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.helpers.trainer import NUM_CLASSES, accuracy, arguments, sparse_model
from tokenprune.integrations.transformers import SparseTrainer

NUM_IMAGES, NUM_VALIDATION_IMAGES = 32, 16


class Trainer(SparseTrainer):
    """Takes images in their order, and draws the same random numbers for a batch in whatever process it comes up."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """The loss, with decisions that depend on the batch and the step alone."""
        inputs = dict(inputs)
        torch.manual_seed(int(inputs.pop("number")[0]) + 1000 * self.state.global_step)
        return super().compute_loss(model, inputs, *args, **options)


class Log(transformers.TrainerCallback):
    """A line for every training log, with its step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Write the last entry of the history, if it is of a step."""
        if state.is_world_process_zero and "loss" in state.log_history[-1]:
            with self.file.open("a") as stream:
                stream.write(json.dumps(state.log_history[-1]) + "\n")


def images(number: int, seed: int) -> list[dict[str, Any]]:
    """Noise around a colour of each class, and a number by which to know an image again."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        pixels = torch.randn(3, 32, 32, generator=generator)
        pixels[index % NUM_CLASSES] += 0.7
        made.append({"pixel_values": pixels, "labels": index % NUM_CLASSES, "number": index})
    return made


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of such images."""
    batch: dict[str, Tensor] = transformers.default_data_collator(items)
    return batch


def main(folder: Path, settings: dict[str, Any]) -> None:
    """Train, evaluate and save."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"num_train_epochs": 4, "max_grad_norm": 1.0, "save_strategy": "no", "per_device_train_batch_size": 4}
    sharded = "ACCELERATE_TORCH_DEVICE" in os.environ
    options |= {"lr_scheduler_type": "linear", "learning_rate": 3e-3, "use_cpu": not sharded}
    options |= settings.get("arguments", {})
    if sharded:  # a GPU machine for Accelerate, whose GPUs would have to know bfloat16
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    seed = settings.get("seed", 0)
    model = sparse_model(settings.get("model", "ViT"), seed)
    trainer = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=images(NUM_IMAGES, 2 * seed),
        eval_dataset=images(NUM_VALIDATION_IMAGES, 2 * seed + 1),
        data_collator=collate,
        compute_metrics=accuracy,
        callbacks=[Log(folder / "log.jsonl")],
        evaluate_dense=True,
        **{"backbone_learning_rate_scale": 0.5, **settings.get("options", {})},
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    after = trainer.evaluate()
    trainer.save_model(str(folder / "trained"))
    if trainer.is_world_process_zero():
        (folder / "after.json").write_text(json.dumps({"before": before, "after": after}))
    trainer.accelerator.wait_for_everyone()  # a launcher whose process has failed kills the others, while they write
    trainer.accelerator.end_training()  # or threads of gloo that still run may end the process with an error


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
