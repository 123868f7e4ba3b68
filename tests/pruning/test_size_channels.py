"""Attention in proportion to sizes by channels instead of a bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.helpers.zoo import BY_NAME, DEPTH
from tokenprune.backbones.interception import AttentionCall
from tokenprune.pruning import attention_scopes, size_channels
from tokenprune.pruning.size_channels import pays, with_channels


def call_and_logs(dtype: torch.dtype, width: int = 20, scale: float | None = None) -> tuple[AttentionCall, Tensor]:
    query, key, value = torch.randn(3, 2, 3, 30, width).to(dtype).unbind(0)
    return AttentionCall(query, key, value, scale=scale), torch.randint(1, 60, (2, 30)).float().log()


@pytest.mark.parametrize("scale", [None, 0.3, 1.0], ids=str)
@pytest.mark.parametrize("width", [64, 72, 20, 7])
def test_it_equals_the_bias(width: int, scale: float | None) -> None:
    call, logs = call_and_logs(torch.float64, width, scale)
    expected = call._replace(attn_mask=logs.double()[:, None, None, :]).run()
    widened = with_channels(call, logs.double())
    assert widened.attn_mask is None and widened.query.shape[-1] % 8 == 0
    assert widened.query.shape[-1] == widened.key.shape[-1] == widened.value.shape[-1]
    torch.testing.assert_close(widened.run()[..., :width], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80])
def test_log_sizes_keep_their_precision(dtype: torch.dtype, width: int) -> None:
    call, logs = call_and_logs(dtype, width)
    widened = with_channels(call, logs)
    assert widened.query.dtype == widened.key.dtype == dtype

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return query.double() @ key.double().mT * width**-0.5

    added = scores(widened.query, widened.key) - scores(call.query, call.key)
    # Two channels of 8 bits give 16 or more; one would be off by up to 1e-2.
    torch.testing.assert_close(added, logs.double()[:, None, None, :].expand_as(added), rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_bias() -> None:
    call, logs = call_and_logs(torch.float64)
    inputs = [tensor.requires_grad_() for tensor in call[:3]]
    outputs = (call._replace(attn_mask=logs.double()[:, None, None, :]).run(), with_channels(call, logs.double()).run())
    grad = torch.randn_like(outputs[0])
    expected, actual = (torch.autograd.grad(output[..., :20], inputs, grad) for output in outputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_on_a_cpu_the_bias_stays() -> None:
    assert not pays(call_and_logs(torch.float16)[0])


@pytest.mark.parametrize("execution", ["gather", "varlen", "mask"])
@torch.no_grad()
def test_tome_gives_the_same_by_channels(monkeypatch: pytest.MonkeyPatch, execution: str) -> None:
    case = BY_NAME["timm class token"]
    ratios = tokenprune.tome_keep_ratios(case.num_patches, r=4, num_stages=DEPTH)
    model = tokenprune.sparsify(case.model(), range(DEPTH), ratios, scorer="tome", pruned="merge_sizes")
    model.tokenprune.execution = execution
    images = case.images()
    expected = case.run(model, images)
    widened: list[int] = []

    def noting(call: AttentionCall, log_sizes: Tensor) -> AttentionCall:
        wider = with_channels(call, log_sizes)
        widened.append(wider.key.shape[-1] - call.key.shape[-1])
        return wider

    monkeypatch.setattr(attention_scopes, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(size_channels, "pays", lambda call: True)
    monkeypatch.setattr(size_channels, "with_channels", noting)
    for name, output in case.run(model, images).items():
        torch.testing.assert_close(output, expected[name], rtol=0, atol=1e-5)
    # Blocks behind the first stage attend by sizes; masked attention has its own kernels, which take the bias.
    assert len(widened) == (0 if execution == "mask" else DEPTH - 1) and all(widened)
