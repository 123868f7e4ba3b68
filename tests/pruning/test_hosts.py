"""What users do with a model besides calling it, done to sparsified ones."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import tokenprune
from tests.helpers.gradients import assert_same_gradients, enable_checkpointing, gradients, loss_of
from tests.helpers.zoo import BY_NAME, KEEP_RATIO, STAGES, Case, compiled_models, some_models

timm_and_transformers = pytest.mark.parametrize(
    "case",
    [BY_NAME["timm class token"], BY_NAME["transformers ViT classifier"], BY_NAME["transformers SigLIP"]],
    ids=str,
)


@some_models
def test_exponential_moving_average(case: Case) -> None:
    model, images = case.sparsified().train(), case.images()
    loss_of(case, model, images).backward()
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model)
    name, parameter = next(iter(average.module.tokenprune.named_parameters()))
    halfway = dict(model.tokenprune.named_parameters())[name] - 0.5
    torch.testing.assert_close(parameter, halfway)
    assert average.module.tokenprune.stages[0] is not model.tokenprune.stages[0]


@some_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    model, images = case.sparsified(scorer="static"), case.images()  # whose scores no rounding moves
    with torch.no_grad():
        expected = case.run(model, images)
        for execution in ("gather", "mask"):
            model.tokenprune.execution = execution
            with torch.autocast("cpu", dtype):
                for name, output in case.run(model, images).items():
                    # Six blocks in bfloat16, with 8 bits of mantissa: 2^-8 an operation, some tens of them.
                    error = (output.float() - expected[name]).abs().max() / expected[name].abs().max()
                    assert output.isfinite().all() and error < 0.05, name
    model = case.sparsified().train()
    with torch.autocast("cpu", dtype):
        loss = loss_of(case, model, images)
    loss.backward()
    assert all(keep.dtype == torch.float32 for keep in model.tokenprune.trace.keep)
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@some_models
def test_half_precision_weights(case: Case) -> None:
    model, images = case.sparsified().to(torch.bfloat16).train(), case.images(dtype=torch.bfloat16)
    loss_of(case, model, images).backward()
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@some_models
@torch.no_grad()
def test_channels_last(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    expected = case.run(model, images)
    actual = case.run(model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


@timm_and_transformers
def test_activation_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model, images = case.sparsified().train(), case.images()
    expected = gradients(case, model, images)
    enable_checkpointing(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_gradients(gradients(case, model, images), expected, 1e-5)


@timm_and_transformers
def test_checkpointing_survives_a_second_forward_pass_before_the_backward(case: Case) -> None:
    model, images = case.sparsified().train(), case.images()
    enable_checkpointing(model)
    expected = gradients(case, model, images)
    torch.manual_seed(3)
    model.zero_grad()
    first = loss_of(case, model, images)
    loss_of(case, model, images.flip(0) + 1)  # other decisions, now the model's latest
    first.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(actual, expected, 1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    case = BY_NAME["transformers ViT classifier"]
    model = case.sparsified().train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(tokenprune.StateError, match="use_reentrant=False"):
        loss_of(case, model, case.images().requires_grad_())


@compiled_models
def test_compile_in_eval(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = case.run(compiled, images)  # the model's first pass
        expected = case.run(model, images)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            case.run(compiled, images)
        assert [len(kept[0]) for kept in model.tokenprune.trace.indices] == [21, 12]


@compiled_models
def test_compile_in_training(case: Case) -> None:
    # In double precision, since compiled code runs on whole sequences, and sums run over other lengths.
    model, images = case.sparsified().double().train(), case.images().double()
    if torch.__version__ < "2.15" and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        pytest.skip("earlier compilers cannot trace nn.MultiheadAttention inside a function mode")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = gradients(case, compiled, images)
    assert model.tokenprune.trace.keep[0].requires_grad
    expected = gradients(case, model, images)
    # The same random numbers, since aot_eager draws them as eager does.
    assert_same_gradients({name.removeprefix("_orig_mod."): grad for name, grad in actual.items()}, expected, 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(case, compiled, images)


@compiled_models
@pytest.mark.parametrize("part", ["block", "attention"])
def test_blocks_and_attention_compiled_one_by_one(case: Case, part: str) -> None:
    # All blocks have one source of a forward, whose code must not be taken from one without hooks for one with them.
    model, images = case.sparsified().double(), case.images().double()
    if torch.__version__ < "2.15" and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        pytest.skip("earlier compilers cannot trace nn.MultiheadAttention inside a function mode")
    compiled = copy.deepcopy(model)
    torch.compiler.reset()
    for index, block in enumerate(compiled.tokenprune.backbone.blocks):
        for module in [block] if part == "block" else compiled.tokenprune.backbone.attention_modules(index):
            module.compile(backend="aot_eager")
    assert_same_gradients(gradients(case, compiled.train(), images), gradients(case, model.train(), images), 1e-6)
    model.eval()
    for step in (nn.Module.eval, tokenprune.freeze, tokenprune.unfreeze):
        step(compiled)
        with torch.no_grad():
            expected, actual = case.run(model, images), case.run(compiled, images)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6)


@compiled_models
def test_what_was_compiled_of_a_dense_model_is_not_taken_for_a_sparse_one(case: Case) -> None:
    # torch.compile shares what it made among models of a class, and by default does not look at their hooks.
    dense, sparse, images = case.model(), case.sparsified(), case.images()
    torch.compiler.reset()
    compiled_dense = torch.compile(dense, backend="eager")
    compiled_sparse = torch.compile(sparse, backend="eager")

    def differ(one: nn.Module, other: nn.Module) -> bool:
        actual, expected = case.run(one, images), case.run(other, images)
        return any((actual[name] - expected[name]).abs().max() > 1e-4 for name in expected)

    with torch.no_grad():
        assert not differ(compiled_dense, dense) and not differ(compiled_sparse, sparse)
        assert sparse.tokenprune.trace is not None and differ(sparse, dense)
        # The same holds for a model that is sparsified after it has been compiled, and for one that is given back.
        tokenprune.sparsify(dense, (1, 3), 0.5)
        assert not differ(compiled_dense, dense) and dense.tokenprune.trace is not None
        tokenprune.unsparsify(dense)
        assert not differ(compiled_dense, dense)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_compile_with_inductor(training: bool) -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified().train(training), case.images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    if training:
        grads = gradients(case, compiled, images)
        assert all(grad.isfinite().all() for grad in grads.values())
        assert all(grads[name].abs().max() > 0 for name in grads if "tokenprune" in name)
    else:
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)


@some_models
def test_export(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    with torch.no_grad():
        expected = case.run(model, images)
    program = torch.export.export(
        model, (images,), kwargs=case.forward_arguments, dynamic_shapes={**_dynamic_batch(model, case)}, strict=False
    )
    exported = program.module()
    with torch.no_grad():
        for batch in (3, 5):
            images = case.images(batch)
            expected, actual = case.run(model, images), case.run(exported, images)
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


def _dynamic_batch(model: nn.Module, case: Case) -> dict[str, object]:
    name = next(iter(inspect.signature(model.forward).parameters))
    return {name: {0: torch.export.Dim("batch", min=2, max=64)}}


@some_models
def test_keep_ratio_and_execution_at_run_time(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    sparsifier = model.tokenprune
    with torch.no_grad():
        sparsifier.keep_ratio = (0.5, 0.5)
        case.run(model, images)
        assert [kept.shape[1] for kept in sparsifier.trace.indices] == [18, 18]
        sparsifier.execution = "mask"
        case.run(model, images)
        assert [keep.sum(dim=1).tolist() for keep in sparsifier.trace.keep] == [[18.0] * 3] * 2
        sparsifier.execution = "gather"
        model.train()
        case.run(model, images)
        assert sparsifier.trace.execution == "gather"
    with pytest.raises(tokenprune.PlanError, match="rise"):
        sparsifier.keep_ratio = (0.2, 0.5)
    assert sparsifier.keep_ratio == (0.5, 0.5)
    with pytest.raises(ValueError, match="execution='fast'"):
        sparsifier.execution = "fast"


@pytest.mark.parametrize("name", ["timm class token", "timm parallel things blocks", "transformers ViT classifier"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "three dimensions"])
def test_attention_masks_of_the_caller_are_respected(name: str, kind: str) -> None:
    case = BY_NAME[name]
    model, images = case.sparsified(), case.images()
    length = case.num_patches + 1
    if name.startswith("timm"):
        mask = torch.rand(length, length) > 0.3
        mask.fill_diagonal_(True)
        additive = torch.randn(3, 1, length, length)
        options = {"attn_mask": {"boolean": mask, "additive": additive, "three dimensions": additive[0]}[kind]}
    else:
        if "attention_mask" not in inspect.signature(model.vit.forward).parameters:
            pytest.skip("this version of transformers takes no attention mask in vision models")
        mask = torch.rand(3, length) > 0.3
        mask[:, 0] = True
        options = {"attention_mask": mask if kind == "boolean" else mask.long()}
    run = Case(name, case.build, 1, forward_arguments=options).run
    with torch.no_grad():
        unmasked, gathered = case.run(model, images), run(model, images)
        model.tokenprune.execution = "mask"
        masked = run(model, images)
    for key in gathered:
        torch.testing.assert_close(masked[key], gathered[key], rtol=0, atol=1e-4)
        assert (gathered[key] - unmasked[key]).abs().max() > 1e-3
    model.train().tokenprune.execution = "auto"
    sum(output.square().mean() for output in run(model, images).values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.tokenprune.parameters())


def test_patch_dropout_changes_the_count_from_call_to_call() -> None:
    from timm.models import VisionTransformer

    model = VisionTransformer(img_size=48, patch_size=8, embed_dim=32, depth=6, num_heads=2, patch_drop_rate=0.25)
    tokenprune.sparsify(model, STAGES, KEEP_RATIO).train()
    model(torch.randn(2, 3, 48, 48)).sum().backward()
    assert model.tokenprune.trace.num_patches == 27 and model.tokenprune.trace.grid is None
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 48))
    assert model.tokenprune.trace.num_patches == 36 and model.tokenprune.trace.grid == (6, 6)


def test_no_memory_is_kept_by_hooks_of_a_dead_model() -> None:
    import gc
    import weakref

    case = BY_NAME["timm class token"]
    model = case.sparsified().train()
    loss_of(case, model, case.images()).backward()
    alive = weakref.ref(model.tokenprune)
    del model
    gc.collect()
    assert alive() is None


def test_an_interrupted_pass_leaves_no_mode_behind_after_the_next() -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified().train(), case.images()

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[3].attn.qkv.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(images)
    handle.remove()
    model(images)
    assert torch._C._len_torch_function_stack() == 0

    handle = model.blocks[3].attn.qkv.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(images)
    tokenprune.unsparsify(model)
    assert torch._C._len_torch_function_stack() == 0


def test_data_parallel_replicas_are_refused() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified()
    model._is_replica = True  # as nn.DataParallel marks its copies, whose hooks belong to the original
    with pytest.raises(tokenprune.StateError, match="DistributedDataParallel"):
        model(case.images())


def test_the_size_of_an_image_is_not_remembered() -> None:
    case = BY_NAME["timm non-square, dynamic size"]
    model = case.sparsified()
    with torch.no_grad():
        model(case.images())
        assert model.tokenprune.trace.grid == (4, 8)
        model.forward_features(case.images().transpose(2, 3))
    assert model.tokenprune.trace.grid != (4, 8)


def test_copies_prune_on_their_own() -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(), case.images()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other(images)
    assert other.tokenprune.trace is not None and model.tokenprune.trace is None
