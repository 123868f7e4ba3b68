"""From a name to a model: a saved folder, a Hub repository, or a model that a library knows by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from torch import nn

from tokenprune.backbones.adapters import adapter
from tokenprune.backbones.entry_points import libraries
from tokenprune.backbones.supported import supported
from tokenprune.errors import UnknownModelError, UnsupportedModelError


def load_from_library(name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
    """A dense model that one of the libraries knows by a name, a folder that it wrote, or a Hub id.

    Libraries whose tests have proved a model of that name are asked first, so that only they are loaded; then the
    others, in alphabetical order. ``library:name`` asks one alone.

    Args:
        name: The name.
        pretrained: Whether to load its trained weights.
        image_size: Height and width to build it for; ``None`` means its own.

    Raises:
        UnknownModelError: None knows it; the message lists who was asked, and names that are close.
        UnsupportedModelError: The one that knows it refuses.
    """
    prefix, colon, rest = name.partition(":")
    asked = libraries()
    if colon and prefix in asked:
        asked, name = (prefix,), rest
    elif not Path(name).exists():
        proved = [library for library in asked if any(model.name == name for model in supported(library))]
        asked = (*proved, *(library for library in asked if library not in proved))
    reasons: list[str] = []
    for library in asked:
        try:
            found = adapter(library)
        except UnsupportedModelError as error:  # an adapter that is damaged, not one that refuses the model
            reasons.append(f"{library}: {str(error).removesuffix('.')}")
            continue
        try:
            return found.load(name, pretrained=pretrained, image_size=image_size)
        except ImportError as error:
            reasons.append(f"{library}: not installed ({error})")
        except LookupError as error:
            reasons.append(f"{library}: {error.args[0] if error.args else 'unknown'}")
    answers = "; ".join(reasons) or "nobody, since no adapter is installed"
    raise UnknownModelError(f"no model {name!r}. Asked were: {answers}.{_suggestion(name)}")


def _suggestion(name: str) -> str:
    names: set[str] = set()
    for library in libraries():
        try:
            names.update(adapter(library).names())
        except (ImportError, UnsupportedModelError):  # a library that is not installed, an adapter that is damaged
            continue
    close = difflib.get_close_matches(name.rpartition(":")[2], sorted(names), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
