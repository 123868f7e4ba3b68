"""The ε of the layer norms in scorers and reductions, which weights trained elsewhere may need another one of."""

from __future__ import annotations

from torch import nn

_DEFAULT = nn.LayerNorm(1).eps


def norm_eps(module: nn.Module) -> float | None:
    """The ε that all layer norms in a module have; ``None`` if they differ, or have PyTorch's default."""
    found = {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}
    return found.pop() if len(found) == 1 and _DEFAULT not in found else None


def set_norm_eps(module: nn.Module, eps: float | None) -> None:
    """Give all layer norms in a module this ε, unless it is ``None``."""
    if eps is None:
        return
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = eps
