"""An image as a network's input: ``(pixels / 255 - mean) / std`` in NCHW, resized and centre-cropped.

The short side becomes 256/224 of the input's, as ImageNet evaluation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_RESIZE = 256 / 224
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __post_init__(self) -> None:
        if 0.0 in self.deviation:
            raise InputError("--image-std must not be 0")


def read_image(
    path: Path, shape: Sequence[int], normalization: Normalization
) -> np.ndarray[Any, Any]:
    """The image as float32 of ``shape[-3:]``; raises InputError where it is none, or does not fit."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if len(shape) != 4 or shape[1] not in _MODES:
        raise InputError(
            f"image {path} fits an input of batch x 3 (or 1) x height x width, not {list(shape)}"
        )
    channels, height, width = shape[1:]
    for values in (normalization.mean, normalization.deviation):
        if len(values) not in (1, channels):
            raise InputError(
                f"the input has {channels} channel(s); give as many numbers to --image-mean and --image-std"
            )
    try:
        with Image.open(path) as opened:
            image = opened.convert(_MODES[channels])
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is no image that can be read") from error
    scale = _RESIZE * max(height / image.height, width / image.width)
    image = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = pixels.reshape(height, width, channels)
    mean = np.array(normalization.mean, np.float32)
    normal = (pixels - mean) / np.array(normalization.deviation, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1), np.float32)


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, sorted; raises InputError where there is none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"folder {folder} holds no image ({', '.join(SUFFIXES)})")
    return found
