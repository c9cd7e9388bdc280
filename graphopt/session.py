"""Run a compiled model: arrays in, arrays out, on the TVM runtime alone (no torch, no compiler).

One Relax virtual machine cannot serve two threads at once (TVM 0.27 crashes), so a session keeps a
stack of machines that share the weights: a call takes one, or makes one (8 us), and puts it back.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graphopt.batch import image_by_image
from graphopt.errors import ArtifactError, InputError
from graphopt.manifest import Dim, Manifest, TensorSpec, WeightTransform
from graphopt.pages import empty_together
from graphopt.runtime import available_cpus, tvm_runtime, use_threads
from graphopt.weights_file import ALIGNMENT, aligned_empty, is_aligned

_LOG = logging.getLogger(__name__)

CPU, POOLED = 1, 2  # a DLPack device type, a kind of TVM's allocators
# The function of a library that allocates the last arguments of its entry, from the inputs' shapes.
_SCRATCH = "scratch"

Array = np.ndarray[Any, Any]
# Called before and after every instruction: (function, name, before, result, *arguments) -> 1 to skip.
Instrument = Callable[..., int]


def map_library(data: bytes) -> Any:
    """The module in ``model.so``. Raises ArtifactError."""
    loader = tvm_runtime().get_global_func("ffi.Module.load_from_file.so")
    # Not a memfd: dlopen knows libraries by path, and "/proc/self/fd/5" names many in one process.
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.so"
        path.write_bytes(data)
        try:
            library = loader(str(path), "so")
            library.get_function("vm_load_executable")
        except (RuntimeError, AttributeError) as error:
            raise ArtifactError(
                f"model.so cannot be loaded as a compiled model from {folder}; if programs may not "
                "run from there, set TMPDIR to a folder where they may"
            ) from error
    return library


def _structured(structure: Any, leaves: Sequence[Array]) -> Any:
    if type(structure) is int:
        return leaves[structure]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {key: _structured(item, leaves) for key, item in items}
    if kind == "value":
        return items
    values = [_structured(item, leaves) for item in items]
    return tuple(values) if kind == "tuple" else values


class Input:
    """Check and pass one argument; a machine's own, for it holds the buffer for unaligned arrays."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.dtype = np.dtype(spec.dtype)
        self.fixed = not any(isinstance(size, Dim) for size in spec.shape)
        self._from_dlpack = tvm_runtime().from_dlpack
        self._buffer = np.empty(0)
        self._tensor: Any = None

    def _refuse(self, what: str) -> InputError:
        return InputError(f"argument {self.spec.name!r} {what}; it must be {self.spec.describe()}")

    def _array(self, value: Any) -> Array:
        if isinstance(value, np.ndarray):
            return value
        if not hasattr(value, "__dlpack__"):
            raise self._refuse(f"is a {type(value).__name__}, no NumPy or DLPack array")
        try:
            return np.from_dlpack(value)
        except (RuntimeError, TypeError, BufferError, ValueError) as error:
            raise self._refuse(f"cannot be read through DLPack ({error})") from error

    def check(self, value: Any, sizes: dict[str, int]) -> Array:
        """Return ``value`` as an array of the declared dtype, shape and indices; raises ``InputError``."""
        array = self._array(value)
        self.check_form(array, sizes)
        if self.spec.below is not None and array.size:
            low, high = array.min(), array.max()
            if low < 0 or high >= self.spec.below:
                raise self._refuse(f"holds {low if low < 0 else high}")
        return array

    def check_form(self, array: Any, sizes: dict[str, int]) -> None:
        """Raise ``InputError`` unless an array or tensor is of the declared dtype and shape."""
        if array.dtype != self.dtype:
            raise self._refuse(f"has dtype {array.dtype}")
        if not (self.fixed and array.shape == self.spec.shape):
            self._check_shape(array, sizes)

    def _check_shape(self, array: Any, sizes: dict[str, int]) -> None:
        if array.ndim != len(self.spec.shape):
            raise self._refuse(f"has {array.ndim} dimensions")
        for size, declared in zip(array.shape, self.spec.shape, strict=True):
            if not isinstance(declared, Dim):
                matches = size == declared
            else:
                high = size if declared.high is None else declared.high
                matches = declared.low <= size <= high
                matches = matches and sizes.setdefault(declared.symbol, size) == size
            if not matches:
                raise self._refuse(f"has shape {list(array.shape)}")

    def tensor(self, array: Array) -> Any:
        """Return a TVM tensor of ``array``: itself where it lies well, else a copy in the buffer."""
        if array.flags.writeable and is_aligned(array, self.spec.alignment):
            return self._from_dlpack(array, require_alignment=self.spec.alignment)
        if self._tensor is None or self._buffer.shape != array.shape:
            self._buffer = aligned_empty(array.shape, self.dtype)
            self._tensor = self._from_dlpack(self._buffer, require_alignment=ALIGNMENT)
        np.copyto(self._buffer, array)
        return self._tensor


class Machine:
    """One virtual machine, the shared weights, its own input buffers and tensors between the kernels."""

    devices: tuple[int, ...] = (CPU, 0, POOLED)  # type, number and allocator of each

    def __init__(self, library: Any, manifest: Manifest, weights: Sequence[Any]) -> None:
        self.module = library["vm_load_executable"]()
        self.module["vm_initialization"](*self.devices)
        self.inputs = tuple(Input(spec) for spec in manifest.inputs)
        self.entry = self.module[manifest.entry]
        self.weights = weights
        self._weight_addresses = frozenset(weight.data_ptr() for weight in weights)
        self._tensor_class = tvm_runtime().Tensor
        self._allocate: Any = None
        if self.module.implements_function(_SCRATCH):
            self._allocate = self.module[_SCRATCH]
        self._scratch: tuple[Any, ...] = ()
        self._shapes: list[tuple[int, ...]] | None = None

    def check(self, values: Sequence[Any]) -> list[Array]:
        """Return the inputs as arrays that the model takes; raises ``InputError``."""
        sizes: dict[str, int] = {}
        return [take.check(value, sizes) for take, value in zip(self.inputs, values, strict=True)]

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Run the code once."""
        tensors = [take.tensor(array) for take, array in zip(self.inputs, arrays, strict=True)]
        if self._allocate is not None:
            self._prepare([array.shape for array in arrays], tensors)
        result = self.entry(*tensors, *self.weights, *self._scratch)
        outputs = [result] if isinstance(result, self._tensor_class) else list(result)
        # An output may *be* an input or a weight (an identity, say): the caller gets a copy of it.
        given = {tensor.data_ptr() for tensor in tensors}
        leaves = []
        for output in outputs:
            address = output.data_ptr()
            shared = address in given or address in self._weight_addresses
            array = np.from_dlpack(output)
            leaves.append(array.copy() if shared else array)
        return leaves

    def _prepare(self, shapes: list[tuple[int, ...]], tensors: Sequence[Any]) -> None:
        """Make the tensors between the kernels, where those of the last run do not fit these shapes."""
        if shapes != self._shapes:
            self._scratch = ()  # first, so that the new ones may take their memory
            self._scratch = tuple(self._allocate(*tensors))
            self._shapes = shapes


class Compiled(Protocol):
    """What a session runs; ``graphopt.artifact.Artifact`` is one."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def library(self) -> bytes: ...

    @property
    def weights(self) -> Mapping[str, Array]: ...


class Session:
    """Call it with the model's inputs; it returns NumPy arrays in the structure of its outputs.

    Inputs are NumPy arrays, or anything with DLPack, positional or by name; any strides and alignment
    (contiguous, writable ones that begin at a multiple of their spec's ``alignment`` are passed without a
    copy). A batch of a model that was compiled for one image runs image by image, over views of its memory. Raises
    ``InputError`` naming the argument. Safe to call from many threads: each call runs on its
    caller's thread and ``threads - 1`` helpers of TVM's pool.
    """

    def __init__(self, artifact: Compiled, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"argument 'threads' is {threads}; it must be 1 or more")
        self.manifest = artifact.manifest
        self.input_names = tuple(spec.name for spec in self.manifest.inputs)
        wanted = threads or self.manifest.threads
        self.threads = min(wanted, available_cpus())
        if self.threads < wanted:
            _LOG.warning("running on %d threads, not %d: no more CPUs", self.threads, wanted)
        self.library = self._map(artifact.library)
        self._weights = self._load(artifact.weights)
        self._idle = [self._machine()]

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.name}: {spec.describe()}" for spec in self.manifest.inputs)
        return f"Session({inputs}; {self.manifest.target}, {self.threads} threads)"

    def _map(self, library: bytes) -> Any:
        return map_library(library)

    def _load(self, weights: Mapping[str, Array]) -> tuple[Any, ...]:
        """The weights as arguments, in memory of the session's own, those in another form in the file transformed."""
        transforms = {transform.weight: transform for transform in self.manifest.weight_transforms}
        specs = {name: (weight.shape, weight.dtype) for name, weight in weights.items()}
        for name, transform in transforms.items():
            sizes = tuple(size for size in transform.result.shape if isinstance(size, int))
            specs[name] = sizes, np.dtype(transform.result.dtype)
        made = empty_together(list(specs.values()))
        tensors = []
        for (name, weight), array in zip(weights.items(), made, strict=True):
            tensors.append(tvm_runtime().from_dlpack(array, require_alignment=ALIGNMENT))
            if name in transforms:
                self._transform(transforms[name], weight, tensors[-1])
            else:
                array[...] = weight
        return tuple(tensors)

    def _transform(self, transform: WeightTransform, weight: Array, result: Any) -> None:
        try:
            function = self.library.get_function(transform.function, query_imports=True)
        except AttributeError as error:
            raise ArtifactError(
                f"the weight transform {transform.function!r} is not in model.so; compile the model again"
            ) from error
        stored = aligned_empty(weight.shape, weight.dtype)
        stored[...] = weight
        function(tvm_runtime().from_dlpack(stored, require_alignment=ALIGNMENT), result)

    def _machine(self) -> Machine:
        return Machine(self.library, self.manifest, self._weights)

    def _positional(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        names = self.input_names
        for name in named:
            if name not in names or name in names[: len(inputs)]:
                raise InputError(
                    f"argument {name!r} is unknown or given twice; the inputs are {', '.join(names)}"
                )
        inputs += tuple(named[name] for name in names[len(inputs) :] if name in named)
        if len(inputs) != len(names):
            raise InputError(
                f"{len(inputs)} arguments were given for the {len(names)} inputs {', '.join(names)}"
            )
        return inputs

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model once."""
        if named or len(inputs) != len(self.input_names):
            inputs = self._positional(inputs, named)
        use_threads(self.threads)
        try:
            machine = self._idle.pop()
        except IndexError:
            machine = self._machine()
        leaves = self._run(machine, inputs)
        self._idle.append(machine)  # not after an error: its state is unknown then
        return _structured(self.manifest.output_structure, leaves)

    def _run(self, machine: Machine, inputs: Sequence[Any]) -> list[Array]:
        arrays = machine.check(inputs)
        if self.manifest.image_by_image:
            return image_by_image(machine.run, arrays)
        return machine.run(arrays)

    def run_instrumented(self, instrument: Instrument, *inputs: Any) -> Any:
        """Run the model once on a machine of its own that calls ``instrument`` around every call."""
        use_threads(self.threads)
        machine = self._machine()
        machine.module["set_instrument"](tvm_runtime().convert(instrument))
        leaves = self._run(machine, self._positional(inputs, {}))
        return _structured(self.manifest.output_structure, leaves)
