"""On a GPU: other kernels, and the same promises. ``pytest -m gpu``."""

from __future__ import annotations

import copy
import os

import pytest
import torch

import tokenprune
from tests.helpers.masked_attention import formula, tensors
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import FORMULA, MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME, Case, every_model, some_models
from tokenprune.functional import masked_attention

DEVICE = os.environ.get("TOKENPRUNE_TEST_DEVICE", "cuda")  # "cpu" tries the tests themselves
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_masked_attention_is_the_formula() -> None:
    inputs = [tensor.detach().to(DEVICE).requires_grad_() for tensor in tensors()]
    on_cpu = [tensor.detach().cpu().requires_grad_() for tensor in inputs]
    actual, expected = masked_attention(*inputs), formula(*on_cpu)
    grad = torch.randn_like(expected)
    pairs = [(actual.detach(), expected.detach())]
    pairs += zip(
        torch.autograd.grad(actual, inputs, grad.to(DEVICE)), torch.autograd.grad(expected, on_cpu, grad), strict=True
    )
    for one, other in pairs:
        assert (one.cpu() - other).abs().max() <= FORMULA


@every_model
@pytest.mark.parametrize("dtype", MASK_EQUALS_GATHER, ids=str)
@torch.no_grad()
def test_mask_equals_gather(case: Case, dtype: torch.dtype) -> None:
    model, images = case.sparsified(dtype).to(DEVICE), case.images(dtype=dtype).to(DEVICE)
    gathered = case.run(model, images)
    model.tokenprune.execution = "mask"
    assert_close(case.run(model, images), gathered, MASK_EQUALS_GATHER[dtype])


@some_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    model, images = case.sparsified().train().to(DEVICE), case.images().to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        loss = sum(output.float().square().mean() for output in case.run(model, images).values())
    loss.backward()
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@some_models
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_calibration(case: Case, dtype: torch.dtype | None) -> None:
    model = case.sparsified().to(DEVICE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state() if DEVICE == "cpu" else torch.get_device_module(DEVICE).get_rng_state()
    images = [case.images(4) + index for index in range(4)]  # on the CPU, as a loader's
    report = tokenprune.calibrate(model, images, steps=3, autocast=dtype, progress=False)
    assert report.steps == 3 and torch.tensor(report.losses).isfinite().all()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("tokenprune.") for name in changed)
    after = torch.get_rng_state() if DEVICE == "cpu" else torch.get_device_module(DEVICE).get_rng_state()
    assert torch.equal(random, after)


@some_models
def test_what_is_measured_and_proven(case: Case) -> None:
    model, images = case.sparsified().to(DEVICE), case.images().to(DEVICE)
    named = {"pixel_values": images} if case.name.startswith("transformers") else images
    assert tokenprune.verify(model, named).passed
    assert tokenprune.throughput(model, (3, *case.image_size), batch_size=2, pairs=2).speedup > 0
    on_cpu = copy.deepcopy(model).cpu()
    assert tokenprune.flops(model, (3, 48, 48)).sparse == tokenprune.flops(on_cpu, (3, 48, 48)).sparse


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@some_models
def test_compiled(case: Case, training: bool) -> None:
    model, images = case.sparsified().train(training).to(DEVICE), case.images().to(DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    if training:
        sum(output.square().mean() for output in case.run(compiled, images).values()).backward()
        for name, parameter in model.tokenprune.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    else:
        with torch.no_grad():
            assert_close(case.run(compiled, images), case.run(model, images), MASK_EQUALS_GATHER[torch.float32])


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU does not count")
def test_throughput_counts_peak_memory() -> None:
    model = BY_NAME["timm class token"].sparsified().to(DEVICE)
    report = tokenprune.throughput(model, (3, 48, 48), batch_size=64, pairs=2, warmup=1)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert report.dense_peak_bytes is not None and report.sparse_peak_bytes is not None
    assert weights < report.sparse_peak_bytes <= report.dense_peak_bytes
