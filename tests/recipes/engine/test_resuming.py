"""The engine stopped and started again: what it leaves behind is whole, and the end is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.digits.data import DigitsConfig, make_digits
from recipes.engine.checkpoints import Interrupted, write_whole
from recipes.engine.logbook import read_log
from recipes.engine.settings import SettingsError
from tests.helpers.engine import command, run_plain, weights_of


def test_write_whole_leaves_no_half_written_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fails(partial: Path) -> None:
        partial.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, fails)
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]
    write_whole(target, lambda partial: partial.write_text("new"))
    assert target.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_keeps_the_state_and_the_next_run_goes_on(folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"loss": nn.functional.cross_entropy(outputs, targets)}

    whole = run_plain(folder, tmp_path / "whole", lambda *args: {"loss": nn.functional.cross_entropy(args[2], args[3])})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="Stopped after step 2 of 6"):
        run_plain(folder, tmp_path / "run", loss)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(SettingsError, match="holds a run already; add --resume"):
        run_plain(folder, tmp_path / "run", loss)
    with pytest.raises(SettingsError, match="seed was 0 and is 1"):
        run_plain(folder, tmp_path / "run", loss, resume=True, seed=1)
    resumed = run_plain(folder, tmp_path / "run", loss, resume=True)
    assert len(calls) == 6
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    folder = make_digits(tmp_path / "digits", DigitsConfig(num_train=70, num_validation=24))
    steps = ["--epochs", "6", "--checkpoint-every", "1"]
    subprocess.run([sys.executable, *command("deit", folder, tmp_path / "whole", *steps)], check=True)
    state, log = tmp_path / "killed" / "checkpoints", tmp_path / "killed" / "log.jsonl"
    kills = 0
    while kills < 5:
        started = time.time_ns()
        process = subprocess.Popen([sys.executable, *command("deit", folder, tmp_path / "killed", *steps, "--resume")])
        # Killed sooner or later after it began to write: while it computes, logs or saves.
        while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > started):
            time.sleep(0.01)
        time.sleep(0.05 + 0.13 * kills)
        assert process.poll() is None, "the run ended before it could be killed; give it more steps"
        process.kill()
        process.wait()
        kills += 1
        for checkpoint in (path for path in state.glob("*-*") if path.suffix == ""):
            load_file(checkpoint / "model.safetensors")
            torch.load(checkpoint / "optimizer.bin", weights_only=True)
    subprocess.run([sys.executable, *command("deit", folder, tmp_path / "killed", *steps, "--resume")], check=True)
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["masked", "gathered"])
def test_two_processes_are_one_that_accumulates(schedule: str, tmp_path: Path) -> None:
    folder = make_digits(tmp_path / "digits", DigitsConfig(num_train=70, num_validation=24))
    options = ("--schedule", schedule, "--calibration-steps", "2", "--backbone-factor", "1")
    one = command("deit", folder, tmp_path / "one", "--accumulation", "2", *options)
    subprocess.run([sys.executable, *one], check=True)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = command("deit", folder, tmp_path / "two", *options)
    subprocess.run([sys.executable, *launch, *two], check=True, env=environment)
    first, second = (read_log(tmp_path / name, "training") for name in ("one", "two"))
    assert len(first) == len(second) == 8
    for line, other in zip(first, second, strict=True):
        for name in set(line) - {"kind"}:
            # Gradients are summed in another order; eight steps leave it at some rounding errors of float32.
            assert line[name] == pytest.approx(other[name], abs=1e-5), (line["step"], name)
