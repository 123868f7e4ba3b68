"""Which class an execution of a name is for a model, by how the model is given images of different sizes."""

from __future__ import annotations

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.padded import Images
from tokenprune.errors import UnsupportedModelError
from tokenprune.pruning.executions.base import Execution, execution_class
from tokenprune.pruning.executions.gather import Gather
from tokenprune.pruning.executions.mask import Mask
from tokenprune.pruning.executions.packed import MaskingOfPacked, RemovingOfPacked
from tokenprune.pruning.executions.padded import GatherOfPadded, MaskOfPadded, VarlenOfPadded
from tokenprune.pruning.executions.varlen import Varlen

# Of images in one sequence, and in a padded row each.
_OF_SIZES: dict[type[Execution], tuple[type[Execution], type[Execution]]] = {
    Mask: (MaskingOfPacked, MaskOfPadded),
    Gather: (RemovingOfPacked, GatherOfPadded),
    Varlen: (RemovingOfPacked, VarlenOfPadded),
}


def execution_of(name: str, backbone: Backbone, images: Images | None) -> Execution:
    """The execution of a name.

    Args:
        name: The name.
        backbone: What the model looks like.
        images: Those that it is given, where they are of different sizes.

    Raises:
        UnsupportedModelError: They are, and the execution is for images of one size.
    """
    execution = execution_class(name)
    if images is None:
        return execution(backbone)
    if execution not in _OF_SIZES:
        raise UnsupportedModelError(
            f"{name!r} execution is for images of one size; set model.tokenprune.execution = 'auto' for this model."
        )
    of_packed, of_padded = _OF_SIZES[execution]
    return (of_packed if isinstance(images, PackedImages) else of_padded)(backbone)
