"""What is checked of a forward pass while it runs, and said where it does not fit.

Shapes: B images, P prefix tokens, N patch tokens, Q suffix tokens, L = P + N + Q, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import NoReturn

from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.padded import Images
from tokenprune.errors import InterceptionError, StateError, UnsupportedModelError
from tokenprune.pruning.executions import AUTO, Execution, check_execution, default_execution, execution_class
from tokenprune.pruning.recomputation import recomputing
from tokenprune.tokens import Layout, sizes


def check_no_replica(model: nn.Module) -> None:
    """Refuse a copy whose hooks belong to another model.

    Raises:
        StateError: `nn.DataParallel` has made it.
    """
    if model.__dict__.get("_is_replica"):
        raise StateError(
            "nn.DataParallel makes copies whose hooks belong to the original model; use DistributedDataParallel."
        )


def layout_of(block: nn.Module, tokens: Tensor, backbone: Backbone, images: Images | None = None) -> Layout:
    """The layout of the sequence (B, L, C) that the first block gets; of a row for each image, where images are packed.

    Raises:
        StateError: It is not one that the backbone describes.
    """
    if tokens.shape[2] != backbone.embed_dim:
        raise StateError(
            f"{type(block).__name__} got tokens of width {tokens.shape[2]}, and the Backbone says "
            f"embed_dim={backbone.embed_dim}."
        )
    if isinstance(images, PackedImages):
        if (*sizes(tokens)[:2],) != (1, images.length):
            raise StateError(
                f"{type(block).__name__} got tokens of shape {tuple(tokens.shape)}, and the images' grids say that "
                f"there are {images.length}, {' + '.join(map(str, images.lengths))}."
            )
        return Layout(images.num_prefix, images.longest)
    num_others = backbone.num_prefix_tokens + backbone.num_suffix_tokens
    num_patches = sizes(tokens)[1] - num_others
    if num_patches < 1:
        raise StateError(
            f"{type(block).__name__} got {tokens.shape[1]} tokens, and {num_others} are "
            "prefix or suffix tokens; there is no patch token to prune."
        )
    if images is not None and sizes(images.present)[1] != num_patches:
        raise StateError(
            f"{type(block).__name__} got {num_patches} patch tokens of each image, and {backbone.patch_mask!r} says "
            f"which of {images.present.shape[1]} are there."
        )
    return Layout(backbone.num_prefix_tokens, num_patches, num_suffix=backbone.num_suffix_tokens)


def refuse_training_in_place() -> NoReturn:
    """Refuse to train a vision tower inside of a model that takes equally many tokens of each image.

    Raises:
        StateError: It says what to do instead.
    """
    raise StateError(
        "in training, images keep different numbers of tokens, and what follows the vision tower takes equally "
        "many of each: train the tower by itself, or set model.tokenprune.execution = "
        f"{default_execution(training=False)!r}, in which scorers do not learn."
    )


def check_calibrated(keep_ratios: tuple[float, ...], calibrated: Collection[tuple[float, ...]]) -> None:
    """Refuse an adaptive budget at ratios for which there are no thresholds.

    Raises:
        StateError: It says for which there are some, and what to do.
    """
    if keep_ratios not in calibrated and any(ratio < 1 for ratio in keep_ratios):
        found = " and ".join(map(str, calibrated)) or "none"
        raise StateError(
            f"an adaptive budget needs thresholds for the keep ratios {keep_ratios}; calibrated are {found}. Call "
            "tokenprune.calibrate_budget(model, images) at these ratios, or set model.tokenprune.budget = 'fixed'."
        )


def check_by_image(execution: str, backbone: Backbone) -> None:
    """Refuse an execution for an adaptive budget in which all images keep equally many tokens.

    Raises:
        StateError: It is one.
        UnsupportedModelError: It is the one that is taken by itself, in which the model cannot run.
    """
    if execution == AUTO:
        check_execution(default_execution(training=False, by_image=True), backbone)
    elif not execution_class(execution).by_image:
        raise StateError(
            f"in {execution!r} execution all images keep equally many tokens, which an adaptive budget does not give: "
            f"set model.tokenprune.execution = 'auto' or {default_execution(training=False, by_image=True)!r}, or "
            "model.tokenprune.budget = 'fixed'."
        )


def refuse_sizes() -> NoReturn:
    """Refuse images of different sizes where stages merge one number of tokens of each.

    Raises:
        StateError: It says what to do instead.
    """
    raise StateError(
        "the model is given images of different sizes, and its scorer, whose stages stand inside of blocks, merges one "
        "number of tokens of each; give it images of one size, or take another scorer, such as 'predictor'."
    )


def check_not_packed(backbone: Backbone) -> None:
    """Refuse thresholds where images are of different sizes, and each keeps a fraction of its own tokens.

    Raises:
        UnsupportedModelError: The model packs images.
    """
    if backbone.packed is not None:
        raise UnsupportedModelError(
            "this model has all images of a batch in one sequence, and of each the same fraction of its own tokens is "
            "kept; an adaptive budget is for models that are given images of one size."
        )


def refuse_order(block: nn.Module, index: int) -> NoReturn:
    """Refuse a forward pass that runs the blocks in another order than the backbone names them.

    Raises:
        StateError: It names the block that was not expected.
    """
    raise StateError(
        f"block {index} of the Backbone, a {type(block).__name__}, runs before blocks that are named before it; name "
        "the blocks in the order in which the model runs them."
    )


def check_attended(block: nn.Module, attended: bool) -> None:
    """Refuse a block of which no attention module was called, although tokens are to be masked in it.

    Raises:
        InterceptionError: None was.
    """
    if not attended:
        raise InterceptionError(
            f"{type(block).__name__} never called the attention modules it was described with, so pruned tokens "
            "could not be masked; name in Backbone.attentions the modules that it calls (not their forward)."
        )


def check_recomputed(execution: Execution, name: str, module: nn.Module) -> None:
    """Refuse that a module is run again in an execution whose decisions belong to the latest pass alone.

    Raises:
        StateError: Activation checkpointing does so.
    """
    if not execution.trains and recomputing():
        raise StateError(
            f"activation checkpointing runs {type(module).__name__} again in {name} execution, that of the latest "
            f"pass; train in {default_execution(training=True)} execution and make no other pass before the backward "
            "pass, or train without checkpointing."
        )


def refuse_recomputing_inside(attention: nn.Module) -> None:
    """Refuse that a block inside of which tokens are pruned is run again.

    Raises:
        StateError: Activation checkpointing does so.
    """
    if recomputing():
        raise StateError(
            f"activation checkpointing runs {type(attention).__name__} again, in a block inside of which tokens are "
            "merged; train without checkpointing, or take a scorer that prunes in front of blocks."
        )


def check_grad(module: nn.Module, *, expected: bool, enabled: bool) -> None:
    """Refuse re-entrant activation checkpointing, which runs a module without gradients.

    Raises:
        StateError: Gradients are expected and not enabled.
    """
    if expected and not enabled:
        raise StateError(
            f"{type(module).__name__} runs without gradients inside a forward pass with them: re-entrant "
            "activation checkpointing loses the gradients of the keep decisions. Use use_reentrant=False."
        )


def warn_of_pruned() -> None:
    """Warn of pruned tokens behind the last block, where no forward pass of the model is there to hide them."""
    warnings.warn(
        "a method of a sparsified model was called in an execution in which all tokens stay, without calling "
        "the model itself: its tokens include pruned ones, which model.tokenprune.trace.keep[-1] tells apart "
        "before they are pooled.",
        stacklevel=3,
    )
