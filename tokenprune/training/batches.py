"""Batches of model inputs out of whatever yields images, some of them held back for validation.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = "Tensor | dict[str, Any]"


class Batches:
    """Inputs for a model, over and over where the images can be read again.

    The first batches are held back for validation, and left out whenever the images are read again. What is shuffled
    anew each time can bring some of their images back.

    Args:
        images: Any iterable of batches; see `inputs_of`.
        num_held_back: How many batches to hold back; where there are no more than that, half of what there is.
        device: Where inputs go.
        dtype: What floating-point inputs become.

    Attributes:
        held_back: The batches for validation. Where there is but one batch, it is for validation and training.
        num_batches: How many batches have been given out for training.
        num_images: How many images were in them.

    Raises:
        TypeError: ``images`` is no iterable of batches, or a batch has nothing that a model could be given.
        ValueError: There is no batch, or none with an image in it.
    """

    def __init__(self, images: Any, *, num_held_back: int, device: torch.device, dtype: torch.dtype) -> None:
        self._images, self._device, self._dtype = images, device, dtype
        self._reads_again = not isinstance(images, Iterator)
        self._iterator = self._read()
        first = list(islice(self._iterator, num_held_back + 1))
        if not first:
            raise ValueError("images yields no batch with an image in it; give at least one.")
        number = num_held_back if len(first) > num_held_back else len(first) // 2
        self.held_back = first[:number] or first
        self._num_skipped = number
        self._iterator = chain(first[number:], self._iterator)
        self.num_batches = self.num_images = 0

    def next(self) -> Inputs | None:
        """The next batch for training; ``None`` where there are no more."""
        batch = next(self._iterator, None)
        if batch is None and self._reads_again:
            self._iterator = islice(self._read(), self._num_skipped, None)
            batch = next(self._iterator, None)
        if batch is not None:
            self.num_batches += 1
            self.num_images += num_images(batch)
        return batch

    def some(self, number: int) -> list[Inputs]:
        """So many of the next batches, or as many as there are."""
        return list(islice(iter(self.next, None), number))

    def _read(self) -> Iterator[Inputs]:
        return all_inputs(self._images, device=self._device, dtype=self._dtype)


def all_inputs(images: Any, *, device: torch.device, dtype: torch.dtype) -> Iterator[Inputs]:
    """Inputs for a model out of every batch that has an image in it, read one after the other.

    Args:
        images: Any iterable of batches; see `inputs_of`.
        device: Where inputs go.
        dtype: What floating-point inputs become.

    Raises:
        TypeError: ``images`` is no iterable of batches; or, later, a batch has nothing that a model could be given.
    """
    _check_iterable(images)
    return (_moved(inputs, device, dtype) for inputs in map(inputs_of, images) if num_images(inputs))


def _moved(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else None, non_blocking=True)
    return {
        name: _moved(value, device, dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }


def inputs_of(batch: Any) -> Inputs:
    """What a model is given of a batch, labels left out.

    Args:
        batch: A tensor (B, …); a mapping of keyword arguments, of which those with ``label`` in their name are left
            out; or a tuple or list, of which the first item is taken.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        named: dict[str, Any] = {name: value for name, value in batch.items() if "label" not in name}
        if any(isinstance(value, Tensor) for value in named.values()):
            return named
        raise TypeError(f"a batch is a mapping of {sorted(named)} without a tensor; expected a model's arguments.")
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; expected a tensor (B, …) of images, a mapping of a model's "
            "arguments, or a tuple that begins with one of these."
        )
    return batch


def num_images(inputs: Inputs) -> int:
    """B."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor))


def _check_iterable(images: Any) -> None:
    single = isinstance(images, (Tensor, Mapping, str, bytes))
    if single or not isinstance(images, Iterable):
        hint = "; images.split(64) makes batches of it" if isinstance(images, Tensor) else ""
        raise TypeError(
            f"images is a {type(images).__name__}{hint}; expected an iterable of batches, such as a DataLoader or a "
            "list."
        )
