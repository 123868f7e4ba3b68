"""A `transformers.Trainer` that trains sparsified models with the loss and the schedule of DynamicViT.

Shapes: B images, N patch tokens, K classes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tokenprune.api import dense, unsparsify
from tokenprune.errors import StateError
from tokenprune.integrations.averages import Averages
from tokenprune.integrations.checkpoints import newest_complete
from tokenprune.integrations.checks import (
    PAPER_LEARNING_RATE_SCALE,
    check_arguments,
    check_classifies,
    check_schedule,
    check_sparsified,
    use_non_reentrant_checkpointing,
)
from tokenprune.integrations.learning_rates import complete_states, leave_out_backbone, split_groups, zero_gradients
from tokenprune.integrations.own_names import own_names
from tokenprune.integrations.sharding import autocast_of, left_unprepared, prepare_sharding, save_whole, share_weights
from tokenprune.pruning.trace import Trace
from tokenprune.training.calibration import calibrate
from tokenprune.training.gathered import gathered
from tokenprune.training.losses import DynamicViTLoss, logits_of

PAPER_FROZEN_SHARE = 5 / 30

logger = logging.getLogger(__name__)


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` for sparsified models, whose loss is `DynamicViTLoss`.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034).

    Predictors learn at ``args.learning_rate``, the rest of the model (the backbone) at a fraction of
    it, and in the first epochs not at all. Optimiser, schedule, weight decay (none for biases and norms),
    precision, accumulation, checkpoints and everything else are the Trainer's own, from ``args``;
    parameters with ``requires_grad=False`` stay as they are. Labels come as ``labels``: class indices
    (B,) or probabilities (B, K).

    Logs hold, besides the Trainer's own figures, the parts of the loss (``classification``, ``kl``,
    ``distill``, ``ratio``) and for each stage the share of patch tokens that it left (``kept_ratio_0``,
    …), averaged since the last log, and ``backbone_learning_rate``. Evaluation runs the model as
    inference does, tokens removed; its loss is the classification part, and ``eval_kept_ratio_0`` … are
    the shares left.

    Processes hold whole models, or shards of one: FSDP2 and DeepSpeed's ZeRO 1 and 2 work as Accelerate's configuration
    or ``args`` ask for them, and other ways to shard are refused. ``args.torch_compile`` compiles the teacher, too.

    Weights are saved under the names that the model's ``state_dict`` has, those of the predictors
    (``tokenprune.…``) among them, and the teacher is not. A checkpoint with other names is refused.

    Args:
        model: The sparsified model. A ``model_init`` returns one.
        args: The `TrainingArguments`. With activation checkpointing, ``use_reentrant`` is set to
            ``False`` in its keyword arguments.
        teacher: The dense model to learn from, as it was before it was sparsified; ``None`` copies the
            model, weights as they are now, without what `tokenprune.sparsify` added. Give one to go on
            training weights that have been sparse before.
        criterion: Called as ``criterion(logits, labels)``; ``None`` means cross-entropy with
            ``args.label_smoothing_factor``.
        kl_weight: λ_KL, see `DynamicViTLoss`.
        distill_weight: λ_distill.
        ratio_weight: λ_ratio; the paper takes 2, and 5 for DeiT-B.
        backbone_learning_rate_scale: The backbone's learning rate as a fraction of
            ``args.learning_rate``; 0 trains the predictors alone.
        freeze_epochs: Epochs, from the first, in which the backbone does not learn; ``None`` means a
            sixth of all steps, the paper's 5 of 30 epochs. Not of the gathered schedule.
        schedule: ``"masked"``: scorers and backbone learn together, on all tokens. ``"gathered"``: a training that is
            not resumed begins with `tokenprune.calibrate` on the training images, without their labels; then the
            scorers are held, and the backbone learns with tokens really removed, as in `tokenprune.gathered`.
        calibration_steps: Steps of that calibration, a batch each.
        calibration_rate: Its learning rate.
        evaluate_dense: Whether an evaluation also runs the model unpruned, under ``eval_dense_…``.
        options: What else `transformers.Trainer` takes, such as datasets and ``compute_metrics``.

    Raises:
        StateError: The model is not sparsified, the teacher is, or a checkpoint does not fit the model.
        TypeError: The teacher is no module, or an option is unknown.
        ValueError: A number is negative, or ``args`` and options ask for what cannot be had together.
    """

    optimizer: Any
    label_names: list[str]

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        kl_weight: float = 0.5,
        distill_weight: float = 0.5,
        ratio_weight: float = 2.0,
        backbone_learning_rate_scale: float = PAPER_LEARNING_RATE_SCALE,
        freeze_epochs: float | None = None,
        schedule: Literal["masked", "gathered"] = "masked",
        calibration_steps: int = 100,
        calibration_rate: float = 3e-3,
        evaluate_dense: bool = False,
        **options: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        if backbone_learning_rate_scale < 0:
            raise ValueError(f"backbone_learning_rate_scale={backbone_learning_rate_scale} is negative.")
        if freeze_epochs is not None and freeze_epochs < 0:
            raise ValueError(f"freeze_epochs={freeze_epochs} is negative; 0 lets the backbone learn from the start.")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher={type(teacher).__name__}: expected the dense model, a torch.nn.Module.")
        check_arguments(args, options, criterion, backbone_learning_rate_scale)
        check_schedule(schedule, args, options, freeze_epochs, calibration_steps)
        self.schedule = schedule
        self.calibration_steps, self.calibration_rate = calibration_steps, calibration_rate
        self.backbone_learning_rate_scale = backbone_learning_rate_scale
        self.freeze_epochs = freeze_epochs
        self.evaluate_dense = evaluate_dense
        self._teacher = teacher
        self._criterion = criterion
        self._loss_weights: dict[str, Any] = {
            "kl_weight": kl_weight,
            "distill_weight": distill_weight,
            "ratio_weight": ratio_weight,
        }
        self._training_averages, self._evaluation_averages = Averages(), Averages()
        self._backbone_frozen = False
        self._groups_are_ours, self._trained = False, False
        self._while_training = ExitStack()
        if model is not None:
            self.dynamicvit_loss = self._make_loss(model, args)
        use_non_reentrant_checkpointing(args)
        super().__init__(model, args, **options)
        prepare_sharding(self.accelerator, self.model, args, options)
        self.dynamicvit_loss.to(self.args.device)
        # `compute_loss` scales the loss itself, and has the Trainer count the labels of all accumulated batches.
        self.model_accepts_loss_kwargs = True
        if self.args.label_names is None and not self.label_names:  # the model's forward takes none
            self.label_names = ["labels"]

    def _make_loss(self, model: nn.Module, args: TrainingArguments) -> DynamicViTLoss:
        check_sparsified(model)
        criterion = self._criterion
        if criterion is None:
            check_classifies(model)
            criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing_factor)
        teacher = self._teacher
        if teacher is None and (self._loss_weights["kl_weight"] or self._loss_weights["distill_weight"]):
            teacher = unsparsify(copy.deepcopy(model)).requires_grad_(False)
        if teacher is not None and args.torch_compile:
            compiled: Any = torch.compile(teacher, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            teacher = compiled
        # Where both of its weights are 0, nobody asks the teacher, and no memory is spent on one.
        return DynamicViTLoss(nn.Identity() if teacher is None else teacher, criterion=criterion, **self._loss_weights)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from ``model_init``, and a loss whose teacher fits it."""
        model: nn.Module = super().call_model_init(trial)
        self.dynamicvit_loss = self._make_loss(model, self.args).to(self.args.device)
        return model

    # Learning rates

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimiser of ``args.optim``, its parameter groups split into predictors and backbone."""
        if self.optimizer is not None:
            return self.optimizer
        trained = self.model if model is None else model
        optimizer: torch.optim.Optimizer = super().create_optimizer()
        expected = {id(parameter) for parameter in trained.parameters() if parameter.requires_grad}
        found = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if expected != found or "lomo" in str(self.args.optim).lower():
            self.optimizer = None
            raise ValueError(
                f"optim={str(self.args.optim)!r} arranges the parameters in its own way, so predictors and backbone "
                "cannot have two learning rates; choose another, such as 'adamw_torch'."
            )
        backbone = {id(parameter) for parameter in self._backbone_parameters()}
        split_groups(optimizer, backbone, self.backbone_learning_rate_scale)
        if self.is_deepspeed_enabled:
            leave_out_backbone(optimizer, self._in_frozen_epochs)
            self._while_training.enter_context(zero_gradients(self._backbone_parameters(), self._in_frozen_epochs))
        if self.is_fsdp_enabled:  # it is about to be sharded
            share_weights([self.model, self.dynamicvit_loss], self.args.device)
        self._groups_are_ours = True
        return optimizer

    def _backbone_parameters(self) -> Iterator[nn.Parameter]:
        predictors = {id(parameter) for parameter in self.model.tokenprune.parameters()}
        return (parameter for parameter in self.model.parameters() if id(parameter) not in predictors)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Train, with averages that start anew; in the gathered schedule calibrate first, unless resuming."""
        self._training_averages = Averages()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args)
        if self._trained and self.is_fsdp_enabled and self.schedule == "gathered" and not resume_from_checkpoint:
            raise StateError(
                "the model is sharded by an earlier training, and cannot be calibrated again; make a new trainer."
            )
        with self._while_training:
            if self.schedule == "gathered":
                self._calibrate(resume_from_checkpoint)
                self._while_training.enter_context(gathered(self.model))
            self._trained = True
            return super().train(resume_from_checkpoint, *args, **options)

    def _calibrate(self, resume_from_checkpoint: str | bool | None) -> None:
        if not resume_from_checkpoint and any(True for _ in self.model.tokenprune.parameters()):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # where the Trainer leaves it on the CPU until then
                self.model.to(self.args.device)
            report = calibrate(
                self.model,
                self.get_train_dataloader(),
                steps=self.calibration_steps,
                learning_rate=self.calibration_rate,
                autocast=torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None,
                seed=self.args.seed,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
            if report.stopped == "interrupted":
                raise KeyboardInterrupt
            logger.info("calibrated: %s", report)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """One forward and backward pass; while the backbone is frozen, its gradients are dropped."""
        loss: Tensor = super().training_step(*args, **options)
        self._backbone_frozen = self._in_frozen_epochs()
        if self._backbone_frozen:
            # Not requires_grad=False: DistributedDataParallel settles what learns before the first step.
            for parameter in self._backbone_parameters():
                parameter.grad = None
        return loss

    def _in_frozen_epochs(self) -> bool:
        if self.schedule == "gathered":
            return False
        if self.freeze_epochs is None:
            return bool(self.state.global_step < self.state.max_steps * PAPER_FROZEN_SHARE)
        return bool((self.state.epoch or 0.0) + 1e-9 < self.freeze_epochs)

    # The loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """The autocast in which a batch runs, for training and for evaluation."""
        return autocast_of(self.accelerator)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The DynamicViT loss in training mode, its classification part in eval mode.

        Args:
            model: The model, possibly wrapped.
            inputs: A batch: what the model takes, and ``labels``.
            return_outputs: Whether to return what the model puts out, too.
            num_items_in_batch: Labels in all batches that are accumulated to one step; a batch then
                counts by its share of them.

        Raises:
            ValueError: The batch has no labels.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"the batch has no 'labels', only {sorted(inputs)}; name the data set's column 'label' or 'labels', or "
                "use a collator that does."
            )
        # As DistributedDataParallel returns them; FSDP2 and DeepSpeed leave them as they are.
        outputs = convert_to_fp32(model(**inputs))
        if model.training:
            parts = self.dynamicvit_loss(model, inputs, outputs, labels)
            share = self._share(labels, num_items_in_batch)
            loss = parts.pop("loss") * share
            trace = self.model.tokenprune.trace
            self._training_averages.add({**parts, **_kept_ratios(trace)}, share)
        else:
            loss = self.dynamicvit_loss.criterion(logits_of(outputs), labels)
        if not return_outputs:
            return loss
        # The Trainer reads logits out of a mapping, and takes the first item of a tuple for the loss.
        return loss, outputs if isinstance(outputs, Mapping) else {"logits": logits_of(outputs)}

    def _share(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """What a batch counts in the step it belongs to; over batches and processes the mean is 1 a step."""
        if num_items_in_batch is None:
            return 1.0
        share: Tensor = labels.ne(-100).sum() / num_items_in_batch
        # The count is then that of all processes, and DistributedDataParallel takes the mean over them.
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

    # What is reported

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with a training loss also its parts, kept ratios and the backbone's learning rate."""
        if "loss" in logs and self._training_averages:
            logs.update(self._training_averages.read(self.accelerator))
            self._training_averages = Averages()
            if self._groups_are_ours and "learning_rate" in logs:
                scale = 0.0 if self._backbone_frozen else self.backbone_learning_rate_scale
                if self.schedule == "gathered":  # the backbone is all that learns, so that it is what was logged
                    scale = 1.0
                logs["backbone_learning_rate"] = scale * logs["learning_rate"]
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the model pruned and, with ``evaluate_dense``, unpruned."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if self.evaluate_dense and not several:  # of several data sets, each comes here by itself
            with dense(self.model):
                metrics.update(super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_dense"))
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Predict a whole data set; the kept ratio of each stage is among the metrics."""
        self._evaluation_averages = Averages()
        with nullcontext() if self._trained else left_unprepared(self):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self._evaluation_averages:
            kept = self._evaluation_averages.read(self.accelerator)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in kept.items()})
        return output

    def prediction_step(self, *args: Any, **options: Any) -> Any:
        """Predict a batch, and note what was kept of it."""
        prediction = super().prediction_step(*args, **options)
        trace = self.model.tokenprune.trace
        if trace is not None:
            self._evaluation_averages.add(_kept_ratios(trace), len(trace.keep[0]))
        return prediction

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, also where checkpoints hold it in parts, which the Trainer leaves at that."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            save_whole(self, output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            complete_states(self.optimizer.optimizer)  # inside of Accelerate's
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with own_names(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer warns and goes on with whatever weights the model had.
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        missing, unexpected = sorted({*load_result.missing_keys} - ignored), sorted(load_result.unexpected_keys)
        if missing or unexpected:
            raise StateError(
                f"the checkpoint does not fit the {type(self.model).__name__}: {len(missing)} missing keys "
                f"{missing[:3]}, {len(unexpected)} unexpected keys {unexpected[:3]}. Sparsify the model as it was when "
                "the checkpoint was written, by a SparseTrainer."
            )
        super()._issue_warnings_after_load(load_result)


def _kept_ratios(trace: Trace) -> dict[str, Tensor]:
    return {f"kept_ratio_{index}": keep.mean() for index, keep in enumerate(trace.keep)}
