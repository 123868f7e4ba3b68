"""How a picture is prepared for a model: size, crop, mean and standard deviation.

Shapes: K channels, H and W height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import torch
from torch import Tensor

from tokenprune.errors import PictureError, extra

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

Picture: TypeAlias = Union[str, Path, "PILImage", "np.ndarray[Any, Any]", Tensor]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_FITS = ("cover", "contain", "squash")
_MODES = {1: "L", 3: "RGB"}  # what Pillow calls pictures of so many channels


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the input of a model.

    It is resized, its middle is cut out, and its pixels, from 0 to 1, are normalised as (pixel − mean) ÷ std.

    Attributes:
        size: Height and width of the input, in pixels.
        mean: One number a channel.
        std: One number a channel, above 0.
        resize: Height and width of the box that the picture is first resized to; ``None`` means ``size``.
        fit: ``"cover"``: the smallest picture of its own proportions that covers the box; ``"contain"``: the
            largest that the box contains, with a margin of the mean; ``"squash"``: the box, whatever the
            proportions.
        interpolation: Of the resizing, by Pillow's name.

    Raises:
        PictureError: A value makes no sense; the message says which.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, int] | None = None
    fit: Literal["cover", "contain", "squash"] = "cover"
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        for name, box in (("size", self.size), ("resize", self.resize or self.size)):
            if len(box) != 2 or min(box) < 1:
                raise PictureError(f"{name}={box}: expected height and width, each at least 1.")
        if len(self.mean) not in _MODES or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise PictureError(
                f"mean={self.mean}, std={self.std}: expected as many of both, 1 or 3, and deviations above 0."
            )
        if self.fit not in _FITS:
            raise PictureError(f"fit={self.fit!r}: choose from {', '.join(_FITS)}.")
        if self.interpolation not in _INTERPOLATIONS:
            raise PictureError(f"interpolation={self.interpolation!r}: choose from {', '.join(_INTERPOLATIONS)}.")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return len(self.mean), *self.size

    def apply(self, picture: Picture) -> Tensor:
        """The input (K, H, W) that a picture becomes.

        Args:
            picture: A file, a Pillow image, an array (h, w) or (h, w, 3) of bytes or of numbers from 0 to 1; or a
                floating-point tensor (K, H, W), which is taken to be an input already.

        Raises:
            PictureError: It cannot be read, or is none of these.
            MissingExtraError: Pillow is not installed.
        """
        if isinstance(picture, Tensor):
            return self._checked(picture)
        with extra("plots"):
            import numpy as np
        cut = self._cut(_opened(picture).convert(_MODES[len(self.mean)]))
        pixels = torch.from_numpy(np.array(cut, dtype=np.float32) / 255)
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)  # (K, H, W)
        mean, std = self._statistics(pixels)
        return (pixels - mean) / std

    def undo(self, inputs: Tensor) -> Tensor:
        """The pixels, from 0 to 1, of inputs (..., K, H, W)."""
        mean, std = self._statistics(inputs)
        return (inputs * std + mean).clamp(0, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.mean)[:, None, None], like.new_tensor(self.std)[:, None, None]

    def _checked(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 3 or inputs.shape[0] != len(self.mean) or not inputs.is_floating_point():
            raise PictureError(
                f"a tensor of shape {tuple(inputs.shape)} and dtype {inputs.dtype} is no input of this model, which "
                f"takes floating-point numbers of shape ({len(self.mean)}, height, width), normalised; pass a picture "
                "that is yet to be resized and normalised as a NumPy array or a Pillow image."
            )
        return inputs.detach().float().cpu()

    def _cut(self, picture: PILImage) -> PILImage:
        from PIL import Image

        (height, width), (top, left) = self.size, (0, 0)
        box_height, box_width = self.resize or self.size
        scales = box_height / picture.height, box_width / picture.width
        if self.fit == "squash":
            resized = box_height, box_width
        else:
            first = scales[0] >= scales[1] if self.fit == "cover" else scales[0] <= scales[1]
            # The side that decides is exact; the other is rounded down, as libraries do.
            other = int(box_height * picture.width / picture.height), int(box_width * picture.height / picture.width)
            resized = (box_height, max(1, other[0])) if first else (max(1, other[1]), box_width)
        picture = picture.resize(resized[::-1], Image.Resampling[self.interpolation.upper()])
        top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
        if top >= 0 and left >= 0:
            return picture.crop((left, top, left + width, top + height))
        margin = tuple(round(255 * value) for value in self.mean)
        canvas = Image.new(picture.mode, (width, height), margin if len(margin) > 1 else margin[0])
        canvas.paste(picture, (-left, -top))
        return canvas


def name_of(picture: Picture) -> str:
    """The name of a picture's file, or nothing."""
    return Path(picture).name if isinstance(picture, (str, Path)) else ""


def _opened(picture: str | Path | PILImage | np.ndarray[Any, Any]) -> PILImage:
    with extra("plots"):
        import numpy as np
        from PIL import Image, ImageOps, UnidentifiedImageError
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as opened:
                return ImageOps.exif_transpose(opened)
        except UnidentifiedImageError:
            raise PictureError(f"{picture} is no picture of a kind that Pillow reads.") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise PictureError(f"{picture} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        return Image.fromarray(_bytes(picture))
    raise PictureError(
        f"a {type(picture).__name__} is no picture: expected a path, a Pillow image, an array or a tensor."
    )


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array of pixels as bytes, (h, w) or (h, w, 3)."""
    import numpy as np

    shape = array.shape[2:]
    if array.ndim not in (2, 3) or shape not in ((), (1,), (3,)) or 0 in array.shape:
        raise PictureError(f"an array of shape {array.shape} is no picture: expected (h, w) or (h, w, 3).")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PictureError(
                f"an array of {array.dtype} has numbers outside of 0 … 1; pass pixels of that range or bytes."
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise PictureError(f"an array of {array.dtype} is no picture: expected bytes, or numbers from 0 to 1.")
    return array[..., 0] if shape == (1,) else array
