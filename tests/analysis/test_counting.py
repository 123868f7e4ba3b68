"""Counting: against the papers' figures, the closed form as integers, and torch's own counter."""

from __future__ import annotations

import io
import json

import pytest
import timm
import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tests.helpers.zoo import ALL, BY_NAME, Case, every_model, hook_counts
from tokenprune.analysis.flop_counter import count


def closed_form(
    width: int,
    plan: tokenprune.Plan | None,
    *,
    patches: int = 196,
    depth: int = 12,
    classes: int = 1000,
    patch: int = 16,
    prefix: int = 1,
    mlp_ratio: int = 4,
) -> int:
    """Multiply-adds of a plain ViT, and 5 an element of what a LayerNorm takes, which fvcore counts too."""

    def block(tokens: int) -> int:
        products = tokens * width * width * (4 + 2 * mlp_ratio) + 2 * tokens * tokens * width
        return products + 2 * 5 * tokens * width

    def predictor(tokens: int) -> int:
        half, quarter = width // 2, width // 4
        return tokens * (width * width + width * half + half * quarter + quarter * 2 + 5 * width)

    total, alive = patches * width * 3 * patch * patch, patches
    for index in range(depth):
        if plan is not None and index in plan.stages:
            kept = plan.num_keep(patches)[plan.stages.index(index)]
            total += predictor(alive) if kept < alive else 0
            alive = kept
        total += block(prefix + alive)
    return total + 5 * (prefix + alive) * width + width * classes


@pytest.mark.parametrize(
    ("name", "width", "figures"),
    [
        ("deit_small_patch16_224", 384, {1.0: 4.61, 0.9: 4.04, 0.8: 3.46, 0.7: 2.98}),
        pytest.param("deit_base_patch16_224", 768, {1.0: 17.56, 0.7: 11.48}, marks=pytest.mark.slow),
        ("deit_tiny_patch16_224", 192, {1.0: 1.25, 0.7: 0.80, 0.5: 0.60}),
    ],
)
def test_published_figures_and_closed_form(name: str, width: int, figures: dict[float, float]) -> None:
    model = tokenprune.sparsify(timm.create_model(name)).eval()
    for ratio, gmacs in figures.items():
        model.tokenprune.keep_ratio = ratio
        report = tokenprune.flops(model)
        assert report.sparse_gmacs == pytest.approx(gmacs, rel=0.01)
        assert report.sparse == closed_form(width, model.tokenprune.plan)
        assert report.dense == closed_form(width, None)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
        assert report.sparse == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@every_model
def test_every_model_is_counted_as_torch_counts_it(case: Case) -> None:
    model = case.sparsified()
    report = tokenprune.flops(model, (3, *case.image_size), forward_kwargs=case.forward_arguments)
    for pruned, counted in ((True, report.sparse), (False, report.dense)):
        model.tokenprune.enabled = pruned
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(case.images(1), **case.forward_arguments)
        torch.backends.mha.set_fastpath_enabled(True)
        products = counter.get_total_flops() / 2
        # torch counts products alone; norms weigh up to a few percent in models this small. fvcore leaves out
        # what no output depends on: the pool that SigLIP's classifier computes and does not use.
        unused = 0.1 if case.name == "transformers SigLIP classifier" else 0.0
        assert products * (1 - unused) <= counted <= products * 1.08
    assert sum(report.sparse_blocks) + sum(report.stages) <= report.sparse < report.dense


def test_the_model_is_left_as_it_was() -> None:
    case = BY_NAME["torchvision"]
    model = case.sparsified().train()
    model.encoder.ln.eval()
    model.tokenprune.execution = "mask"
    tokenprune.flops(model, (3, 48, 48))
    assert model.training and not model.encoder.ln.training and model.tokenprune.execution == "mask"
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_operator_that_cannot_be_counted_is_an_error() -> None:
    class Distance(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x.flatten(1), x.flatten(1))

    with pytest.raises(tokenprune.CountingError, match=r"cannot count aten::cdist \(1 times\) in Distance"):
        count(Distance(), torch.zeros(1, 3, 8, 8))


def test_a_pass_that_fails_leaves_no_hooks() -> None:
    model = BY_NAME["timm class token"].sparsified()
    before = hook_counts(model)
    with pytest.raises(AssertionError, match="Input height"):  # timm's own
        tokenprune.flops(model, (3, 10, 10))
    assert hook_counts(model) == before


def test_attention_is_not_counted_as_nothing() -> None:
    attention = timm.layers.Attention(32, num_heads=2, qkv_bias=False)
    assert count(attention, torch.zeros(1, 10, 32))[""] == 10 * 32 * 32 * 4 + 2 * 10 * 10 * 32


def test_report_as_object_table_and_json() -> None:
    report = tokenprune.flops(BY_NAME["timm class token"].sparsified(), (3, 48, 48))
    fields = json.loads(report.to_json())
    assert fields["dense"] == report.dense and fields["ratio"] == report.dense / report.sparse
    assert (
        len(report.dense_blocks) == 6
        and report.stage_blocks == (2, 4)
        and report.sparse_blocks[0] == report.dense_blocks[0]
    )
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "stage 1, keeps 36.0%" in text and "block 5" in text and "everything else" in text
    assert str(report).endswith(f"ratio {report.ratio:.2f}")


def test_an_unsparsified_model_is_refused() -> None:
    with pytest.raises(tokenprune.StateError, match="is not sparsified"):
        tokenprune.flops(ALL[0].model())
