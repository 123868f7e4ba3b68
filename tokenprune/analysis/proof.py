"""Proving on a model what must hold for every pruned one, and saying what the model is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.analysis.description import describe_behaviour
from tokenprune.analysis.hosts import run_dense
from tokenprune.analysis.verification import verify
from tokenprune.api import sparsifier_of, sparsify, unsparsify
from tokenprune.backbones.adapters import library_of
from tokenprune.backbones.examples import Example
from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.probing import named_outputs
from tokenprune.backbones.supported import SupportedModel
from tokenprune.errors import ProofError
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.trace import Trace

IDENTITY = 1e-5
"""Nothing pruned, relative to the largest output: some models build tables anew, in another order of sums."""

EXECUTIONS_AGREE = 2e-5
"""For the same decisions, in single precision. Rounding gives up to a few 1e-6; wrong positions no more than 4e-4."""

EFFECT = 1e-4
"""Pruning changes outputs by more than this, or nothing has been shown."""

COMPILED = 1e-4
"""A compiled or exported model may fuse what the eager one computes step by step; relative and absolute."""


def prove(example: Example, *, library: str, compiled: bool | None = None) -> SupportedModel:
    """Prove on a model what must hold, and say what it is.

    The untouched model comes first, built by its library, with every parameter drawn anew. Then it is sparsified with
    the learned predictor, and:

    - *identity*: with nothing pruned, every output is that of the dense model, to 1e-5;
    - *mask = gather*: for the same decisions all executions agree, to 2e-5, stages keep as many tokens as planned, and
      pruning has an effect;
    - *training step*: every predictor gets a finite gradient that is not zero. Left out where the vision tower hands on
      kept tokens alone, since such a model is trained in parts;
    - *undo*: after `unsparsify` outputs are those of before, bit by bit, and neither a hook nor a key is left;
    - *compile*, *export*: see `Example.compiled`.

    All random numbers are the same every time, and the caller's are left alone.

    Args:
        example: The model, and what it is given.
        library: Root package of the model's library, whose adapter is proved with it.
        compiled: Whether to compile and export it; ``None`` means what the example says.

    Returns:
        The model's entry in the table of proved models; see `tokenprune.backbones.supported.write_supported`.

    Raises:
        HostError: The library cannot run the untouched model, so that nothing can be proved.
        ProofError: Something does not hold.
        TokenpruneError: The model cannot be sparsified, or not be masked; the message says why.
    """
    with _repeatable():
        model, arguments, outputs = run_dense(example, library=library)
        if library_of(model) != library:
            raise ProofError(
                f"{example.name} is a {type(model).__module__}.{type(model).__qualname__}, of which the adapter for "
                f"{library} knows nothing."
            )
        keys, hooks = list(model.state_dict()), _hooks(model)
        sparsify(model, example.stages, example.keep_ratio, pruned=example.pruned)
        trained = _prove_invariants(model, arguments, example.name)
        description = describe_behaviour(model, arguments)
        unsparsify(model)
        _prove_undone(model, arguments, outputs, example.name)
        if list(model.state_dict()) != keys or _hooks(model) != hooks:
            raise ProofError(f"{example.name}: unsparsify() left hooks, or keys of the state dict, behind.")
        passes = ["identity", "mask = gather", "undo", *(["training step"] if trained else [])]
        if example.compiled if compiled is None else compiled:
            passes += [how for how in _COMPILERS if _prove_compiled(example, how)]
    return SupportedModel(
        library=library,
        family=example.family,
        name=example.name,
        model_class=type(model).__name__,
        passes=tuple(passes),
        pruned=example.pruned,
        **description._asdict(),
    )


@contextmanager
def _repeatable() -> Iterator[None]:
    """While it lasts, random numbers and the order of sums are the same every time."""
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_num_threads(1)  # with which small models run fastest, too
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def _prove_invariants(model: nn.Module, arguments: Mapping[str, Any], name: str) -> bool:
    """What must hold while a model is sparsified. Returns whether a training step is a part of that."""
    sparsifier = sparsifier_of(model)
    report = verify(model, arguments, tolerance=EXECUTIONS_AGREE)
    failures = [*report.failures]
    if not report.identity <= IDENTITY:
        failures.append(f"with nothing pruned, outputs differ from the dense model's by {report.identity:.1e}")
    if not report.effect > EFFECT:
        failures.append(f"pruning changes the outputs by no more than {report.effect:.1e}")
    trained = sparsifier.backbone.downstream != "any number"
    num_pruning = sum(probability < 1 for probability in sparsifier.keep_probabilities)
    if len(report.gradients) != (num_pruning if trained else 0):
        failures.append(f"{len(report.gradients)} of {num_pruning} scorers were trained")
    with torch.no_grad():
        model(**arguments)
    trace = sparsifier.trace
    assert trace is not None
    for kept, planned in _numbers_kept(trace, sparsifier.plan):
        if kept != planned:
            failures.append(f"stages keep {kept} tokens of an image, and the plan says {planned}")
    if failures:
        raise ProofError("\n".join([f"{name}:", *dict.fromkeys(failures)]))
    return trained


def _numbers_kept(trace: Trace, plan: Plan) -> Iterator[tuple[list[int], list[int]]]:
    """How many tokens each stage has kept of an image, and how many it was to keep; of packed images, merge groups."""
    images = trace.images
    if isinstance(images, PackedImages):
        for image, (number, groups) in enumerate(zip(images.num_groups, images.groups, strict=True)):
            yield [len(groups[indices[image]].unique()) for indices in trace.indices], [*plan.num_keep(number)]
    elif images is not None:
        for image, number in enumerate(images.present.sum(dim=1).long().tolist()):
            yield [len(indices[image]) for indices in trace.indices], [*plan.num_keep(number)]
    else:
        yield [len(indices[0]) for indices in trace.indices], [*plan.num_keep(trace.num_patches)]


def _prove_undone(model: nn.Module, arguments: Mapping[str, Any], before: Mapping[str, Tensor], name: str) -> None:
    """After unsparsify() the outputs are those of before, bit by bit."""
    with torch.no_grad():
        after = named_outputs(model(**arguments))
    differ = [output for output, tensor in before.items() if not torch.equal(after[output], tensor)]
    if differ:
        raise ProofError(f"{name}: after unsparsify() {', '.join(differ)} differ from the dense model's.")


def _prove_compiled(example: Example, how: str) -> bool:
    """Whether the dense model can be compiled or exported, as the pruned one then must be."""
    run, arguments = _COMPILERS[how], example.arguments()
    try:
        run(example.model(), arguments)
    except Exception:  # whatever a compiler raises
        return False
    model = sparsify(example.model(), example.stages, example.keep_ratio, pruned=example.pruned)
    with torch.no_grad():
        expected = named_outputs(model(**arguments))
    try:
        actual = named_outputs(run(model, arguments))
    except Exception as error:
        raise ProofError(
            f"{example.name}: {how} takes the dense model, and not the pruned one: {type(error).__name__}: {error}"
        ) from error
    for name, tensor in expected.items():
        if not torch.allclose(actual[name], tensor, rtol=COMPILED, atol=COMPILED):
            difference = float((actual[name] - tensor).abs().max())
            raise ProofError(f"{example.name}: {name} differs by {difference:.1e} after {how}.")
    return True


def _compile(model: nn.Module, arguments: dict[str, Any]) -> Any:
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(model, backend="eager", fullgraph=True)(**arguments)


def _export(model: nn.Module, arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return torch.export.export(model, (), arguments, strict=False).module()(**arguments)


_COMPILERS: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {"compile": _compile, "export": _export}


def _hooks(model: nn.Module) -> list[object]:
    """How many hooks of each kind every module of a model has, and whether a ``forward`` of its own."""
    kinds = sorted(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_always_called", "_with_kwargs")))
    return [(*(len(getattr(module, kind)) for kind in kinds), "forward" in vars(module)) for module in model.modules()]
