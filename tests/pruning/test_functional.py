"""Masked attention against the formula of the paper, written out and differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.masked_attention import PLACES, Place, formula, tensors
from tokenprune import functional
from tokenprune.functional import attend, masked_attention

every_place = pytest.mark.parametrize("place", PLACES)


def compare(
    place: Place,
    inputs: list[Tensor],
    attention: Callable[..., Tensor] = masked_attention,
    *,
    own_key: bool = True,
    attn_mask: Tensor | None = None,
) -> None:
    """Output and gradients of the inputs, and of a mask that asks for one, beside those of the formula."""
    there = [place.take(tensor) for tensor in inputs]
    mask = None if attn_mask is None else place.take(attn_mask)
    actual, expected = attention(*there, attn_mask=mask), formula(*inputs, own_key=own_key, attn_mask=attn_mask)
    if attn_mask is not None and attn_mask.requires_grad:
        inputs, there = [*inputs, attn_mask], [*there, mask]
    grad = torch.randn_like(expected)
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, there, place.take(grad)), torch.autograd.grad(expected, inputs, grad), strict=True
    )
    for one, other in pairs:
        assert one.shape == other.shape and one.dtype == place.dtype
        assert (one.cpu() - other).abs().max() <= place.tolerance * max(1, other.abs().max())


@every_place
@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("block", [1 << 19, 49, 147, 1])
def test_output_and_all_gradients(monkeypatch: pytest.MonkeyPatch, place: Place, block: int, value_dim: int) -> None:
    monkeypatch.setattr(functional, "_CPU_BLOCK", block)  # whole, a head, an image and less than a head at a time
    inputs = tensors(value_dim=value_dim)
    assert 0 < inputs[3].sum() < inputs[3].numel()
    compare(place, inputs)


@every_place
def test_dropped_keys_get_a_gradient(place: Place) -> None:
    inputs = [place.take(tensor) for tensor in tensors()]
    (grad,) = torch.autograd.grad(masked_attention(*inputs).square().sum(), inputs[3])
    assert (grad[inputs[3] == 0].abs() > 1e-6).all()


@every_place
def test_the_output_is_attention_over_the_kept_keys(place: Place) -> None:
    query, key, value, keep = tensors()
    output = masked_attention(*(place.take(tensor) for tensor in (query, key, value, keep))).cpu().to(query.dtype)
    for image in range(2):
        kept = keep[image] == 1
        expected = F.scaled_dot_product_attention(query[image][:, kept], key[image][:, kept], value[image][:, kept])
        torch.testing.assert_close(output[image][:, kept], expected, rtol=0, atol=place.tolerance)


@every_place
@pytest.mark.parametrize("shape", [(7, 7), (3, 7, 7), (1, 3, 7, 7), (2, 1, 7, 7), (2, 1, 1, 7), (2, 3, 7, 7)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive", "learned"])
@pytest.mark.parametrize("block", [1 << 19, 49])
def test_attention_masks(
    monkeypatch: pytest.MonkeyPatch, place: Place, shape: tuple[int, ...], kind: str, block: int
) -> None:
    monkeypatch.setattr(functional, "_CPU_BLOCK", block)
    inputs = tensors()
    if kind == "boolean":
        mask = torch.rand(shape) > 0.3
        mask[..., 0] = True
    else:
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=kind == "learned")
    compare(place, inputs, attn_mask=mask)


@every_place
def test_fractional_keep_weighs_a_key(place: Place) -> None:
    inputs = tensors()
    inputs[3] = torch.rand_like(inputs[3]).requires_grad_()
    compare(place, inputs)


@every_place
def test_cross_attention_has_no_own_keys(place: Place) -> None:
    compare(place, tensors(queries=2), own_key=False)


@every_place
def test_a_pool_of_as_many_queries_as_keys_has_no_own_keys_either(place: Place) -> None:
    compare(place, tensors(), partial(attend, own_key=False), own_key=False)


@every_place
def test_a_dominating_dropped_key_leaves_everything_finite(place: Place) -> None:
    inputs = tensors()
    with torch.no_grad():
        inputs[3][:] = 1
        inputs[3][:, 4] = 0
        # Every query sees a score of the dropped key above all others by at least 1e4.
        inputs[0][:] = inputs[0].abs() + 1
        inputs[1][:, :, 4] = 1e4 * math.sqrt(8)
    scores = (inputs[0] @ inputs[1].transpose(-1, -2) / math.sqrt(8)).detach()
    others = scores[..., [0, 1, 2, 3, 5, 6]].amax(dim=-1)
    assert (scores[..., 4] - others).min() > 1e4
    there = [place.take(tensor) for tensor in inputs]
    output, expected = masked_attention(*there), formula(*inputs)
    tolerance = place.tolerance if place.dtype == torch.float64 else 3e-2  # steps of scores near 5e4 are 4e-3
    assert (output.cpu() - expected).abs().max() <= tolerance
    grad = torch.randn_like(expected)
    actual = [one.cpu() for one in torch.autograd.grad(output, there, place.take(grad))]
    reference = torch.autograd.grad(expected, inputs, grad)
    for one, other in zip(actual[:3], reference[:3], strict=True):
        assert (one - other).abs().max() <= tolerance
    assert (actual[3] - reference[3])[:, [0, 1, 2, 3, 5, 6]].abs().max() <= tolerance
    # What the dominating key itself would change has no bound; it is cut to a large finite number.
    assert actual[3][:, 4].isfinite().all() and actual[3][:, 4].abs().min() > 1e3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = tensors(dtype=torch.float32)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs[:3]] + [inputs[3]]
    actual, expected = masked_attention(*halves), formula(*inputs)
    assert actual.dtype == dtype
    # A bfloat16 has 8 bits of mantissa; values are of magnitude 1 to 4.
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.06)
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, halves, grad.to(dtype)), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert one.isfinite().all()
        torch.testing.assert_close(one.float(), other, rtol=0.1, atol=0.3)


def test_autocast_casts_as_it_does_for_plain_attention() -> None:
    inputs = tensors(dtype=torch.float32)
    inputs[0] = inputs[0].detach().bfloat16().requires_grad_()  # a norm left the key in float32
    with torch.autocast("cpu", torch.bfloat16):
        output = masked_attention(*inputs)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


def test_dropout_draws_the_same_weights_forward_and_backward() -> None:
    inputs = tensors()
    torch.manual_seed(1)
    output = masked_attention(*inputs, dropout_p=0.5)
    assert (output - masked_attention(*inputs)).abs().max() > 0.1
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, inputs, grad)
    # Numeric differentiation under the same random numbers.
    direction = [torch.randn_like(tensor) for tensor in inputs[:3]]
    step = 1e-6

    def at(sign: float) -> Tensor:
        torch.manual_seed(1)
        moved = [tensor + sign * step * move for tensor, move in zip(inputs[:3], direction, strict=True)]
        return (masked_attention(*moved, inputs[3], dropout_p=0.5) * grad).sum()

    numeric = (at(1) - at(-1)) / (2 * step)
    analytic = sum((gradient * move).sum() for gradient, move in zip(actual[:3], direction, strict=True))
    torch.testing.assert_close(numeric, analytic, rtol=1e-6, atol=1e-6)


def test_dropout_averages_to_the_formula() -> None:
    inputs = [tensor.detach() for tensor in tensors()]
    mean = torch.stack([masked_attention(*inputs, dropout_p=0.2) for _ in range(2000)]).mean(dim=0)
    # 2000 draws of a relative deviation of 0.5: the mean is off by about 0.01 to 0.05.
    torch.testing.assert_close(mean, formula(*inputs), rtol=0, atol=0.15)


@every_place
@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_row_that_may_see_nothing_gives_zero(place: Place, dropout_p: float, value_dim: int) -> None:
    inputs = [place.take(tensor) for tensor in tensors(value_dim=value_dim)]
    mask = torch.ones(7, 7, dtype=torch.bool, device=place.device)
    mask[-2:] = False
    output = masked_attention(*inputs, dropout_p=dropout_p, attn_mask=mask)
    assert (output[:, :, -2:] == 0).all() and output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), inputs))


@every_place
def test_where_no_key_is_kept_gradients_are_finite(place: Place) -> None:
    inputs = tensors(queries=3)
    with torch.no_grad():
        inputs[3].zero_()
    compare(place, inputs, partial(attend, own_key=False), own_key=False)


@every_place
def test_no_matrix_of_scores_is_kept_for_the_backward_pass(place: Place) -> None:
    inputs = [place.take(tensor) for tensor in tensors(keys=50, queries=50)]
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    for options in ({}, {"dropout_p": 0.1}):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            masked_attention(*inputs, **options)
        assert max(saved, default=0) < 50 * 50


@every_place
def test_without_gradients_it_is_one_fused_call(place: Place) -> None:
    inputs = tensors()
    with torch.no_grad():
        output = masked_attention(*(place.take(tensor) for tensor in inputs))
        assert (output.cpu() - formula(*inputs)).abs().max() <= place.tolerance


@every_place
def test_a_batch_of_no_images(place: Place) -> None:
    there = [place.take(tensor[:0]) for tensor in tensors()]
    with torch.no_grad():
        assert masked_attention(*there).shape == (0, 3, 7, 8)
    masked_attention(*there).sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in there)


@every_place
def test_scale(place: Place) -> None:
    inputs = tensors()

    def scaled(query: Tensor, *others: Tensor, attn_mask: None) -> Tensor:  # as if it were scaled by 0.1
        return masked_attention(query / (0.1 * math.sqrt(8)), *others, scale=0.1)

    compare(place, inputs, scaled)


@pytest.mark.parametrize(
    "shapes",
    [
        {"keep": (2, 6)},
        {"keep": (7,)},
        {"value": (2, 3, 6, 8)},
        {"key": (2, 3, 7, 4)},
        {"query": (3, 7, 8)},
        {"query": (1, 3, 7, 8)},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_stated(shapes: dict[str, Any]) -> None:
    right = {"query": (2, 3, 7, 8), "key": (2, 3, 7, 8), "value": (2, 3, 7, 8), "keep": (2, 7)}
    given = {name: torch.ones(shapes.get(name, shape)) for name, shape in right.items()}
    with pytest.raises(ValueError, match=r"got query \(.*\), key \(.*\), value \(.*\), keep \("):
        masked_attention(**given)
