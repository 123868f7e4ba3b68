"""Runs a module as ``python -m`` does, with processes that Accelerate shards for although they compute on CPUs.

``torchrun --nproc_per_node 2 -m tests.helpers.sharded_on_cpu recipes.deit --smoke …``

Accelerate 1.15 shards only on accelerators: on CPUs it takes FSDP for DDP without a word, and DeepSpeed's processes for
one each. Here it is told that the processes, which talk over gloo, are those of a GPU machine; all that follows is its
own code and PyTorch's, or DeepSpeed's.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _on_gloo(self: PartialState, *args: object, **options: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _on_gloo
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
