"""What is left between a sparsified model and its limit, frozen or not? ``python -m benchmarks.frozen``."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import timm
import torch
import typer

import tokenprune
from benchmarks.inference import shortened
from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, input_size, report
from recipes.digits.model import load_dense_model
from tokenprune.analysis.runtimes import in_turn, runtime_named

DIGITS = "digits_vit"
SCORERS = {"predictor": "official", "predictor_slim": "slim", "predictor_linear": "linear"}


def main(
    model: Annotated[str, typer.Option(help=f"A Vision Transformer of timm, or {DIGITS}.")] = "deit_small_patch16_224",
    batch_size: Annotated[list[int] | None, typer.Option(help="Images a pass; give it several times.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="ρ: ρ, ρ², ρ³ of the patch tokens are kept.")] = 0.7,
    runtime: Annotated[str, typer.Option(help="eager, compile, pt2 or onnx: what runs the models.")] = "eager",
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 21,
    name: Name = "frozen-cpu",
) -> None:
    """Time in turn: dense, its sequence cut off, both predictors, frozen and not, and hooks that prune nothing.

    The last of these in eager PyTorch alone; other runtimes see no hooks.
    """
    torch.manual_seed(0)
    dense: Any = (load_dense_model() if model == DIGITS else timm.create_model(model)).eval()
    dense.to(device, getattr(torch, dtype))

    def sparse(scorer: str, ratio: float = keep_ratio) -> Any:
        return tokenprune.sparsify(copy.deepcopy(dense), keep_ratio=ratio, scorer=scorer)

    plan = sparse("predictor").tokenprune.plan
    cut = shortened(dense, plan, dense.patch_embed.num_patches)
    rows, data = [], []
    runners: dict[str, Any] = {"sequence cut off, no more": cut}
    for scorer, label in SCORERS.items():
        runners[f"{label} predictor"] = sparse(scorer)
        runners[f"{label} predictor, frozen"] = tokenprune.freeze(sparse(scorer))
    if runtime == "eager":
        runners["ρ = 1, nothing pruned"] = sparse("predictor", 1.0)
        runners["ρ = 1, frozen"] = tokenprune.freeze(sparse("predictor", 1.0))
        runners["an untouched copy"] = copy.deepcopy(dense)
    batches = {batch: pairs if batch > 4 else 4 * pairs for batch in batch_size or [1, 16]}  # short ones scatter more
    times = {}
    with torch.no_grad(), runtime_named(runtime)([dense, *runners.values()], input_size(dense)) as timers:
        for batch, repeats in batches.items():
            images = torch.rand(batch, *input_size(dense), device=device, dtype=getattr(torch, dtype))
            times[batch] = in_turn(timers(images), rounds=repeats, warmup=3)
    for batch, (first, *others) in times.items():
        limit = Ratio(first_seconds=first, second_seconds=others[0])
        for label, seconds in zip(runners, others, strict=True):
            speed = Ratio(first_seconds=first, second_seconds=seconds)
            lower, upper = speed.quartiles
            of_limit = Ratio(first_seconds=limit.second_seconds, second_seconds=seconds).median
            pruned = "ρ = 1" not in label and "copy" not in label
            rows.append(
                [
                    f"{batch}", label, f"{1e3 * speed.medians[1]:.2f}",
                    f"{speed.median:.3f} ({lower:.3f} … {upper:.3f})", f"**{of_limit:.3f}**" if pruned else "",
                ]
            )  # fmt: skip
            data.append({"batch_size": batch, "what": label, "dense_over_it": speed, "of_limit": of_limit})
    report(
        name,
        f"{model}, runtime {runtime}, ρ = {keep_ratio:g}, medians of {pairs} rounds ({4 * pairs} at batches up to 4)",
        environment(device, dtype),
        ("batch", "what runs", "ms a batch", "speed-up over dense (quartiles)", "of the cut sequence's speed"),
        rows,
        data,
    )


if __name__ == "__main__":
    typer.run(main)
