"""The Sparsifier: what a pruned model carries, set and read by its user, saved with its weights, taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.backbone import Backbone, Setting, exchange
from tokenprune.errors import CheckpointError
from tokenprune.pruning.compilation import rejoin, set_apart
from tokenprune.pruning.grid_methods import GridMethod
from tokenprune.pruning.hooks import Execution, PruningHooks
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.record import Record
from tokenprune.scorers import Scorer

Pruned = Literal["drop", "preserve"]


class Sparsifier(PruningHooks):
    """Attached to a model as ``model.tokenprune`` by `tokenprune.sparsify`; holds all that it adds.

    One forward pass at a time may run on a model: its record is kept here.

    Attributes:
        stages: The stages, each with its scorer.
        backbone: What the model looks like.
        pruned: What becomes of pruned tokens, as `sparsify` was told.
        scorer: The name under which the scorer is registered; ``None`` for one without a name.
        trace: The record of the last forward pass; ``None`` before the first one and after an
            unpruned one.
        enabled: Whether the model runs pruned; see `disabled`.
    """

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        scorers: Sequence[Scorer],
        *,
        pruned: Pruned = "drop",
        scorer_name: str | None = None,
    ) -> None:
        super().__init__(plan, backbone.preserving() if pruned == "preserve" else backbone, scorers)
        self.scorer = scorer_name
        self.pruned: Pruned = pruned
        self._handles: list[RemovableHandle] = []
        self._previous_settings: tuple[Setting, ...] = ()
        self._set_apart: list[nn.Module] = []

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
        """
        return self._plan.keep_ratios

    @keep_ratio.setter
    def keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        self._plan = self._plan.with_keep_ratio(keep_ratio)

    @property
    def execution(self) -> Execution:
        """``"auto"`` (mask in training mode, gather in eval mode), ``"mask"`` or ``"gather"``.

        Raises:
            ValueError: On setting anything else.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution not in ("auto", "mask", "gather"):
            raise ValueError(f"execution={execution!r}: choose 'auto', 'mask' or 'gather'.")
        self._execution = execution

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts, the model runs unpruned."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def executing(self, execution: Execution) -> Iterator[None]:
        """While it lasts, the execution is this one."""
        before, self.execution = self.execution, execution
        try:
            yield
        finally:
            self.execution = before

    # What goes along in a state dict, so that every file that holds the weights also says what they belong to

    @property
    def record(self) -> Record:
        """What `sparsify` was asked for, with the keep ratios as they are now."""
        return Record(plan=self._plan, scorer=self.scorer, pruned=self.pruned)

    def get_extra_state(self) -> Tensor:
        """The `record` as a tensor, which `tokenprune.from_pretrained` finds in a library's own files."""
        return self.record.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Loading weights changes neither plan nor keep ratio, which are the user's; see `from_pretrained`."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        key, errors = f"{prefix}_extra_state", others[-1]
        if key in missing:  # weights that come from elsewhere, such as converted ones
            missing.remove(key)
        if key in state_dict:
            try:
                stages = Record.from_tensor(state_dict[key]).plan.stages
            except CheckpointError as error:
                errors.append(str(error))
                return
            if stages != self._plan.stages:
                errors.append(
                    f"the weights belong to scorers at stages {stages}, and these are at {self._plan.stages}; take "
                    f"{key!r} out of the state dict to load them in spite of that."
                )

    # Attaching and detaching

    def attach(self, model: nn.Module) -> None:
        """Install everything in ``model``, or, if anything fails, nothing."""
        try:
            self._previous_settings = exchange(self.backbone.settings)
            for name in self.backbone.grid_methods:
                self._tower(model).__dict__[name] = GridMethod(self, self._tower(model), name)
            self._set_apart = set_apart(self._guarded())
            self._handles += self._install_hooks(self._tower(model))
            model.add_module("tokenprune", self)
        except BaseException:
            self.detach(model)
            raise

    def detach(self, model: nn.Module) -> None:
        """Take everything out of ``model`` again."""
        self._close_interceptions()
        for handle in self._handles:
            handle.remove()
        rejoin(self._set_apart)
        exchange(self._previous_settings)
        for name in self.backbone.grid_methods:
            self._tower(model).__dict__.pop(name, None)
        model._modules.pop("tokenprune", None)
        self._handles, self._previous_settings, self._set_apart, self.trace = [], (), [], None

    def _tower(self, model: nn.Module) -> nn.Module:
        return model if self.backbone.tower is None else self.backbone.tower

    def _guarded(self) -> tuple[nn.Module, ...]:
        """The modules with hooks one of which stands in every piece of code that a compiler makes of the model."""
        norm = self.backbone.final_norm
        return (*self.backbone.blocks, *(() if norm is None else (norm,)))
