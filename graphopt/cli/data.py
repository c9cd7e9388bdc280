"""Arrays from files: the inputs of a run, and batches to calibrate on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli.images import SUFFIXES, Normalization, images_in, read_image
from graphopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from graphopt.manifest import TensorSpec
    from graphopt.program import Program

    Array = np.ndarray[Any, Any]


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` by name, or of a ``.npy`` under ``""``; pickled objects are refused."""
    import numpy as np

    if not path.is_file():
        raise InputError(f"input file {path} does not exist")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # NumPy raises whatever the damage leads to
        raise InputError(f"{path} is no .npy or .npz of plain arrays") from error


def run_inputs(
    given: Sequence[str], specs: Sequence[TensorSpec], normalization: Normalization
) -> list[Array]:
    """One array for each of the model's inputs, from ``[name=]file`` in any order.

    Raises InputError where a file cannot be read, and where names and inputs do not match.
    """
    names = [spec.name for spec in specs]
    found: dict[str, Array] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or name not in names:
            name, file = "", text
        for key, array in _input_file(Path(file), name, specs, normalization).items():
            free = next((n for n in names if n not in found), "")
            target = name or (key if key in names else free)
            if not target or target in found:
                raise InputError(
                    f"{text}: the model's inputs are {', '.join(names)}, each given once"
                )
            found[target] = array
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"input {missing[0]!r} is missing; give --input {missing[0]}=FILE")
    return [found[name] for name in names]


def _input_file(
    path: Path, name: str, specs: Sequence[TensorSpec], normalization: Normalization
) -> Mapping[str, Array]:
    if path.suffix.lower() not in SUFFIXES:
        return read_arrays(path)
    if not path.is_file():
        raise InputError(f"input file {path} does not exist")
    spec = next((spec for spec in specs if spec.name == name), specs[0])
    shape = [size if isinstance(size, int) else size.low for size in spec.shape]
    image = read_image(path, shape, normalization)
    return {spec.name: image[None].repeat(shape[0], axis=0)}


def calibration(source: str, program: Program, normalization: Normalization) -> Iterable[Any]:
    """Batches for the program: a tensor each, or a tuple of tensors where it has several inputs.

    ``source`` is a ``.npz`` whose arrays hold samples along axis 0, a folder of images, or
    ``package.module:factory``, which returns the batches. Raises InputError.
    """
    if ":" in source and not Path(source).exists():
        from graphopt.models import factory

        return list(factory(source)())
    path = Path(source)
    if path.is_dir():
        return _image_batches(path, program, normalization)
    if path.suffix == ".npz":
        return _array_batches(path, program)
    raise InputError(
        f"calibration {source!r} must be a .npz file, a folder of images or package.module:factory"
    )


def labelled(source: str, program: Program) -> Iterable[Any]:
    """Batches ``(inputs, labels)``: of ``package.module:factory``, or of a ``.npz`` that has an array ``labels`` too.

    Raises InputError.
    """
    if ":" in source and not Path(source).exists():
        from graphopt.models import factory

        return list(factory(source)())
    path = Path(source)
    if path.suffix != ".npz":
        raise InputError(f"data {source!r} must be a .npz file or package.module:factory")
    import torch

    arrays = read_arrays(path)
    if "labels" not in arrays:
        raise InputError(f"{path} has no array 'labels'; it holds {', '.join(arrays)}")
    labels = torch.from_numpy(arrays.pop("labels"))
    batches = _split([*_tensors(path, arrays, program), labels], program, str(path))
    return [(batch[0] if len(batch) == 2 else batch[:-1], batch[-1]) for batch in batches]


def _batch_size(program: Program) -> int:
    return max(1, int(program.example_inputs[0].shape[0]))


def _image_batches(folder: Path, program: Program, normalization: Normalization) -> list[Any]:
    import numpy as np
    import torch

    if len(program.inputs) != 1:
        raise InputError(f"folder {folder} gives one input, the model has {len(program.inputs)}")
    shape = tuple(program.example_inputs[0].shape)
    images = [read_image(path, shape, normalization) for path in images_in(folder)]
    return _split([torch.from_numpy(np.stack(images))], program, str(folder))


def _array_batches(path: Path, program: Program) -> list[Any]:
    return _split(_tensors(path, read_arrays(path), program), program, str(path))


def _tensors(path: Path, arrays: dict[str, Array], program: Program) -> list[Any]:
    """A tensor for each of the program's inputs, by name; a single array is the single input's."""
    import torch

    names = [node.name for node in program.inputs]
    if len(arrays) == len(names) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"{path} has no array {missing[0]!r}; it holds {', '.join(arrays)}")
    return [
        torch.from_numpy(arrays[node.name]).to(node.meta["val"].dtype) for node in program.inputs
    ]


def _split(tensors: Sequence[Any], program: Program, source: str) -> list[Any]:
    """Batches of the program's size; what is left over at the end is dropped."""
    step, count = _batch_size(program), min(int(tensor.shape[0]) for tensor in tensors)
    if count < step:
        raise InputError(f"{source} holds {count} sample(s), fewer than one batch of {step}")
    starts = range(0, count - step + 1, step)
    batches = [tuple(tensor[start : start + step] for tensor in tensors) for start in starts]
    return [batch[0] if len(batch) == 1 else batch for batch in batches]
