"""Runtimes that run files: ONNX Runtime, in a process of its own, and `torch.export` programs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from tokenprune.analysis.runtimes import Timer, Timers, register_runtime, timers_of
from tokenprune.errors import ExportError, UnsupportedModelError
from tokenprune.saving.export import check_path, export

TOLERANCE = 0.1
"""How far a file that is timed may be from its model. Where rounding ranks two tokens the other way round, outputs
differ by much more than rounding, and speed by nothing."""


@register_runtime("pt2")
@contextmanager
def programs(models: Sequence[nn.Module], input_size: Sequence[int]) -> Iterator[Timers]:
    """Programs that `tokenprune.export` has written, loaded again, on the models' device.

    Raises:
        ExportError: A model cannot be exported.
    """
    with _files(models, input_size, ".pt2") as files:
        yield partial(timers_of, [torch.export.load(file).module() for file in files])


@register_runtime("onnx")
@contextmanager
def onnx_runtime(models: Sequence[nn.Module], input_size: Sequence[int]) -> Iterator[Timers]:
    """ONNX Runtime on the CPU, with as many threads as PyTorch has here.

    It runs in a process of its own: the threads of two runtimes in one process take each other's cores.

    Raises:
        ModuleNotFoundError: A package of the extra ``tokenprune[export]`` is missing.
        UnsupportedModelError: A model is on another device.
        ExportError: A model cannot be exported, or the process has died.
    """
    check_path(Path("model.onnx"))
    for device in {weight.device for model in models for weight in model.parameters()}:
        if device.type != "cpu":
            raise UnsupportedModelError(
                f"runtime='onnx' is timed on a CPU, and the model is on {device}; move it: model.cpu()."
            )
    with _files(models, input_size, ".onnx") as files, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenprune.saving.onnx_process", str(torch.get_num_threads()), *map(str, files)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip

        def timers(images: Tensor) -> list[Timer]:
            import numpy as np

            saved = files[0].with_name("images.npy")
            np.save(saved, images.numpy())
            _answer(process, f"images {saved}", errors)
            return [partial(_answer, process, f"run {number}", errors) for number in range(len(files))]

        with process:
            yield timers


@contextmanager
def _files(models: Sequence[nn.Module], input_size: Sequence[int], suffix: str) -> Iterator[list[Path]]:
    """Each model as a file."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}{suffix}" for number in range(len(models))]
        for model, file in zip(models, files, strict=True):
            export(model, file, input_size=input_size, tolerance=TOLERANCE)
        yield files


def _answer(process: subprocess.Popen[str], line: str, errors: IO[str]) -> float:
    """The seconds that a process answers with.

    Raises:
        ExportError: It has died.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        code = process.wait()
        errors.seek(0)
        reason = (errors.read().strip().splitlines() or ["without a word"])[-1]
        raise ExportError(f"the process of ONNX Runtime has died (exit code {code}): {reason}")
    return float(answer)
