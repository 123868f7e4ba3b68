"""`SparseTrainer` where Accelerate shards: two processes are one, killed or not; what cannot be sharded is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tokenprune
from tests.helpers.killed import kill_workers
from tests.helpers.tolerances import CLIPPED, SHARDED
from tests.helpers.trainer import arguments, sparse_model
from tokenprune.integrations.checkpoints import newest_complete
from tokenprune.integrations.learning_rates import complete_states, leave_out_backbone, zero_gradients
from tokenprune.integrations.sharding import prepare_sharding
from tokenprune.integrations.transformers import SparseTrainer

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
MODULE = "tests.helpers.sharded_trainer"


class Kind:
    def __init__(self, value: str) -> None:
        self.value = value


def accelerator(kind: str = "MULTI_CPU", *, fsdp2: bool = True, parallelism: Any = None, **plugin: Any) -> Any:
    plugin = {"cpu_ram_efficient_loading": False, "activation_checkpointing": False,
              "transformer_cls_names_to_wrap": None, **plugin}  # fmt: skip
    state = SimpleNamespace(parallelism_config=parallelism, fsdp_plugin=SimpleNamespace(**plugin))
    return SimpleNamespace(distributed_type=Kind(kind), is_fsdp2=fsdp2, state=state)


def deepspeed(stage: int = 2, **config: Any) -> Any:
    made = accelerator("DEEPSPEED")
    config = {"zero_optimization": {"stage": stage}, **config}
    made.state.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (accelerator("FSDP", fsdp2=False), "FSDP 1 flattens parameters.*fsdp_version"),
        (accelerator("FSDP", cpu_ram_efficient_loading=True), "without weights.*fsdp_cpu_ram_efficient_loading"),
        (accelerator("FSDP", activation_checkpointing=True), "take that of the TrainingArguments"),
        (accelerator("FSDP", parallelism=object()), "parallelism_config would cut up tokens"),
        (deepspeed(0), "stage 0 is not supported: take 1 or 2"),
        (deepspeed(3), "stage 3 is not supported: take 1 or 2"),
        (deepspeed(fp16={"enabled": True}), "take bf16"),
        (deepspeed(optimizer={}), "'optimizer' of DeepSpeed's configuration has one learning rate"),
        (deepspeed(scheduler={}), "'scheduler' of DeepSpeed's configuration has one learning rate"),
        (deepspeed(tensor_parallel={"autotp_size": 2}), "tensor_parallel would cut up the weights"),
    ],
)
def test_what_cannot_be_sharded_is_refused(made: Any, message: str) -> None:
    args = SimpleNamespace(fsdp=None, deepspeed=None, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=message):
        prepare_sharding(made, sparse_model(), args, {})


def test_what_a_configuration_leaves_open_is_filled_in() -> None:
    args: Any = SimpleNamespace(fsdp=None, deepspeed=None, max_grad_norm=0.3)
    two, fsdp, named = deepspeed(2), accelerator("FSDP"), accelerator("FSDP", transformer_cls_names_to_wrap=["Own"])
    for made in (two, fsdp, named):
        prepare_sharding(made, sparse_model(), args, {})
    assert two.state.deepspeed_plugin.hf_ds_config.config["gradient_clipping"] == 0.3
    assert fsdp.state.fsdp_plugin.transformer_cls_names_to_wrap == ["ViTLayer"]
    assert named.state.fsdp_plugin.transformer_cls_names_to_wrap == ["Own"]
    with pytest.raises(ValueError, match=r"let args\.optim name it"):
        prepare_sharding(two, sparse_model(), args, {"optimizers": (object(), None)})


def test_sharding_that_accelerate_would_leave_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ({"fsdp": True, "deepspeed": None}, {"fsdp": None, "deepspeed": "zero2.json"}):
        with pytest.raises(ValueError, match="would train as MULTI_CPU here"):
            prepare_sharding(accelerator(), sparse_model(), SimpleNamespace(**asked), {})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="asked for FSDP, and would train as NO here"):
        SparseTrainer(sparse_model(), arguments(tmp_path))


def test_a_model_that_was_evaluated_is_prepared_for_training_like_any_other(images: Any, tmp_path: Path) -> None:
    model = sparse_model()
    own = dict(model.__dict__)
    trainer = SparseTrainer(model, arguments(tmp_path, bf16=True, max_steps=1), train_dataset=images,
                            eval_dataset=images)  # fmt: skip
    trainer.is_fsdp_enabled = True  # which Accelerate could not evaluate
    trainer.evaluate()
    assert trainer.is_fsdp_enabled and model.__dict__.keys() == own.keys()
    assert not trainer.accelerator._models and trainer.model_wrapped is model
    trainer.is_fsdp_enabled = False
    trainer.train()
    assert model._is_accelerate_prepared


def test_a_held_backbone_is_as_if_it_had_no_gradient() -> None:
    predictors, backbone = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [predictors], "name": "predictors"}, {"params": [backbone], "name": "backbone"}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    holds = True
    leave_out_backbone(optimizer, lambda: holds)
    with zero_gradients([backbone], lambda: holds):
        for _ in range(2):
            (3 * predictors + 2 * backbone).sum().backward()
            assert backbone.grad is not None and torch.all(backbone.grad == (0 if holds else 2))
            optimizer.step()
            optimizer.zero_grad()
            assert len(optimizer.param_groups) == 2 and optimizer.state[predictors]
            assert bool(optimizer.state.get(backbone)) is not holds and torch.equal(backbone, torch.ones(2)) is holds
            holds = False
    assert optimizer.state[backbone]["step"] == 1  # so that AdamW's first correction is that of a first step
    backbone.sum().backward()
    assert torch.equal(backbone.grad, torch.ones(2))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_the_state_of_what_has_not_learned_is_that_of_a_first_step(kind: type[Any]) -> None:
    def learned(completed: bool) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.full((3,), 2.0)) for _ in range(2)]
        optimizer = kind([{"params": [one]} for one in parameters], lr=0.1, weight_decay=0.5)
        for step in range(3):
            for parameter in parameters[: 1 if step == 0 else 2]:
                parameter.grad = parameter.detach() ** 2
            optimizer.step()
            optimizer.zero_grad()
            if step == 0 and completed:
                complete_states(optimizer)
                assert torch.equal(parameters[1], torch.full((3,), 2.0)) and parameters[1].grad is None
                assert kind is torch.optim.SGD or optimizer.state[parameters[1]]
        return parameters

    assert all(torch.equal(*pair) for pair in zip(learned(False), learned(True), strict=True))


def test_gathered_gives_back_what_learns_although_fsdp_puts_other_parameters_in_place() -> None:
    model = sparse_model()
    with tokenprune.gathered(model):
        norm = next(module for module in model.tokenprune.modules() if isinstance(module, nn.LayerNorm))
        norm.weight = nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    assert norm.weight.requires_grad and all(one.requires_grad for one in model.tokenprune.parameters())


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(images: Any, tmp_path: Path) -> None:
    settings = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    SparseTrainer(sparse_model(), settings, train_dataset=images).train()
    assert newest_complete(settings) == str(tmp_path / "checkpoint-3")
    random = tmp_path / "checkpoint-3" / "rng_state.pth"
    random.write_bytes(random.read_bytes()[:-100])
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert newest_complete(settings) == str(tmp_path / "checkpoint-1")
    again = SparseTrainer(sparse_model(), arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=images)
    again.train(resume_from_checkpoint=True)
    assert [logs["step"] for logs in again.state.log_history if "loss" in logs] == [1, 2]
    with pytest.raises(ValueError, match="no complete checkpoint"):
        newest_complete(arguments(tmp_path / "elsewhere"))


def by_step(folder: Path) -> dict[int, list[dict[str, float]]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found: dict[int, list[dict[str, float]]] = {}
    for line in lines:
        found.setdefault(line.pop("step"), []).append(line)
    return found


def run_one(folder: Path, **arguments: Any) -> None:
    """Train as two processes would, in one that accumulates twice as much."""
    settings = {"arguments": {"gradient_accumulation_steps": 2, **arguments}}
    subprocess.run([sys.executable, "-m", MODULE, str(folder), json.dumps(settings)], check=True)


def run_two(how: str, folder: Path, schedule: str = "masked", **arguments: Any) -> None:
    """Train in two processes, sharded as ``how`` begins, and killed on the way if it ends so."""
    if how.startswith("zero2") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "-m"]
    if how == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"
    elif how == "fsdp2, one file":
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
        launch += ["tests.helpers.sharded_on_cpu"]
    else:
        config = str(CONFIGS / f"{how.split(',')[0]}.yaml")
        launch = ["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
        launch += ["--fsdp_transformer_layer_cls_to_wrap", "ViTLayer"] if how.startswith("fsdp2") else []
        launch += ["--main_process_port", "0", "-m", "tests.helpers.sharded_on_cpu"]
    killed = how.endswith("killed")
    arguments |= {"save_strategy": "steps", "save_steps": 1} if killed else {}
    settings = {"arguments": arguments, "options": {"schedule": schedule}}
    command = [sys.executable, "-m", *launch, MODULE, str(folder), json.dumps(settings)]
    for steps, victims in ((3, slice(None)), (8, slice(1))) if killed else ():
        kill_workers(subprocess.Popen(command, env=environment), folder / "log.jsonl", steps, victims)
    subprocess.run(command, check=True, env=environment)


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "trained" / "model.safetensors")
    return found


def check_same(one: Path, two: Path) -> None:
    """That two runs have logged, found and learned the same."""
    first, second = by_step(one), by_step(two)
    assert list(first) == sorted(second) == list(range(1, 17))
    for step, (line,) in first.items():
        for other in second[step]:  # again, where a step had not been saved
            for name in line:
                assert line[name] == pytest.approx(other[name], abs=SHARDED), (step, name)
    evaluations = [json.loads((folder / "after.json").read_text()) for folder in (one, two)]
    for name, value in evaluations[0]["after"].items():
        if "loss" in name or "accuracy" in name or "kept" in name:
            assert value == pytest.approx(evaluations[1]["after"][name], abs=SHARDED), name
    whole, sharded = trained_weights(one), trained_weights(two)
    assert whole.keys() == sharded.keys()
    assert all(torch.allclose(whole[name], sharded[name], atol=SHARDED) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2, one file", "fsdp2, killed", "zero2, killed"])
def test_two_processes_are_one_killed_or_not(how: str, tmp_path: Path) -> None:
    run_two(how, tmp_path / "two")
    run_one(tmp_path / "one")
    check_same(tmp_path / "one", tmp_path / "two")
    reloaded = tokenprune.from_pretrained(tmp_path / "two" / "trained").state_dict()
    assert all(torch.equal(value, reloaded[name]) for name, value in trained_weights(tmp_path / "two").items())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2, killed", "zero2, killed"])
def test_the_gathered_schedule_is_the_same_sharded_and_killed(how: str, tmp_path: Path) -> None:
    run_two(how, tmp_path / "sharded", schedule="gathered")
    run_two("ddp", tmp_path / "whole", schedule="gathered")  # since each process calibrates on images of its own
    check_same(tmp_path / "whole", tmp_path / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2, one file", "zero2"])
def test_two_processes_clip_bfloat16_by_the_factor_of_one_process(how: str, tmp_path: Path) -> None:
    # One step that clips: the next would see weights whose last digits differ, and round some of them to other ones.
    # Plain SGD, at a rate that shows it: AdamW's first step is the same whatever the gradient is multiplied by.
    settings = {"bf16": True, "optim": "sgd", "max_steps": 2, "learning_rate": 8.0, "max_grad_norm": 0.5}
    run_two(how, tmp_path / "two", **settings)
    run_one(tmp_path / "one", **settings)
    (_, line), (_, other) = ([lines[0] for lines in by_step(tmp_path / name).values()] for name in ("one", "two"))
    assert line["grad_norm"] > 1.0 and line["loss"] == other["loss"]
    assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=CLIPPED)
    whole, sharded = trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two")
    assert all(torch.allclose(whole[name], sharded[name], rtol=0, atol=CLIPPED) for name in whole)
