"""Integrations: `SparseTrainer` against what a user of transformers.Trainer expects, and against the formulas."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import tokenprune
from tokenprune.integrations.transformers import SparseTrainer

NUM_CLASSES, NUM_IMAGES = 3, 24
SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_labels": NUM_CLASSES,
    "hidden_dropout_prob": 0.0,
}
KEEP_RATIOS = (0.75, 0.5)  # of 16 patches: 12 and 8
PARTS = {"classification", "kl", "distill", "ratio"}
KEPT = {"kept_ratio_0", "kept_ratio_1"}

CHECKPOINTING = next(  # older versions call it so
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(transformers.TrainingArguments, name)
)

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(intermediate_size=64, **SIZES)),
    "DINOv2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(mlp_ratio=2, **SIZES)),
    "SigLIP, no class token": lambda: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(
            vision_config={**SIZES, "intermediate_size": 64},
            text_config={**dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8),
                         **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)},
            num_labels=NUM_CLASSES,
        )
    ),
}  # fmt: skip


def sparse_model(name: str = "ViT", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tokenprune.sparsify(BUILDERS[name](), (1, 2), KEEP_RATIOS)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise around a colour of each class."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(NUM_IMAGES):
        label = index % NUM_CLASSES
        pixels = torch.randint(0, 120, (32, 32, 3), generator=generator)
        pixels[..., label] += 120
        folder = root / "train" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return root


def to_pixels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    pixels = [
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in batch["image"]
    ]
    return {
        "pixel_values": [(p.view(32, 32, 3).permute(2, 0, 1).float() / 127.5) - 1 for p in pixels],
        "label": batch["label"],
    }


@pytest.fixture(scope="session")
def images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(image_folder), cache_dir=str(cache), split="train")
    return loaded.with_transform(to_pixels)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**settings, **options})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def training_logs(trainer: SparseTrainer) -> list[dict[str, float]]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def logits(model: nn.Module, images: Any) -> Tensor:
    pixels = torch.stack(images[:4]["pixel_values"])
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


def reloaded(folder: Path) -> nn.Module:
    """What the Trainer saved: weights, architecture and plan all lie in the folder."""
    model: nn.Module = tokenprune.from_pretrained(folder)
    return model


# The whole way


@pytest.mark.parametrize("name", list(BUILDERS))
def test_trains_evaluates_saves_and_reloads(name: str, images: Any, tmp_path: Path) -> None:
    model = sparse_model(name)
    trainer = SparseTrainer(
        model,
        arguments(tmp_path, num_train_epochs=8),
        train_dataset=images,
        eval_dataset=images,
        compute_metrics=accuracy,
        backbone_learning_rate_scale=0.3,
        freeze_epochs=1,
        evaluate_dense=True,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_accuracy"] == 1.0
    assert (after["eval_kept_ratio_0"], after["eval_kept_ratio_1"]) == KEEP_RATIOS
    assert after["eval_dense_accuracy"] == 1.0 and after["eval_dense_loss"] != after["eval_loss"]
    assert not any(key.startswith("eval_dense_kept") for key in after)

    for logs in training_logs(trainer):
        assert set(logs) >= PARTS | KEPT
        total = logs["classification"] + 0.5 * logs["kl"] + 0.5 * logs["distill"] + 2.0 * logs["ratio"]
        assert logs["loss"] == pytest.approx(total, abs=2e-4)  # what older Trainers log is rounded to 1e-4
        assert 0 < logs["kept_ratio_1"] <= logs["kept_ratio_0"] <= 1

    assert not trainer.dynamicvit_loss.teacher.training
    trainer.save_model(str(tmp_path / "saved"))
    keys = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert keys == model.state_dict().keys() and any(key.startswith("tokenprune.stages.0.scorer.") for key in keys)
    assert torch.equal(logits(reloaded(tmp_path / "saved"), images), logits(model, images))
    # transformers itself reads the folder, and gets the dense model.
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    with tokenprune.dense(model):
        assert torch.equal(logits(plain, images), logits(model, images))


# The loss


def test_losses_are_those_of_the_formulas(images: Any, tmp_path: Path) -> None:
    model = sparse_model()
    teacher = tokenprune.unsparsify(copy.deepcopy(model))
    trainer = SparseTrainer(
        model, arguments(tmp_path, label_smoothing_factor=0.1), kl_weight=0.3, distill_weight=0.7, ratio_weight=1.5
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = tokenprune.DynamicViTLoss(teacher, criterion=criterion, kl_weight=0.3, distill_weight=0.7, ratio_weight=1.5)
    pixels, labels = torch.stack(images[:6]["pixel_values"]), torch.tensor(images[:6]["label"])
    for targets in (labels, torch.nn.functional.one_hot(labels, NUM_CLASSES) * 0.8 + 0.1):
        inputs = {"pixel_values": pixels, "labels": targets}
        model.train()
        torch.manual_seed(3)
        expected = loss(model, {"pixel_values": pixels}, model(pixel_values=pixels), targets)["loss"]
        torch.manual_seed(3)
        got, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        assert torch.equal(got, expected) and outputs["logits"].shape == (6, NUM_CLASSES) and "labels" in inputs
        torch.manual_seed(3)
        # Twice as many labels in the step: this batch is half of it.
        half = trainer.compute_loss(model, inputs, num_items_in_batch=2 * targets.numel())
        torch.testing.assert_close(half, expected / 2)

        model.eval()
        torch.testing.assert_close(
            trainer.compute_loss(model, inputs), criterion(model(pixel_values=pixels).logits, targets)
        )
    own = SparseTrainer(model, arguments(tmp_path), criterion=lambda logits, labels: logits.sum() * 0 + 7.0)
    assert own.compute_loss(model.eval(), inputs) == 7.0


def one_step(folder: Path, images: Any, num_images: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights after one step on so many images, and what was logged; nothing is random."""
    torch.manual_seed(0)
    model = tokenprune.sparsify(BUILDERS["ViT"](), (1, 2), 1.0)  # keeps all, so there is nothing to sample
    torch.manual_seed(1)
    trainer = SparseTrainer(
        model,
        arguments(folder, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, num_train_epochs=1, **options),
        teacher=BUILDERS["ViT"](),
        train_dataset=images.select(range(num_images)),
        backbone_learning_rate_scale=1.0,
        freeze_epochs=0,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return model.state_dict(), training_logs(trainer)[0]


def test_accumulated_batches_are_one_batch(images: Any, tmp_path: Path) -> None:
    whole, whole_logs = one_step(tmp_path, images, 7, per_device_train_batch_size=7)
    # Batches of 4 and 3 images: the mean of their means would be another.
    parts, parts_logs = one_step(tmp_path, images, 7, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for key, value in whole.items():
        # Sums in another order, of a step of length 0.5.
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-6)
    assert whole_logs["kl"] > 0 and whole_logs["distill"] > 0
    for name in ("loss", *PARTS, *KEPT):
        assert parts_logs[name] == pytest.approx(whole_logs[name], abs=1.1e-4), name


# The optimiser


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


# Several processes


def train_one_process(rank: int, port: int, folder: Path, images: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    pruned, _ = trained(folder, images, 0.3, max_steps=3, **options)  # frozen for one step
    checkpointed, _ = trained(folder, images, max_steps=3, **{CHECKPOINTING: True}, **options)
    torch.save((*one_step(folder, images, 8, **options), pruned, checkpointed), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(images: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_one_process, (port, tmp_path, images), nprocs=2)
    (first, logs, *pruned), (second, _, *also_pruned) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs in zip((first, *pruned), (second, *also_pruned), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    start = sparse_model().state_dict()
    assert not any(torch.equal(weights[key], start[key]) for weights in pruned for key in start if "weight" in key)
    whole, whole_logs = one_step(tmp_path, images, 8, per_device_train_batch_size=8)
    for key, value in whole.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)  # sums in another order
    for name in ("loss", *PARTS, *KEPT):
        assert logs[name] == pytest.approx(whole_logs[name], abs=1.1e-4), name


# Checkpoints


@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_resuming_goes_on_as_if_nothing_had_happened(name: str, images: Any, tmp_path: Path) -> None:
    def trainer() -> SparseTrainer:
        settings = arguments(tmp_path, num_train_epochs=3, save_strategy="epoch")
        return SparseTrainer(
            sparse_model(name), settings, train_dataset=images, freeze_epochs=2, backbone_learning_rate_scale=0.5
        )

    whole, rest = trainer(), trainer()
    whole.train()
    # At the end of an epoch: within one, the Trainer of old versions takes the images in another order.
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.state.global_step == 9
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key
    for first, second in zip(training_logs(whole)[-6:], training_logs(rest)[-6:], strict=True):
        assert {key: first[key] for key in PARTS | KEPT} == {key: second[key] for key in PARTS | KEPT}


def test_the_best_model_is_loaded_at_the_end(images: Any, tmp_path: Path) -> None:
    settings = arguments(
        tmp_path,
        num_train_epochs=3,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_dense_loss",
        greater_is_better=True,  # so that it is not the last one
    )
    trainer = SparseTrainer(
        sparse_model(), settings, train_dataset=images, eval_dataset=images, evaluate_dense=True, freeze_epochs=0,
        backbone_learning_rate_scale=1.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in trainer.model.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_refused(images: Any, tmp_path: Path) -> None:
    settings = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    SparseTrainer(sparse_model(), settings, train_dataset=images).train()
    other = SparseTrainer(
        tokenprune.sparsify(BUILDERS["ViT"](), (1, 2, 3)), arguments(tmp_path, max_steps=2), train_dataset=images
    )
    with pytest.raises(RuntimeError, match=r"belong to scorers at stages \(1, 2\), and these are at \(1, 2, 3\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    fewer = {name: tensor for name, tensor in safetensors.torch.load_file(weights).items() if "out_conv" not in name}
    safetensors.torch.save_file(fewer, weights, metadata={"format": "pt"})
    same = SparseTrainer(sparse_model(), arguments(tmp_path, max_steps=2), train_dataset=images)
    with pytest.raises(tokenprune.StateError, match=r"12 missing keys \['tokenprune\.stages\.0.*as it was when"):
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# The Trainer's own options


def trained(
    folder: Path, images: Any, freeze_epochs: float = 0.0, **options: Any
) -> tuple[dict[str, Tensor], SparseTrainer]:
    trainer = SparseTrainer(
        sparse_model(),
        arguments(folder, **options),
        train_dataset=images,
        freeze_epochs=freeze_epochs,
        backbone_learning_rate_scale=0.5,
    )
    trainer.train()
    return trainer.model.state_dict(), trainer


def test_activation_checkpointing_changes_nothing(images: Any, tmp_path: Path) -> None:
    plain, _ = trained(tmp_path, images, max_steps=2)
    checkpointed, trainer = trained(tmp_path, images, max_steps=2, **{CHECKPOINTING: True})
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    for key, value in plain.items():
        # The same kernels run twice; AdamW's first steps blow rounding up to a share of the learning rate.
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-5)


def test_bfloat16_reaches_model_and_teacher(images: Any, tmp_path: Path) -> None:
    teacher, kinds = BUILDERS["ViT"](), []
    next(module for module in teacher.modules() if isinstance(module, nn.Linear)).register_forward_hook(
        lambda module, args, output: kinds.append(output.dtype)
    )
    trainer = SparseTrainer(
        sparse_model(), arguments(tmp_path, bf16=True, max_steps=3), teacher=teacher, train_dataset=images
    )
    trainer.train()
    assert kinds == [torch.bfloat16] * 3
    assert all(torch.tensor(list(logs.values())).isfinite().all() for logs in training_logs(trainer))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_compiled_models_train_and_report(images: Any, tmp_path: Path) -> None:
    plain, plain_trainer = trained(tmp_path, images, max_steps=2)
    compiled, trainer = trained(tmp_path, images, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    assert set(compiled) == set(plain)
    for first, second in zip(training_logs(plain_trainer), training_logs(trainer), strict=True):
        assert {key: first[key] for key in KEPT} == {key: second[key] for key in KEPT}


def test_several_data_sets_are_evaluated_one_by_one(images: Any, tmp_path: Path) -> None:
    both = {"first": images.select(range(10)), "second": images.select(range(10, 24))}
    trainer = SparseTrainer(sparse_model(), arguments(tmp_path), eval_dataset=both, evaluate_dense=True)
    metrics = trainer.evaluate()
    expected = {f"eval_{name}_{what}" for name in both for what in ("loss", "dense_loss", "kept_ratio_1")}
    assert expected <= set(metrics) and not any(key.startswith("eval_dense_") for key in metrics)
    assert trainer.predict(both["first"]).metrics["test_kept_ratio_1"] == KEEP_RATIOS[1]


def test_model_init_and_its_teacher(images: Any, tmp_path: Path) -> None:
    trainer = SparseTrainer(
        model_init=lambda: sparse_model(), args=arguments(tmp_path, max_steps=1), train_dataset=images
    )
    first = trainer.dynamicvit_loss
    trainer.train()
    assert trainer.dynamicvit_loss is not first
    fresh = tokenprune.unsparsify(sparse_model()).state_dict()
    teacher = trainer.dynamicvit_loss.teacher
    assert all(torch.equal(value, fresh[key]) for key, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(tokenprune.StateError, match="is not sparsified"):
        SparseTrainer(model_init=BUILDERS["ViT"], args=arguments(tmp_path))


def test_a_model_that_is_not_of_transformers(images: Any, tmp_path: Path) -> None:
    import timm

    model = tokenprune.sparsify(
        timm.models.VisionTransformer(32, 8, embed_dim=32, depth=4, num_heads=2, num_classes=NUM_CLASSES), (1, 2)
    )
    trainer = SparseTrainer(
        model,
        arguments(tmp_path),
        data_collator=lambda items: {
            "x": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["label"] for item in items]),
        },
        train_dataset=images,
        eval_dataset=images,
        compute_metrics=accuracy,
    )
    trainer.train()
    assert {"eval_loss", "eval_accuracy", "eval_kept_ratio_0"} <= set(trainer.evaluate())
    trainer.save_model()
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


# Refusals


def not_sparse() -> nn.Module:
    return BUILDERS["ViT"]()


def of_several_labels() -> nn.Module:
    model = sparse_model()
    model.config.problem_type = "multi_label_classification"
    return model


@pytest.mark.parametrize(
    ("build", "settings", "options", "error", "message"),
    [
        (not_sparse, {}, {}, tokenprune.StateError, r"call tokenprune\.sparsify\(model\) first"),
        (sparse_model, {}, {"teacher": sparse_model()}, tokenprune.StateError, "the teacher is sparsified"),
        (sparse_model, {}, {"teacher": "deit"}, TypeError, "teacher=str: expected the dense model"),
        (sparse_model, {}, {"kl_weight": -1}, ValueError, "kl_weight=-1 is negative"),
        (sparse_model, {}, {"backbone_learning_rate_scale": -1}, ValueError, "scale=-1 is negative"),
        (sparse_model, {}, {"freeze_epochs": -1}, ValueError, "freeze_epochs=-1 is negative"),
        (sparse_model, {}, {"compute_loss_func": print}, ValueError, "pass criterion"),
        (sparse_model, {"label_smoothing_factor": 0.1}, {"criterion": print}, ValueError, "label_smoothing_factor=0.1"),
        (of_several_labels, {}, {}, ValueError, "problem_type='multi_label_classification'.*pass criterion"),
        (
            sparse_model,
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            {},
            ValueError,
            "re-entrant checkpointing loses",
        ),
        (
            sparse_model,
            {},
            {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None), "backbone_learning_rate_scale": 0.1},
            ValueError,
            "has its own learning rates",
        ),
        (sparse_model, {}, {"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_refusals(
    build: Callable[[], nn.Module],
    settings: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        SparseTrainer(build(), arguments(tmp_path, **settings), **options)


def test_ways_to_run_it_that_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = arguments(tmp_path)
    with monkeypatch.context() as two_gpus:
        two_gpus.setattr(transformers.TrainingArguments, "n_gpu", 2)
        with pytest.raises(ValueError, match=r"2 GPUs in one process.*torchrun or accelerate launch"):
            SparseTrainer(sparse_model(), settings)
    post_process = transformers.Trainer.create_accelerator_and_postprocess

    def shard(trainer: Any) -> None:
        post_process(trainer)
        trainer.is_deepspeed_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", shard)
    with pytest.raises(ValueError, match="does not shard models"):
        SparseTrainer(sparse_model(), settings)


def test_refusals_on_the_way(images: Any, tmp_path: Path) -> None:
    def unlabelled(items: list[Any]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}

    trainer = SparseTrainer(sparse_model(), arguments(tmp_path), train_dataset=images, data_collator=unlabelled)
    with pytest.raises(ValueError, match=r"no 'labels', only \['pixel_values'\]"):
        trainer.train()

    model = sparse_model()
    few = {"params": list(model.tokenprune.parameters()), "lr": 0.1}
    trainer = SparseTrainer(
        model, arguments(tmp_path), train_dataset=images, optimizer_cls_and_kwargs=(torch.optim.SGD, few)
    )
    with pytest.raises(ValueError, match="arranges the parameters in its own way"):
        trainer.train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu(precision: str, images: Any, tmp_path: Path) -> None:
    weights, trainer = trained(tmp_path, images, 0.3, num_train_epochs=4, use_cpu=False, **{precision: True})
    assert next(trainer.dynamicvit_loss.teacher.parameters()).is_cuda
    assert all(value.is_cuda and value.isfinite().all() for value in weights.values())
    assert all(torch.tensor([logs[name] for name in PARTS]).isfinite().all() for logs in training_logs(trainer))
