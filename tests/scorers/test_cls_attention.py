"""Class attention: what tokens receive in the block before a stage, seen in any model, and only while asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune
from tests.census.lookup import census_model
from tests.helpers.attention import NUM_HEADS, Recording, outputs_of
from tests.helpers.refusals import refused
from tests.helpers.zoo import BY_NAME, KEEP_RATIO, NUM_PATCHES, STAGES, Case, hook_counts, models
from tokenprune.analysis.verification import named_outputs
from tokenprune.pruning.attention_recorder import AttentionRecorder, received_attention
from tokenprune.scorers import ClassAttention


def written_out(attention: nn.Module, qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d) of a timm attention module, (B, H, L, L), from what its qkv layer gave."""
    query, key, _ = qkv.unflatten(2, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return query @ key.transpose(2, 3) / query.shape[-1] ** 0.5


@pytest.mark.parametrize("execution", ["gather", "mask"])
@models(
    "timm class token",
    "timm distilled",
    "timm registers, layer scale, q/k norm, no class position",
    "timm registers alone, average",
    "timm no class token, average",
)
@torch.no_grad()
def test_scores_are_the_written_out_softmax(case: Case, execution: str) -> None:
    model, images, prefix = case.model(), case.images(), case.num_prefix_tokens
    tokenprune.sparsify(model, STAGES, KEEP_RATIO, scorer=lambda context: Recording())
    model.tokenprune.execution = execution
    for stage, start in enumerate(STAGES):
        attention = model.blocks[start - 1].attn
        with outputs_of(attention.qkv) as seen:
            model(images)
        given = model.tokenprune.stages[stage].scorer.seen
        products = written_out(attention, seen[0])  # (B, H, L, L)
        queries = torch.ones(products.shape[0], products.shape[-1])
        if given.keep is not None:  # of what is masked nothing is seen
            queries[:, prefix:] = given.keep
            products = products.masked_fill(queries[:, None, None] == 0, -torch.inf)
        weights = products.softmax(-1).mean(dim=1)  # (B, L, L)
        if model.cls_token is not None:
            expected = weights[:, 0]
        else:
            expected = (weights * queries[:, :, None]).sum(dim=1) / queries.sum(dim=1, keepdim=True)
        torch.testing.assert_close(given.attention, expected[:, prefix:], rtol=1e-5, atol=1e-7)
        assert given.attention.std() > 1e-4
        if stage == 1:
            left = model.tokenprune.plan.num_keep(NUM_PATCHES)[0]
            assert (given.attention > 0).sum(dim=1).tolist() == [left] * len(images)


@pytest.mark.parametrize("name", ["ViTModel", "DINOv3ViTModel", "Dinov2WithRegistersModel", "BlipVisionModel"])
@torch.no_grad()
def test_scores_are_the_weights_that_transformers_itself_puts_out(name: str) -> None:
    model, inputs = census_model(name)
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    weights = dense(**inputs, output_attentions=True).attentions[0].mean(dim=1)  # (B, L, L), rotary positions and all
    tokenprune.sparsify(model, (1,), KEEP_RATIO, scorer=lambda context: Recording())
    model(**inputs)
    prefix = model.tokenprune.backbone.num_prefix_tokens
    assert prefix >= 1 and model.tokenprune.backbone.class_token
    given = model.tokenprune.stages[0].scorer.seen.attention
    torch.testing.assert_close(given, weights[:, 0, prefix:], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_scores_are_the_weights_that_multi_head_attention_itself_puts_out() -> None:
    case = BY_NAME["torchvision"]
    model, images = case.model(), case.images()
    tokenprune.sparsify(model, STAGES, KEEP_RATIO, scorer=lambda context: Recording())
    layer = model.encoder.layers[STAGES[0] - 1]
    with outputs_of(layer.ln_1) as seen:
        model(images)
    _, weights = copy.deepcopy(layer.self_attention)(*seen * 3, need_weights=True)
    given = model.tokenprune.stages[0].scorer.seen.attention
    torch.testing.assert_close(given, weights[:, 0, 1:], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_bias_and_rotary_positions_count() -> None:
    for name in ("beit_base_patch16_224", "vit_small_patch16_dinov3"):  # a bias over pairs; positions and registers
        model, inputs = census_model(name)
        dense = copy.deepcopy(model)
        tokenprune.sparsify(model, (1,), KEEP_RATIO, scorer=lambda context: Recording())
        model(**inputs)
        for block in dense.blocks:
            block.attn.fused_attn = False
        weights: list[Tensor] = []
        dense.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda module, args, to=weights: to.append(args[0]))
        dense(**inputs)
        prefix = model.tokenprune.backbone.num_prefix_tokens
        given = model.tokenprune.stages[0].scorer.seen.attention
        torch.testing.assert_close(given, weights[0].mean(dim=1)[:, 0, prefix:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "vit_medium_patch16_reg4_gap_256",  # registers alone
        "vit_small_patch16_dinov3",  # RoPE, class token and registers
        "beit_base_patch16_224",
        "vit_relpos_base_patch16_cls_224",
        "volo_d1_224",
        "DINOv3ViTModel",
        "SiglipVisionModel",
        "Dinov2WithRegistersForImageClassification",
        "BlipVisionModel",  # attention written out
        "PixtralVisionModel",  # all images in one sequence
        "YolosForObjectDetection",  # tokens put back
    ],
)
def test_mask_equals_gather(name: str) -> None:
    model, inputs = census_model(name)
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, scorer="cls_attention")
    assert tokenprune.verify(model, inputs, tolerance=2e-5).passed
    with torch.no_grad():
        gathered, kept = named_outputs(model(**inputs)), model.tokenprune.trace.keep
        model.tokenprune.execution = "mask"
        masked = named_outputs(model(**inputs))
    assert all(torch.equal(one, other) for one, other in zip(kept, model.tokenprune.trace.keep, strict=True))
    compared = [key for key in gathered if gathered[key].shape == masked[key].shape]
    for key in compared:
        scale = float(gathered[key].abs().max())
        torch.testing.assert_close(masked[key], gathered[key], rtol=0, atol=2e-5 * scale)
    assert compared or name in ("SiglipVisionModel", "DINOv3ViTModel", "PixtralVisionModel")


def test_the_class_token_is_told_from_registers() -> None:
    expected = {
        "vit_medium_patch16_reg4_gap_256": (4, False),
        "vit_small_patch16_dinov3": (5, True),
        "vit_base_patch16_224": (1, True),
        "RadioModel": (10, True),
        "CLIPVisionModel": (1, True),
    }
    for name, (prefix, class_token) in expected.items():
        backbone = tokenprune.sparsify(census_model(name)[0], (1,), 0.5).tokenprune.backbone
        assert (backbone.num_prefix_tokens, backbone.class_token) == (prefix, class_token), name


@torch.no_grad()
def test_what_all_tokens_pay_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune import functional

    query, key = torch.randn(3, 4, 7, 8), torch.randn(3, 4, 7, 8)
    keep, bias = (torch.rand(3, 7) > 0.4).float(), torch.randn(1, 4, 7, 7)
    keep[:, 0] = 1
    whole = received_attention(query, key, keep=keep, bias=bias)
    scores = (query @ key.transpose(2, 3) / 8**0.5 + bias).masked_fill(keep[:, None, None] == 0, -torch.inf)
    expected = (scores.softmax(-1) * keep[:, None, :, None]).sum(dim=2).mean(dim=1) / keep.sum(dim=1, keepdim=True)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(whole.sum(dim=1), torch.ones(3))
    for budget in (49, 49 * 3, 49 * 8):  # a head, three heads of four, and two images at a time
        monkeypatch.setattr(functional, "_CPU_BLOCK", budget)
        torch.testing.assert_close(received_attention(query, key, keep=keep, bias=bias), whole)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result


@torch.no_grad()
def test_the_class_tokens_row_is_all_that_is_computed() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified(scorer="cls_attention")
    with Shapes() as noted:
        model(case.images())
    assert (3, NUM_HEADS, 1, NUM_PATCHES + 1) in noted.shapes
    assert not [shape for shape in noted.shapes if shape[-2:] == (NUM_PATCHES + 1, NUM_PATCHES + 1)]


@pytest.mark.parametrize("name", ["timm class token", "torchvision"])
@torch.no_grad()
def test_attention_is_looked_at_only_where_and_while_a_scorer_asks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]
    started: list[int] = []
    enter = AttentionRecorder.enter
    monkeypatch.setattr(AttentionRecorder, "enter", lambda self: (started.append(1), enter(self)))
    images = case.images()
    plain, model = case.sparsified(), case.sparsified(scorer="cls_attention")
    plain(images)
    assert not started
    # Two, one of them always called, and so a forward of its own.
    assert sum(hook_counts(model)) - sum(hook_counts(plain)) == 4
    model(images)
    assert len(started) == len(STAGES)
    for run in (lambda: model(images), lambda: tokenprune.dense(model).__enter__()):
        started.clear()
        model.tokenprune.keep_ratio = 1.0
        run()
        assert not started
    model.tokenprune.keep_ratio = (1.0, 0.5)
    model.tokenprune.enabled = True
    model(images)
    assert len(started) == 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stages": (0, 3)}, tokenprune.PlanError, "there is none before block 0; move the stage, or take another"),
        (
            {"stages": (1,), "name": "cait_s24_224"},
            tokenprune.UnsupportedModelError,
            "mixes the weights over",
        ),
    ],
    ids=["no block before", "talking heads"],
)
def test_what_cannot_be_told_is_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    name = options.pop("name", None)
    model = BY_NAME["timm class token"].model() if name is None else census_model(name)[0]
    refused(model, error, match, scorer="cls_attention", **options)


@pytest.mark.parametrize("name", ["timm differential attention", "timm differential parallel blocks"])
def test_attention_that_is_put_together_of_several_is_refused(name: str) -> None:
    case = BY_NAME[name]
    model = case.sparsified(scorer="cls_attention")
    with pytest.raises(tokenprune.InterceptionError, match="passed 2 times, and not once"):
        model(case.images())


class Odd(nn.Module):
    """Attention over windows of tokens, or of another kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "windows":
            x = x.unflatten(1, (4, 9)).flatten(0, 1)
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.kind == "linear":
            mixed = query.sigmoid() @ (key.sigmoid().transpose(2, 3) @ value)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.kind == "causal")
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed.unflatten(0, (-1, 4)).flatten(1, 2) if self.kind == "windows" else mixed


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("windows", r"attention of shape \(12, 2, 9, 9\).* is not one over all tokens of an image, of which 36 are"),
        ("linear", "passed 0 times, and not once"),
        ("causal", "is not one over all tokens"),
    ],
)
def test_attention_of_another_kind_in_the_block_before_is_refused(kind: str, match: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.blocks = nn.Sequential(Odd("global"), Odd(kind), Odd("global"), Odd("global"))

        def forward(self, images: Tensor) -> Tensor:
            return self.blocks(self.embed(images).flatten(2).transpose(1, 2)).mean(dim=1)

    model, images = Model().eval(), torch.randn(3, 3, 48, 48)
    backbone = tokenprune.Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=16)
    tokenprune.sparsify(model, (2,), 0.5, scorer="cls_attention", backbone=backbone)
    with pytest.raises(tokenprune.InterceptionError, match=match):
        model(images)
    tokenprune.unsparsify(model)
    tokenprune.sparsify(model, (3,), 0.5, scorer="cls_attention", backbone=backbone)
    assert tokenprune.verify(model, images).passed  # the block before is one that can be looked at
    assert torch._C._len_torch_function_stack() == 0


def test_a_scorer_that_is_put_there_later_is_found_out() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified()
    model.tokenprune.stages[0].scorer = ClassAttention()
    with pytest.raises(tokenprune.StateError, match=r"needs attention scores.*pass it as tokenprune\.sparsify"):
        model(case.images())


def test_an_interrupted_pass_is_forgotten() -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(scorer=lambda context: Recording()), case.images()
    with torch.no_grad():
        expected = model.forward_features(images)

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[STAGES[0] - 1].mlp.register_forward_pre_hook(interrupt)  # behind attention
    with pytest.raises(KeyboardInterrupt):
        model(images + 1)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), expected)
