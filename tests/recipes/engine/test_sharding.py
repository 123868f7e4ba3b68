"""The engine where Accelerate shards: two processes are one, killed or not; what cannot be sharded is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from timm.utils import ModelEmaV3
from torch import nn

from recipes.digits.data import DigitsConfig, make_digits
from recipes.engine.logbook import read_log
from recipes.engine.settings import SettingsError
from recipes.engine.sharding import Average, Unsharded, prepare_sharding
from tests.helpers.engine import broken, command, run_plain, sparse, weights_of
from tests.helpers.killed import kill_workers
from tests.helpers.tolerances import SHARDED

CONFIGS = Path(__file__).parents[3] / "recipes" / "accelerate"
OPTIONS = ("--epochs", "4", "--backbone-factor", "1", "--clip-gradient", "1", "--tracker", "none",
           "--num-workers", "0")  # fmt: skip


@pytest.mark.parametrize(("flag", "kind"), [("FSDP", "FSDP"), ("DEEPSPEED", "DEEPSPEED")])
def test_sharding_that_accelerate_would_leave_out_is_refused(
    flag: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, is_fsdp2=False)
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", "true")
    with pytest.raises(SettingsError, match=rf"asked for {kind}, and would train as MULTI_CPU here"):
        prepare_sharding(accelerator, sparse(folder, tmp_path))


def test_a_run_on_a_cpu_that_asks_for_fsdp_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SettingsError, match="asked for FSDP, and would train as NO here"):
        run_plain(folder, tmp_path / "run", broken)
    assert not (tmp_path / "run").exists()


def deepspeed(stage: int) -> tuple[Any, dict[str, Any]]:
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 1}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state), config


def test_what_is_sharded_in_another_way_is_refused(folder: Path, tmp_path: Path) -> None:
    first: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(SettingsError, match="fsdp_version: 2"):
        prepare_sharding(first, sparse(folder, tmp_path))
    for stage in (0, 3):
        with pytest.raises(SettingsError, match=rf"zero_stage={stage} is not supported: take 1 or 2"):
            prepare_sharding(deepspeed(stage)[0], sparse(folder, tmp_path))
    with pytest.raises(SettingsError, match="take bf16"):
        prepare_sharding(deepspeed(2)[0], sparse(folder, tmp_path, mixed_precision="fp16"))


def test_deepspeed_is_told_the_settings(folder: Path, tmp_path: Path) -> None:
    accelerator, config = deepspeed(2)
    settings = sparse(folder, tmp_path, accumulation=3, clip_gradient=0.5, mixed_precision="bf16")
    prepare_sharding(accelerator, settings)
    assert config["train_micro_batch_size_per_gpu"] == 20 and config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert not config["bf16"]["enabled"]


def test_of_a_model_that_is_whole_the_average_is_that_of_timm() -> None:
    model = nn.Linear(3, 2)
    ours, theirs, before = Average(model, decay=0.9), ModelEmaV3(model, decay=0.9), Unsharded(model)
    for step in (1, 2, 3):
        nn.init.normal_(model.weight)
        ours.update(model, step=step)
        theirs.update(model, step=step)
    assert torch.equal(ours.module.weight, theirs.module.weight)
    end: Any = before.with_weights_of(model)
    assert end is not model and torch.equal(end.weight, model.weight)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "ema_decay"), [("fsdp2", "0"), ("fsdp2", "0.5"), ("zero2", "0")])
def test_two_sharded_processes_are_one_killed_or_not(config: str, ema_decay: str, tmp_path: Path) -> None:
    if config == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = make_digits(tmp_path / "digits", DigitsConfig(num_train=70, num_validation=24))
    options = (*OPTIONS, "--ema-decay", ema_decay)
    one = command("deit", folder, tmp_path / "one", "--accumulation", "2", *options)
    subprocess.run([sys.executable, *one], check=True)

    launch = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "tests.helpers.sharded_on_cpu"]
    recipe = command("deit", folder, tmp_path / "two", "--checkpoint-every", "1", "--resume", *options)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    two = [sys.executable, "-m", *launch, *recipe]
    log = tmp_path / "two" / "log.jsonl"
    for steps, victims in ((3, slice(None)), (8, slice(1))):
        kill_workers(subprocess.Popen(two, env=environment), log, steps, victims)
    subprocess.run(two, check=True, env=environment)

    first, second = (read_log(tmp_path / name, "training") for name in ("one", "two"))
    assert len(first) == len(second) == 16
    for line, other in zip(first, second, strict=True):
        for name in set(line) - {"kind"}:
            assert line[name] == pytest.approx(other[name], abs=SHARDED), (line["step"], name)
    whole, sharded = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert whole.keys() == sharded.keys()
    assert all(torch.allclose(whole[name], sharded[name], atol=SHARDED) for name in whole)
