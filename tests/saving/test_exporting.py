"""Exported files: that they compute what the model computes, and that the model does not notice."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.zoo import BY_NAME, Case, hook_counts
from tokenprune.saving import export as exporting

TOLERANCE = 1e-4
"""Single precision in other kernels: rounding gives some 1e-6 of logits of about 1, another token kept some 1e-3."""

BATCHES = (1, 3, 8)
suffixes = pytest.mark.parametrize("suffix", ["onnx", "pt2"])


def size_of(case: Case) -> tuple[int, int, int]:
    return (3, *case.image_size)


def runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """What runs the file, with nothing of the library's in between."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (images_input,) = session.get_inputs()
        return lambda images: [
            torch.from_numpy(each) for each in session.run(None, {images_input.name: images.numpy()})
        ]
    module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        output = module(images)
        return [output] if isinstance(output, Tensor) else list(output.values())

    return run


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def check(model: nn.Module, path: Path, images: Callable[[int], Tensor]) -> None:
    run = runner(path)
    for batch in BATCHES:
        (actual,) = run(images(batch))
        torch.testing.assert_close(actual.detach(), logits(model, images(batch)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        pytest.param("timm registers alone, average", "onnx", marks=pytest.mark.slow),
        ("timm registers, layer scale, q/k norm, no class position", "pt2"),
        ("transformers ViT classifier", "onnx"),
        pytest.param("torchvision", "pt2", marks=pytest.mark.slow),
    ],
)
def test_a_file_computes_what_the_model_computes(name: str, suffix: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model, path = case.sparsified(), tmp_path / f"model.{suffix}"
    report = tokenprune.export(model, path, input_size=size_of(case))
    assert report.path == path and [file.name for file in tmp_path.iterdir()] == [path.name]
    assert report.batch_sizes == BATCHES and max(report.differences) < TOLERANCE
    hugging_face = name.startswith("transformers")
    assert report.output_names == (("logits",) if hugging_face else ("output",))
    assert report.input_name == ("pixel_values" if hugging_face else "x")
    assert json.loads(report.to_json())["path"] == str(path) and str(path) in str(report)
    check(model, path, case.images)
    with tokenprune.dense(model):
        difference = (runner(path)(case.images())[0].detach() - logits(model, case.images())).abs().max()
    assert difference > 100 * TOLERANCE, "the file prunes"


# The three models at the size they are used in.


def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224")


def registers() -> nn.Module:
    return timm.create_model("vit_little_patch16_reg1_gap_256", img_size=224)


def hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "num_labels": 1000}
    return ViTForImageClassification(ViTConfig(**sizes))


@pytest.mark.slow
@suffixes
@pytest.mark.parametrize("build", [deit, registers, hugging_face])
def test_whole_models(build: Callable[[], nn.Module], suffix: str, tmp_path: Path) -> None:
    model, path = tokenprune.sparsify(build()).eval(), tmp_path / f"model.{suffix}"
    tokenprune.export(model, path)
    # Scorers that have learned nothing tell tokens apart by little more than rounding, so images are chosen as the
    # check of the library chooses them.
    with exporting._as_it_runs(model), torch.no_grad():
        images = exporting._clear_cut(model, torch.rand(32, 3, 224, 224))
    check(model, path, lambda batch: images[:batch])
    assert model.tokenprune.trace.indices[0].shape == (8, 137)


@suffixes
def test_a_dense_model(suffix: str, tmp_path: Path) -> None:
    case, path = BY_NAME["timm class token"], tmp_path / f"model.{suffix}"
    tokenprune.export(case.model(), path, input_size=size_of(case))
    check(case.model(), path, case.images)


def test_inside_dense_the_file_does_not_prune(tmp_path: Path) -> None:
    case, path = BY_NAME["timm class token"], tmp_path / "model.pt2"
    model = case.sparsified()
    with tokenprune.dense(model):
        tokenprune.export(model, path, input_size=size_of(case))
    check(case.model(), path, case.images)


@pytest.mark.slow
def test_through_torch_compile_and_in_a_model_of_ones_own(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, photographs: Tensor) -> Tensor:
            return self.model(photographs) * 2

    case = BY_NAME["timm class token"]
    model = case.sparsified()
    model.tokenprune.execution = "mask"
    compiled = tokenprune.export(torch.compile(model), tmp_path / "compiled.pt2", input_size=size_of(case))
    assert compiled.input_name == "x"
    report = tokenprune.export(Own(model), tmp_path / "own.pt2", input_size=size_of(case))
    assert report.input_name == "photographs" and model.tokenprune.execution == "mask"
    images = case.images()
    (once,), (twice,) = runner(tmp_path / "compiled.pt2")(images), runner(tmp_path / "own.pt2")(images)
    torch.testing.assert_close(twice, once * 2)


def test_outputs_are_chosen_by_name(tmp_path: Path) -> None:
    case, path = BY_NAME["transformers DeiT with teacher"], tmp_path / "model.pt2"
    model = case.sparsified()
    every = ("logits", "cls_logits", "distillation_logits")
    assert tokenprune.export(model, path, input_size=size_of(case)).output_names == ("logits",)
    chosen = ("distillation_logits", "logits")
    assert tokenprune.export(model, path, input_size=size_of(case), outputs=chosen).output_names == chosen
    program = torch.export.load(path).module()(case.images(5))
    with torch.no_grad():
        expected = model(case.images(5))
    assert tuple(program) == chosen
    for name in chosen:
        torch.testing.assert_close(program[name].detach(), expected[name], rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match=f"choose from {', '.join(every)}"):
        tokenprune.export(model, path, input_size=size_of(case), outputs=["attentions"])


@pytest.mark.parametrize(
    ("outputs", "names", "chosen"),
    [
        (None, ("output",), ("output",)),
        (None, ("last_hidden_state", "pooler_output"), ("last_hidden_state", "pooler_output")),
        (None, ("hidden_states.0", "logits"), ("logits",)),
        ("pooler_output", ("last_hidden_state", "pooler_output"), ("pooler_output",)),
        (["hidden_states.0"], ("hidden_states.0", "logits"), ("hidden_states.0",)),
    ],
)
def test_which_outputs_are_exported(outputs: Any, names: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    assert exporting._chosen(outputs, names) == chosen


def test_what_outputs_are_called() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    named = {"logits": one, "hidden_states": (one, two), "loss": None}
    assert list(dict(exporting._tensors(named, ""))) == ["logits", "hidden_states.0", "hidden_states.1"]
    assert list(dict(exporting._tensors((one, [two]), ""))) == ["output.0", "output.1.0"]
    assert list(dict(exporting._tensors(one, ""))) == ["output"]


@pytest.mark.slow
def test_the_model_does_not_notice(tmp_path: Path) -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified().train()
    model.blocks[0].eval()
    model.pos_embed.requires_grad_(False)
    model.tokenprune.execution = "mask"
    model(case.images()).sum().backward()

    def state() -> list[Any]:
        sparsifier = model.tokenprune
        return [
            [module.training for module in model.modules()],
            [(name, parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()],
            [None if parameter.grad is None else id(parameter.grad) for parameter in model.parameters()],
            hook_counts(model),
            (sparsifier.execution, sparsifier.keep_ratio, sparsifier.enabled, id(sparsifier.trace)),
        ]

    weights, before = copy.deepcopy(model.state_dict()), state()
    tokenprune.export(model, tmp_path / "model.onnx", input_size=size_of(case))
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(tokenprune.ExportError):
        tokenprune.export(model, tmp_path / "model.pt2", input_size=(3, 47, 48))
    assert state() == before


@pytest.mark.parametrize("suffix", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_a_file_that_disagrees_is_not_left(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, path = BY_NAME["timm class token"], tmp_path / f"model.{suffix}"
    path.write_text("older")
    model, exported = case.sparsified(), exporting._exported

    def other_weights(wrapped: Any, images: Tensor) -> Any:
        wrapped.model.head.bias.data[3] += 0.01
        try:
            return exported(copy.deepcopy(wrapped), images)
        finally:
            wrapped.model.head.bias.data[3] -= 0.01

    monkeypatch.setattr(exporting, "_exported", other_weights)
    with pytest.raises(tokenprune.ExportError, match=r"differs from the model by .*at batch 8.*tolerance=0\.0001"):
        tokenprune.export(model, path, input_size=size_of(case))
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]
    tokenprune.export(model, path, input_size=size_of(case), tolerance=0.1)
    assert runner(path)


def test_how_far_apart_outputs_are() -> None:
    expected = {"logits": torch.tensor([[1.0, -4.0]]), "tokens": torch.tensor([[0.5]])}
    alike = {name: tensor.clone() for name, tensor in expected.items()}
    assert exporting._difference(alike, expected) == 0
    assert exporting._difference({"logits": torch.tensor([[1.0, -3.8]])}, expected) == pytest.approx(0.2 / 4)
    assert exporting._difference(alike | {"tokens": torch.tensor([[0.6]])}, expected) == pytest.approx(0.1 / 0.5)
    assert math.isnan(exporting._difference(alike | {"tokens": torch.tensor([[math.nan]])}, expected))
    assert exporting._difference({"logits": torch.tensor([1.0, -4.0])}, expected) == math.inf


def test_images_whose_decisions_hang_on_rounding_are_passed_over() -> None:
    bright = torch.zeros(())

    class Tied(tokenprune.Scorer):
        """Of bright images, all scores differ; of others, those at the border of what is kept are equal."""

        def forward(self, candidates: tokenprune.Candidates) -> Tensor:
            position = torch.arange(candidates.patches.shape[1]).float()
            return torch.where(bright[:, None], -position, -(position / 30).floor())

    class Patches(nn.Module):
        """Notes which images come, before the model does anything with them."""

        def forward(self, images: Tensor) -> Tensor:
            nonlocal bright
            bright = images.mean(dim=(1, 2, 3)) > 0.5
            return images

    case = BY_NAME["timm class token"]
    model = tokenprune.sparsify(case.model(), (2,), 0.6, scorer=lambda context: Tied())
    model.patch_embed.proj = nn.Sequential(Patches(), model.patch_embed.proj)
    images = torch.rand(32, 1, 1, 1).expand(-1, 3, 48, 48)
    with exporting._as_it_runs(model), torch.no_grad():
        chosen = exporting._clear_cut(model, images)
    assert chosen.shape == (12, 3, 48, 48) and (images[:12] < 0.5).any()
    assert (chosen > 0.5).all(), "at k = 21 of 36, positions 20 and 21 have equal scores in a dark image"


def test_a_frozen_model_is_checked_with_the_same_images() -> None:
    """Frozen, it keeps no record by which they could be chosen."""
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(), torch.rand(32, 3, 48, 48)
    chosen = []
    for each in (model, tokenprune.freeze(copy.deepcopy(model))):
        hooks = hook_counts(each)
        with exporting._as_it_runs(each), torch.no_grad():
            chosen.append(exporting._clear_cut(each, images))
        assert hook_counts(each) == hooks and each.tokenprune.frozen is (each is not model)
        assert each.tokenprune.trace is None
    assert torch.equal(*chosen) and not torch.equal(chosen[0], images[:12])


def meta() -> nn.Module:
    with torch.device("meta"):
        return BY_NAME["timm class token"].build()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.sum((1, 2, 3)) if images.sum() > 0 else -images.sum((1, 2, 3)) * self.weight


class Silent(Branching):
    def forward(self, images: Tensor) -> Any:
        return None


@pytest.mark.parametrize(
    ("build", "name", "error", "message"),
    [
        (BY_NAME["timm class token"].sparsified, "model.pth", ValueError, r"model\.pth.*\.onnx or \.pt2"),
        (BY_NAME["timm class token"].sparsified, "no/model.pt2", FileNotFoundError, "no folder .*no; make it"),
        (BY_NAME["timm class token"].sparsified, "folder.pt2", IsADirectoryError, "is a folder"),
        (meta, "model.pt2", tokenprune.UnsupportedModelError, "meta device"),
        (Branching, "model.pt2", tokenprune.ExportError, "Branching cannot be taken by torch.export"),
        (Silent, "model.pt2", tokenprune.ExportError, "returns no tensor"),
        (
            lambda: BY_NAME["timm class token"].sparsified(scorer="random"),
            "model.onnx",
            tokenprune.ExportError,
            "other outputs each time",
        ),
        (
            lambda: BY_NAME["timm class token"].sparsified().bfloat16(),
            "model.onnx",
            tokenprune.ExportError,
            "cannot be written and read again",
        ),
    ],
)
def test_what_is_refused(
    build: Callable[[], nn.Module], name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=message):
        tokenprune.export(build(), tmp_path / name, input_size=(3, 48, 48))
    assert [file.name for file in tmp_path.iterdir()] == ["folder.pt2"]


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    model = BY_NAME["timm class token"].model()
    with pytest.raises(ModuleNotFoundError, match=r"need onnxscript: pip install 'tokenprune\[export\]'"):
        tokenprune.export(model, tmp_path / "model.onnx", input_size=(3, 48, 48))
    tokenprune.export(model, tmp_path / "model.pt2", input_size=(3, 48, 48))


def test_a_file_stands_by_itself(tmp_path: Path) -> None:
    case = BY_NAME["transformers ViT classifier"]
    tokenprune.export(case.sparsified(), tmp_path / "model.pt2", input_size=size_of(case))
    script = """
import sys, torch
program = torch.export.load("model.pt2").module()
print(program(torch.rand(5, 3, 48, 48))["logits"].shape)
print([name for name in ("tokenprune", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "torch.Size([5, 7])\n[]\n", done.stderr
