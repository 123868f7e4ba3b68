"""What an adapter is, and how the one for a model is found.

An adapter describes the models of one library. It is found through the entry-point group ``tokenprune.adapters``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.entry_points import adapter_entries, libraries
from tokenprune.backbones.examples import Example
from tokenprune.backbones.preprocessing import Preprocessing
from tokenprune.backbones.probing import random_inputs
from tokenprune.backbones.supported import supported
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import CheckpointError, TokenpruneError, UnknownModelError, UnsupportedModelError


class Adapter(ABC):
    """Describes the models of one library to tokenprune, and builds them.

    Only `describe` has to be written. Each of the other methods makes one more thing possible, and refuses until
    it is written.

    An entry point of the group ``tokenprune.adapters`` makes an adapter known: its name is the root package of the
    models' classes, its value the adapter, an instance or a class, as in
    ``my_vits = "tokenprune_my_vits:MyViTAdapter"``. Importing the adapter must not import that library: whoever has
    one of its models has imported it already. A file ``supported.json`` in the adapter's package lists the models that
    were proved, see `SupportedModel`.
    """

    @abstractmethod
    def describe(self, model: nn.Module) -> Backbone:
        """Describe ``model``.

        Raises:
            UnsupportedModelError: The model cannot be described; the message says why.
        """

    def vision_language(self, model: nn.Module) -> VisionLanguage | None:
        """Where a vision-language model puts image tokens into its prompts; ``None`` of any other model."""
        return None

    def example_prompts(
        self, model: nn.Module, described: VisionLanguage, *, num_prompts: int, num_words: int
    ) -> Mapping[str, Any]:
        """Keyword arguments of a forward pass on prompts with a random image each; for ``tokenprune prefill``.

        Args:
            model: A vision-language model.
            described: What `vision_language` says of it.
            num_prompts: How many prompts.
            num_words: How many tokens each has besides those of its image.

        Raises:
            UnsupportedModelError: The adapter makes none.
        """
        raise UnsupportedModelError(f"{self} makes no prompts; pass those of the model's processor to the functions.")

    def identity(self, model: nn.Module) -> dict[str, Any]:
        """What `build` builds ``model`` from, as an object of JSON; for `save_pretrained`.

        It need not be complete: `save_pretrained` builds the model from it and compares. A key ``"hub_id"`` names
        public weights in the model card.

        Raises:
            UnsupportedModelError: ``model`` is not what the library builds by itself.
        """
        raise UnsupportedModelError(
            f"{self} does not say from what a {type(model).__name__} is built again; build the model yourself, and "
            "pass it as model= when what is saved is loaded."
        )

    def build(self, identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
        """A model from what `identity` gave; for `from_pretrained`.

        Args:
            identity: What `identity` gave, after a round trip through JSON.
            pretrained: Whether to load public weights; otherwise the caller loads all of them.

        Raises:
            UnsupportedModelError: This version of the library does not build it, or there are no public weights.
        """
        raise UnsupportedModelError(
            f"{self} does not build models; build the dense model yourself, and pass it as model=."
        )

    def load(self, name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
        """The model of a name, a folder that the library wrote or a Hub id; for the command line.

        Args:
            name: The name.
            pretrained: Whether to load trained weights.
            image_size: Height and width to build it for; ``None`` means its own.

        Raises:
            LookupError: It is none of the library's.
            UnsupportedModelError: It is, and cannot be made, at that size or with those weights.
        """
        raise UnknownModelError(
            f"{self} does not load models by name; load the model in Python, and pass it to tokenprune's functions"
        )

    def example_inputs(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Keyword arguments of a forward pass on two random images, to look at how ``model`` runs.

        Returns:
            ``None`` where images (B, channels, height, width) alone will do.
        """
        return None

    def names(self) -> Iterable[str]:
        """Names that `load` takes, to suggest one that is close; none unless they are listed."""
        return ()

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """How images become the input of ``model``; for `show`, `animate` and `report`.

        Raises:
            UnsupportedModelError: The model takes no images, or takes them in a way that cannot be described.
        """
        raise UnsupportedModelError(
            f"{self} does not say how images become the input of a {type(model).__name__}; {_PASS_PREPROCESSING}"
        )

    def from_state_dict(self, state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
        """The model that a state dict belongs to, with any weights: the caller loads them; for `load_dynamicvit`.

        Args:
            state: The dense model's weights under the names that its authors gave them.
            num_heads: Heads of the attention; ``None`` means the adapter is to know.

        Raises:
            CheckpointError: The adapter knows no model with such weights, or needs ``num_heads``.
        """
        raise _BuildsNone(
            f"{self} builds no models from official checkpoints; build the model, sparsify it, and load the weights "
            "into it."
        )

    def official_weights(self, model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights under the names that their authors gave them, under those of ``model``; for `load_dynamicvit`.

        Args:
            model: What `from_state_dict` made of them.
            state: The weights.
        """
        return state

    def examples(self) -> Iterable[Example]:
        """Small models of every kind that the adapter describes, to prove; for ``tokenprune prove``.

        The library may be imported here. Where it cannot build a model by itself, as when its release is too old,
        leave the example out.

        Raises:
            UnsupportedModelError: The adapter names none.
        """
        raise UnsupportedModelError(
            f"{self} names no examples to prove; pass a function that does, as in --examples tests.my_models:examples."
        )

    def __str__(self) -> str:
        return f"the adapter {type(self).__module__}.{type(self).__qualname__}"


_PASS_PREPROCESSING = "pass preprocessing=tokenprune.Preprocessing(size=…, mean=…, std=…)."


class _BuildsNone(CheckpointError):
    """From an adapter that builds no models from weights, so that its refusal says nothing about these."""


class _FunctionAdapter(Adapter):
    """A module, or another object, with functions of the methods' names: an adapter written for tokenprune 0.1."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        for name in ("identity", "build", "load", "names", "example_inputs", "preprocessing", "from_state_dict"):
            if callable(function := getattr(functions, name, None)):
                setattr(self, name, function)

    def describe(self, model: nn.Module) -> Backbone:
        described: Backbone = self._functions.describe(model)
        return described

    def __str__(self) -> str:
        return f"the adapter {getattr(self._functions, '__name__', self._functions)}"


def adapter(library: str) -> Adapter:
    """The adapter of a library.

    Raises:
        UnsupportedModelError: There is none, or what its entry point names cannot be imported or is no adapter.
    """
    entries = adapter_entries()
    if library not in entries:
        raise UnsupportedModelError(
            f"no adapter for {library!r} is installed; there are some for {', '.join(sorted(entries)) or 'nothing'}."
        )
    entry = entries[library]
    try:
        return _adapter_of(entry.load())
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise UnsupportedModelError(
            f"the adapter for {library} cannot be used: its entry point is {entry.value!r}, and "
            f"{type(error).__name__}: {error}. Install the package that brings it again, or remove it."
        ) from error


def _adapter_of(named: Any) -> Adapter:
    """The adapter that an entry point names: by itself, by its class, or by a module that holds it."""
    if isinstance(named, ModuleType) and _is_adapter(held := getattr(named, "adapter", None)):
        named = held
    if _is_adapter(named):
        made: Adapter = named() if isinstance(named, type) else named
        return made
    if not isinstance(named, type) and callable(getattr(named, "describe", None)):
        return _FunctionAdapter(named)
    raise TypeError(f"{named!r} is neither an instance nor a subclass of tokenprune.Adapter")


def _is_adapter(value: Any) -> bool:
    return isinstance(value, Adapter) or (isinstance(value, type) and issubclass(value, Adapter))


def library_of(model: nn.Module) -> str | None:
    """Root package of the library whose adapter knows the class of ``model``, or one of its bases."""
    entries = adapter_entries()
    packages = (base.__module__.partition(".")[0] for base in type(model).__mro__)
    return next((package for package in packages if package in entries), None)


def describe(model: nn.Module) -> Backbone:
    """The description of ``model`` by the adapter of the library its class comes from.

    Raises:
        UnsupportedModelError: No adapter knows the class, or its adapter refuses it.
    """
    library = library_of(model)
    if library is None:
        raise UnsupportedModelError(_unknown(model))
    return adapter(library).describe(model)


def vision_language_of(model: nn.Module) -> VisionLanguage | None:
    """Where ``model`` puts image tokens into its prompts, by the adapter of its library; ``None`` if it does not."""
    library = library_of(model)
    return None if library is None else adapter(library).vision_language(model)


def example_prompts_of(
    model: nn.Module, described: VisionLanguage, *, num_prompts: int, num_words: int
) -> Mapping[str, Any]:
    """Keyword arguments of a forward pass of a vision-language model, by the adapter of its library.

    Raises:
        UnsupportedModelError: The adapter makes none.
    """
    library = library_of(model)
    assert library is not None  # whose adapter has described the model
    return adapter(library).example_prompts(model, described, num_prompts=num_prompts, num_words=num_words)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How images become the input of ``model``, by the adapter of the library its class comes from.

    Raises:
        UnsupportedModelError: No adapter says.
    """
    library = library_of(model)
    if library is None:
        raise UnsupportedModelError(
            f"no adapter says how images become the input of a {type(model).__name__}; {_PASS_PREPROCESSING}"
        )
    return adapter(library).preprocessing(model)


def example_inputs_of(model: nn.Module, size: tuple[int, int, int]) -> Mapping[str, Any] | tuple[Any, ...]:
    """What ``model`` is called with on two random images: by its adapter, or images of ``size`` alone.

    Raises:
        UnsupportedModelError: It is on the meta device, where nothing can be run.
    """
    library = library_of(model)
    inputs = None if library is None else adapter(library).example_inputs(model)
    return inputs if inputs is not None else (random_inputs(model, images=(2, *size))["images"],)


def model_of(state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
    """The dense model that a state dict belongs to, built by the first adapter that knows it, without its weights.

    Raises:
        CheckpointError: None does; the message has the reason of each that builds models.
    """
    refusals: list[CheckpointError] = []
    for library in libraries():
        try:
            return adapter(library).from_state_dict(state, num_heads=num_heads)
        except _BuildsNone:
            continue
        except CheckpointError as error:
            refusals.append(error)
        except UnsupportedModelError as error:
            refusals.append(CheckpointError(str(error)))
        except ModuleNotFoundError as error:
            refusals.append(CheckpointError(f"the model would be one of {library}, which is not installed ({error})."))
    if not refusals:
        raise CheckpointError("no installed adapter builds models from official checkpoints.")
    if len(refusals) == 1:
        raise refusals[0]
    raise CheckpointError("\n".join(["no adapter knows a model with these weights.", *map(str, refusals)]))


def official_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The authors' weights under the names of a model that `model_of` made of them."""
    library = library_of(model)
    return state if library is None else adapter(library).official_weights(model, state)


def _unknown(model: nn.Module) -> str:
    cls = type(model)
    lines = [
        f"no adapter knows {cls.__module__}.{cls.__qualname__}.",
        "Proved are (tokenprune.supported() names the models), and others like them work too:",
        *(f"  {library}: {_families(library)}" for library in libraries()),
        "For any other model whose blocks take and return (B, L, C) tokens, say where they are:",
        "  tokenprune.sparsify(model, backbone=tokenprune.Backbone(",
        "      blocks=model.blocks, num_prefix_tokens=1, embed_dim=384))",
    ]
    return "\n".join(lines)


def _families(library: str) -> str:
    try:
        return ", ".join(sorted({model.family for model in supported(library)}))
    except TokenpruneError as error:
        return str(error)
