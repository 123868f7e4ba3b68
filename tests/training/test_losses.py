"""The training objective: its parts against their formulas, its teacher, its refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import tokenprune
from tests.helpers.zoo import BY_NAME, Case, every_model
from tokenprune import DynamicViTLoss
from tokenprune.training.teacher_tokens import watched

TIMM = BY_NAME["timm class token"]
LVVIT, HEADS = BY_NAME["timm LV-ViT"], ("head", "aux_head")


def student_and_teacher(case: Case = TIMM) -> tuple[nn.Module, nn.Module]:
    return case.sparsified().train(), case.model()


def test_parts_are_their_formulas() -> None:
    model, teacher = student_and_teacher()
    with torch.no_grad():
        for parameter in teacher.parameters():  # far from the student, so that no part is small
            parameter.add_(torch.randn_like(parameter) * 0.2)
    loss, images, targets = DynamicViTLoss(teacher), TIMM.images(), torch.tensor([1, 5, 2])
    outputs = model(images)
    parts = loss(model, images, outputs, targets)
    keep, tokens = model.tokenprune.trace.keep, model.tokenprune.trace.tokens

    with torch.no_grad():
        teacher_logits, teacher_tokens = teacher(images), teacher.forward_features(images)
    student, other = F.softmax(outputs, -1), F.softmax(teacher_logits, -1)
    errors, count = 0.0, 0
    for image in range(3):
        for position in range(36):
            if keep[-1][image, position] == 1:
                errors += (tokens[image, 1 + position] - teacher_tokens[image, 1 + position]).square().mean()
                count += 1
    expected = {
        "classification": F.cross_entropy(outputs, targets),
        "kl": (student * (student / other).log()).sum(-1).mean(),
        "distill": errors / count,
        "ratio": sum(((ratio - d.mean(1)) ** 2).mean() for ratio, d in zip((0.6, 0.36), keep, strict=True)) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-7)
    total = expected["classification"] + 0.5 * expected["kl"] + 0.5 * expected["distill"] + 2 * expected["ratio"]
    torch.testing.assert_close(parts["loss"], total, rtol=1e-4, atol=1e-5)
    assert list(parts) == ["loss", "classification", "kl", "distill", "ratio"]


def test_parts_with_a_head_on_patch_tokens_are_their_formulas() -> None:
    model, teacher = student_and_teacher(LVVIT)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    loss, images, targets = DynamicViTLoss(teacher, heads=HEADS), LVVIT.images(), torch.tensor([1, 5, 2])
    parts = loss(model, images, model(images), targets)
    keep, tokens = model.tokenprune.trace.keep, model.tokenprune.trace.tokens

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum()

    with torch.no_grad():
        taught = teacher.forward_features(images)
    class_logits = model.head(tokens[:, 0])
    kept = [(image, 1 + position) for image, position in keep[-1].nonzero().tolist()]
    assert 3 <= len(kept) < 3 * 36
    expected = {
        "classification": F.cross_entropy(class_logits, targets),
        "kl": sum(divergence(class_logits[image], teacher.head(taught[image, 0])) for image in range(3)) / 3,
        "distill": sum(divergence(model.aux_head(tokens[at]), teacher.aux_head(taught[at])) for at in kept) / len(kept),
        "ratio": sum(((ratio - d.mean(1)) ** 2).mean() for ratio, d in zip((0.6, 0.36), keep, strict=True)) / 2,
    }
    for name, value in expected.items():
        assert value > 1e-3
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    total = expected["classification"] + 0.5 * expected["kl"] + 0.5 * expected["distill"] + 2 * expected["ratio"]
    torch.testing.assert_close(parts["loss"], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [None, HEADS], ids=str)
def test_a_step_with_a_head_on_patch_tokens(heads: tuple[str, str] | None) -> None:
    model, teacher = student_and_teacher(LVVIT)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    loss, images = DynamicViTLoss(teacher, heads=heads).train(), LVVIT.images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model, images, model(images), torch.tensor([1, 5, 2]))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    # Its batch norms, too: they are those of the teacher, and see no batch of the student's.
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_heads_alone_and_the_weights_of_zero() -> None:
    model, teacher = student_and_teacher(LVVIT)
    images, targets = LVVIT.images(), torch.tensor([1, 5, 2])
    outputs = model(images)
    parts = DynamicViTLoss(teacher, heads=HEADS, distill_weight=0)(model, images, outputs, targets)
    assert parts["distill"] == 0 and parts["kl"] > 0
    model.set_token_training()  # what it returns does not matter where heads say how tokens become logits
    torch.manual_seed(1)
    pair = model(images)
    loss = DynamicViTLoss(teacher, heads=HEADS)
    torch.testing.assert_close(loss(model, images, pair, targets)["classification"], F.cross_entropy(pair[0], targets))


def test_heads_that_are_not_there_are_refused() -> None:
    model, teacher = student_and_teacher()
    images, targets = TIMM.images(), torch.tensor([1, 5, 2])
    with pytest.raises(ValueError, match=r"heads: VisionTransformer has no module 'aux_head'; name the modules"):
        DynamicViTLoss(teacher, heads=HEADS)
    with pytest.raises(ValueError, match=r"heads: VisionTransformer has no module 'aux_head'"):
        DynamicViTLoss(LVVIT.model(), heads=HEADS)(model, images, model(images), targets)
    case = BY_NAME["timm no class token, average"]
    model, teacher = student_and_teacher(case)
    with pytest.raises(ValueError, match=r"heads=\('head', 'head'\): this model has no class token"):
        DynamicViTLoss(teacher, heads=("head", "head"))(model, images, model(images), targets)


def test_looking_on_without_gradients() -> None:
    model, teacher = student_and_teacher()
    images, targets = TIMM.images(), torch.tensor([1, 5, 2])
    with torch.no_grad():
        outputs = model(images)
        with pytest.raises(tokenprune.StateError, match="left no final tokens to distill: it ran under no_grad"):
            DynamicViTLoss(teacher)(model, images, outputs, targets)
        parts = DynamicViTLoss(teacher, distill_weight=0)(model, images, outputs, targets)
    assert parts["kl"] > 0


@every_model
def test_every_model_trains_with_the_full_loss(case: Case) -> None:
    model, teacher = student_and_teacher(case)
    loss, images = DynamicViTLoss(teacher), case.images()
    output = model(images, **case.forward_arguments)
    inputs = {"pixel_values": images, **case.forward_arguments} if case.name.startswith("transformers") else images
    if isinstance(output, tuple):
        output = output[0]  # timm's distilled head returns two sets of logits in training
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        output = next(value for name in ("image_embeds", "pooler_output") if (value := output.get(name)) is not None)
        pytest.skip("a model without logits has nothing to classify")
    classes = logits.shape[1]
    parts = loss(model, inputs, output, torch.arange(3) % classes)
    parts["loss"].backward()
    assert all(part.isfinite() for part in parts.values()) and parts["distill"] > 0
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.tokenprune.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_runs_once_without_gradients_in_eval_mode() -> None:
    model, teacher = student_and_teacher()
    calls: list[tuple[bool, bool]] = []
    teacher.register_forward_hook(lambda *_: calls.append((torch.is_grad_enabled(), teacher.training)))
    loss, images = DynamicViTLoss(teacher).train(), TIMM.images()
    loss(model, images, model(images), torch.tensor([1, 5, 2]))
    assert calls == [(False, False)]
    assert not teacher.norm._forward_hooks, "the hook that reads the teacher's tokens is gone"


@pytest.mark.parametrize("criterion", [None, LabelSmoothingCrossEntropy(0.1), SoftTargetCrossEntropy()], ids=repr)
def test_hard_and_soft_targets(criterion: Any) -> None:
    model, teacher = student_and_teacher()
    loss, images = DynamicViTLoss(teacher, criterion=criterion), TIMM.images()
    outputs = model(images)
    targets = torch.tensor([1, 5, 2])
    if not isinstance(criterion, LabelSmoothingCrossEntropy):
        targets = F.one_hot(targets, 7).float() * 0.9 + 0.1 / 7
    parts = loss(model, images, outputs, targets)
    expected = (criterion or nn.CrossEntropyLoss())(outputs, targets)
    assert torch.equal(parts["classification"], expected)


def test_a_part_without_weight_costs_nothing() -> None:
    model, teacher = student_and_teacher()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    loss, images = DynamicViTLoss(teacher, kl_weight=0, distill_weight=0, ratio_weight=0), TIMM.images()
    parts = loss(model, images, model(images), torch.tensor([1, 5, 2]))
    assert parts["kl"] == parts["distill"] == parts["ratio"] == 0
    assert torch.equal(parts["loss"], parts["classification"])


def test_a_teacher_of_another_architecture_teaches_logits_alone() -> None:
    from torchvision.models import resnet18

    model, teacher, images = TIMM.sparsified().train(), resnet18(num_classes=7), TIMM.images()
    parts = DynamicViTLoss(teacher, distill_weight=0)(model, images, model(images), torch.tensor([1, 5, 2]))
    assert parts["kl"] > 0
    with pytest.raises(ValueError, match=r"a ResNet, has no module 'norm' .* pass distill_weight=0"):
        DynamicViTLoss(teacher)(model, images, model(images), torch.tensor([1, 5, 2]))


def test_it_finds_the_sparsifier_in_a_compiled_model() -> None:
    model, teacher = student_and_teacher()
    compiled = torch.compile(model, backend="eager")
    images = TIMM.images()
    parts = DynamicViTLoss(teacher)(compiled, images, compiled(images), torch.tensor([1, 5, 2]))
    parts["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.tokenprune.parameters())


def test_a_compiled_teacher_is_compiled_once_and_distils() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, teacher = student_and_teacher()
    images, targets = TIMM.images(), torch.tensor([1, 5, 2])
    with torch.no_grad():  # code of the same class that reads no tokens
        torch.compile(copy.deepcopy(teacher).eval(), backend=backend, fullgraph=True)(images)
    ours = DynamicViTLoss(torch.compile(copy.deepcopy(teacher), backend=backend, fullgraph=True))
    plain = DynamicViTLoss(teacher)
    for step in range(3):
        outputs = model(images + step)
        parts, expected = ours(model, images + step, outputs, targets), plain(model, images + step, outputs, targets)
        assert parts["distill"] > 0
        torch.testing.assert_close(parts, expected)
    assert len(graphs) == 2

    ran = torch.compile(copy.deepcopy(teacher).eval(), backend=backend)
    with torch.no_grad():
        ran(images)
    torch.testing.assert_close(DynamicViTLoss(ran)(model, images + step, outputs, targets), expected)
    with pytest.raises(tokenprune.StateError, match="had run before this loss"), watched(ran, "norm"):
        pass  # code without the hook leaves no tokens either


@pytest.mark.parametrize("keep_ratio", [1.0, (0.5, 0.5)], ids=str)
def test_a_stage_that_keeps_all_needs_no_gradient(keep_ratio: Any) -> None:
    model, teacher = student_and_teacher()
    model.tokenprune.keep_ratio = keep_ratio
    images = TIMM.images()
    parts = DynamicViTLoss(teacher)(model, images, model(images), torch.tensor([1, 5, 2]))
    parts["loss"].backward()
    assert parts["loss"].isfinite()
    if keep_ratio != 1.0:
        assert tokenprune.verify(model, images).passed


def test_misuse_is_refused() -> None:
    model, teacher = student_and_teacher()
    images, targets = TIMM.images(), torch.tensor([1, 5, 2])
    loss = DynamicViTLoss(teacher)
    with pytest.raises(tokenprune.StateError, match="the teacher is sparsified"):
        DynamicViTLoss(copy.deepcopy(model))
    with pytest.raises(ValueError, match="kl_weight=-1 is negative"):
        DynamicViTLoss(teacher, kl_weight=-1)
    with pytest.raises(tokenprune.StateError, match=r"is not sparsified; call tokenprune\.sparsify"):
        loss(teacher, images, teacher(images), targets)
    with pytest.raises(tokenprune.StateError, match="no pruned forward pass"):
        loss(model, images, torch.zeros(3, 7), targets)
    model.eval()
    with pytest.raises(tokenprune.StateError, match="one in gather execution"):
        loss(model, images, model(images), targets)
    model.train()
    with torch.no_grad():
        outputs = model(images)
    with pytest.raises(tokenprune.StateError, match="carry no gradient"):
        loss(model, images, outputs, targets)
    outputs = model(images)
    with pytest.raises(ValueError, match=r"expected logits of shape \(B, K\).*got tuple"):
        loss(model, images, (outputs, outputs), targets)
