"""Exporting: a model as one file, in which it prunes to fixed numbers of tokens, for runtimes that know no hooks."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.backbones.probing import eval_mode, random_inputs
from tokenprune.errors import ExportError, TokenpruneError
from tokenprune.pruning.executions import default_execution
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.sparsifier import Sparsifier

BATCH_SIZES = (1, 3, 8)
"""Images a batch with which a file is checked."""

_CANDIDATES = 4 * max(BATCH_SIZES)
"""Random images of which those with the clearest decisions are taken for the check."""

_ONLY = "output"
"""What the output of a model that returns a tensor is called."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export` wrote, and how well it agrees with the model.

    Attributes:
        path: The file; the weights of an ONNX model above 2 GB are beside it, with ``.data`` behind the name.
        input_name: What the images are called in it.
        output_names: What its outputs are called.
        input_size: Channels, height and width of the images; the number of images is free.
        batch_sizes: Images in the batches with which it was checked.
        differences: For each of them the largest difference of an output, relative to its largest magnitude.
    """

    path: Path
    input_name: str
    output_names: tuple[str, ...]
    input_size: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    differences: tuple[float, ...]

    def to_json(self) -> str:
        """All attributes as a JSON object."""
        return json.dumps({**asdict(self), "path": str(self.path)})

    def __str__(self) -> str:
        size = " × ".join(map(str, self.input_size))
        checks = ", ".join(map(str, self.batch_sizes))
        return (
            f"{self.path}: {self.input_name} (batch × {size}) to {', '.join(self.output_names)}; differs from the "
            f"model by {max(self.differences):.1e} at most, at batch {checks}"
        )


def export(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    input_size: Sequence[int] = (3, 224, 224),
    outputs: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write a model, sparsified or not, to an ONNX file or a `torch.export` program, and check the file.

    The file prunes as ``model`` does now in eval mode, in `gather` execution: the number of images may
    change from call to call, the keep ratios and the size of images cannot. It stands by itself, without
    tokenprune and the model's library. What was written is read again and run beside the model, at
    batch 1, 3 and 8: an ONNX file by ONNX Runtime on a CPU. The model is left exactly as it was.

    Args:
        model: A model in the dtype and, for ``.pt2``, on the device that the file is for; may be compiled.
        path: Ends with ``.onnx`` (needs the extra ``tokenprune[export]``) or ``.pt2``; an older file is replaced.
        input_size: Channels, height and width of the images, the one positional input.
        outputs: Names of the outputs to export, of a model that returns several, such as transformers';
            ``None`` means ``logits`` where there are any, otherwise all. Those within others are called
            ``hidden_states.0``, those of a tuple ``output.0``. With ``.pt2``, outputs that have names are
            returned as a dict.
        tolerance: Up to which relative difference the file is accepted; meant for float32.

    Raises:
        ValueError: ``path`` ends with something else, or the model has no output of a name.
        FileNotFoundError, IsADirectoryError: The folder does not exist, or the file is one.
        ModuleNotFoundError: A package that writes and checks ONNX is missing.
        UnsupportedModelError: The model is on the meta device.
        ExportError: The model cannot run on such images or cannot be exported, or the file disagrees
            with it. No file is left, and an older one is untouched.
    """
    path = Path(path)
    check_path(path)
    write = _WRITERS[path.suffix]
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    candidates = random_inputs(inner, images=(_CANDIDATES, *input_size))["images"]
    with _as_it_runs(inner), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        images = dict(zip(BATCH_SIZES, _clear_cut(inner, candidates).split(BATCH_SIZES), strict=True))
        expected = {batch: _run(inner, images[batch]) for batch in BATCH_SIZES}
        _check_repeatable(inner, images[BATCH_SIZES[0]], expected[BATCH_SIZES[0]])
        wrapped = _Outputs(inner, _chosen(outputs, tuple(expected[BATCH_SIZES[0]]))).eval()
        program = _exported(wrapped, images[BATCH_SIZES[1]])
        names = _Names(next(iter(inspect.signature(inner.forward).parameters)), wrapped.names)
        with _explained(inner, "cannot be written and read again"):
            run = write(program, Path(folder) / path.name, names)
            actual = {batch: run(images[batch]) for batch in BATCH_SIZES}
        differences = tuple(_difference(actual[batch], expected[batch]) for batch in BATCH_SIZES)
        if not all(difference <= tolerance for difference in differences):
            told = ", ".join(
                f"{found:.1e} at batch {batch}" for batch, found in zip(BATCH_SIZES, differences, strict=True)
            )
            raise ExportError(
                f"the exported {type(inner).__name__} differs from the model by {told}, relative to the largest "
                f"output; tolerance={tolerance:g}. Nothing was written to {path}."
            )
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return ExportReport(
        path=path,
        input_name=names.input,
        output_names=names.outputs,
        input_size=tuple(input_size),
        batch_sizes=BATCH_SIZES,
        differences=differences,
    )


class _Names(NamedTuple):
    input: str
    outputs: tuple[str, ...]


_Run = Callable[[Tensor], dict[str, Tensor]]
_Write = Callable[[Any, Path, _Names], _Run]


def check_path(path: Path) -> None:
    """Refuse what `export` could not write to, before anything is done.

    Raises:
        ValueError, FileNotFoundError, IsADirectoryError, ModuleNotFoundError: As `export` says.
    """
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: the name must end with {' or '.join(_WRITERS)}, which say what is written.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ModuleNotFoundError(
            f"{path}: ONNX files need {', '.join(missing)}: pip install 'tokenprune[export]'.", name=missing[0]
        )


def _write_onnx(program: torch.export.ExportedProgram, file: Path, names: _Names) -> _Run:
    import onnx
    import onnxruntime

    written = torch.onnx.export(
        program,
        program.example_inputs[0],
        dynamo=True,
        verbose=False,
        input_names=[names.input],
        output_names=list(names.outputs),
        dynamic_shapes=({0: "batch"},),
    )
    assert written is not None
    written.save(file)
    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(list(names.outputs), {names.input: images.cpu().numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names.outputs, values, strict=True)}

    return run


def _write_program(program: torch.export.ExportedProgram, file: Path, names: _Names) -> _Run:
    torch.export.save(program, file)
    module = torch.export.load(file).module()
    return lambda images: dict(_tensors(module(images), ""))


_WRITERS: dict[str, _Write] = {".onnx": _write_onnx, ".pt2": _write_program}
"""What writes files of a suffix, and gives back what runs them."""


class _Outputs(nn.Module):
    """A model that returns chosen outputs alone, by name: types of its library stay out of the file."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        found = dict(_tensors(self.model(images), ""))
        return found[_ONLY] if self.names == (_ONLY,) else {name: found[name] for name in self.names}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returned, by where it stands."""
    if isinstance(value, Tensor):
        yield name or _ONLY, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name or _ONLY}.{index}")


def _chosen(outputs: Sequence[str] | None, found: tuple[str, ...]) -> tuple[str, ...]:
    if outputs is None:
        return ("logits",) if "logits" in found else found
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        raise ValueError(f"outputs={names}: choose from {', '.join(found)}.")
    return names


@contextmanager
def _as_it_runs(model: nn.Module) -> Iterator[None]:
    """In eval mode and `gather` execution; afterwards modes, executions and traces are what they were."""
    sparsifiers = _sparsifiers(model).values()
    traces = [sparsifier.trace for sparsifier in sparsifiers]
    with ExitStack() as settings:
        settings.enter_context(eval_mode(model))
        for sparsifier in sparsifiers:
            if sparsifier.enabled and sparsifier.budget != "fixed":
                raise ExportError(
                    "a file keeps equally many tokens of every image, and this model's budget is adaptive; set "
                    "model.tokenprune.budget = 'fixed' to export it as it is planned."
                )
            settings.enter_context(sparsifier.executing(default_execution(training=False)))
        try:
            yield
        finally:
            for sparsifier, trace in zip(sparsifiers, traces, strict=True):
                sparsifier.trace = trace


def _clear_cut(model: nn.Module, images: Tensor) -> Tensor:
    """As many of the images as are needed, those first whose decisions hang least on rounding.

    Two tokens whose scores are equal but for rounding are ranked differently by every runtime, and the outputs
    then differ by far more than rounding, though nothing is wrong.
    """
    margins, sparsifiers = [], _sparsifiers(model)
    with ExitStack() as thawed:  # frozen models keep no record
        for owner, sparsifier in sparsifiers.items():
            thawed.enter_context(sparsifier.thawed(owner))
        for some in images.split(max(BATCH_SIZES)):
            _run(model, some)
            found = [some.new_ones(len(some), dtype=torch.float32)]
            for sparsifier in sparsifiers.values():
                selections = [] if sparsifier.trace is None else sparsifier.trace.selections  # none inside dense(model)
                found += [_margin(selection) for selection in selections if selection.scores is not None]
            margins.append(torch.stack([each.to(found[0]) for each in found]).amin(dim=0))
    order = torch.cat(margins).argsort(descending=True, stable=True)
    return images[order[: sum(BATCH_SIZES)]]


def _margin(selection: Selection) -> Tensor:
    """How far apart the worst kept and the best pruned token of an image are, of all its scores' range: (B,)."""
    assert selection.scores is not None and selection.indices is not None
    num_keep = selection.indices.shape[1]
    best = selection.scores.float().sort(dim=1, descending=True).values  # (B, m)
    return (best[:, num_keep - 1] - best[:, num_keep]) / (best[:, 0] - best[:, -1]).clamp(min=1e-12)


def _sparsifiers(model: nn.Module) -> dict[nn.Module, Sparsifier]:
    """Of every sparsified module among a model's what it carries."""
    found = {module: module._modules.get("tokenprune") for module in model.modules()}
    return {module: attached for module, attached in found.items() if isinstance(attached, Sparsifier)}


def _run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with _explained(model, f"cannot run on images of input_size={tuple(images.shape[1:])}"):
        found = dict(_tensors(model(images), ""))
    if not found:
        raise ExportError(f"this {type(model).__name__} returns no tensor, so there is nothing to export.")
    return found


def _check_repeatable(model: nn.Module, images: Tensor, before: Mapping[str, Tensor]) -> None:
    again = _run(model, images)
    if not all(torch.equal(again[name], before[name]) for name in before):
        raise ExportError(
            f"this {type(model).__name__} gives other outputs each time it runs on the same images, as with "
            "scorer='random', so no file of it could be checked; give it a deterministic scorer."
        )


def _exported(model: _Outputs, images: Tensor) -> torch.export.ExportedProgram:
    with _explained(model.model, "cannot be taken by torch.export with a batch size that may change"):
        batch = torch.export.Dim("batch")
        return torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)


@contextmanager
def _explained(model: nn.Module, what: str) -> Iterator[None]:
    try:
        yield
    except TokenpruneError:
        raise
    except Exception as error:  # of any kind: the model's, the exporter's and the runtime's own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ExportError(f"this {type(model).__name__} {what}: {type(error).__name__}: {reason}") from error


def _difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest over the outputs, each relative to its largest magnitude; NaN, which no tolerance allows, counts."""
    found = [torch.zeros(())]
    for name, tensor in actual.items():
        reference = expected[name].cpu().double()
        if tensor.shape != reference.shape:
            return float("inf")
        difference = (tensor.cpu().double() - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
        found.append(difference)
    return float(torch.stack([each.double() for each in found]).max())  # max hands NaN on
