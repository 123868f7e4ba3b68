"""The outputs of sparsified models as they were before the core was rebuilt, written down once and compared since.

``python -m tests.helpers.golden write FILE`` writes them, of the checkout that it runs in; ``tests/test_golden.py``
compares. Of every output up to 64 values are written, evenly spread, in double precision, so that the file stays small.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tokenprune
from tests.census import timm as census_timm
from tests.census import torchvision as census_torchvision
from tests.census import transformers as census_transformers
from tests.census.entry import KEEP_RATIO, STAGES, Entry
from tests.helpers.zoo import ALL, Case

FILE = Path(__file__).with_name("golden.safetensors")
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
    model, inputs = entry.model(double=True), entry.example(double=True)
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


# Of timm one model of each of these files; of the other libraries one of each family.
FAMILIES = {
    "beit", "cait", "convit", "deepseek_vit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "vitamin", "volo",
    "vision_transformer_relpos", "vision_transformer_hybrid",
}  # fmt: skip


def entries() -> dict[str, Entry]:
    """The models of the census that are written down, by names that differ."""
    timm = [*census_timm.flat(), *census_timm.volo(), *census_timm.naflex_dict()]
    others = [*census_transformers.supported(), *census_transformers.uncovered(), *census_torchvision.supported()]
    kinds: dict[tuple[str, str], Entry] = {}
    for entry in (*timm, *others):
        if entry.library != "timm" or entry.family in FAMILIES:
            kinds.setdefault((entry.library, entry.family), entry)
    found: dict[str, Entry] = {}
    for entry in (*kinds.values(), *census_transformers.composites()):
        number = sum(other.name == entry.name for other in found.values())
        found[f"{entry} {number}" if number else str(entry)] = entry
    return found


def record() -> tuple[dict[str, Tensor], list[str]]:
    """All that is written down, by model and output, and the models that could not be run in double precision."""
    found: dict[str, Tensor] = {}
    left_out: list[str] = []
    for case in ALL:
        found |= {f"{case}: {name}": value for name, value in of_case(case).items()}
    for key, entry in entries().items():
        try:
            found |= {f"{key}: {name}": value for name, value in of_entry(entry).items()}
        except Exception as error:
            left_out.append(f"{key}: {type(error).__name__}: {str(error)[:90]}")
    return found, left_out


if __name__ == "__main__":
    torch.set_num_threads(2)
    tensors, missing = record()
    save_file(tensors, Path(sys.argv[2]))
    sys.stdout.write(
        "\n".join([*missing, f"{len(tensors)} outputs of {len({name.split(':')[0] for name in tensors})} models", ""])
    )
