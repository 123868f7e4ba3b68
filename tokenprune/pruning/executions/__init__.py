"""Executions: how the decisions of stages are carried out while a model runs, one file each.

Their order is that in which ``"auto"`` looks for one that trains, and for one that does not.
"""

from tokenprune.pruning.executions.base import (
    AUTO,
    Execution,
    check_execution,
    chosen_execution,
    default_execution,
    execution_class,
    executions,
    register_execution,
)
from tokenprune.pruning.executions.gather import Gather
from tokenprune.pruning.executions.mask import Mask
from tokenprune.pruning.executions.of_sizes import execution_of
from tokenprune.pruning.executions.paths import Paths
from tokenprune.pruning.executions.varlen import Varlen
from tokenprune.pruning.executions.whole import Whole

__all__ = [
    "AUTO",
    "Execution",
    "Gather",
    "Mask",
    "Paths",
    "Varlen",
    "Whole",
    "check_execution",
    "chosen_execution",
    "default_execution",
    "execution_class",
    "execution_of",
    "executions",
    "register_execution",
]
