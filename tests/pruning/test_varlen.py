"""Variable length: one sequence for all images says what a rectangle says, and what each image alone says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.census.transformers import supported
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import VARLEN
from tests.helpers.zoo import ALL, BY_NAME, ONE_OF_EACH_KIND, Case, models, some_models
from tokenprune import Backbone, Candidates, InterceptionError, Scorer, ScorerContext, StateError, UnsupportedModelError
from tokenprune.backbones.interception import AttentionCall, Interception
from tokenprune.pruning.budget import Threshold
from tokenprune.pruning.executions import packed_attention
from tokenprune.pruning.packing import Packing
from tokenprune.pruning.trace import Trace

every_reduction = pytest.mark.parametrize(
    "pruned", ["drop", "fuse", "merge", "preserve", "fuse_preserve", "merge_preserve"]
)


class Bright(Scorer):
    """Scores that depend on a token, and more on its image: some images keep all that others lose."""

    def forward(self, candidates: Candidates) -> Tensor:
        patches = candidates.patches
        image = (
            torch.sin(50 * candidates.prefix.mean(dim=(1, 2))) if candidates.prefix.shape[1] else 0 * patches[:, 0, 0]
        )
        return torch.sin(40 * patches.mean(dim=2)) + image.unsqueeze(1)


def bright(context: ScorerContext) -> Bright:
    return Bright()


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has stages keep what has a higher score, and two tokens of each image at least; given nothing, as many of all."""

    def give(*scores: float) -> None:
        found = [Threshold(score, 2) for score in scores] or [None, None]
        monkeypatch.setattr(Trace, "threshold", lambda self, stage, num_keep: found[stage])

    return give


def middles(model: nn.Module, case: Case, images: Tensor) -> list[float]:
    """For each stage the median of its scores, had all images kept as many."""
    case.run(model, images)
    return [float(scores.nanmedian()) for scores in model.tokenprune.trace.scores]


def counts(model: nn.Module) -> list[list[int]]:
    return [[len(indices) for indices in stage] for stage in model.tokenprune.trace.indices]


def alone(
    case: Case, model: nn.Module, images: Tensor, kept: list[list[int]], thresholds: Callable[..., None]
) -> dict[str, Tensor]:
    """Each image by itself, as a rectangle in which it keeps as many tokens as it kept among the others."""
    thresholds()
    outputs = []
    for index, numbers in enumerate(zip(*kept, strict=True)):
        model.tokenprune.keep_ratio = [number / case.num_patches for number in numbers]
        with model.tokenprune.executing("gather"):
            outputs.append(case.run(model, images[index : index + 1]))
        assert counts(model) == [[number] for number in numbers]
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


# Double precision tells a wrong token from rounding; single precision is for one model of each kind, and for slow runs.
every_model_and_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}", marks=() if often else pytest.mark.slow)
        for case in ALL
        for dtype in VARLEN
        for often in [dtype == torch.float64 or case.name in ONE_OF_EACH_KIND]
    ],
)


@every_model_and_dtype
@torch.no_grad()
def test_equal_numbers_are_those_of_gather(case: Case, dtype: torch.dtype) -> None:
    model, images = case.sparsified(dtype), case.images(4, dtype)
    gathered, trace = case.run(model, images), model.tokenprune.trace
    model.tokenprune.execution = "varlen"
    assert_close(case.run(model, images), gathered, VARLEN[dtype])
    ours = model.tokenprune.trace
    assert all(torch.equal(one, other) for one, other in zip(ours.indices, trace.indices, strict=True))
    assert all(selection.packing is not None for selection in ours.selections)


@every_model_and_dtype
@torch.no_grad()
def test_each_image_is_as_it_is_alone(case: Case, dtype: torch.dtype, thresholds: Callable[..., None]) -> None:
    model, images = case.sparsified(dtype, scorer=bright), case.images(4, dtype)
    thresholds(*(middle + 0.1 for middle in middles(model, case, images)))
    model.tokenprune.execution = "varlen"
    together, kept = case.run(model, images), counts(model)
    assert len({*kept[0]}) > 1 and kept[0] != kept[1]
    with model.tokenprune.executing("mask"):
        assert_close(case.run(model, images), together, VARLEN[dtype])
    assert_close(alone(case, model, images, kept, thresholds), together, VARLEN[dtype])


@some_models
@every_reduction
@pytest.mark.parametrize("scorer", [pytest.param("predictor", marks=pytest.mark.slow), "cls_attention", bright])
@torch.no_grad()
def test_every_reduction(case: Case, pruned: str, scorer: Any, thresholds: Callable[..., None]) -> None:
    model, images = case.sparsified(torch.float64, pruned=pruned, scorer=scorer), case.images(4, torch.float64)
    gathered = case.run(model, images)
    model.tokenprune.execution = "varlen"
    assert_close(case.run(model, images), gathered, VARLEN[torch.float64])
    thresholds(*middles(model, case, images))
    together, kept = case.run(model, images), counts(model)
    assert len({*kept[0]}) > 1
    with model.tokenprune.executing("mask"):
        assert_close(case.run(model, images), together, VARLEN[torch.float64])
    if "fuse" not in pruned or all(
        first < case.num_patches and second < first for first, second in zip(*kept, strict=True)
    ):
        assert_close(alone(case, model, images, kept, thresholds), together, VARLEN[torch.float64])


@models(*ONE_OF_EACH_KIND)
@torch.no_grad()
def test_an_image_that_prunes_nothing_has_no_summary(case: Case, thresholds: Callable[..., None]) -> None:
    """Its row is a token shorter, and it is as if it had been dropped from."""

    class First(Scorer):
        def forward(self, candidates: Candidates) -> Tensor:
            scores = torch.sin(40 * candidates.patches.mean(dim=2))
            return scores + 9 * (torch.arange(len(scores)) == 0).to(scores.dtype)[:, None]

    images = case.images(3, torch.float64)
    fused = case.sparsified(torch.float64, pruned="fuse", scorer=lambda context: First())
    dropped = case.sparsified(torch.float64, scorer=lambda context: First())
    thresholds(0.0, 0.3)
    fused.tokenprune.execution = dropped.tokenprune.execution = "varlen"
    outputs, others = case.run(fused, images), case.run(dropped, images)
    assert [stage[0] for stage in counts(fused)] == [case.num_patches] * 2
    assert_close(
        {name: one[:1] for name, one in outputs.items()}, {name: one[:1] for name, one in others.items()}, 1e-9
    )
    assert max((outputs[name] - others[name]).abs().max() for name in outputs) > 1e-3
    with fused.tokenprune.executing("mask"):
        assert_close(case.run(fused, images), outputs, VARLEN[torch.float64])


@models(*ONE_OF_EACH_KIND)
@torch.no_grad()
def test_blocks_run_on_one_sequence_and_attention_on_no_more_than_an_image(
    case: Case, thresholds: Callable[..., None]
) -> None:
    class Seen(Interception):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[tuple[int, int, int]] = []

        def attention(self, call: AttentionCall) -> Tensor:
            self.shapes.append((len(call.query), call.query.shape[2], call.key.shape[2]))
            return call.run()

    model, images = case.sparsified(scorer=bright), case.images(6)
    thresholds(*middles(model, case, images))
    model.tokenprune.execution = "varlen"
    blocks, tokens = model.tokenprune.backbone.blocks, []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: tokens.append(tuple(args[0].shape)))
    with Seen() as seen:
        case.run(model, images)
    prefix, kept = case.num_prefix_tokens, counts(model)
    totals = [sum(prefix + number for number in numbers) for numbers in kept]
    width, whole = model.tokenprune.backbone.embed_dim, prefix + case.num_patches
    assert tokens == [(6, whole, width)] * 2 + [(1, totals[0], width)] * 2 + [(1, totals[1], width)] * 2
    for stage, numbers in enumerate(kept):
        lengths = sorted({prefix + number for number in numbers}, reverse=True)
        expected = [(numbers.count(length - prefix), length, length) for length in lengths]
        start = 2 + 2 * sum(len({*others}) for others in kept[:stage])
        assert seen.shapes[start : start + 2 * len(lengths)] == expected * 2


def _rotary() -> list[Any]:
    wanted = ("DINOv3ViTModel", "BeitModel", "MLCDVisionModel", "VJEPA2Model", "Llama4VisionModel")
    entries = {entry.name: entry for entry in supported() if entry.name in wanted}
    return [pytest.param(entry, id=name) for name, entry in entries.items()]


@pytest.mark.parametrize("entry", _rotary())
@torch.no_grad()
def test_what_belongs_to_a_token_goes_with_it(entry: Any, thresholds: Callable[..., None]) -> None:
    """Rotary tables, with an entry for prefix tokens and without, biases, and positions."""
    model, arguments = entry.model(double=True), entry.arguments(double=True)
    tokenprune.sparsify(model, entry.stages, entry.keep_ratio, scorer=bright)
    gathered = model(**arguments).last_hidden_state
    thresholds(*(float(scores.nanmedian()) for scores in model.tokenprune.trace.scores))
    model.tokenprune.execution = "varlen"
    together = model(**arguments).last_hidden_state
    (*_, kept), prefix = counts(model), model.tokenprune.backbone.num_prefix_tokens
    assert gathered.shape[0] == len({*kept}) or len({*kept}) > 1
    model.tokenprune.execution = "mask"
    masked, indices = model(**arguments).last_hidden_state, model.tokenprune.trace.keep[-1]
    restored = model.tokenprune.restores
    for image, number in enumerate(kept):
        rows = (
            torch.arange(masked.shape[1])
            if restored
            else torch.cat([torch.arange(prefix), prefix + indices[image].nonzero().squeeze(1)])
        )
        ours = together[image] if restored else together[image, : prefix + number]
        assert torch.allclose(ours, masked[image, rows], rtol=0, atol=VARLEN[torch.float64] * float(masked.abs().max()))


@torch.no_grad()
def test_eva_with_rotary_tables_for_patches_alone(thresholds: Callable[..., None]) -> None:
    torch.manual_seed(0)
    model = (
        timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=4, embed_dim=48, num_heads=2, num_classes=5)
        .double()
        .eval()
    )
    case = Case("EVA-02", lambda: model, 1, image_size=(56, 56))
    images = case.images(4, torch.float64)
    tokenprune.sparsify(model, (1, 2), 0.6, scorer=bright)
    gathered = case.run(model, images)
    model.tokenprune.execution = "varlen"
    assert_close(case.run(model, images), gathered, VARLEN[torch.float64])
    thresholds(*middles(model, case, images))
    together = case.run(model, images)
    assert len({*counts(model)[0]}) > 1
    with model.tokenprune.executing("mask"):
        assert_close(case.run(model, images), together, VARLEN[torch.float64])


# The kernel for sequences of all lengths, which is for CUDA alone


def _reference(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, other: Tensor, longest: int, most: int,
               scale: float | None = None) -> Tensor:  # fmt: skip
    assert edges.dtype == torch.int32 and longest == most == int(edges.diff().max()) and edges is other
    results = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[start:end].transpose(0, 1) for tensor in (query, key, value)), scale=scale
        ).transpose(0, 1)
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return torch.cat(results)


def _call(dtype: torch.dtype = torch.bfloat16, width: int = 16, **options: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, width, generator=generator).to(dtype) for _ in range(3))
    return AttentionCall(query, key, value, **options)


PACKED = Packing.of(torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "fused_kernel", lambda: _reference)
    monkeypatch.setattr(packed_attention, "_on_such_a_gpu", lambda query: True)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_kernel_gives_what_the_parts_give(scale: float | None, kernel: None) -> None:
    call = _call(scale=scale)
    assert packed_attention.takes(call, PACKED)
    parts = PACKED.join([part.run() for part in packed_attention.split(call, PACKED)])
    # In half precision, and older releases of torch round in another order.
    assert torch.allclose(packed_attention.by_kernel(call, PACKED), parts, atol=1e-2)
    shared = call._replace(key=call.key[:, :1], value=call.value[:, :1], enable_gqa=True)
    parts = PACKED.join([part.run() for part in packed_attention.split(shared, PACKED)])
    assert torch.allclose(packed_attention.by_kernel(shared, PACKED), parts, atol=1e-2)


def test_the_kernel_is_asked_for_nothing_that_it_cannot(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    takes = packed_attention.takes
    assert takes(_call(torch.float16), PACKED)
    assert not takes(_call(torch.float32), PACKED)
    assert not takes(_call(width=12), PACKED) and not takes(_call(width=264), PACKED)
    assert not takes(_call(dropout_p=0.1), PACKED) and not takes(_call(attn_mask=torch.zeros(12)), PACKED)
    assert not takes(_call(), Packing.of_equal(3, 4)), "a rectangle is as fast by the plain call"
    monkeypatch.setattr(packed_attention, "fused_kernel", lambda: lambda q, k, v, edges, other, longest, most: q)
    assert takes(_call(scale=0.25), PACKED) and not takes(_call(scale=0.3), PACKED), "an old one knows no scale"
    monkeypatch.setattr(packed_attention, "fused_kernel", lambda: None)
    assert not takes(_call(), PACKED)


def test_without_a_gpu_no_kernel_is_asked() -> None:
    assert not packed_attention.takes(_call(), PACKED)


@torch.no_grad()
def test_a_model_by_the_kernel(kernel: None, thresholds: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(torch.bfloat16, scorer=bright), case.images(4, torch.bfloat16)
    thresholds(0.0, 0.0)
    model.tokenprune.execution = "varlen"
    fast = case.run(model, images)
    assert len({*counts(model)[0]}) > 1
    monkeypatch.setattr(packed_attention, "fused_kernel", lambda: None)
    assert_close(case.run(model, images), fast, 2e-2)


# What is refused


def test_models_that_cannot_are_refused_when_it_is_set() -> None:
    model = timm.create_model("cait_xxs24_224", img_size=32, depth=4, embed_dim=32, num_heads=2)
    tokenprune.sparsify(model, (1, 2))
    with pytest.raises(
        UnsupportedModelError, match=r"cannot run in 'varlen' execution: .*attention mixes finished weights"
    ):
        model.tokenprune.execution = "varlen"
    assert model.tokenprune.execution == "auto"
    model.eval()(torch.randn(2, 3, 32, 32))


class _WrittenOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.transpose(1, 2)).softmax(dim=-1)
        return x + weights @ x


class _Grouped(nn.Module):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        heads = x.unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).squeeze(1) + condition


class _Own(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.conditioned = block is _Grouped
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.new_ones(len(x), 1, x.shape[2])) if self.conditioned else block(x)
        return x.mean(dim=1)


@pytest.mark.parametrize(
    ("block", "error", "words"),
    [
        (_WrittenOut, InterceptionError, "attention is written out, with a softmax over the 27 tokens of all images"),
        (_Grouped, StateError, r"given 'condition', of shape \(3, 1, 8\), with an entry for each image"),
    ],
)
def test_models_of_ones_own_that_cannot_are_refused_when_they_run(
    block: type[nn.Module], error: type[Exception], words: str
) -> None:
    model = _Own(block)
    backbone = Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=8)
    tokenprune.sparsify(model, (1, 2), (0.6, 0.6), backbone=backbone).eval()
    model.tokenprune.execution = "varlen"
    with pytest.raises(error, match=words):
        model(torch.randn(3, 16, 8))
    model(torch.randn(1, 16, 8))  # a single image is a sequence like any other
    model.tokenprune.execution = "gather"
    model(torch.randn(3, 16, 8))


def test_it_trains_a_backbone_as_gather_does() -> None:
    case = BY_NAME["timm class token"]
    gradients = []
    for execution in ("gather", "varlen"):
        model = case.sparsified(torch.float64)
        model.tokenprune.execution = execution
        sum(output.square().sum() for output in case.run(model, case.images(3, torch.float64)).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if not n.startswith("tokenprune.")})
    assert_close(gradients[1], gradients[0], VARLEN[torch.float64])


@pytest.mark.slow
@models("timm class token", "transformers ViT classifier", "torchvision")
@torch.no_grad()
def test_equal_numbers_compile_without_a_break(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    model.tokenprune.execution = "varlen"
    expected = case.run(model, images)
    torch.compiler.reset()
    assert_close(case.run(torch.compile(model, backend="eager", fullgraph=True), images), expected, 1e-5)


def test_hidden_states_have_a_row_for_each_image() -> None:
    case = BY_NAME["transformers ViT classifier"]
    model, images = case.sparsified(), case.images()
    with torch.no_grad():
        gathered = model(images, output_hidden_states=True).hidden_states
        model.tokenprune.execution = "varlen"
        ours = model(images, output_hidden_states=True).hidden_states
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, gathered, strict=True))
