"""What `sparsify` was asked for, in a form that goes into a file or along in a state dict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import CheckpointError, PlanError
from tokenprune.pruning.budget import BUDGETS, FIXED, Budget, Thresholds
from tokenprune.pruning.plan import Plan, cumulative_ratios

# A state dict's tensor is as long as this, or a multiple, whatever the figures in it, so that averages of
# models (EMA) that copy one state dict into another find the same shapes at another keep ratio.
_NUM_BYTES = 1024


class LanguageRecord(NamedTuple):
    """What a language model is given behind the tower.

    Attributes:
        pruner: The name of the pruner; ``None`` for one without a registered name.
        keep_ratio: The fraction of each image's tokens.
    """

    pruner: str | None
    keep_ratio: float

    @classmethod
    def from_dict(cls, fields: Any) -> LanguageRecord:
        """Read an object of JSON.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            ratio, pruner = cumulative_ratios(fields["keep_ratio"], 1)[0], fields["pruner"]
        except (TypeError, KeyError, PlanError) as error:
            raise CheckpointError(
                f"language={fields!r}: expected a pruner and a keep ratio in the record of how a model was sparsified."
            ) from error
        return cls(pruner, ratio)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The arguments of `sparsify` that make a model prune as it does.

    Attributes:
        plan: Where is pruned and how much is kept.
        scorer: The name of the scorer; ``None`` for one without a registered name.
        pruned: The name of the reduction; ``None`` for one without a registered name.
        budget: How many tokens stages keep of each image, ``"fixed"`` or ``"adaptive"``.
        thresholds: What was calibrated for the latter, one entry for each plan.
        norm_eps: The ε of the layer norms in scorers and reductions; ``None`` for that of new ones.
        language: Of a vision-language model what its language model is given; else ``None``.
    """

    plan: Plan
    scorer: str | None
    pruned: str | None
    budget: Budget = FIXED
    thresholds: tuple[Thresholds, ...] = ()
    norm_eps: float | None = None
    language: LanguageRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """As an object of JSON, which `from_dict` reads; the plan carries the version."""
        fields = {"plan": json.loads(self.plan.to_json()), "scorer": self.scorer, "pruned": self.pruned}
        if self.thresholds:
            fields |= {"budget": self.budget, "thresholds": [one.to_dict() for one in self.thresholds]}
        if self.language is not None:
            fields["language"] = self.language._asdict()
        return fields if self.norm_eps is None else {**fields, "norm_eps": self.norm_eps}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Record:
        """Read what `to_dict` gave; other entries are left alone.

        Raises:
            CheckpointError: An entry is missing or of another kind, or the plan is none.
        """
        missing = [name for name in ("plan", "scorer", "pruned") if name not in fields]
        if missing:
            raise CheckpointError(
                f"the record of how a model was sparsified lacks {', '.join(missing)}; it is damaged."
            )
        scorer, pruned = fields["scorer"], fields["pruned"]
        if not all(isinstance(name, (str, type(None))) for name in (scorer, pruned)):
            raise CheckpointError(
                f"scorer={scorer!r}, pruned={pruned!r}: expected names in the record of how a model was sparsified."
            )
        try:
            plan = Plan.from_json(json.dumps(fields["plan"]))
        except PlanError as error:
            raise CheckpointError(f"the record of how a model was sparsified holds no plan: {error}") from error
        budget, thresholds = fields.get("budget", FIXED), fields.get("thresholds", [])
        if budget not in BUDGETS or not isinstance(thresholds, list):
            raise CheckpointError(
                f"budget={budget!r}, thresholds={thresholds!r}: expected one of {BUDGETS}, and a list, in the record "
                "of how a model was sparsified."
            )
        read = tuple(Thresholds.from_dict(one, len(plan.stages)) for one in thresholds)
        eps = fields.get("norm_eps")
        if eps is not None and not (isinstance(eps, float) and eps > 0):
            raise CheckpointError(
                f"norm_eps={eps!r}: expected a number above 0 in the record of how a model was sparsified."
            )
        found = fields.get("language")
        language = None if found is None else LanguageRecord.from_dict(found)
        return cls(
            plan=plan, scorer=scorer, pruned=pruned, budget=budget, thresholds=read, norm_eps=eps, language=language
        )

    def to_tensor(self) -> Tensor:
        """As bytes in a tensor, since formats without pickle hold tensors alone."""
        text = json.dumps(self.to_dict()).encode()
        length = -(-len(text) // _NUM_BYTES) * _NUM_BYTES
        return torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Any) -> Record:
        """Read what `to_tensor` gave.

        Raises:
            CheckpointError: The tensor holds something else.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CheckpointError("the record of how a model was sparsified is damaged; it is no row of bytes.")
        try:
            fields = json.loads(bytes(tensor.cpu().tolist()))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the record of how a model was sparsified is damaged ({error}).") from error
        if not isinstance(fields, dict):
            raise CheckpointError("the record of how a model was sparsified is damaged; it is no JSON object.")
        return cls.from_dict(fields)
