"""The training objective: classification, distillation from the dense model, and the keep ratio.

Shapes: B images, N patch tokens, P prefix tokens, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.api import sparsifier_of, unwrap
from tokenprune.backbones.probing import call
from tokenprune.errors import StateError
from tokenprune.pruning.executions import default_execution, execution_class
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import select
from tokenprune.training.teacher_tokens import watched


class DynamicViTLoss(nn.Module):
    """DynamicViT's full loss: L = L_cls + λ_KL L_KL + λ_distill L_distill + λ_ratio L_ratio.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034),
    Eq. 13 to 17.

    - ``classification``: the criterion on the logits.
    - ``kl``: KL(student ‖ teacher) of the class probabilities, mean over the batch.
    - ``distill``: squared error between the student's and the teacher's final patch tokens, mean
      over channels and over the tokens kept at the last stage; 0 if none is. Where pruned tokens stay in the sequence,
      mean over all positions of the final map.
    - ``ratio``: squared difference between a stage's keep ratio and the share of tokens an image
      keeps there, mean over images and stages.

    Inside of `tokenprune.gathered`, where every image keeps as many tokens as planned, ``distill`` is on those, and
    ``ratio`` is 0.

    With ``heads``, for a model that classifies its patch tokens too (token labeling, arXiv 2104.10858) and adds
    both up in its output:

    - ``classification`` and ``kl`` are taken on the logits of the first token alone;
    - ``distill``: KL(student ‖ teacher) of the class probabilities of the final patch tokens, mean over
      the tokens kept at the last stage; 0 if none is.

    Deviation: KL divergences are as the paper writes them; the authors' code swaps the two.

    Args:
        teacher: The dense model, as it was before it was sparsified: a copy made with
            ``copy.deepcopy``. It is put in eval mode, is run without gradients, once a step, and
            stays in eval mode whatever the mode of this loss. It may be compiled, ``torch.compile(teacher)``.
        criterion: Called as ``criterion(logits, targets)``; ``None`` means cross-entropy, for class
            indices (B,) as for class probabilities (B, K).
        kl_weight: λ_KL.
        distill_weight: λ_distill.
        ratio_weight: λ_ratio; the paper takes 2, and 5 for DeiT-B.
        heads: Names, in student and teacher alike, of the module that classifies the first final token, (B, C) to
            (B, K), and of the one that classifies patch tokens, (B, N, C) to (B, N, K). ``None`` for a model with
            the usual one head.

    Raises:
        StateError: The teacher is a sparsified model.
        ValueError: A weight is negative, or the teacher has no modules of these names.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        kl_weight: float = 0.5,
        distill_weight: float = 0.5,
        ratio_weight: float = 2.0,
        heads: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("kl", kl_weight), ("distill", distill_weight), ("ratio", ratio_weight)):
            if weight < 0:
                raise ValueError(f"{name}_weight={weight} is negative; 0 leaves the part out.")
        if any(isinstance(module, Sparsifier) for module in teacher.modules()):
            raise StateError(
                "the teacher is sparsified; pass the dense model: teacher = copy.deepcopy(model) before "
                "tokenprune.sparsify(model)."
            )
        for name in heads or ():
            _head(teacher, name)
        self.teacher = teacher.eval()
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.kl_weight = kl_weight
        self.distill_weight = distill_weight
        self.ratio_weight = ratio_weight
        self.heads = heads

    def train(self, mode: bool = True) -> DynamicViTLoss:
        """Set the training mode, which the teacher ignores."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, model: nn.Module, inputs: Any, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The loss of a forward pass that the sparsified model has just made.

        Args:
            model: The sparsified model, possibly wrapped (DDP, `torch.compile`), in training mode.
            inputs: What it was called with: a tensor, a tuple of positional arguments or a mapping
                of keyword arguments.
            outputs: What it returned: logits (B, K), or something with ``logits``; not read where ``heads``
                say how final tokens become logits.
            targets: What the criterion takes, (B,) class indices or (B, K) probabilities as a rule.

        Returns:
            Scalars ``loss`` (the weighted total), ``classification``, ``kl``, ``distill`` and
            ``ratio`` (unweighted). A part whose weight is 0 is not computed and is 0.

        Raises:
            StateError: The model is not sparsified, or its last forward pass left no decisions with
                gradients: it ran in eval mode, densely, or under re-entrant checkpointing, or removed tokens outside
                of `tokenprune.gathered`.
            ValueError: Student and teacher do not fit together.
        """
        sparsifier = sparsifier_of(model)
        trace = _trained_trace(sparsifier)
        keep = trace.keep
        if self.heads is not None and not sparsifier.backbone.num_prefix_tokens:
            raise ValueError(f"heads={self.heads}: this model has no class token for the first of them.")
        logits = logits_of(outputs) if self.heads is None else self._class_logits(model, _final_tokens(sparsifier))
        zero = logits.new_zeros(())
        parts = {"classification": self.criterion(logits, targets), "kl": zero, "distill": zero, "ratio": zero}
        if self.kl_weight or self.distill_weight:
            teacher_logits, teacher_tokens = self._teach(inputs, _tokens_module(model, sparsifier))
            if self.kl_weight:
                parts["kl"] = _kl_divergence(logits, teacher_logits)
            if self.distill_weight:
                tokens = _final_tokens(sparsifier)
                student, teacher = _patches(tokens, teacher_tokens, trace)
                errors = self._token_errors(model, student, teacher)
                parts["distill"] = (
                    errors.mean()
                    if trace.whole or errors.shape != keep[-1].shape
                    else _mean_over_kept(errors, keep[-1])
                )
        if self.ratio_weight and execution_class(trace.execution).trains:
            parts["ratio"] = _ratio(trace.shares, sparsifier.plan.keep_ratios)
        total = (
            parts["classification"]
            + self.kl_weight * parts["kl"]
            + self.distill_weight * parts["distill"]
            + self.ratio_weight * parts["ratio"]
        )
        return {"loss": total, **parts}

    @torch.no_grad()
    def _teach(self, inputs: Any, tokens_module: str) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits, and its final tokens: what its module of that name puts out."""
        if not self.distill_weight and self.heads is None:
            return logits_of(call(self.teacher, inputs)), None
        with watched(self.teacher, tokens_module) as watch:
            outputs = call(self.teacher, inputs)
            tokens = cast(Tensor, watch.output)
        return logits_of(outputs) if self.heads is None else self._class_logits(self.teacher, tokens), tokens

    def _class_logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """What the first head of a model makes of its final tokens."""
        assert self.heads is not None
        return logits_of(_head(model, self.heads[0])(tokens[:, 0]))

    def _token_errors(self, model: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        """How far the student's final patch tokens are from the teacher's, (B, N); tokens (B, N, C) each."""
        if self.heads is None:
            return (student - teacher).float().square().mean(dim=-1)
        with torch.no_grad():
            taught = _head(self.teacher, self.heads[1])(teacher)  # (B, N, K)
        return _divergences(_head(model, self.heads[1])(student), taught)


def _trained_trace(sparsifier: Sparsifier) -> Trace:
    """The record of the last forward pass, if a loss can be computed of it."""
    trace = sparsifier.trace
    if trace is not None and sparsifier.training and _scorers_held(sparsifier):
        return trace
    if trace is None or not execution_class(trace.execution).trains:
        ran = "no pruned forward pass" if trace is None else f"one in {trace.execution} execution"
        raise StateError(
            f"the loss needs decisions made in {default_execution(training=True)} execution; there was {ran}. Call "
            "model.train() and model(inputs), outside of tokenprune.dense, before the loss; or train inside of "
            "tokenprune.gathered, where scorers do not learn."
        )
    learns = any(
        parameter.requires_grad
        for stage, probability in zip(sparsifier.stages, sparsifier.keep_probabilities, strict=True)
        if probability < 1  # one that keeps all it gets does not ask its scorer
        for parameter in stage.parameters()
    )
    if torch.is_grad_enabled() and learns and not any(keep.requires_grad for keep in trace.keep):
        raise StateError(
            "the decisions of the last forward pass carry no gradient; it ran under no_grad, or inside re-entrant "
            "activation checkpointing (use use_reentrant=False)."
        )
    return trace


def _scorers_held(sparsifier: Sparsifier) -> bool:
    """Whether no scorer is to learn, as inside of `tokenprune.gathered`."""
    scorers = [cast(Stage, stage).scorer for stage in sparsifier.stages]
    return not any(parameter.requires_grad for scorer in scorers for parameter in scorer.parameters())


def logits_of(outputs: Any) -> Tensor:
    """The logits (B, K) among what a classifier returned.

    Raises:
        ValueError: There are none, or not of that shape.
    """
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs)
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected logits of shape (B, K), or an output that has them as .logits; got {got}.")
    return logits


def _final_tokens(sparsifier: Sparsifier) -> Tensor:
    assert sparsifier.trace is not None
    if sparsifier.trace.tokens is None:
        raise StateError(
            "the last forward pass left no final tokens to distill: it ran under no_grad. Pass distill_weight=0, and "
            "no heads, to a loss that is only evaluated."
        )
    return sparsifier.trace.tokens


def _head(model: nn.Module, name: str) -> nn.Module:
    try:
        return unwrap(model).get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"heads: {type(unwrap(model)).__name__} has no module {name!r}; name the modules, in student and teacher "
            "alike, that classify the first final token and the patch tokens."
        ) from None


def _tokens_module(model: nn.Module, sparsifier: Sparsifier) -> str:
    """The name, within the model, of the module whose output is the final tokens."""
    backbone = sparsifier.backbone
    wanted = backbone.blocks[-1] if backbone.final_norm is None else backbone.final_norm
    name: str = next(name for name, module in unwrap(model).named_modules() if module is wanted)
    return name


def _kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher) of softmax probabilities, mean over the batch; logits (B, K) each."""
    return _divergences(student, teacher).mean()


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher) of the softmax probabilities of each row of logits, (…, K) to (…)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape."
        )
    pointwise = F.kl_div(
        F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1), reduction="none",
        log_target=True,
    )  # fmt: skip
    return pointwise.sum(dim=-1)


def _patches(student: Tensor, teacher: Tensor | None, trace: Trace) -> tuple[Tensor, Tensor]:
    """The patch tokens that are there in the end, (B, n, C) each, of the final tokens of student and teacher.

    Where every token stays in the sequence, of a hierarchy its final maps.
    """
    layout, dense = trace.layout, trace.full_layout
    is_map = student.dim() != 3 or student.shape[1] != layout.length
    if trace.whole and is_map and teacher is not None and student.shape == teacher.shape:
        return student, teacher
    if teacher is None or student.shape[1] != layout.length or teacher.shape[1:] != (dense.length, student.shape[2]):
        got = None if teacher is None else tuple(teacher.shape)
        raise ValueError(
            f"final tokens of student {tuple(student.shape)} and teacher {got} differ in shape; pass distill_weight=0 "
            "for a teacher of another architecture, and do not drop patches in training while distilling tokens."
        )
    taught = dense.patches(teacher)
    indices = trace.selections[-1].indices if trace.selections else None
    if indices is not None and not trace.restored:
        taught = select(taught, indices)
    return layout.patches(student), taught


def _mean_over_kept(errors: Tensor, keep: Tensor) -> Tensor:
    """The mean over kept tokens of errors (B, N), with decisions (B, N) that get no gradient from it."""
    kept = keep.detach()
    return (errors * kept).sum() / kept.sum().clamp(min=1)


def _ratio(shares: tuple[Tensor, ...], keep_ratios: tuple[float, ...]) -> Tensor:
    """Squared difference between planned and actual keep ratio (B,), mean over images and stages."""
    errors = [(ratio - share).square().mean() for ratio, share in zip(keep_ratios, shares, strict=True)]
    return torch.stack(errors).mean()
