"""At keep ratio 1 the hooks have nothing to do, and do nothing, but for the record."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.helpers.profiling import operators
from tests.helpers.zoo import STAGES, Case, models
from tokenprune.pruning.attention_scopes import AttentionScopes
from tokenprune.pruning.executions import Execution, execution_class, executions
from tokenprune.pruning.hooks import PruningHooks
from tokenprune.pruning.trace import Trace

some = models("timm class token", "timm LV-ViT", "transformers SigLIP", "torchvision")
one_model = models("timm class token")


def unpruned(case: Case) -> nn.Module:
    model = case.sparsified()
    model.tokenprune.keep_ratio = 1.0
    return model


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("there is nothing to be done here")


@some
@pytest.mark.parametrize("execution", executions())
@torch.no_grad()
def test_blocks_run_as_they_are(case: Case, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = case.model(), unpruned(case)
    model.tokenprune.execution = execution
    for owner, name in ((PruningHooks, "_prune"), (PruningHooks, "_side_inputs"), (AttentionScopes, "enter")):
        monkeypatch.setattr(owner, name, refuse)
    expected, given = case.run(dense, case.images()), case.run(model, case.images())
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    trace = model.tokenprune.trace
    assert trace.execution == execution and len(trace.selections) == len(STAGES) == len(trace.keep)
    assert all(keep.shape[1] == case.num_patches and keep.all() for keep in trace.keep)
    assert trace.scores == (None,) * len(STAGES)
    for one, stage in zip(trace.selections, STAGES, strict=True):
        assert one.layout == model.tokenprune.backbone.layout_at(trace.start.layout, stage)


@one_model
@torch.no_grad()
def test_no_operator_is_called_that_a_dense_model_does_not_call(case: Case) -> None:
    assert operators(case, unpruned(case)) == operators(case, case.model())


@one_model
def test_the_record_of_one_pass_serves_another_with_gradients(case: Case) -> None:
    model = unpruned(case)
    with torch.inference_mode():
        case.run(model, case.images())
    case.run(model, case.images())
    weights = torch.ones(3, case.num_patches, requires_grad=True)
    weights.gather(1, model.tokenprune.trace.indices[0]).sum().backward()
    assert weights.grad is not None and weights.grad.eq(1).all()


@one_model
@torch.no_grad()
def test_the_record_is_made_once_for_passes_that_are_made_alike(case: Case) -> None:
    model = unpruned(case)
    first = record(case, model)
    assert record(case, model) is first
    with model.tokenprune.disabled():
        case.run(model, case.images())
        assert model.tokenprune.trace is None
    assert record(case, model) is first and model.tokenprune.trace.keep[0].all()


@one_model
@torch.no_grad()
def test_no_other_pass_takes_its_record(case: Case) -> None:
    model = unpruned(case)
    first = record(case, model)
    assert record(case, model, batch_size=3).keep[0].shape[0] == 3
    assert record(case, model, batch_size=2).keep[0].shape == first.keep[0].shape
    model.tokenprune.execution = "mask"
    assert record(case, model).execution == "mask"
    model.tokenprune.execution = "auto"
    model.train()
    assert record(case, model).execution == "mask"
    model.eval()
    assert record(case, model).execution == "gather"
    model.tokenprune.keep_ratio = 0.5
    assert not record(case, model).keep[0].all()
    model.tokenprune.keep_ratio = 1.0
    assert record(case, model).keep[0].all()


@some
def test_a_pass_that_is_traced_leaves_no_record_to_others(case: Case) -> None:
    model = unpruned(case)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript, and of every size that it takes for a constant
        torch.jit.trace(model, case.images(), strict=False, check_trace=False)
        traced = model.tokenprune.trace
        assert record(case, model, batch_size=3) is not traced


@one_model
@torch.no_grad()
def test_compiled_code_does_not_depend_on_what_other_passes_have_left(case: Case) -> None:
    model, counter = case.sparsified(), CompileCounter()
    case.run(model, case.images())  # the first pass of all makes an execution, for which compiled code has a guard
    model.tokenprune.keep_ratio = 1.0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = compiled(case.images())
    record(case, model, batch_size=3)
    assert torch.equal(compiled(case.images()), expected)
    assert counter.frame_count == 1


def record(case: Case, model: nn.Module, batch_size: int = 2) -> Trace:
    case.run(model, case.images(batch_size))
    trace = model.tokenprune.trace
    assert isinstance(trace, Trace)
    return trace


@one_model
@torch.no_grad()
def test_what_was_interrupted_does_not_keep_the_next_pass_from_pruning(case: Case) -> None:
    model = unpruned(case)
    expected = case.sparsified()
    interrupt = model.blocks[-1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        case.run(model, case.images())
    interrupt.remove()
    model.tokenprune.keep_ratio = expected.tokenprune.keep_ratio
    assert torch.equal(model.forward_features(case.images()), expected.forward_features(case.images()))
    assert torch.equal(model(case.images()), expected(case.images()))


def interrupted(block: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise KeyboardInterrupt


@one_model
@torch.no_grad()
def test_an_execution_that_skips_no_stage_is_asked_at_every_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    gather = execution_class("gather")

    def decide(self: Execution, scores: Tensor, *others: Any, **options: Any) -> Any:
        asked.append(scores)
        return before(self, scores, *others, **options)

    before = gather.decide
    monkeypatch.setattr(gather, "keeps_all", lambda *_, **__: False)
    monkeypatch.setattr(gather, "decide", decide)
    case.run(unpruned(case), case.images())
    assert len(asked) == len(STAGES)


@one_model
def test_losses_find_what_they_need(case: Case) -> None:
    model = unpruned(case).train()
    case.run(model, case.images())
    tokens = model.tokenprune.trace.tokens
    assert tokens is not None and tokens.requires_grad and tokens.shape[1] == case.num_patches + 1
