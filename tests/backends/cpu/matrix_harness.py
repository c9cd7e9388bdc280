"""Views of NumPy arrays as the kernels of products take them."""

from __future__ import annotations

import math

import numpy as np

from graphopt.backends.cpu.tokens import Strided
from graphopt.backends.cpu.workload import Layout


def rows(array: np.ndarray, dynamic: bool = False) -> Layout:
    """The layout of a contiguous array of two dimensions or more."""
    batch = None if dynamic else array.shape[0]
    return Layout(batch, 1, math.prod(array.shape[1:-1]), array.shape[-1], "float32")


def physical(array: np.ndarray) -> np.ndarray:
    """The array in the shape of its layout."""
    return array.reshape(array.shape[0], 1, -1, array.shape[-1])


def viewed(values: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A contiguous base, and ``values`` as ``base.transpose(axes)``."""
    base = np.ascontiguousarray(values.transpose(np.argsort(axes)))
    return base, base.transpose(axes)


def strided(view: np.ndarray, base: np.ndarray, dynamic: bool = False) -> Strided:
    """``view``, which shares memory with the contiguous ``base``."""
    address = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    strides = tuple(stride // view.itemsize for stride in view.strides)
    return Strided(rows(base, dynamic), strides, address // view.itemsize)


def noise(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_near(actual: np.ndarray, exact: np.ndarray, bound: float = 1e-5) -> None:
    """Within ``bound`` of the largest element: sums of a few hundred float32 products."""
    assert np.isnan(actual).tolist() == np.isnan(exact).tolist()
    largest = float(np.nanmax(np.abs(exact), initial=0.0))
    np.testing.assert_allclose(actual, exact, rtol=0, atol=bound * largest)
