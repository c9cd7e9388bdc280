"""The photos of the demo: enough of them, prepared alike, none in both sets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from graphopt.demo import photos
from graphopt.errors import InputError


def test_crops_are_six_squares_inside_the_photo() -> None:
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    photo = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    squares = list(photos.crops(photo))
    assert [square.size for square in squares] == [(100, 100)] + [(85, 85)] * 5
    corners = [tuple(np.asarray(square)[0, 0, :2]) for square in squares]
    assert corners == [(50, 0), (58, 8), (0, 0), (115, 0), (0, 15), (115, 15)]


def test_prepare_is_the_networks_own_scaling() -> None:
    flat = photos.prepare(Image.new("RGB", (300, 400), (127, 255, 0)))
    assert flat.shape == (3, 224, 224)
    assert flat.dtype == np.float32
    assert flat.flags.c_contiguous
    assert np.array_equal(flat[:, 0, 0], np.array([0, 1, -127 / 128], np.float32))
    assert np.array_equal(flat, np.broadcast_to(flat[:, :1, :1], flat.shape))


def test_calibration_pictures() -> None:
    pictures = photos.calibration()
    assert pictures.shape == (42, 3, 224, 224)
    assert len(np.unique(pictures.reshape(42, -1), axis=0)) == 42


def test_labelled_photos_and_held_out_crops_are_not_calibrated_on() -> None:
    pictures, labels = photos.labelled()
    crops = photos.held_out()
    assert pictures.shape == (20, 3, 224, 224)
    assert len(labels) == 20
    assert all(0 <= label < 1000 for label in labels)
    assert crops.shape == (240, 3, 224, 224)
    # Each photo's first crop is the whole of it; one photo is not square and is resized after the crop.
    assert np.abs(crops[0::12] - pictures).mean() < 0.01
    assert np.array_equal(crops[1::2], crops[0::2][..., ::-1])
    seen = {picture.tobytes() for picture in photos.calibration()}
    assert not seen & {picture.tobytes() for picture in crops}


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="the demo needs the photos of package foolbox"):
        photos.labelled()
