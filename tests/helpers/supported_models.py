"""What the census proved: its counts, and the page of the docs that is made from the lists beside the adapters.

``tokenprune prove`` writes these lists, ``python -m tests.helpers.supported_models`` the page; a test fails where it is
out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenprune
from tests.census import timm as census_timm
from tests.census import timm_hierarchies, torchvision_hierarchies, transformers_hierarchies, transformers_packed
from tests.census import torchvision as census_torchvision
from tests.census import transformers as census_transformers
from tests.census.entry import Entry
from tokenprune import SupportedModel
from tokenprune.backbones.supported import proved_version

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "supported-models.md"
LIBRARIES = ("timm", "transformers", "torchvision")

TABLES: dict[str, dict[str, list[Entry]]] = {
    "timm": {
        "flat entry points": census_timm.flat(),
        "of these ViTamin": [entry for entry in census_timm.flat() if entry.family == "vitamin"],
        "VOLO": census_timm.volo(),
        "given patches of many sizes": census_timm.naflex_dict(),
        "hierarchies with a fast path": timm_hierarchies.examples(),
    },
    "transformers": {
        "classes that differ little from a list of blocks": census_transformers.supported(),
        "classes that differ more": census_transformers.uncovered(),
        "models of several parts": [*census_transformers.composites(), *census_transformers.language_models()],
        "given images of different sizes in one sequence": transformers_packed.towers(),
        "models behind such towers": [*transformers_packed.composites(), *transformers_packed.alike()],
        "hierarchies with a fast path": transformers_hierarchies.examples(),
    },
    "torchvision": {
        "flat entry points": census_torchvision.supported(),
        "hierarchies with a fast path": torchvision_hierarchies.every(),
    },
}

Recorded = Mapping[str, list[str]]
"""Names of models, by what was found of them and their library, such as ``"supported timm"``."""

HEAD = """# Supported models

{counts}

Each was built by its library at a small size, with random weights, and
[proved](write-an-adapter.md#prove-your-models) on every output: with nothing pruned it is the dense model (to 1e-5),
masking equals gathering (to 2e-5, relative), undoing is exact, and a training step gives every predictor a finite
gradient. *Compile* and *export* say that `torch.compile(fullgraph=True)` or `torch.export` took the pruned model, and
are tried on one model of each kind of timm's, on torchvision's first, on the plainer classes of transformers, and of
hierarchies on a Swin and a ConvNeXt, in other tests. Hierarchies are listed by themselves. Of timm's 17 files that the
method is meant for, such as Swin's and ConvNeXt's, every entry point was proved; of each other file, the one that is
named. Other sizes of these models work as well, and so do other input sizes and non-square grids wherever the model
itself takes them. `tokenprune.supported()` gives this list in code.

What is not here may work too: `sparsify` finds blocks by their structure, says so where it cannot, and
[`verify`](write-an-adapter.md) proves the rest on your own model and inputs.
"""

TAIL = """
## What is refused, and why

Where pruned tokens leave the sequence, as with every reduction but `"fast"` and `"fast_nested"`:

- **Hierarchies** (Swin, PVT, Hiera, ConvNeXt, MaxViT, PiT, LeViT and others): they pool tokens as they go.
- **Windows and grids** (SAM, ViTDet and others): their blocks need the full grid.
- **Attention that is not over all tokens** (XCiT, CoaT, TimeSformer, VideoPrism): dropping one has no single meaning.
- **Models of several parts whose other parts need every token** (Idefics2, Janus, OWL-ViT and others): their towers can
  be sparsified alone. In [vision-language models](vision-language-models.md) with `stages=()`, and in LLaVA-NeXT and
  LLaVA-OneVision with a pruner by name, image tokens are pruned behind the tower.

With [`pruned="fast"`](hierarchies.md):

- **Blocks without a part that treats tokens one by one**: two linear layers, or 1 × 1 convolutions, in a row to more
  channels and back, over all tokens of an image as the block gets them. {refused}

Each is refused with an error that says so, and is left as it was.
"""


def counts(recorded: Recorded) -> Iterator[str]:
    """How many models of each library were proved in one run, of how many, and how many refused."""
    for library in LIBRARIES:
        supported, refused = recorded.get(f"supported {library}", []), recorded.get(f"refused {library}", [])
        if supported or refused:
            yield f"{library} {version(library)}: {len(supported)} models proved, {len(refused)} refused"
        for what, entries in TABLES[library].items():
            if supported:
                yield f"  {what}: {sum(entry.name in supported for entry in entries)} of {len(entries)}"


def page() -> str:
    """The page as it should be, from the lists beside the adapters."""
    sections = []
    numbers = []
    for library in LIBRARIES:
        models = tokenprune.supported(library)
        flat, whole = ([one for one in models if (one.pruned == "drop") is dropped] for dropped in (True, False))
        numbers.append(f"- **{library}** {proved_version(library)}: {len(flat)} models, and {len(whole)} hierarchies")
        if library == "transformers":
            towers, behind = (
                len({model.name for model in flat} & {entry.name for entry in TABLES[library][what]})
                for what in ("given images of different sizes in one sequence", "models behind such towers")
            )
            numbers.append(
                f"  - of these {towers} vision towers that are given [images of different sizes](packed-towers.md) in "
                f"one sequence, and {behind} models with such a tower"
            )
        sections.append(f"\n## {library}\n\n{_table(flat)}")
        sections.append(f'\n### Hierarchies of {library}, with `pruned="fast"`\n\n{_table(whole)}')
    return HEAD.format(counts="\n".join(numbers)) + "".join(sections) + TAIL.format(refused=_refused())


def _refused() -> str:
    """Which of timm's files have none, and of how many."""
    files = sorted({entry.family for entry, _ in timm_hierarchies.refused()})
    num_proved = len({*timm_hierarchies.HIERARCHIES, *timm_hierarchies.OTHERS})
    listed = ", ".join(f"`{file}`" for file in files)
    return (
        f"Of timm's files without a flat list of blocks, {num_proved} are listed above, and these {len(files)} are "
        f"refused, which hold convolutional networks of an older kind, TNT and MLP-Mixer: {listed}."
    )


def _table(models: Sequence[SupportedModel]) -> str:
    def kind(model: SupportedModel) -> tuple[Any, ...]:
        return model.family, model.model_class, model.pooling, model.position_encoding, model.side_inputs

    rows = ["| family | class | models | pooling | positions | side inputs | compile | export |", "|" + "---|" * 8]
    for key, group in groupby(sorted(models, key=lambda model: (*map(str, kind(model)), model.name)), kind):
        alike = list(group)
        family, cls, pooling, positions, side_inputs = key
        names = [model.name for model in alike]
        listed = "" if names == [cls] else ", ".join(f"`{name}`" for name in names)
        passes = {one for model in alike for one in model.passes}
        ticks = ["yes" if how in passes else "" for how in ("compile", "export")]
        cells = [family, f"`{cls}`", listed, pooling, positions, ", ".join(side_inputs), *ticks]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
