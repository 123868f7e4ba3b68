"""Reductions: what becomes of pruned tokens, one file each."""

from tokenprune.pruning.reductions.base import (
    Reduced,
    Reduction,
    ReductionBuilder,
    ReductionContext,
    Split,
    WholeModel,
    check_reduced,
    reduction_builder,
    reduction_name,
    reduction_names,
    register_reduction,
)
from tokenprune.pruning.reductions.drop import Drop
from tokenprune.pruning.reductions.fast import Fast, FastPath, NestedFast
from tokenprune.pruning.reductions.fuse import Fuse, FusePreserve
from tokenprune.pruning.reductions.merge import Merge, MergePreserve
from tokenprune.pruning.reductions.merge_sizes import MergeSizes, MergeSizesPreserve
from tokenprune.pruning.reductions.preserve import Preserve

__all__ = [
    "Drop",
    "Fast",
    "FastPath",
    "Fuse",
    "FusePreserve",
    "Merge",
    "MergePreserve",
    "MergeSizes",
    "MergeSizesPreserve",
    "NestedFast",
    "Preserve",
    "Reduced",
    "Reduction",
    "ReductionBuilder",
    "ReductionContext",
    "Split",
    "WholeModel",
    "check_reduced",
    "reduction_builder",
    "reduction_name",
    "reduction_names",
    "register_reduction",
]
