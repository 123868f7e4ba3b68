"""The docs page of supported models, made from the models that the tests run on.

``python -m tests.supported_models`` writes it; a test fails where it is out of date.
"""

from __future__ import annotations

from pathlib import Path

from tests.zoo import TIMM, TORCHVISION, TRANSFORMERS, Case

PAGE = Path(__file__).parent.parent / "docs" / "supported-models.md"

HEAD = """# Supported models

Each line is a model class, with the forms of it that pass the whole protocol of proof on every change: identity with
nothing pruned, mask equals gather in single and double precision, exact undo, copies, state dicts, a finite gradient to
every predictor, counted multiply-adds. Subclasses and other sizes of these work as well, and so do other input sizes
and non-square grids wherever the model itself takes them.

A model that is not here, and whose blocks take and return `(B, L, C)` tokens, can be
[described in three lines](write-an-adapter.md).
"""

TAIL = """
## Not supported

- Models without a flat list of blocks over tokens: Swin, ConvNeXt, ResNet, and others that pool as they go.
- timm's `VisionTransformerRelPos`, `Eva`, `Beit` and other classes of their own.
- transformers' `…Backbone` and `…ForMaskedImageModeling` classes and contrastive models as a whole: what they do with
  their tokens takes all of them. The vision model inside a contrastive one can be sparsified alone.

Each is refused with an error that says so, and is left as it was.
"""


def page() -> str:
    """The page as it should be."""
    sections = [
        f"\n## {library}\n\n| class | tested forms |\n|---|---|\n{_rows(cases)}"
        for library, cases in (("timm", TIMM), ("transformers", TRANSFORMERS), ("torchvision", TORCHVISION))
    ]
    return HEAD + "".join(sections) + TAIL


def _rows(cases: list[Case]) -> str:
    forms: dict[str, list[str]] = {}
    for case in cases:
        forms.setdefault(type(case.build()).__name__, []).append(case.name.partition(" ")[2] or "plain")
    return "".join(f"| `{name}` | {'; '.join(names)} |\n" for name, names in forms.items())


if __name__ == "__main__":
    PAGE.write_text(page())
