"""Putting back, after a model was trained on, everything that was not to be trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tokenprune.backbones.probing import kept_modes
from tokenprune.pruning.sparsifier import Sparsifier


@contextmanager
def preserved(model: nn.Module, sparsifier: Sparsifier, trained: Iterable[nn.Parameter], seed: int) -> Iterator[None]:
    """While it lasts, nothing requires a gradient unless `learning` says so, and random numbers are those of ``seed``.

    Afterwards buffers, gradients, ``requires_grad``, modes, keep ratios, execution, the record of the last pass and the
    state of the random number generators are what they were. If an error is raised, so are ``trained``.
    """
    trained = list(trained)
    parameters = list(model.parameters())
    learns = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    plan, execution, trace = sparsifier.plan, sparsifier.execution, sparsifier.trace
    start = snapshot(trained)
    with kept_modes(model), forked_random_state(parameters[0].device):
        try:
            _seed(parameters[0].device, seed)
            model.requires_grad_(False)
            for parameter in parameters:
                parameter.grad = None
            with torch.inference_mode(False), torch.enable_grad():
                yield
        except Exception:
            put_back(trained, start)
            raise
        finally:
            for parameter, flag, gradient in zip(parameters, learns, gradients, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = gradient
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            sparsifier.keep_ratio, sparsifier.execution, sparsifier.trace = plan.keep_ratios, execution, trace


@contextmanager
def learning(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While it lasts, these require gradients; afterwards they do not, and have none."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def snapshot(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of the values."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def put_back(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Give parameters the values of a `snapshot`."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Afterwards restore the state of the random number generators of the CPU and of a device."""
    on_device = nullcontext()
    if device.type != "cpu":
        on_device = torch.random.fork_rng([device], device_type=device.type)  # type: ignore[assignment]
    with torch.random.fork_rng([]), on_device:
        yield


def _seed(device: torch.device, seed: int) -> None:
    """Seed what `forked_random_state` restores, and no other device, as `torch.manual_seed` would."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(seed)
