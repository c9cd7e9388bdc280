"""Every tensor of a line of calls lies inside of its input, weight or storage; C code does not check it again.

Storages and results have their sizes in the line, and are checked when it is read (``graphopt.straight_line``). A file
whose hashes are right may still name others' bytes: whoever writes hashes can forge them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from graphopt.errors import ArtifactError
from graphopt.manifest import TensorSpec

if TYPE_CHECKING:
    from graphopt.artifact import Artifact


def check_bounds(artifact: Artifact) -> None:
    """Raise ArtifactError naming the first tensor, output or weight transform that is of something else."""
    manifest, line = artifact.manifest, artifact.manifest.line
    made = {transform.weight: transform.result for transform in manifest.weight_transforms}
    for name in made:
        if name not in artifact.weights:
            raise _refused(f"the weight transform of {name!r} is of no weight")
    weights = [
        _bytes(made[name], one_image=False) if name in made else artifact.weights[name].nbytes
        for name in manifest.weights
    ]
    inputs = [_bytes(spec, manifest.image_by_image) for spec in manifest.inputs]
    sizes = {"input": inputs, "weight": weights}
    names = {"input": [spec.name for spec in manifest.inputs], "weight": manifest.weights}
    for tensor in line.tensors:
        owned = sizes.get(tensor.memory)
        if owned is None:
            continue
        size = owned[tensor.index]
        if tensor.offset + tensor.bytes > size:
            name = names[tensor.memory][tensor.index]
            raise _refused(
                f"tensor {str(tensor)!r} is not inside of the {size} bytes of {tensor.memory} {name!r}"
            )
    if len(line.outputs) != len(manifest.outputs):
        raise _refused(f"it gives {len(line.outputs)} outputs of {len(manifest.outputs)}")
    for spec, number in zip(manifest.outputs, line.outputs, strict=True):
        size, given = _bytes(spec, manifest.image_by_image), line.tensors[number].bytes
        if size != given:
            raise _refused(f"output {spec.name!r} is of {size} bytes and its tensor of {given}")


def _bytes(spec: TensorSpec, one_image: bool) -> int:
    """The size of a tensor in one run of the kernels."""
    shape = (1, *spec.shape[1:]) if one_image and spec.shape else spec.shape
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) != len(shape):
        raise _refused(f"tensor {spec.name!r} is {spec.describe()}, which is no fixed size")
    return math.prod(sizes) * np.dtype(spec.dtype).itemsize


def _refused(reason: str) -> ArtifactError:
    return ArtifactError(
        f"the model's line of calls is malformed: {reason}; compile the model again"
    )
