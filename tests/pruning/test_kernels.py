"""Our own kernels: in Triton's interpreter, on a GPU where there is one, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.masked_attention import INTERPRETED, KERNEL_PLACES, Place, formula, tensors
from tests.helpers.tolerances import KERNELS, KERNELS_HALF
from tests.helpers.zoo import BY_NAME
from tokenprune.functional import attend, masked_attention, without_kernels

pytest.importorskip("triton")
from tests.helpers.compiled_kernels import SHARED_MEMORY, compiling_for, launch
from tokenprune import kernels

ROOT = Path(__file__).parents[2]

by_kernels = pytest.mark.parametrize("place", KERNEL_PLACES)


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> int:
        return sum(name.startswith("tokenprune::") for name in self.names)


def mixed(keep: Tensor) -> Tensor:
    """Decisions of all kinds: about a third are 0, a third 1, a third between."""
    return (1.5 * torch.rand_like(keep) - 0.25).clamp(0, 1).requires_grad_()


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and gradients from a fixed one of its own."""
    torch.manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert (one.cpu().double() - other).abs().max() <= tolerance * max(1, other.abs().max())


CASES = [
    # queries, keys, channels, those of a value, own keys
    (65, 65, 24, 24, True),
    (33, 70, 20, 12, False),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(1, 1, 16, 16, True), (70, 70, 8, 40, True), (66, 66, 33, 33, False), (63, 63, 64, 64, True),
                     (64, 64, 80, 80, True), (197, 197, 72, 72, True), (2, 130, 96, 96, False),
                     (130, 3, 88, 88, False), (128, 128, 128, 128, True), (50, 50, 64, 128, True)]
    ),
]  # fmt: skip


@by_kernels
@pytest.mark.parametrize(("queries", "keys", "dim", "value_dim", "own_key"), CASES)
def test_every_length_and_width(place: Place, queries: int, keys: int, dim: int, value_dim: int, own_key: bool) -> None:
    inputs = tensors(queries, keys, dim, value_dim)
    inputs[3] = mixed(inputs[3])
    there = [place.take(tensor) for tensor in inputs]
    with Operators() as operators:
        actual = gradients(attend(*there, own_key=own_key), there)
    assert operators.ours == 2
    assert_near(actual, gradients(formula(*inputs, own_key=own_key), inputs), KERNELS)


@pytest.fixture
def multiplying_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16, wrongly; here it multiplies the numbers."""
    if INTERPRETED:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder

        dot = InterpreterBuilder.create_dot

        def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
            if a.dtype.scalar == tl.bfloat16:
                a, b = (self.create_fp_ext(one, tl.float32) for one in (a, b))
            return dot(self, a, b, *others)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        monkeypatch.setattr(kernels, "most_channels", lambda device, dtype: 256)
    yield


@by_kernels
@pytest.mark.parametrize("own_key", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", KERNELS_HALF, ids=str)
def test_half_precision(place: Place, dtype: torch.dtype, own_key: bool, multiplying_bfloat16: None) -> None:
    inputs = tensors(67, 67, 40, 40, torch.float64)
    inputs[3] = mixed(inputs[3])
    rounded = [tensor.detach().to(dtype).double().requires_grad_() for tensor in inputs[:3]] + [inputs[3]]
    there = [Place(place.device, dtype, 0).take(tensor) for tensor in rounded[:3]] + [place.take(inputs[3])]
    output = attend(*there, own_key=own_key)
    actual = gradients(output, there)
    assert [one.dtype for one in actual] == [dtype] * 4 + [torch.float32]
    assert_near(actual, gradients(formula(*rounded, own_key=own_key), rounded), KERNELS_HALF[dtype])


@by_kernels
def test_views_into_one_projection_are_not_copied(place: Place) -> None:
    packed = torch.randn(2, 19, 3, 3, 16, dtype=torch.float64, requires_grad=True)  # (B, L, 3, H, D)
    keep = mixed(torch.rand(2, 38, dtype=torch.float64))
    there, keep_there = place.take(packed), place.take(keep)

    def views(tensor: Tensor, decisions: Tensor) -> list[Tensor]:
        return [*tensor.permute(2, 0, 3, 1, 4).unbind(0), decisions[:, ::2]]

    with Operators() as operators:
        output = masked_attention(*views(there, keep_there))
    assert operators.ours == 1 and not any("clone" in name or "contiguous" in name for name in operators.names)
    assert output.transpose(1, 2).is_contiguous()  # as the layer behind attention wants it
    expected = formula(*views(packed, keep))
    assert_near(gradients(output, [there, keep_there]), gradients(expected, [packed, keep]), KERNELS)


@by_kernels
def test_channels_masks_and_gradients_of_any_stride(place: Place) -> None:
    inputs = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in tensors()[:3]] + tensors()[3:]
    assert all(tensor.stride(-1) != 1 for tensor in inputs[:3])
    there = [place.take(tensor) for tensor in inputs]
    mask = torch.randn(7, 7, dtype=torch.float64).mT
    output = masked_attention(*there, attn_mask=place.take(mask))
    actual = torch.autograd.grad(output.sum(), there)  # from one number, expanded
    assert_near(actual, torch.autograd.grad(formula(*inputs, attn_mask=mask).sum(), inputs), KERNELS)


@by_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.float16], ids=str)
def test_keep_of_any_dtype(place: Place, dtype: torch.dtype) -> None:
    inputs = tensors()
    there = [place.take(tensor) for tensor in inputs[:3]]
    keep = inputs[3].detach().to(place.device, dtype).requires_grad_(dtype.is_floating_point)
    actual = gradients(masked_attention(*there, keep), [*there, keep] if keep.requires_grad else there)
    assert actual[-1].dtype == (dtype if keep.requires_grad else place.dtype)
    expected = gradients(formula(*inputs), inputs)[: len(actual)]
    assert_near(actual, expected, KERNELS_HALF[dtype] if dtype == torch.float16 else KERNELS)


@by_kernels
@pytest.mark.slow
def test_gradients_are_the_same_in_every_run(place: Place) -> None:
    there = [place.take(tensor) for tensor in tensors(70, 70)]
    first, second = (gradients(masked_attention(*there), there) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@by_kernels
@pytest.mark.slow
def test_what_the_kernels_do_not_take(place: Place) -> None:
    def ours(*inputs: Tensor, **options: Any) -> int:
        with Operators() as operators:
            masked_attention(*inputs, **options).sum().backward()
        return operators.ours

    there = [place.take(tensor) for tensor in tensors()]
    assert ours(*there) == 2
    mask = torch.randn(7, 7, device=place.device, requires_grad=True)
    assert ours(*there, attn_mask=mask) == 1  # its gradient is a matrix of scores
    assert ours(*there, attn_mask=mask.detach()) == 2
    assert ours(*there, dropout_p=0.5) == 0
    assert ours(*(tensor.detach().double().requires_grad_() for tensor in there)) == 0
    wide = [place.take(tensor) for tensor in tensors(dim=136, value_dim=136)]
    assert ours(*wide) == 0
    assert ours(*(tensor.detach().half().requires_grad_() for tensor in wide)) == 2
    with without_kernels():
        assert ours(*there) == 0
    assert ours(*there) == 2


@by_kernels
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_operators_are_as_the_compiler_expects(place: Place, masked: bool) -> None:
    query, key, value, keep = (place.take(tensor).detach() for tensor in tensors(5, 7))
    bias = torch.randn(1, 3, 1, 7, device=place.device) if masked else None
    inputs = (query, key, value, keep, bias)
    output, log_sum_exp = kernels.masked_attention(*inputs, False, 0.3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.masked_attention, (*inputs, False, 0.3), test_utils=checks)
    backward = (torch.randn_like(output), *inputs, output, log_sum_exp, False, 0.3)
    torch.library.opcheck(kernels.masked_attention_backward, backward, test_utils=checks)


@by_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(place: Place, dynamic: bool) -> None:
    def names(graphs: list[Any]) -> str:
        return " ".join(str(node.target) for graph in graphs for node in graph.graph.nodes)

    torch.compiler.reset()
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(masked_attention, fullgraph=True, dynamic=dynamic, backend=recorded)
    for length in (7, 9):
        there = [place.take(tensor) for tensor in tensors(length, length)]
        actual = gradients(compiled(*there), there)
        assert_near(actual, [one.cpu().double() for one in gradients(masked_attention(*there), there)], 1e-6)
    assert len(recorded.fw_graphs) == len(recorded.bw_graphs) == (1 if dynamic else 2)
    assert "tokenprune.masked_attention.default" in names(recorded.fw_graphs)
    assert "tokenprune.masked_attention_backward.default" in names(recorded.bw_graphs)
    if not dynamic:
        with without_kernels():
            compiled(*there)
        assert len(recorded.fw_graphs) == 3 and "tokenprune" not in names(recorded.fw_graphs[-1:])


@by_kernels
@pytest.mark.slow
def test_a_model_trains_alike(place: Place) -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified().train().to(place.device), case.images().to(place.device)
    found = []
    for context in (Operators(), without_kernels()):
        torch.manual_seed(0)
        model.zero_grad()
        with context:
            sum(output.square().mean() for output in case.run(model, images).values()).backward()
        found.append([parameter.grad.cpu().double() for parameter in model.parameters() if parameter.grad is not None])
        if isinstance(context, Operators):
            assert context.ours >= 4
    assert_near(*found, KERNELS)


@pytest.mark.skipif(INTERPRETED, reason="about the process that is not")
def test_products_are_as_exact_as_pytorchs_own() -> None:
    assert kernels._precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert kernels._precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert kernels._precision() == "ieee"


# Compiled for GPUs that are not there


needs_the_compiler = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")


@needs_the_compiler
def test_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_all(80, torch.float16, 64, monkeypatch, [(True, False)])


@pytest.mark.slow
@needs_the_compiler
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("size", "channels", "precision"),
    [(*shape, "ieee") for shape in kernels.CONFIGS] + [(*shape, "tf32") for shape in kernels.CONFIGS if shape[0] == 4],
)
def test_every_configuration_compiles(
    size: int, channels: int, precision: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_precision", lambda: precision)
    kinds = [(True, True)]  # which takes most of everything
    if capability in (80, 90):
        kinds += [(True, False), (False, False)]
    for dtype in (torch.float16, torch.bfloat16) if size == 2 else (torch.float32,):
        compile_all(capability, dtype, channels, monkeypatch, kinds)


def compile_all(
    capability: int, dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch, kinds: list[tuple[bool, bool]]
) -> None:
    """Launch forward and backward as if there were such a GPU; what they need fits into its shared memory."""
    with compiling_for(capability, monkeypatch) as compiled:
        for own_key, masked in kinds:
            launch(dtype, channels, own_key=own_key, masked=masked)
    assert len(compiled) == 3 * len(kinds)
    for kernel in compiled:
        assert kernel.asm["cubin"] and f".target sm_{capability}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]


# In Triton's interpreter, which has to be chosen before Triton is imported


def interpret(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="starts what this is")
def test_interpreted() -> None:
    interpret("-m", "not gpu and not slow", "tests/pruning/test_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sys.modules['triton'] = None", "os.environ['TOKENPRUNE_KERNELS'] = '0'"])
def test_without_triton_and_switched_off_there_are_no_kernels(what: str) -> None:
    script = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"  # so that they would run here
{what}
import torch
from tokenprune.functional import masked_attention
inputs = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
masked_attention(*inputs, torch.ones(1, 5)).sum().backward()
assert all(tensor.grad.isfinite().all() for tensor in inputs) and "tokenprune.kernels" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts what this is")
def test_all_tests_of_the_function_interpreted() -> None:
    interpret("-m", "not gpu", "tests/pruning/test_kernels.py", "tests/pruning/test_functional.py")
