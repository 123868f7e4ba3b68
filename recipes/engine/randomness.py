"""Random numbers that depend on where in the run they are drawn, and on nothing that happened before.

A run that is stopped and continued, or spread over more processes, draws the same numbers for the
same images: no random state has to be saved.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(*place: int) -> None:
    """Seed torch, numpy and random from a position in the run, such as (seed, epoch, index of the image)."""
    first, second = np.random.SeedSequence(place).generate_state(2, dtype=np.uint32)
    torch.manual_seed(int(first) << 32 | int(second))
    np.random.seed(int(first))
    random.seed(int(second))
