"""The Sparsifier: what a pruned model carries, set and read by its user, saved with its weights, taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import CheckpointError, StateError, UnsupportedModelError
from tokenprune.pruning.budget import ADAPTIVE, BUDGETS, FIXED, Budget, Thresholds
from tokenprune.pruning.checks import check_by_image, check_calibrated, check_not_packed
from tokenprune.pruning.compilation import give_own_forward, take_own_forward
from tokenprune.pruning.executions import AUTO, check_execution, default_execution
from tokenprune.pruning.freezing import FreezingHooks
from tokenprune.pruning.frozen import FrozenStage
from tokenprune.pruning.language import LanguagePruning, Pruner
from tokenprune.pruning.norms import norm_eps, set_norm_eps
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.record import LanguageRecord, Record
from tokenprune.pruning.stage import Stage


class Sparsifier(FreezingHooks):
    """Attached to a model as ``model.tokenprune`` by `tokenprune.sparsify`; holds all that it adds.

    One forward pass at a time may run on a model: its record is kept here.

    Attributes:
        stages: The stages, each with its scorer and its reduction.
        backbone: What the model looks like.
        pruned: The name under which the reduction is registered; ``None`` for one without a name.
        scorer: The name under which the scorer is registered; ``None`` for one without a name.
        language: Of a vision-language model what prunes image tokens for the language model; else ``None``.
        trace: The record of the last forward pass; ``None`` before the first one and after an
            unpruned one.
        enabled: Whether the model runs pruned; see `disabled`.
    """

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        stages: Sequence[Stage],
        *,
        pruned: str | None = "drop",
        scorer: str | None = None,
        language: VisionLanguage | None = None,
        pruner: str | Pruner | None = None,
    ) -> None:
        super().__init__(plan, backbone, stages)
        self.language: LanguagePruning | None = None
        if language is not None:
            self.language = LanguagePruning(language, plan.keep_ratios[-1], pruner or "tower", survival=self.survival)
        self._budget: Budget = FIXED
        self._thresholds: dict[tuple[float, ...], Thresholds] = {}
        self._tried: Thresholds | None = None
        self.scorer = scorer
        self.pruned = pruned
        self._handles: list[RemovableHandle] = []
        self._own_forward: list[nn.Module] = []

    # What users set and read

    @property
    def plan(self) -> Plan:
        """Where is pruned and how much is kept."""
        return self._plan

    @property
    def keep_ratio(self) -> tuple[float, ...]:
        """The cumulative keep ratios, one a stage; set to a number or a sequence to change them.

        Raises:
            PlanError: On setting ratios that make no plan; nothing is changed.
            StateError: On setting ratios at which an adaptive budget has not been calibrated; nothing is changed.
        """
        return self._plan.keep_ratios

    @keep_ratio.setter
    def keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        self._check_not_frozen("another keep ratio")
        plan = self._plan.with_keep_ratio(keep_ratio)
        if self._budget == ADAPTIVE:
            check_calibrated(plan.keep_ratios, self._thresholds)
        self._plan = plan
        if self.language is not None:
            self.language.keep_ratio = plan.keep_ratios[-1]

    @property
    def execution(self) -> str:
        """How decisions are carried out: ``"mask"``, ``"gather"``, ``"varlen"``, or ``"auto"``.

        The last means mask in training mode and gather in eval mode, or varlen where the budget is adaptive.

        Raises:
            ValueError: On setting anything else.
            UnsupportedModelError: On setting an execution in which this model cannot run.
            StateError: On setting one in which all images keep equally many tokens, while the budget is adaptive.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: str) -> None:
        check_execution(execution, self.backbone)
        if execution not in (AUTO, default_execution(training=False)):
            self._check_not_frozen(f"{execution!r} execution")
        if self._budget == ADAPTIVE:
            check_by_image(execution, self.backbone)
        self._execution = execution

    @property
    def budget(self) -> Budget:
        """How many tokens a stage keeps of each image in eval mode: ``"fixed"`` or ``"adaptive"``.

        *Fixed*: the plan's number of every image. *Adaptive*: as many as have a score above a threshold, which was set
        by `tokenprune.calibrate_budget` so that their mean over images is the plan's number.

        Raises:
            ValueError: On setting anything else.
            StateError: On setting ``"adaptive"`` without calibrated thresholds for these keep ratios, or in an
                execution in which all images keep equally many tokens.
            UnsupportedModelError: On setting ``"adaptive"`` for a model of which all images must keep equally many.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        if budget not in BUDGETS:
            raise ValueError(f"budget={budget!r}: choose 'fixed' or 'adaptive'.")
        if budget == ADAPTIVE:
            self._check_not_frozen("an adaptive budget")
            if self._hands_on_kept():
                raise UnsupportedModelError(
                    "what follows the vision tower of this model takes equally many tokens of each image, which an "
                    "adaptive budget does not give; sparsify the tower by itself."
                )
            if self._inside:
                raise UnsupportedModelError(
                    f"scorer={self.scorer!r} prunes inside of blocks by a number that it is given, which an adaptive "
                    "budget does not give; choose another scorer."
                )
            if self._whole:
                raise UnsupportedModelError(
                    f"with pruned={self.pruned!r} every token stays in the sequence, and as many of each image take "
                    "the one path or the other, which an adaptive budget does not give; choose another reduction."
                )
            check_not_packed(self.backbone)
            check_by_image(self._execution, self.backbone)
            check_calibrated(self._plan.keep_ratios, self._thresholds)
        self._budget = budget

    @property
    def thresholds(self) -> tuple[Thresholds, ...]:
        """What `tokenprune.calibrate_budget` has found, one entry for each plan that was calibrated."""
        return tuple(self._thresholds.values())

    @thresholds.setter
    def thresholds(self, thresholds: Sequence[Thresholds]) -> None:
        self._thresholds = {one.keep_ratios: one for one in thresholds}

    @property
    def inference_execution(self) -> str:
        """The execution that ``"auto"`` takes in eval mode."""
        return default_execution(training=False, by_image=self.thresholds_in_force is not None)

    @property
    def thresholds_in_force(self) -> Thresholds | None:
        """By which stages keep different numbers of tokens of images; ``None`` where they keep as many of all."""
        if self._tried is not None:
            return self._tried
        if self._budget == FIXED or self._plan.keeps_all:
            return None
        check_calibrated(self._plan.keep_ratios, self._thresholds)  # weights may have been loaded that have none
        return self._thresholds[self._plan.keep_ratios]

    @contextmanager
    def budgeting(self, budget: Budget) -> Iterator[None]:
        """While it lasts, the budget is this one."""
        before, self.budget = self._budget, budget
        try:
            yield
        finally:
            self._budget = before

    @contextmanager
    def trying(self, thresholds: Thresholds) -> Iterator[None]:
        """While it lasts, stages go by these thresholds, and those without one keep equally many of all images.

        Raises:
            UnsupportedModelError: In this model, stages do not go by thresholds.
        """
        check_not_packed(self.backbone)
        self._tried = thresholds
        try:
            yield
        finally:
            self._tried = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts, the model runs unpruned."""
        before, self.enabled = self.enabled, False
        try:
            with nullcontext() if self.language is None else self.language.disabled():
                yield
        finally:
            self.enabled = before

    @contextmanager
    def executing(self, execution: str) -> Iterator[None]:
        """While it lasts, the execution is this one."""
        before, self.execution = self.execution, execution
        try:
            yield
        finally:
            self.execution = before

    def _check_not_frozen(self, what: str) -> None:
        if self.frozen:
            raise StateError(f"the model is frozen; call tokenprune.unfreeze(model) for {what}.")

    def forward(self, value: Any) -> Any:
        """Pass on what comes: a model that is a container of modules runs this one as its last."""
        return value

    # What goes along in a state dict, so that every file that holds the weights also says what they belong to

    @property
    def record(self) -> Record:
        """What `sparsify` was asked for, with the keep ratios as they are now."""
        return Record(
            plan=self._plan,
            scorer=self.scorer,
            pruned=self.pruned,
            budget=self._budget,
            thresholds=self.thresholds,
            language=None
            if self.language is None
            else LanguageRecord(self.language.pruner_name, self.language.keep_ratio),
            norm_eps=norm_eps(self),
        )

    def get_extra_state(self) -> Tensor:
        """The `record` as a tensor, which `tokenprune.from_pretrained` finds in a library's own files."""
        return self.record.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Loading weights changes neither plan, keep ratio nor budget, which are the user's; see `from_pretrained`."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        for frozen in self._frozen or ():
            frozen.forget()
        key, errors = f"{prefix}_extra_state", others[-1]
        if key in missing:  # weights that come from elsewhere, such as converted ones
            missing.remove(key)
        if key in state_dict:
            try:
                record = Record.from_tensor(state_dict[key])
            except CheckpointError as error:
                errors.append(f"{key}: {error} Take it out of the state dict to load the weights in spite of that.")
                return
            if record.plan.stages != self._plan.stages:
                errors.append(
                    f"the weights belong to scorers at stages {record.plan.stages}, and these are at "
                    f"{self._plan.stages}; take {key!r} out of the state dict to load them in spite of that."
                )
                return
            self.thresholds = record.thresholds  # which belong to the scores that these weights give
            set_norm_eps(self, record.norm_eps)

    # Attaching and detaching

    def attach(self, model: nn.Module) -> None:
        """Install everything in ``model``, or, if anything fails, nothing."""
        try:
            for adaptation in self.backbone.adaptations:
                adaptation.apply()
            for handle in self._install_hooks(self._tower(model)):
                self._handles.append(handle)
            self._show_hooks(model)
            if self.language is not None:
                self.language.install()
            model.add_module("tokenprune", self)
        except BaseException:
            self.detach(model)
            raise

    def detach(self, model: nn.Module) -> None:
        """Take everything out of ``model`` again."""
        self._close()
        self._take_out_hooks()
        if self.language is not None:
            self.language.uninstall()
        take_own_forward(self._own_forward)
        for adaptation in reversed(self.backbone.adaptations):
            adaptation.undo()
        model._modules.pop("tokenprune", None)
        self._own_forward, self.trace, self._frozen = [], None, None

    def freeze(self, frozen: tuple[FrozenStage, ...], model: nn.Module) -> None:
        """Exchange the hooks in ``model`` for those of a frozen one."""
        self._close()
        self._take_out_hooks()
        self._frozen, self.trace, self._pass.running = frozen, None, None
        self._handles += self._install_frozen(self._tower(model))
        self._show_hooks(model)

    def unfreeze(self, model: nn.Module) -> None:
        """Put the hooks of a model that is not frozen into ``model`` again."""
        self._take_out_hooks()
        self._frozen = None
        self._handles += self._install_hooks(self._tower(model))
        self._show_hooks(model)

    @contextmanager
    def thawed(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, ``model`` is not frozen."""
        before = self._frozen
        if before is None:
            yield
            return
        self.unfreeze(model)
        try:
            yield
        finally:
            self.freeze(before, model)

    @contextmanager
    def running_on(self, frozen: tuple[FrozenStage, ...], model: nn.Module) -> Iterator[None]:
        """While it lasts, ``model`` is frozen with other stages."""
        before = self._frozen
        self.freeze(frozen, model)
        try:
            yield
        finally:
            if before is None:
                self.unfreeze(model)
            else:
                self.freeze(before, model)

    def _take_out_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _tower(self, model: nn.Module) -> nn.Module:
        return model if self.backbone.tower is None else self.backbone.tower

    def _show_hooks(self, model: nn.Module) -> None:
        """Let a compiler see which modules of the tower have hooks."""
        take_own_forward(self._own_forward)
        tower, ours = self._tower(model), {handle.id for handle in self._handles}
        self._own_forward = give_own_forward(
            module for module in tower.modules()
            if module is not tower and not ours.isdisjoint({*module._forward_pre_hooks, *module._forward_hooks})
        )  # fmt: skip
