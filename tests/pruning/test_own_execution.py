"""An execution in one file: the library carries out decisions in a way that it does not know of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME, STAGES, Case, hook_counts
from tokenprune.backbones.interception import AttentionCall, Interception
from tokenprune.pruning.executions import Execution, base, register_execution
from tokenprune.pruning.sampling import top_k
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, select


class _MinusInfinity(Interception):
    """Scores of pruned keys are minus infinity."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def attention(self, call: AttentionCall) -> Tensor:
        bias = self.bias if call.attn_mask is None else self.bias + call.attn_mask
        return call._replace(attn_mask=bias).run()


class Bias(Execution):
    """All tokens stay, and a bias of minus infinity hides pruned ones, as it would on hardware with fixed shapes."""

    intercepts = True

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return num_keep >= num_reached

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        if before.keep is not None:
            return before
        return before.replace(keep=tokens.new_ones(len(tokens), before.layout.num_patches))

    def decide(self, scores: Tensor, before: Selection, num_keep: int, *, sampled: bool) -> Selection:
        keep = torch.zeros_like(scores).scatter(1, top_k(scores, before.keep, num_keep), 1.0)
        return before.replace(keep=keep, all_kept=False)

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        return tokens

    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        return tokens

    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        if selection.all_kept:
            return tokens
        if selection.hosts is not None:
            return full.with_patches(tokens, select(full.patches(tokens), selection.hosts))
        return torch.where(full.with_others(selection.keep).bool().unsqueeze(-1), tokens, everything)

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        visible = selection.visible(layouts[0])
        return None if visible is None else _MinusInfinity(visible.log()[:, None, None])

    def tail(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.all_kept else _KeptMean(selection, layouts)


class _KeptMean(Interception):
    """A mean over tokens behind the last block is one over those that are kept."""

    def __init__(self, selection: Selection, layouts: Sequence[Layout]) -> None:
        super().__init__()
        self.selection, self.layouts = selection, layouts

    def attention(self, call: AttentionCall) -> Tensor:
        return call.run()

    def other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not Tensor.mean or args[0].dim() != 3:
            return func(*args, **kwargs)
        layout = next(layout for layout in self.layouts if layout.length == args[0].shape[1])
        keep = self.selection.visible(layout).unsqueeze(-1)
        return (args[0] * keep).sum(dim=1) / keep.sum(dim=1)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(base, "_EXECUTIONS", dict(base._EXECUTIONS))
    register_execution("bias")(Bias)
    yield


CASES = [BY_NAME[name] for name in ("timm class token", "timm no class token, average", "timm registers alone, average",
                                    "transformers ViT classifier", "torchvision")]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "pruned", ["drop", "preserve", "fuse", "merge", "fuse_preserve", "merge_preserve", "merge_sizes"]
)
@torch.no_grad()
def test_the_protocol_of_proof(case: Case, pruned: str) -> None:
    model, images = case.model(), case.images()
    before, hooks = case.run(model, images), hook_counts(model)
    tokenprune.sparsify(model, STAGES, 1.0, pruned=pruned)
    model.tokenprune.execution = "bias"
    assert_close(case.run(model, images), before, IDENTITY)

    sparse = case.sparsified(pruned=pruned)
    gathered = case.run(sparse, images)
    sparse.tokenprune.execution = "bias"
    assert_close(case.run(sparse, images), gathered, MASK_EQUALS_GATHER[torch.float32])
    assert sparse.tokenprune.trace.execution == "bias" and sparse.tokenprune.trace.indices == ()
    assert max((gathered[name] - before[name]).abs().max() for name in before) > 1e-3

    tokenprune.unsparsify(model)
    assert hook_counts(model) == hooks
    assert all(torch.equal(output, before[name]) for name, output in case.run(model, images).items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_verify_compares_all_executions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.sparsified()
    report = tokenprune.verify(model, case.images())
    assert report.passed, str(report)
    monkeypatch.setattr(Bias, "attention", lambda self, selection, layouts: None)
    monkeypatch.setattr(Bias, "intercepts", False)
    report = tokenprune.verify(model, case.images())
    assert not report.passed and "executions differ" in str(report)


def test_a_block_that_is_never_intercepted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bias, "attention", lambda self, selection, layouts: None)
    case = BY_NAME["timm class token"]
    model = case.sparsified()
    model.tokenprune.execution = "bias"
    with pytest.raises(tokenprune.InterceptionError, match="never called the attention modules"):
        model(case.images())


def test_its_name_is_offered() -> None:
    model = BY_NAME["timm class token"].sparsified()
    with pytest.raises(ValueError, match="choose 'auto', 'gather', 'mask', 'varlen' or 'bias'"):
        model.tokenprune.execution = "flash"
    assert math.isclose(model.tokenprune.keep_ratio[0], 0.6)


def test_auto_takes_none_that_was_added_later() -> None:
    model: nn.Module = BY_NAME["timm class token"].sparsified()
    model(BY_NAME["timm class token"].images())
    assert model.tokenprune.trace.execution == "gather"
