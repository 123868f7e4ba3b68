"""`SparseTrainer`: what learns, how fast, and from which epoch on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.helpers.trainer import arguments, sparse_model, training_logs
from tokenprune.integrations.transformers import SparseTrainer


def groups_by_name(trainer: SparseTrainer) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("optim", "kind"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adafactor", None)]
)
def test_every_parameter_has_its_learning_rate_and_decay(
    optim: str, kind: type | None, images: Any, tmp_path: Path
) -> None:
    model = sparse_model()
    position = next(name for name, _ in model.named_parameters() if "position_embeddings" in name)
    model.get_parameter(position).requires_grad_(False)
    settings = arguments(tmp_path, optim=optim, lr_scheduler_type="linear", max_steps=4)
    trainer = SparseTrainer(model, settings, train_dataset=images, backbone_learning_rate_scale=0.05, freeze_epochs=0)
    trainer.create_optimizer_and_scheduler(4)
    for steps_left in (4, 3):
        groups = groups_by_name(trainer)
        assert groups.keys() == {name for name, _ in model.named_parameters()} - {position}
        for name, group in groups.items():
            scale = 1.0 if name.startswith("tokenprune.") else 0.05
            assert group["lr"] == pytest.approx(1e-2 * scale * steps_left / 4), name
            decays = not name.endswith("bias") and "norm" not in name and "in_conv.0" not in name
            assert group["weight_decay"] == (0.05 if decays else 0.0), name
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert kind is None or type(trainer.optimizer) is kind
    trainer.train()
    assert [logs["learning_rate"] for logs in training_logs(trainer)] == pytest.approx(
        [logs["backbone_learning_rate"] / 0.05 for logs in training_logs(trainer)]
    )


class Watch(transformers.TrainerCallback):
    """Which parameters each step changed."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.before = copy.deepcopy(options["model"].state_dict())

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        after = options["model"].state_dict()
        self.changed.append({name for name, value in after.items() if not torch.equal(value, self.before[name])})


@pytest.mark.parametrize(
    ("freeze_epochs", "num_frozen"), [(1, 3), (None, 2), (0, 0), (0.34, 2), (100, 12)], ids=lambda value: str(value)
)
def test_the_backbone_is_frozen_in_the_first_epochs(
    freeze_epochs: float | None, num_frozen: int, images: Any, tmp_path: Path
) -> None:
    model, watch = sparse_model(), Watch()
    trainer = SparseTrainer(
        model,
        arguments(tmp_path, num_train_epochs=4, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        train_dataset=images,
        callbacks=[watch],
        freeze_epochs=freeze_epochs,
        backbone_learning_rate_scale=0.5,
    )
    trainer.train()
    assert len(watch.changed) == 12
    predictors = {name for name in model.state_dict() if name.startswith("tokenprune.")}
    for index, changed in enumerate(watch.changed):
        frozen = index < num_frozen
        assert changed & predictors and bool(changed - predictors) is not frozen, index
        assert training_logs(trainer)[index]["backbone_learning_rate"] == (0.0 if frozen else 5e-3)


def test_an_optimizer_of_the_user_is_left_alone(images: Any, tmp_path: Path) -> None:
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SparseTrainer(model, arguments(tmp_path), train_dataset=images, optimizers=(optimizer, None))
    trainer.train()
    assert len(optimizer.param_groups) == 1 and "backbone_learning_rate" not in training_logs(trainer)[0]
