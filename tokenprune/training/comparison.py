"""How far a pruned pass is from the dense one, without labels.

Shapes: B images, K classes, N patch tokens, n of them left, R rows, D numbers a row, L tokens, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.backbones.probing import call, named_outputs
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout, output_tokens, select
from tokenprune.training.batches import Inputs
from tokenprune.training.losses import logits_of

Measure = Literal["top-1 agreement", "feature cosine"]


class View(NamedTuple):
    """What is compared of a forward pass.

    Attributes:
        answer: Logits (B, K) of a classifier, otherwise features (R, D).
        tokens: (B, L, C), the final tokens.
        trace: The record of the pass; ``None`` where it ran dense.
    """

    answer: Tensor
    tokens: Tensor
    trace: Trace | None


class Comparison:
    """Runs a model and compares what it finds, by logits where the model is a classifier, otherwise by features.

    The features of an image are every output (B, D) of the model, such as a pooled or projected one; where it has
    none, its final prefix and suffix tokens, or the mean of its final patch tokens where it has neither. Of a model
    that gets every token back, such as one with a dense head, they are all of its final patch tokens.

    Args:
        model: The sparsified model, without wrappers.
        sparsifier: Its sparsifier.
        autocast: The dtype to run it in; ``None`` means its own.
    """

    def __init__(self, model: nn.Module, sparsifier: Sparsifier, autocast: torch.dtype | None = None) -> None:
        self.model, self.sparsifier, self.autocast = model, sparsifier, autocast
        self.measure: Measure = "feature cosine"

    def copy(self) -> Comparison:
        """The same of a copy of the model as it is now."""
        model = copy.deepcopy(self.model)
        made = Comparison(model, cast(Sparsifier, model.tokenprune), self.autocast)
        made.measure = self.measure
        return made

    def find_measure(self, inputs: Inputs) -> None:
        """Run the model once, to see what it puts out."""
        with torch.no_grad(), self.sparsifier.disabled():
            if classifies(self.model, call(self.model, inputs)):
                self.measure = "top-1 agreement"

    def dense(self, inputs: Inputs) -> View:
        """A pass of the model that prunes nothing."""
        with torch.no_grad(), self.sparsifier.disabled():
            return self.pruned(inputs)

    def pruned(self, inputs: Inputs) -> View:
        """A pass of the model as it is set."""
        backbone, device = self.sparsifier.backbone, next(self.model.parameters()).device
        found: list[Tensor] = []
        last = backbone.blocks[-1] if backbone.final_norm is None else backbone.final_norm
        handle = last.register_forward_hook(lambda module, args, output: found.append(output_tokens(output)))
        try:
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                outputs = call(self.model, inputs)
        finally:
            handle.remove()
        tokens, trace = found[-1], self.sparsifier.trace
        answer = logits_of(outputs) if self.measure == "top-1 agreement" else self._features(outputs, tokens, trace)
        return View(answer.float(), tokens, trace)

    def _features(self, outputs: Any, tokens: Tensor, trace: Trace | None) -> Tensor:
        images, layout = len(tokens), self._layout(tokens, trace)
        if self.sparsifier.restores:
            return layout.patches(tokens).flatten(0, 1)
        found = [output for output in named_outputs(outputs).values() if output.dim() == 2 and len(output) == images]
        if found:
            return torch.cat([F.normalize(output.float(), dim=-1) for output in found], dim=-1)
        patches = layout.patches(tokens)
        others = torch.cat([layout.prefix(tokens), tokens[:, tokens.shape[1] - layout.num_suffix :]], dim=1)
        if others.shape[1]:
            return others.flatten(0, 1)
        if trace is None or trace.indices:
            return patches.mean(dim=1)
        keep = trace.keep[-1].unsqueeze(-1).to(patches.dtype)  # (B, N, 1)
        return (patches * keep).sum(dim=1) / keep.sum(dim=1)

    def _layout(self, tokens: Tensor, trace: Trace | None) -> Layout:
        if self.sparsifier.backbone.packed is not None:  # one sequence, every token of which is restored
            return Layout(0, tokens.shape[1])
        if trace is not None:
            return trace.layout
        backbone = self.sparsifier.backbone
        num_prefix = backbone.num_prefix_at(len(backbone.blocks))
        num_patches = tokens.shape[1] - num_prefix - backbone.num_suffix_tokens
        return Layout(num_prefix, num_patches, num_suffix=backbone.num_suffix_tokens)

    def distance(self, student: View, teacher: View) -> Tensor:
        """KL(teacher ‖ student) of class probabilities, or 1 − cosine of features; the mean over images."""
        if self.measure == "top-1 agreement":
            log_student, log_teacher = student.answer.log_softmax(dim=-1), teacher.answer.log_softmax(dim=-1)
            return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return 1 - self.agreement(student, teacher)

    def agreement(self, student: View, teacher: View) -> Tensor:
        """The share of images with the same best class, or the mean cosine of features."""
        if self.measure == "top-1 agreement":
            return (student.answer.argmax(dim=-1) == teacher.answer.argmax(dim=-1)).float().mean()
        return F.cosine_similarity(student.answer, teacher.answer, dim=-1).mean()

    def token_distance(self, student: View, teacher: View) -> Tensor:
        """Squared error of the final patch tokens that are left, as a fraction of the teacher's mean square."""
        trace = student.trace
        assert trace is not None
        patches = self._layout(student.tokens, trace).patches(student.tokens).float()
        taught = self._layout(teacher.tokens, None).patches(teacher.tokens).float()
        scale = taught.square().mean()
        if trace.restored:
            return (patches - taught).square().mean() / scale
        indices = trace.selections[-1].indices
        if indices is not None:
            return (patches - select(taught, indices)).square().mean() / scale
        kept = trace.keep[-1].detach()
        errors = (patches - taught).square().mean(dim=-1)  # (B, N)
        return (errors * kept).sum() / kept.sum() / scale


def classifies(model: nn.Module, outputs: Any) -> bool:
    """Whether what a model returned are the logits of one class out of several, as far as it can be known.

    They are named so, or are all that it returns, and nothing says that they are features or something else.
    """
    config = getattr(model, "config", None)
    if getattr(model, "num_classes", None) == 0 or getattr(config, "problem_type", None) in (
        "regression",
        "multi_label_classification",
    ):
        return False
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    logits = outputs if isinstance(outputs, Tensor) else named
    return isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 1
