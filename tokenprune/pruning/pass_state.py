"""The state of the pass that is running, as its hooks leave it to one another.

Shapes: B images, L tokens before any pruning, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenprune.backbones.interception import Interception
from tokenprune.backbones.padded import Images
from tokenprune.pruning.executions import Execution
from tokenprune.pruning.recomputation import NOTHING
from tokenprune.pruning.trace import Trace


class PassState:
    """What hooks know of a pass.

    It is no module: these check every attribute that they are given, which takes many times as long as setting it.

    Attributes:
        in_tower: Whether the module runs that embeds images and runs the blocks.
        grad_enabled: Whether gradients were enabled when it began.
        image_size: Height and width of its images, if known.
        images: Its images, where they are of different sizes.
        running: The execution of the last pass that reached a block; ``None`` after an unpruned one.
        open: Whether blocks are still to come.
        idle: Whether nothing is to be done any more, since nothing is pruned and all is recorded.
        state: What the blocks behind the last stage find decided.
        attended: Whether attention has been masked in the block that is running.
        everything: (B, L, C), all tokens in front of the block that is running, where they are restored behind it.
        entry: What that block found decided.
        tail: What the model is intercepted by behind its last block.
        idled: How the last idle pass was made, with its record.
    """

    def __init__(self) -> None:
        self.in_tower = False
        self.grad_enabled = False
        self.image_size: tuple[int, int] | None = None
        self.images: Images | None = None
        self.running: Execution | None = None
        self.open = False
        self.idle = False
        self.state = NOTHING
        self.attended = False
        self.everything: Tensor | None = None
        self.entry = NOTHING
        self.tail: Interception | None = None
        self.idled: tuple[tuple[Any, ...], Execution, Trace] | None = None

    def end(self) -> None:
        """Forget what blocks have left, and leave the tail."""
        tail, self.tail = self.tail, None
        if tail is not None:
            tail.leave()
        self.everything, self.entry, self.state = None, NOTHING, NOTHING
        self.open = self.idle = False
