"""The same float model as others run it: PyTorch, ONNX Runtime, OpenVINO, in float and in int8.

Each gets ``threads`` threads and the same inputs, and is timed in turns with our sessions in one process.
Int8 is each tool's own recipe: ONNX Runtime ``quantize_static`` (QDQ, weights per channel, activations
uint8) or ``quantize_dynamic``, OpenVINO ``nncf.quantize``. They run what ``torch.onnx`` exports from the model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from graphopt.bench.report import Comparison, machine_name
from graphopt.bench.timing import time_interleaved
from graphopt.errors import BenchmarkError

_LOG = logging.getLogger(__name__)
_PAUSE = 0.03  # ONNX Runtime's threads spin for some 15 ms after a run, on the cores of whoever comes next

Call = Callable[[], Any]
Arrays = tuple[np.ndarray[Any, Any], ...]


@dataclass(frozen=True)
class Subject:
    """What all peers run: a float ``nn.Module``, its inputs, calibration batches, a folder to work in.

    ``is_transformer`` has OpenVINO's quantizer look for attention.
    """

    model: Any
    inputs: Arrays
    calibration: Sequence[Arrays]
    threads: int
    folder: Path
    is_transformer: bool = False

    @property
    def names(self) -> list[str]:
        """The names that the inputs have in the exported model."""
        return [f"input_{index}" for index in range(len(self.inputs))]

    def feed(self, arrays: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Return arrays by input name."""
        return dict(zip(self.names, arrays, strict=True))

    def onnx(self) -> Path:
        """Return the model as an ONNX file, exported on first use."""
        path = self.folder / "model.onnx"
        if not path.exists():
            import torch

            tensors = tuple(torch.from_numpy(array) for array in self.inputs)
            torch.onnx.export(
                self.model,
                tensors,
                path,
                input_names=self.names,
                external_data=False,  # ORT's quantizer does not find a second file
                verbose=False,
            )
        return path


def _torch(subject: Subject) -> Call:
    import torch

    torch.set_num_threads(subject.threads)
    tensors = tuple(torch.from_numpy(array) for array in subject.inputs)

    def call() -> Any:
        with torch.inference_mode():
            return subject.model(*tensors)

    return call


def _torch_compile(subject: Subject) -> Call:
    import torch

    torch.set_num_threads(subject.threads)
    tensors = tuple(torch.from_numpy(array) for array in subject.inputs)
    compiled = torch.compile(subject.model)

    def call() -> Any:
        with torch.inference_mode():
            return compiled(*tensors)  # type: ignore[no-untyped-call]  # torch.compile of an Any

    return call


def _run_onnx(subject: Subject, path: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = subject.feed(subject.inputs)
    return lambda: session.run(None, feed)


def _onnxruntime(subject: Subject) -> Call:
    return _run_onnx(subject, subject.onnx())


def _prepared_onnx(subject: Subject) -> Path:
    """The model as ONNX Runtime's quantizers want it: shapes inferred, constants folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = subject.folder / "prepared.onnx"
    if not path.exists():
        quant_pre_process(str(subject.onnx()), str(path), skip_symbolic_shape=True)
    return path


def _onnxruntime_int8(subject: Subject) -> Call:
    from onnxruntime import quantization

    batches = iter([subject.feed(arrays) for arrays in subject.calibration])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped package
        def get_next(self) -> Any:
            return next(batches, None)

    path = subject.folder / "int8.onnx"
    quantization.quantize_static(
        str(_prepared_onnx(subject)),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return _run_onnx(subject, path)


def _onnxruntime_dynamic(subject: Subject) -> Call:
    from onnxruntime import quantization

    path = subject.folder / "dynamic.onnx"
    quantization.quantize_dynamic(
        str(_prepared_onnx(subject)),
        str(path),
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
    )
    return _run_onnx(subject, path)


def _run_openvino(subject: Subject, model: Any) -> Call:
    import openvino

    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": subject.threads,
            "INFERENCE_PRECISION_HINT": "f32",  # bf16 would be its own choice where the CPU has it
        },
    )
    request = compiled.create_infer_request()
    feed = list(subject.inputs)
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


def _read_openvino(subject: Subject) -> Any:
    import openvino

    return openvino.Core().read_model(str(subject.onnx()))


def _openvino(subject: Subject) -> Call:
    return _run_openvino(subject, _read_openvino(subject))


def _openvino_int8(subject: Subject) -> Call:
    import nncf

    dataset = nncf.Dataset(list(subject.calibration), list)
    kind = nncf.ModelType.TRANSFORMER if subject.is_transformer else None
    quantized = nncf.quantize(_read_openvino(subject), dataset, model_type=kind)
    return _run_openvino(subject, quantized)


@dataclass(frozen=True)
class Peer:
    """A rival: the packages it needs, whether it wants calibration data, and how to set it up."""

    packages: tuple[str, ...]
    calibrated: bool
    prepare: Callable[[Subject], Call]


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OPENVINO = ("onnx", "onnxscript", "openvino")

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "torch": Peer(("torch",), False, _torch),
        "torch.compile": Peer(("torch",), False, _torch_compile),
        "onnxruntime": Peer(_ONNX, False, _onnxruntime),
        "onnxruntime-int8": Peer(_ONNX, True, _onnxruntime_int8),
        "onnxruntime-dynamic": Peer(_ONNX, False, _onnxruntime_dynamic),
        "openvino": Peer(_OPENVINO, False, _openvino),
        "openvino-int8": Peer((*_OPENVINO, "nncf"), True, _openvino_int8),
    }
)


def check_peers(names: Sequence[str], calibrated: bool) -> None:
    """Raise ``BenchmarkError`` for a peer that is unknown, not installed, or lacks calibration data."""
    for name in names:
        if name not in PEERS:
            raise BenchmarkError(f"unknown peer {name!r}; known are {', '.join(PEERS)}")
        for package in PEERS[name].packages:
            if importlib.util.find_spec(package) is None:
                raise BenchmarkError(
                    f"peer {name!r} needs the package {package}: pip install 'graphopt[bench]'"
                )
        if PEERS[name].calibrated and not calibrated:
            raise BenchmarkError(f"peer {name!r} quantizes and needs calibration batches")


def _versions(names: Sequence[str]) -> dict[str, str]:
    packages = {package for name in names for package in PEERS[name].packages}
    return {package: importlib.metadata.version(package) for package in sorted(packages)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the peers' exporters and quantizers from filling the log and standard output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _torch_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepared(names: Sequence[str], subject: Subject) -> tuple[dict[str, Call], dict[str, str]]:
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    for name in names:
        _LOG.info("preparing peer %s", name)
        try:
            with _quiet():
                call = PEERS[name].prepare(subject)
                call()
        except Exception as error:  # a rival may fail in any way; the others still run
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            _LOG.warning("peer %s cannot run this model: %s", name, failures[name])
            continue
        calls[name] = call
    return calls, failures


def compare(
    ours: Mapping[str, Call],
    names: Sequence[str],
    model: Any,
    inputs: Arrays,
    calibration: Sequence[Arrays] = (),
    threads: int = 1,
    seconds: float = 2.0,
    progress: Callable[[float], None] = lambda _share: None,
    is_transformer: bool = False,
) -> Comparison:
    """Time ``ours`` and the peers called ``names`` on a float ``model``, in turns, on ``threads`` threads.

    ``model`` is an ``nn.Module`` in eval mode or a ``Program``; ``calibration`` are batches of its inputs for
    the int8 peers. A peer that fails on this model is a row that says so. Raises ``BenchmarkError`` as
    ``check_peers`` does, before anything runs.
    """
    check_peers(names, bool(calibration))
    module = getattr(model, "graph_module", model)
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder, _torch_threads():
        subject = Subject(module, inputs, calibration, threads, Path(folder), is_transformer)
        calls, failures = _prepared(names, subject)
        pause = _PAUSE if threads > 1 else 0.0
        timings = time_interleaved({**ours, **calls}, seconds, progress, pause)
    return Comparison(timings, failures, _versions(names), threads, machine_name())
