"""`recipes.hf_finetune` from the command line, on a handful of images and tiny models."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from typer.testing import CliRunner

import tokenprune
from recipes import hf_finetune
from recipes.digits.data import DigitsConfig, make_digits
from recipes.huggingface.arguments import training_arguments
from recipes.huggingface.data import input_config, open_images
from recipes.huggingface.models import freeze_embeddings, trained_classifier
from recipes.huggingface.settings import HfSettings
from tests.helpers.tolerances import SHARDED

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
SMOKE = ("--smoke", "--tracker", "none", "--num-workers", 0, "--max-train-images", 24, "--max-validation-images", 20)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=70, num_validation=30))


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(hf_finetune.app, [str(argument) for argument in arguments])


def results(output: Path) -> Any:
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def dense(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT that the command itself trained on the ten classes."""
    output = tmp_path_factory.mktemp("dense") / "run"
    result = invoke(*SMOKE, "--dense", "--data-dir", folder, "--output", output)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def sparse(folder: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sparse") / "run"
    arguments = ("--model", dense, "--keep-ratio", 0.6, "--learning-rate", 0.3, "--data-dir", folder)
    result = invoke(*SMOKE, *arguments, "--output", output)
    assert result.exit_code == 0, result.output
    assert "59% / 36% / 20%" in result.output and "GMACs" in result.output
    return output


def test_the_gathered_schedule(folder: Path, dense: Path, tmp_path: Path) -> None:
    options = ("--schedule", "gathered", "--calibration-steps", 2, "--keep-ratio", 0.6, "--learning-rate", 0.3)
    result = invoke(*SMOKE, "--model", dense, *options, "--data-dir", folder, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "59% / 36% / 20%" in result.output
    assert results(tmp_path / "run")["settings"]["schedule"] == "gathered"
    result = invoke(*SMOKE, "--model", dense, *options, "--frozen-epochs", 1, "--data-dir", folder)
    assert result.exit_code == 2 and "freeze_epochs=1" in result.output


def settings(folder: Path, **changes: Any) -> HfSettings:
    return HfSettings(**{"data_dir": folder, "tiny_model": True, "num_workers": 0, "tracker": "none", **changes})


# The whole way


def test_a_dense_run_gives_a_model_to_go_on_with(dense: Path, folder: Path) -> None:
    found = results(dense)
    assert set(found["scores"]) == {"top1", "top5"} and set(found["gmacs"]) == {"dense"}
    model = transformers.AutoModelForImageClassification.from_pretrained(dense)
    assert model.config.id2label[3] == "3" and not any("tokenprune" in name for name in load_file(weights(dense)))


def test_a_sparse_run_reports_and_can_be_loaded(sparse: Path, dense: Path, folder: Path) -> None:
    found = results(sparse)
    assert {"top1", "top5", "dense_top1", "dense_top5", "kept_1", "kept_2", "kept_3"} == set(found["scores"])
    # 64 patches: floor(64 · 0.6), floor(64 · 0.36) and floor(64 · 0.216) of them
    assert [found["scores"][f"kept_{stage}"] * 64 for stage in (1, 2, 3)] == [38, 23, 13]
    assert found["settings"]["keep_ratio"] == [0.6] and found["settings"]["model"] == str(dense)
    assert set(found["versions"]) == {"tokenprune", "torch", "transformers", "datasets", "accelerate"}

    model = tokenprune.sparsify(transformers.AutoModelForImageClassification.from_pretrained(sparse), keep_ratio=0.6)
    before = [parameter.clone() for parameter in model.tokenprune.parameters()]
    model.load_state_dict(load_file(weights(sparse)), strict=True)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.tokenprune.parameters(), strict=True))
    report = tokenprune.flops(model, (3, 64, 64))
    assert (report.dense_gmacs, report.sparse_gmacs) == (found["gmacs"]["dense"], found["gmacs"]["sparse"])

    config = {"input_size": (3, 64, 64), "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    saved = yaml.safe_load((sparse / "settings.yaml").read_text())
    images = open_images(HfSettings(**{**saved, "data_dir": folder, "output": sparse}))
    _, validation = images.prepared(settings(folder), {**config, "interpolation": "bicubic", "crop_pct": 1.0})
    rows = validation[: len(validation)]
    with torch.no_grad():
        best = model.eval()(torch.stack(rows["pixel_values"])).logits.argmax(-1)
    assert float((best == torch.tensor(rows["labels"])).float().mean()) == pytest.approx(found["scores"]["top1"])


def weights(output: Path) -> Path:
    return output / "model.safetensors"


def test_a_run_is_neither_replaced_nor_changed_by_accident(sparse: Path) -> None:
    refused = invoke("--config", sparse / "settings.yaml")
    assert refused.exit_code == 2 and "holds a run already" in words(refused)
    refused = invoke("--config", sparse / "settings.yaml", "--resume", "--epochs", 3)
    assert refused.exit_code == 2 and "epochs was 2 and is 3" in words(refused)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_run_goes_on_where_it_was(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    output: Path = request.getfixturevalue(kind)
    first, last = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    before = load_file(weights(last))
    last.rename(tmp_path / "last")  # as if it had been killed while it saved the second epoch
    last.mkdir()
    (last / "model.safetensors").write_bytes(b"begun")
    result = invoke("--config", output / "settings.yaml", "--resume")
    assert result.exit_code == 0, result.output
    after = load_file(weights(last))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    halfway = load_file(weights(first))
    assert not all(torch.equal(halfway[name], after[name]) for name in after)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_run_killed_in_its_first_save_starts_anew(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    whole: Path = request.getfixturevalue(kind)
    first = min(whole.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])).name
    output = tmp_path / "run"
    shutil.copytree(whole / first, output / first)
    shutil.copy(whole / "settings.yaml", output)
    (output / first / "trainer_state.json").unlink()
    (output / first / "model.safetensors").write_bytes(b"begun")
    options = ("--config", whole / "settings.yaml", "--output", output)
    refused = invoke(*options)
    assert refused.exit_code == 2 and "holds a run already" in words(refused)
    result = invoke(*options, "--resume")
    assert result.exit_code == 0, result.output
    before, after = load_file(weights(whole)), load_file(weights(output))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "recipes.hf_finetune"]
    arguments = [*SMOKE, "--data-dir", folder, "--output", tmp_path / "run"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *map(str, arguments)], check=True, env=environment)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["max_steps"] == 4  # 24 images, 8 a process, 2 epochs: as many steps as one process has with 16
    assert {"top1", "kept_3"} < set(results(tmp_path / "run")["scores"])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
@pytest.mark.parametrize("options", [(), ("--dense",)], ids=["sparse", "dense"])
def test_two_sharded_processes_are_two_whole_ones(
    config: str, options: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    if config == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    arguments = [*SMOKE, *options, "--data-dir", folder, "--clip-gradient", 1, "--output"]
    whole = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "recipes.hf_finetune"]
    sharded = ["accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", "2"]
    if config == "fsdp2":
        sharded += ["--fsdp_transformer_layer_cls_to_wrap", "ViTLayer"]
    sharded += ["--main_process_port", "0", "-m", "tests.helpers.sharded_on_cpu", "recipes.hf_finetune"]
    losses = {}
    for name, launch, given in (("whole", whole, {"ACCELERATE_USE_CPU": "true"}),
                                ("sharded", sharded, {"DS_ACCELERATOR": "cpu"})):  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **given}
        command = map(str, [sys.executable, "-m", *launch, *arguments, tmp_path / name])
        subprocess.run(list(command), check=True, env=environment)
        log = json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        losses[name] = [line["loss"] for line in log if "loss" in line]
    assert len(losses["whole"]) == 4 and losses["sharded"] == pytest.approx(losses["whole"], abs=SHARDED)
    before, after = load_file(weights(tmp_path / "whole")), load_file(weights(tmp_path / "sharded"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=SHARDED) for name in before)


# Settings


def words(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data-dir", "FOLDER"], "give --model"),
        (["--tiny-model"], "either --data-dir or --dataset"),
        (["--tiny-model", "--data-dir", "FOLDER", "--dataset", "cifar10"], "either --data-dir or --dataset"),
        (["--tiny-model", "--data-dir", "nowhere"], "no such folder"),
        (["--tiny-model", "--data-dir", "FOLDER", "--validation-split", "test"], "cannot open split 'test'"),
        (["--tiny-model", "--data-dir", "FOLDER", "--label-column", "name"], "there are image (Image), label"),
        (["--tiny-model", "--data-dir", "FOLDER", "--warmup-epochs", "31"], "leaves nothing of epochs=30"),
        (["--tiny-model", "--data-dir", "FOLDER", "--min-learning-rate", "1"], "is above learning_rate"),
        (["--tiny-model", "--data-dir", "FOLDER", "--stages", "9"], "stages"),
        (["--tiny-model", "--data-dir", "FOLDER", "--scorer", "magic"], "magic"),
        (["--tiny-model", "--data-dir", "FOLDER", "--dense", "--keep-ratio", "0.5"], "leave out keep_ratio"),
        (["--tiny-model", "--data-dir", "FOLDER", "--dense", "--teacher", "x"], "leave out teacher"),
        (["--tiny-model", "--data-dir", "FOLDER", "--teacher", "nowhere"], "cannot open model 'nowhere'"),
        (["--model", "nowhere", "--data-dir", "FOLDER"], "cannot open model 'nowhere'"),
    ],
)
def test_bad_settings_end_with_code_2(arguments: list[str], said: str, folder: Path, tmp_path: Path) -> None:
    given = [str(folder) if word == "FOLDER" else word for word in arguments]
    result = invoke(*given, "--tracker", "none", "--output", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert said in words(result)
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_classes_is_refused_and_learns_them_with_dense(folder: Path, tmp_path: Path) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "three")
    arguments = (*SMOKE, "--model", tmp_path / "three", "--data-dir", folder, "--output", tmp_path / "run")
    result = invoke(*arguments)
    assert result.exit_code == 2 and "it knows 3" in words(result) and "--dense" in words(result)
    assert invoke(*arguments, "--dense").exit_code == 0
    assert trained_classifier(str(tmp_path / "run"), 10).config.num_labels == 10


def test_a_model_without_a_head_is_refused(dense: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(dense)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of classifier\.bias, classifier\.weight"):
        trained_classifier(str(tmp_path / "headless"), 10)


def test_settings_reach_the_trainer(folder: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def trainer(model: nn.Module, arguments: Any, **options: Any) -> Any:
        seen.update(options, model=model, arguments=arguments)
        raise ValueError("seen")

    monkeypatch.setattr(hf_finetune, "SparseTrainer", trainer)
    given = {"kl-weight": 0.1, "distill-weight": 0.2, "ratio-weight": 0.3, "backbone-factor": 0.4, "frozen-epochs": 1.5}
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    arguments = ("--stages", 2, "--keep-ratio", 0.5, "--scorer", "static", "--teacher", dense, *options)
    result = invoke(*SMOKE, *arguments, "--data-dir", folder, "--output", tmp_path / "run")
    assert result.exit_code == 2 and "seen" in result.output
    assert (seen["kl_weight"], seen["distill_weight"], seen["ratio_weight"]) == (0.1, 0.2, 0.3)
    assert (seen["backbone_learning_rate_scale"], seen["freeze_epochs"], seen["evaluate_dense"]) == (0.4, 1.5, True)
    assert seen["model"].tokenprune.plan.stages == (2,) and seen["model"].tokenprune.plan.keep_ratios == (0.5,)
    taught = transformers.AutoModelForImageClassification.from_pretrained(dense).state_dict()
    assert all(torch.equal(taught[name], tensor) for name, tensor in seen["teacher"].state_dict().items())
    frozen = [name for name, parameter in seen["model"].named_parameters() if not parameter.requires_grad]
    assert frozen == ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]


def test_the_paper_s_schedule_is_the_default(folder: Path, tmp_path: Path) -> None:
    given = training_arguments(settings(folder, accumulation=4, output=tmp_path), 1000)
    assert given.learning_rate == 1e-3 * 256 / 1024 and given.lr_scheduler_kwargs == {"min_lr_rate": 4e-6 / 1e-3}
    assert given.num_train_epochs == 30 and given.warmup_steps == 5 * 4  # 1000 images are 4 steps of 256
    assert (given.weight_decay, given.label_smoothing_factor, given.max_grad_norm) == (0.05, 0.1, 0.0)
    assert given.load_best_model_at_end and given.metric_for_best_model == "eval_accuracy" and given.greater_is_better
    assert not given.remove_unused_columns and not (given.bf16 or given.fp16)


def test_the_rate_falls_to_the_lowest_and_no_optimizer_is_asked_for_defaults(folder: Path, tmp_path: Path) -> None:
    given = training_arguments(settings(folder, output=tmp_path, min_learning_rate=3e-5), 1000)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=given.learning_rate)
    del optimizer.defaults["lr"]  # DeepSpeed's optimizer has no defaults
    schedule = transformers.get_scheduler(
        given.lr_scheduler_type, optimizer, 0, 3, scheduler_specific_kwargs=given.lr_scheduler_kwargs
    )
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-5)


def test_precision_and_checkpointing_reach_the_arguments(folder: Path, tmp_path: Path) -> None:
    changes = {"mixed_precision": "bf16", "activation_checkpointing": True, "clip_gradient": 0.5}
    given = training_arguments(settings(folder, output=tmp_path, **changes), 1000)
    checkpointing = [getattr(given, f"{name}_checkpointing", None) for name in ("activation", "gradient")]
    assert given.bf16 and given.max_grad_norm == 0.5 and True in checkpointing


# Data


HALVES, ZEROS, ONES = (0.5,) * 3, (0.0,) * 3, (1.0,) * 3


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        (None, {}, ((3, 64, 64), "bicubic", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 1.0)),
        ("ViT", {"size": {"height": 48, "width": 32}}, ((3, 48, 32), "bilinear", HALVES, HALVES, 1.0)),
        (
            "ViT",
            {"size": {"height": 32, "width": 32}, "do_normalize": False, "resample": 3},
            ((3, 32, 32), "bicubic", ZEROS, ONES, 1.0),
        ),
        (
            "CLIP",
            {"size": {"shortest_edge": 80}, "crop_size": {"height": 60, "width": 60}, "image_mean": HALVES,
             "image_std": ONES},
            ((3, 60, 60), "bicubic", HALVES, ONES, 0.75),
        ),
    ],
)  # fmt: skip
def test_images_are_made_as_the_processor_says(kind: str | None, said: Any, expected: Any) -> None:
    processor = None if kind is None else getattr(transformers, f"{kind}ImageProcessor")(**said)
    found = input_config(processor, transformers.ViTConfig(image_size=64))
    assert tuple(found[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")) == expected


def test_the_size_of_a_model_of_several_parts() -> None:
    assert input_config(None, transformers.CLIPConfig(vision_config={"image_size": 96}))["input_size"] == (3, 96, 96)


def test_validation_images_are_those_of_the_processor(folder: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    images = open_images(settings(folder))
    _, validation = images.prepared(settings(folder), input_config(processor, None))
    ours = validation[0]["pixel_values"]
    raw = images.validation[0]["image"].convert("RGB")
    theirs = processor(raw, return_tensors="pt")["pixel_values"][0]
    # Pillow and torchvision resize to the same 8 bits but for rounding: one step of 1 / 127.5.
    assert float((ours - theirs).abs().max()) <= 1.01 / 127.5 and isinstance(raw, Image.Image)


def test_classes_are_those_of_the_model(folder: Path) -> None:
    images = open_images(settings(folder))
    assert images.labelled({str(digit): digit for digit in range(10)}) is images
    turned = images.labelled({str(digit): 9 - digit for digit in range(10)})
    assert turned.classes == tuple("9876543210")
    assert turned.training["label"][:5] == [9 - label for label in images.training["label"][:5]]


def test_a_data_set_by_name(folder: Path) -> None:
    by_name = open_images(settings(folder, data_dir=None, dataset=str(folder), train_split="train[:20]"))
    assert len(by_name.training) == 20 and len(by_name.validation) == 30


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        (lambda sizes: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes)), 2),
        (
            lambda sizes: transformers.CLIPForImageClassification(
                transformers.CLIPConfig(vision_config={**sizes, "intermediate_size": 16, "projection_dim": 8})
            ),
            2,
        ),
    ],
)
def test_embeddings_are_frozen(model: Any, frozen: int) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    built = model(sizes)
    freeze_embeddings(built)
    names = [name for name, parameter in built.named_parameters() if not parameter.requires_grad]
    assert len(names) == frozen and all("embeddings" in name for name in names), names
