"""Finding the parts of blocks that treat tokens one by one, by running the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tokenprune.backbones.module_calls import Recording, record_calls
from tokenprune.backbones.probing import eval_mode
from tokenprune.backbones.token_wise_candidates import FoundPart, candidates
from tokenprune.backbones.token_wise_trial import Trial
from tokenprune.errors import UnsupportedModelError


class Probe:
    """Runs a model, and finds and proves its token-wise parts.

    Args:
        model: The model, or the part of it that runs the blocks.
        inputs: Keyword arguments of its forward pass, or positional ones.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> None:
        self.model, self.inputs = model, inputs
        self._silent = {
            name: torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter) * 0.1
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not bool(parameter.detach().any())
        }

    def run(self) -> None:
        """One pass; parameters that are all zero, behind which something could hide, have other values in it.

        Raises:
            UnsupportedModelError: The model could not be run.
        """
        args, kwargs = ((), dict(self.inputs)) if isinstance(self.inputs, Mapping) else (tuple(self.inputs), {})
        devices = [parameter.device for parameter in self.model.parameters() if parameter.device.type == "cuda"][:1]
        try:
            with eval_mode(self.model), torch.random.fork_rng(devices=devices), torch.no_grad():
                functional_call(self.model, self._silent, args, kwargs)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} could not be run on example images to see what it looks like "
                f"({type(error).__name__}: {error})."
            ) from error

    def record(self) -> Recording:
        """Run the model and note how its modules are called."""
        return record_calls(self.model, self.run)

    def parts(self, blocks: Sequence[nn.Module], recording: Recording) -> dict[nn.Module, list[FoundPart]]:
        """The token-wise parts of each of several blocks, in the order in which they run."""
        open_pairs = {
            (block, number): forms for block in blocks for number, forms in enumerate(candidates(block, recording))
        }
        found: dict[tuple[nn.Module, int], FoundPart] = {}
        while open_pairs:
            tried = {key: forms[0] for key, forms in open_pairs.items()}
            proved = self._prove(tried, recording)
            found |= {key: tried[key] for key in proved}
            open_pairs = {key: forms[1:] for key, forms in open_pairs.items() if key not in found and forms[1:]}
        return {block: [found[key] for key in _in_order(found, block)] for block in blocks}

    def _prove(
        self, tried: Mapping[tuple[nn.Module, int], FoundPart], recording: Recording
    ) -> set[tuple[nn.Module, int]]:
        """Which of several parts, no two of which overlap, treat tokens one by one."""
        left = dict(tried)
        failures: Counter[tuple[type, ...]] = Counter()
        while left:
            trials = {key: Trial(one.part, recording.calls[one.part.last].output) for key, one in left.items()}
            try:
                with ExitStack() as hooks:
                    for trial in trials.values():
                        for handle in trial.install():
                            hooks.callback(handle.remove)
                    self.run()
            except UnsupportedModelError:
                # The one that was running is none, nor are others of its kind where it is the second one.
                running = [key for key, trial in trials.items() if trial.running]
                if not running:
                    raise
                kinds = {key: (type(key[0]), *map(type, left[key].part.modules)) for key in left}
                failures.update(kinds[key] for key in running)
                left = {key: left[key] for key in left if key not in running and failures[kinds[key]] < 2}
                continue
            return {key for key, trial in trials.items() if trial.holds}
        return set()


def _in_order(found: Mapping[tuple[nn.Module, int], FoundPart], block: nn.Module) -> list[tuple[nn.Module, int]]:
    """The keys of one block's parts, in order."""
    return sorted((key for key in found if key[0] is block), key=lambda key: key[1])
