"""The outputs of sparsified models as they were before the core was rebuilt, written down once and compared ever since.

``python -m tests.golden write FILE`` writes them, with whatever state the checkout is in; ``tests/test_golden.py`` compares.
Of every output up to 64 values are written, evenly spread, in double precision, so that the file stays small.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tokenprune
from tests import census_timm, census_torchvision, census_transformers
from tests.census import KEEP_RATIO, STAGES, Entry
from tests.zoo import ALL, Case

NUM_VALUES = 64


def spread(values: Tensor) -> Tensor:
    """Up to `NUM_VALUES` of the values, evenly spread."""
    flat = values.detach().double().flatten()
    step = max(1, flat.numel() // NUM_VALUES)
    return flat[::step][:NUM_VALUES].clone()


def of_case(case: Case) -> dict[str, Tensor]:
    """What a form of model of the zoo puts out, in both executions and in a step of training."""
    found: dict[str, Tensor] = {}
    model, images = case.sparsified(torch.float64), case.images(dtype=torch.float64)
    with torch.no_grad():
        for execution in ("gather", "mask"):
            model.tokenprune.execution = execution
            found |= {f"{execution} {name}": spread(value) for name, value in case.run(model, images).items()}
    model.tokenprune.execution = "auto"
    for module in model.modules():  # other draws than those of the decisions
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    outputs = case.run(model.train(), images)
    sum(value.square().mean() for value in outputs.values() if value.is_floating_point()).backward()
    found |= {f"training {name}": spread(value) for name, value in outputs.items()}
    for number, stage in enumerate(model.tokenprune.stages):
        gradient = torch.stack(
            [parameter.grad.norm() for parameter in stage.parameters() if parameter.grad is not None]
        )
        found[f"gradients of stage {number}"] = spread(gradient)
    return found


def of_entry(entry: Entry) -> dict[str, Tensor]:
    """What a model of the census puts out, in both executions."""
    model, inputs = entry.model().double(), _doubled(entry.example())
    tokenprune.sparsify(model, STAGES, KEEP_RATIO)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.tokenprune.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        found = {}
        for execution in ("gather", "mask"):
            model.tokenprune.execution = execution
            outputs = _tensors(model(**inputs))
            found |= {f"{execution} {name}": spread(value) for name, value in outputs.items()}
    return found


def _doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _doubled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_doubled(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: Any, name: str = "output") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items: list[tuple[Any, Any]] = []
    if hasattr(value, "items"):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= _tensors(item, f"{name}.{key}")
    return found


# One model of every family of which an adapter says something that structure alone does not, and one of each library.
FAMILIES = {
    "beit", "cait", "convit", "deepseek_vit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer_relpos",
    "vitamin", "volo", "vision_transformer_hybrid", "data2vec", "vjepa2", "step3p7", "mlcd", "llama4", "pixtral", "x_clip",
    "yolos", "siglip2", "phi4_multimodal", "gemma4", "granite_docling", "janus", "dinov3_vit", "sapiens2",
}  # fmt: skip


def entries() -> Iterator[Entry]:
    """The models of the census that are written down."""
    seen: set[tuple[str, str]] = set()
    timm = [*census_timm.flat(), *census_timm.volo(), *census_timm.naflex_dict()]
    transformers = [
        *census_transformers.supported(),
        *census_transformers.uncovered(),
        *census_transformers.composites(),
    ]
    for entry in (*timm, *transformers, *census_torchvision.supported()):
        kind = (entry.library, entry.family)
        composite = entry in transformers[-17:]
        if kind in seen and not composite:
            continue
        if entry.library != "timm" or entry.family in FAMILIES:
            seen.add(kind)
            yield entry


def record() -> tuple[dict[str, Tensor], list[str]]:
    """All that is written down, by model and output, and the models that could not be run in double precision."""
    found: dict[str, Tensor] = {}
    left_out: list[str] = []
    for case in ALL:
        found |= {f"{case}: {name}": value for name, value in of_case(case).items()}
    for entry in entries():
        try:
            found |= {f"{entry}: {name}": value for name, value in of_entry(entry).items()}
        except Exception as error:
            left_out.append(f"{entry}: {type(error).__name__}: {str(error)[:90]}")
    return found, left_out


if __name__ == "__main__":
    torch.set_num_threads(2)
    tensors, missing = record()
    save_file(tensors, Path(sys.argv[2]))
    sys.stdout.write(
        "\n".join([*missing, f"{len(tensors)} outputs of {len({name.split(':')[0] for name in tensors})} models", ""])
    )
