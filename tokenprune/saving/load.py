"""Loading a sparsified model from a folder or a Hub repository.

Whatever may be wrong is found before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.api import sparsifier_of, sparsify, unsparsify
from tokenprune.backbones.adapters import describe
from tokenprune.backbones.backbone import Backbone
from tokenprune.errors import CheckpointError, PlanError, StateError, UnknownModelError, UnsupportedModelError
from tokenprune.pruning.language import Pruner, pruner_of
from tokenprune.pruning.norms import set_norm_eps
from tokenprune.pruning.record import Record
from tokenprune.pruning.reductions import ReductionBuilder, reduction_builder
from tokenprune.saving import hub, weights
from tokenprune.saving.manifest import MANIFEST, WEIGHTS, Manifest
from tokenprune.saving.named import load_from_library
from tokenprune.saving.rebuilding import build, cast_buffers
from tokenprune.scorers import ScorerBuilder, scorer_builder

_PREFIX = "tokenprune."
_EXTRA = f"{_PREFIX}_extra_state"


def from_pretrained(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    scorer: str | ScorerBuilder | None = None,
    pruned: str | ReductionBuilder | None = None,
    pruner: str | Pruner | None = None,
    backbone: Backbone | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """A sparsified model from what `save_pretrained` or a library's own saving wrote.

    Without ``model`` the base model is built again from what the folder says of it, by the library that it came
    from, and returned on the CPU, in eval mode, in the dtypes it was saved in. A folder of scorers alone takes the
    public weights of the base model in addition, which its library fetches.

    Folders that the ``save_pretrained`` of a model's own library wrote while it was sparsified are read too.

    Args:
        source: A folder, or the id of a Hub repository.
        model: A dense model to load into, in place; it keeps its device, dtype and mode. Needed where the saved
            model is user-written or modified.
        scorer: Builds the scorers where they have no registered name.
        pruned: Builds the reductions where they have no registered name.
        pruner: Chooses image tokens for a language model where the pruner has no registered name.
        backbone: What ``model`` looks like, where no adapter says.
        revision: Branch, tag or commit of the repository.
        token: For the Hub; ``None`` means the one that is stored on this machine.
        cache_dir: Where downloads are kept.

    Returns:
        The sparsified model; with ``model`` given, that very object.

    Raises:
        CheckpointError: The source does not exist, is damaged, incomplete, of a later version or of another
            architecture, or needs ``model``, ``scorer``, ``pruned`` or ``pruner``; nothing has been changed.
        StateError: ``model`` is sparsified already.
    """
    folder = hub.local_folder(source, revision=revision, token=token, cache_dir=cache_dir)
    if backbone is not None and model is None:
        raise CheckpointError("backbone= describes a model of yours; pass it as model= beside it.")
    if model is not None and not isinstance(model, nn.Module):
        raise CheckpointError(f"model={type(model).__name__}: expected a torch.nn.Module to load into.")
    if model is not None and any(name.endswith(_EXTRA) for name in model.state_dict()):
        raise StateError("model= is sparsified already; pass a dense one, or call tokenprune.unsparsify first.")
    with torch.random.fork_rng(devices=[]):  # new weights are drawn, and the saved ones take their places
        if not (folder / MANIFEST).exists():
            return _from_library_folder(folder, model, (scorer, pruned, pruner), backbone)
        return _from_own_folder(folder, model, (scorer, pruned, pruner), backbone)


class _Builders(NamedTuple):
    """What makes the scorers and the reductions of the saved model again."""

    scorer: str | ScorerBuilder
    pruned: str | ReductionBuilder
    pruner: str | Pruner | None = None


_Given = tuple[str | ScorerBuilder | None, str | ReductionBuilder | None, str | Pruner | None]


def _from_own_folder(
    folder: Path,
    model: nn.Module | None,
    given: _Given,
    backbone: Backbone | None,
) -> nn.Module:
    manifest = Manifest.read(folder)
    state = weights.read([folder / WEIGHTS])
    chosen = _builders(manifest.record, *given)
    own = {name: tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    base = {name: tensor for name, tensor in state.items() if name not in own}
    if manifest.scorers_only:
        into = _rebuilt(manifest, pretrained=True) if model is None else model
        return _scorers_into(into, manifest, own, base, chosen, backbone, given=model is not None)
    if model is not None:
        return _all_into(model, manifest.record, base, own, chosen, backbone, given=True)
    built = _rebuilt(manifest, pretrained=False)
    made = _all_into(built, manifest.record, base, own, chosen, None, given=False, wrote=_who(manifest))
    cast_buffers(made, manifest.buffer_dtypes)
    return made.eval()


def _all_into(
    model: nn.Module,
    record: Record,
    base: dict[str, Tensor],
    own: dict[str, Tensor],
    builders: _Builders,
    backbone: Backbone | None,
    *,
    given: bool,
    wrote: str = "",
) -> nn.Module:
    remedy = (
        "Pass the model that was saved, with the same classes and sizes."
        if given
        else f"{wrote} Install the versions that wrote it, or pass model=, the dense model to load into."
    )
    weights.check_fit(
        base, model.state_dict(), f"the saved weights are not those of this {type(model).__name__}", remedy
    )
    _sparsified(model, record, own, builders, backbone)
    if not given:
        _cast(model, base | own)
    model.load_state_dict(base | own)
    return model


def _scorers_into(
    model: nn.Module,
    manifest: Manifest,
    own: dict[str, Tensor],
    base: dict[str, Tensor],
    builders: _Builders,
    backbone: Backbone | None,
    *,
    given: bool,
) -> nn.Module:
    if base:
        raise CheckpointError(f"a folder of scorers alone holds other weights: {weights.shortened(list(base))}.")
    described = (describe(model) if backbone is None else backbone).for_stages(manifest.record.plan.stages)
    expected, found = (manifest.depth, manifest.embed_dim), (len(described.blocks), described.embed_dim)
    if expected != found:
        raise CheckpointError(
            f"the scorers belong to a {manifest.model_class} of {expected[0]} blocks and width {expected[1]}, and "
            f"this {type(model).__name__} has {found[0]} blocks and width {found[1]}."
        )
    if weights.digest(described.blocks) != manifest.blocks_sha256:
        differs = "the blocks of the base model do not have the very weights beside which the scorers were saved"
        if not given:
            raise CheckpointError(f"{differs}; pass model=, the base model they belong to.")
        warnings.warn(f"{differs}; check that it is the right model (another dtype alone is no harm).", stacklevel=4)
    _sparsified(model, manifest.record, own, builders, described)
    model.load_state_dict({**model.state_dict(), **own})
    return model if given else model.eval()


def _sparsified(
    model: nn.Module, record: Record, own: dict[str, Tensor], builders: _Builders, backbone: Backbone | None
) -> None:
    """Sparsify as recorded; if the saved scorers and reductions do not fit, leave the model as it was."""
    plan = record.plan
    try:
        sparsify(model, plan.stages, plan.keep_ratios, **builders._asdict(), backbone=backbone)
    except (PlanError, ValueError) as error:
        raise CheckpointError(f"{type(model).__name__} cannot be sparsified as the saved model was: {error}") from error
    sparsifier = sparsifier_of(model)
    sparsifier.thresholds = record.thresholds
    sparsifier.budget = record.budget
    set_norm_eps(sparsifier, record.norm_eps)
    if sparsifier.language is not None and record.language is not None:
        sparsifier.language.keep_ratio = record.language.keep_ratio
    expected = {f"{_PREFIX}{name}": value for name, value in sparsifier.state_dict().items()}
    expected.pop(_EXTRA, None)
    built = f"scorer={builders.scorer!r} and pruned={builders.pruned!r} build"
    try:
        weights.check_fit(own, expected, f"the saved scorers are not what {built}", "Pass scorer= or pruned=.")
    except CheckpointError:
        unsparsify(model)
        raise


def _builders(
    record: Record,
    scorer: str | ScorerBuilder | None,
    pruned: str | ReductionBuilder | None,
    pruner: str | Pruner | None,
) -> _Builders:
    """What was given, and what was recorded where nothing was."""
    language = record.language
    return _Builders(
        _builder("scorer", record.scorer, scorer, scorer_builder),
        _builder("pruned", record.pruned, pruned, reduction_builder),
        pruner if language is None else _builder("pruner", language.pruner, pruner, _check_pruner),
    )


def _check_pruner(pruner: str | Pruner) -> None:
    if pruner != "tower":
        pruner_of(pruner)


_Builder = TypeVar("_Builder", bound=Callable[..., Any])


def _builder(
    option: str, recorded: str | None, given: str | _Builder | None, resolve: Callable[[str | _Builder], Any]
) -> str | _Builder:
    what = {"scorer": "scorer", "pruned": "reduction", "pruner": "pruner"}[option]
    if given is not None:
        resolve(given)
        return given
    if recorded is None:
        raise CheckpointError(
            f"the saved model's {what} has no registered name; pass {option}=, the callable that it was sparsified "
            "with."
        )
    try:
        resolve(recorded)
    except ValueError as error:
        raise CheckpointError(
            f"the saved model's {what} {recorded!r} is not registered here; import the module that registers it "
            f"with tokenprune.register_{what}, or pass {option}= ({error})"
        ) from error
    return recorded


def _rebuilt(manifest: Manifest, *, pretrained: bool) -> nn.Module:
    if manifest.library is None or manifest.identity is None:
        raise CheckpointError(
            f"the saved {manifest.model_class} cannot be built from what was saved "
            f"({manifest.why_no_identity or 'its identity is missing'}); pass model=, the dense model to load into."
        )
    try:
        return build(manifest.library, manifest.identity, pretrained=pretrained)
    except UnsupportedModelError as error:
        raise CheckpointError(
            f"the saved {manifest.model_class} cannot be built: {error} {_who(manifest)} "
            "Pass model=, the dense model to load into."
        ) from error


def _who(manifest: Manifest) -> str:
    return "It was saved with " + ", ".join(f"{name} {number}" for name, number in manifest.versions.items()) + "."


def _cast(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give parameters and buffers the dtypes that were saved, without untying any."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def _from_library_folder(
    folder: Path,
    model: nn.Module | None,
    given: _Given,
    backbone: Backbone | None,
) -> nn.Module:
    """From what the model's own library wrote while it was sparsified: its files, with our tensors among them."""
    own = weights.read(sorted(folder.glob("*.safetensors")), prefix=_PREFIX)
    if _EXTRA not in own:
        raise CheckpointError(
            f"{folder} has no {MANIFEST} and no safetensors file with a sparsified model's tensors. Load a dense model "
            "with its own library and call tokenprune.sparsify."
        )
    record = Record.from_tensor(own.pop(_EXTRA))
    chosen = _builders(record, *given)
    try:
        # By the library itself, which may write other names than its models' state dicts have.
        loaded = load_from_library(str(folder), pretrained=True)
    except (UnknownModelError, UnsupportedModelError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by the library that wrote it: {error}") from error
    if model is not None:
        return _all_into(model, record, loaded.state_dict(), own, chosen, backbone, given=True)
    return _all_into(loaded, record, loaded.state_dict(), own, chosen, None, given=False).eval()
