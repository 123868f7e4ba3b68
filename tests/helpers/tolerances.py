"""The one table of tolerances, each with its reason."""

from __future__ import annotations

import torch

IDENTITY = 1e-6
"""Nothing pruned: the same kernels on the same tensors, so nearly always exactly 0."""

MASK_EQUALS_GATHER = {
    # Sums over kept keys run over other lengths, so in another order; errors of single precision add up
    # over the blocks.
    torch.float32: 1e-4,
    # The same in double precision, where eps is 2e-16.
    torch.float64: 1e-9,
}

FORMULA = 1e-9
"""Double precision against the written-out formula; sums in another order."""

KERNELS = 1e-5
"""The same by our own kernels in single precision, where eps is 6e-8, relative to the largest; sums of some hundred."""

KERNELS_HALF = {
    # As above, where kernels multiply what has 11 bits of mantissa, weights and slopes included.
    torch.float16: 4e-3,
    # And what has 8 of them.
    torch.bfloat16: 3e-2,
}

CENSUS_IDENTITY = 1e-5
"""Over hundreds of models, some of which build tables anew in another order, relative to the largest output."""

CENSUS_MASK_EQUALS_GATHER = 2e-5
"""As above, in single precision, relative. Rounding gives up to a few 1e-6; wrong positions no more than 4e-4."""

OFFICIAL = 1e-5
"""Logits of about 1 against the official inference written out, in single precision, through up to 16 blocks."""

TOME = 1e-5
"""Tokens of about 1 behind the final norm against ToMe written out, in single precision, through 12 blocks."""

INTERPOLATED_COST = 5e-3
"""Of a plan, beside the counted one, relative: half of what `plan_for` promises, and it counts what it returns."""

VARLEN = {
    # Of one sequence for all images and of each by itself: sums of as many numbers, which a product over more rows may
    # add up in another order.
    torch.float32: 1e-5,
    # The same in double precision.
    torch.float64: 1e-9,
}

FROZEN = 1e-5
"""A frozen model beside the same one with its hooks, relative to the largest output: constants of scorers are folded,
and tokens go on in another order, so that sums run in another order."""

SHORTENED_PROMPT = 1e-5
"""Logits of about 1, in single precision: sums over the tokens that are left run over other lengths."""

SHARDED = 1e-4
"""Losses of about 2.5 and weights of about 1, of two sharded processes and of one, after 16 steps: gradients are summed
in another order, and AdamW divides by their size."""

CLIPPED = 5e-7
"""Norms, relative, and weights of about 1, after one step of the same gradients, clipped by two sides that add up
squares in another order: two to four units in the last place of single precision."""
