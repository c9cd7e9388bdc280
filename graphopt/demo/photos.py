"""Real photos that packages carry: some to calibrate on, others to measure on, none in both.

Calibration: seven colour photos of scikit-image and scikit-learn, six square crops each. Measuring: the 20 labelled
ImageNet photos of foolbox; for agreement, six crops of each (the whole, and 85 % at the centre and the corners), as they are and
mirrored: 240 pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.demo.network import DEVIATION, MEAN, RESIZE, SIZE
from graphopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Array = np.ndarray[Any, Any]

_CALIBRATION = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
_PART = 0.85
_PLACES = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def _folder(package: str) -> Path:
    """Where a package's files lie; it is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo needs the photos of package {package}; run `make setup`")
    return Path(spec.submodule_search_locations[0])


def _open(path: Path) -> Image:
    from PIL import Image as images

    if not path.is_file():
        raise InputError(f"photo {path.name} is missing from its package in {path.parent}")
    with images.open(path) as opened:
        return opened.convert("RGB")


def crops(photo: Image) -> Iterator[Image]:
    """Six squares: the centre of the whole, then 85 % of its side at the centre and at each corner."""
    short = min(photo.size)
    for side, places in ((short, _PLACES[:1]), (round(short * _PART), _PLACES)):
        for across, down in places:
            left = round((photo.width - side) * across)
            top = round((photo.height - side) * down)
            yield photo.crop((left, top, left + side, top + side))


def prepare(photo: Image) -> Array:
    """Float32 ``[3, 224, 224]``: short side to 256, centre crop, ``(rgb - 127) / 128``."""
    import numpy as np
    from PIL import Image as images

    scale = RESIZE / min(photo.size)
    size = (round(photo.width * scale), round(photo.height * scale))
    resized = photo.resize(size, images.Resampling.BICUBIC)
    left, top = (resized.width - SIZE) // 2, (resized.height - SIZE) // 2
    pixels = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), np.float32)
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1))


def calibration() -> Array:
    """42 pictures, ``[42, 3, 224, 224]``."""
    import numpy as np

    photos = [_open(_folder(package) / name) for package, name in _CALIBRATION]
    return np.stack([prepare(crop) for photo in photos for crop in crops(photo)])


def _labelled_files() -> list[Path]:
    files = sorted((_folder("foolbox") / "data").glob("imagenet_*_*.jpg"))
    if not files:
        raise InputError("package foolbox holds no ImageNet photos; install foolbox==3.3.4")
    return files


def labelled() -> tuple[Array, list[int]]:
    """20 photos ``[20, 3, 224, 224]`` and their ImageNet classes, from the file names."""
    import numpy as np

    files = _labelled_files()
    labels = [int(file.stem.rpartition("_")[2]) for file in files]
    return np.stack([prepare(_open(file)) for file in files]), labels


def held_out() -> Array:
    """240 pictures that calibration has not seen: six crops of each labelled photo, and their mirrors."""
    import numpy as np
    from PIL import ImageOps

    squares = [crop for file in _labelled_files() for crop in crops(_open(file))]
    return np.stack([prepare(p) for crop in squares for p in (crop, ImageOps.mirror(crop))])
