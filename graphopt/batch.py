"""A batch of images through code that takes one: views of the inputs in, the rows of every output stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphopt.weights_file import aligned_empty

Array = np.ndarray[Any, Any]
Run = Callable[[Sequence[Array]], list[Array]]


def image_by_image(run: Run, inputs: Sequence[Array]) -> list[Array]:
    """Return the outputs of ``run`` for each image of ``inputs`` (dimension 0), joined along dimension 0."""
    images = len(inputs[0])
    if images == 1:
        return run(inputs)
    outputs: list[Array] = []
    for image in range(images):
        leaves = run([array[image : image + 1] for array in inputs])
        if not outputs:
            outputs = [
                aligned_empty((images * len(leaf), *leaf.shape[1:]), leaf.dtype) for leaf in leaves
            ]
        for output, leaf in zip(outputs, leaves, strict=True):
            output[image * len(leaf) : (image + 1) * len(leaf)] = leaf
    return outputs
