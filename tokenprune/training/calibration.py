"""Calibration: training what `sparsify` added to a model, on images without labels, in minutes.

Shapes: B images.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from tokenprune.api import sparsifier_of, unwrap
from tokenprune.pruning.plan import cumulative_ratios
from tokenprune.training.batches import Batches
from tokenprune.training.budgets import calibrate_anew
from tokenprune.training.calibration_report import Agreement, CalibrationReport
from tokenprune.training.comparison import Comparison
from tokenprune.training.fitting import Fit, fit
from tokenprune.training.objectives import BackboneObjective, ScorerObjective
from tokenprune.training.preserving import preserved
from tokenprune.training.progress import CalibrationProgress
from tokenprune.training.requirements import (
    check_model,
    check_settings,
    checked_range,
    trained_parameters,
)
from tokenprune.training.validation import Validation

NUM_BUDGET_BATCHES = 6


def calibrate(
    model: nn.Module,
    images: Iterable[Any],
    *,
    steps: int = 100,
    train: Literal["scorers", "all"] = "scorers",
    backbone_steps: int = 150,
    keep_ratio_range: tuple[float, float] | None = (0.4, 0.7),
    learning_rate: float = 3e-3,
    backbone_learning_rate: float = 2e-4,
    autocast: torch.dtype | None = None,
    validation_batches: int = 2,
    adaptive: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Train what `sparsify` added to a model, and nothing else, to agree with the model as it is unpruned.

    The model is its own teacher, so that images without labels are enough. Of a classifier, the class probabilities of
    the pruned model are to be those of the dense one; of any other model, its features: what it puts out as (B, D),
    or else its final tokens. To that comes the distance of the final patch tokens, as in DynamicViT (arXiv 2106.02034,
    Eq. 14), and its ratio loss. Tokens are masked, as in training, with decisions that are sampled from the scores.

    From time to time the model is compared with the dense one as inference runs it, tokens removed, on the first
    batches, which are held back. The last scorers are left in the model, unless the first were better; where Ctrl-C
    ends the calibration, or the images do, the best so far.

    Of what `sparsify` added, what does not require a gradient stays as it is, unless nothing of it does: so the
    predictors of a model with fast paths are trained alone.

    Afterwards every weight and buffer that `sparsify` did not add, gradients, ``requires_grad``, the mode of every
    module, keep ratio, execution and the state of torch's random number generators are, bit by bit, what they were.

    Deviation: the divergence is KL(dense ‖ pruned), the usual one of distillation, where `DynamicViTLoss` has the
    paper's, the other way round.

    Deviation: scores are trained at a keep ratio ρ that is drawn anew in each step. So that they need not change with
    it, an image's log-odds are shifted until as many tokens are expected to be kept as ρ says. The ratio loss holds the
    log-odds that are left at the model's own keep ratio.

    With ``train="all"`` the rest of the model is trained after that, at the model's own keep ratios, with tokens really
    removed and the scorers held, as in `gathered`. Its teacher is a copy of the dense model as it was. Scorers without
    parameters, such as class attention, need no first part.

    Args:
        model: A sparsified model, on its device, possibly compiled. It runs in eval mode.
        images: An iterable of batches, such as a DataLoader: tensors (B, …), mappings of the model's arguments, or
            tuples that begin with one of these. Labels are not looked at: neither what follows in a tuple, nor
            what has ``label`` in its name. It is read again when it ends; an iterator, which cannot be, ends the
            calibration early. 32 images or more a batch are good.
        steps: Steps of the optimiser that train what `sparsify` added, one batch each; with ``train="all"`` 0 leaves
            them out.
        train: ``"scorers"``, or ``"all"``.
        backbone_steps: With ``train="all"``, further steps that train everything that requires a gradient, but for the
            scorers.
        keep_ratio_range: The lowest and the highest ρ that is drawn, in (0, 1]; stages keep ρ, ρ², ρ³ … of the
            patch tokens. ``None`` trains at the model's own keep ratios alone.
        learning_rate: The peak of AdamW's learning rate. The default is for `Predictor`; `Static` scorers, of which
            each weight stands for itself, take 5e-2.
        backbone_learning_rate: The same for ``backbone_steps``.
        autocast: The dtype in which to run the model, such as ``torch.bfloat16``; ``None`` means its own.
        validation_batches: How many batches to hold back; where there are no more than that, half of what there is.
        adaptive: Whether to find the thresholds of an adaptive budget afterwards, as `calibrate_budget` does, on the
            batches that are held back and the next ones. A model that has thresholds gets new ones in any case.
        seed: Of what is drawn.
        progress: Whether to show a bar on stderr, if that is a terminal or a notebook.

    Returns:
        What was done, and the agreement with the dense model before and after.

    Raises:
        StateError: The model is not sparsified, runs dense or is wrapped by `DistributedDataParallel`; it has
            nothing that could be trained; or it must be trained in parts.
        PlanError: ``keep_ratio_range`` is none.
        ValueError, TypeError: ``images`` yields no images, or nothing that a model could be given; or a setting is
            out of its range.
        FloatingPointError: A loss is not finite.

    Whatever is raised, the model is left exactly as it was.
    """
    started = time.perf_counter()
    check_model(model)
    check_settings(
        lowest={
            "steps": (steps, 0 if train == "all" else 1),
            "backbone_steps": (backbone_steps, 1),
            "validation_batches": (validation_batches, 1),
        },
        rates={"learning_rate": learning_rate, "backbone_learning_rate": backbone_learning_rate},
        autocast=autocast,
    )
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    plans = [sparsifier.plan.keep_ratios]
    if keep_ratio_range is not None:
        plans += [cumulative_ratios(ratio, len(plans[0])) for ratio in checked_range(keep_ratio_range)]
    added, rest = trained_parameters(model, train, steps)
    parameter = next(inner.parameters())
    with preserved(inner, sparsifier, {*added, *rest}, seed), sparsifier.budgeting("fixed"):
        inner.eval()
        batches = Batches(images, num_held_back=validation_batches, device=parameter.device, dtype=parameter.dtype)
        comparison = Comparison(inner, sparsifier, autocast)
        comparison.find_measure(batches.held_back[0])
        validation = Validation(comparison, batches.held_back, tuple(dict.fromkeys(plans)))
        first = validation.run()
        run = Fit(first, first)
        phase = partial(fit, run, batches=batches, validation=validation, scale_loss=autocast == torch.float16)
        if added:
            objective = ScorerObjective(comparison, keep_ratio_range, seed)
            with CalibrationProgress(steps, shown=progress, description="calibrating") as bar:
                phase(objective, added, steps=steps, learning_rate=learning_rate, num_plans=None, progress=bar)
        if rest and run.stopped == "done":
            # The scorers were chosen at all plans, the backbone is at the model's own, which comes first.
            gathered = BackboneObjective(comparison, comparison.copy())
            with CalibrationProgress(backbone_steps, shown=progress, description="training the backbone") as bar:
                phase(
                    gathered,
                    rest,
                    steps=backbone_steps,
                    learning_rate=backbone_learning_rate,
                    num_plans=1,
                    progress=bar,
                )
        num_images = batches.num_images
        calibrate_anew(inner, [*batches.held_back, *batches.some(NUM_BUDGET_BATCHES)], adaptive=adaptive)
    return CalibrationReport(
        measure=comparison.measure,
        agreements=tuple(
            Agreement(keep_ratios=plan, before=before, after=after)
            for plan, before, after in zip(validation.plans, run.first.agreements, run.left.agreements, strict=True)
        ),
        steps=len(run.losses),
        step_left=run.left_step,
        stopped=run.stopped,
        num_images=num_images,
        num_validation_images=validation.num_images,
        kept_ratios=run.left.kept_ratios,
        losses=tuple(run.losses),
        seconds=time.perf_counter() - started,
    )
