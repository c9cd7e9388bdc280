"""Times every distinct convolution of ResNet-50 and MobileNetV2 alone, as a share of the measured peak.

``python benchmarks/kernels.py --isa avx512-vnni --network resnet50 --dtype uint8``, one thread, best of many calls on
warm caches: what the micro-kernel reaches, not what a network feels. Depthwise layers are not in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass

import numpy as np
import tvm

from graphopt.backends.cpu.conv import conv2d, pack_conv2d
from graphopt.backends.cpu.conv_plan import plan_conv2d
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.peak import measure_peak
from graphopt.backends.cpu.workload import (
    Activation,
    Conv2d,
    Epilogue,
    Layout,
    QuantizedAdd,
    Requantize,
)
from graphopt.backends.x86.isa import ISAS

_SECONDS = 0.2  # a layer
_REQUANTIZE = Requantize(zero_point=0, qmin=0, qmax=255)
_ADD = QuantizedAdd(2**19, 2**19, 20, 0, 0, 0, 0, 255)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One layer's result; ``share`` is of the peak of its element type."""

    kernel: str
    tile: str
    microseconds: float
    gops: float
    share: float


def layer(
    dtype: str, size: int, channels: tuple[int, int], kernel: int, stride: int, residual: bool
) -> Conv2d:
    """A square layer with ReLU, its padding ``kernel // 2``; uint8 channels come in fours."""
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    channel_stride = -(-channels[0] // 4) * 4 if dtype == "uint8" else channels[0]
    x = Layout(1, size, size, channels[0], dtype, pad, pad, pad, pad, channel_stride)
    y = Layout(1, out, out, channels[1], dtype)
    epilogue = Epilogue(activation=Activation("relu"), float_residual=residual)
    if dtype == "uint8":
        epilogue = Epilogue(requantize=_REQUANTIZE, residual_add=_ADD if residual else None)
    other = y if residual else None
    square = (kernel, kernel), (stride, stride), (pad, pad)
    return Conv2d(x, y, *square, epilogue=epilogue, residual=other)


def resnet50(dtype: str) -> list[Conv2d]:
    """The distinct convolutions of ResNet-50 (v1.5: the 3 x 3 has the stride)."""
    layers = [layer(dtype, 224, (3, 64), 7, 2, False)]
    channels, size = 64, 56
    for stage, middle in enumerate((64, 128, 256, 512)):
        stride = 1 if stage == 0 else 2
        out = size // stride
        layers += [
            layer(dtype, size, (channels, middle), 1, 1, False),
            layer(dtype, size, (middle, middle), 3, stride, False),
            layer(dtype, size, (channels, 4 * middle), 1, stride, False),
            layer(dtype, out, (middle, 4 * middle), 1, 1, True),
            layer(dtype, out, (4 * middle, middle), 1, 1, False),
            layer(dtype, out, (middle, middle), 3, 1, False),
        ]
        channels, size = 4 * middle, out
    return list(dict.fromkeys(layers))


def mobilenet_v2(dtype: str) -> list[Conv2d]:
    """The distinct dense convolutions of MobileNetV2 (Sandler et al. 2018, table 2)."""
    layers = [layer(dtype, 224, (3, 32), 3, 2, False)]
    channels, size = 32, 112
    table = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, out, repeats, first_stride in table:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            hidden = channels * expansion
            if expansion > 1:
                layers.append(layer(dtype, size, (channels, hidden), 1, 1, False))
            size //= stride
            residual = stride == 1 and channels == out
            layers.append(layer(dtype, size, (hidden, out), 1, 1, residual))
            channels = out
    layers.append(layer(dtype, 7, (320, 1280), 1, 1, False))
    return list(dict.fromkeys(layers))


def _arguments(workload: Conv2d, isa: Isa) -> list[tvm.runtime.Tensor]:
    """Random arguments in physical layouts."""
    generator = np.random.default_rng(0)

    def activations(layout: Layout) -> np.ndarray:
        shape = (1, layout.rows, layout.columns, layout.channel_stride)
        return generator.integers(0, 128, shape).astype(layout.dtype)

    x, y = workload.x, workload.y
    taps = (y.channels, x.channels, *workload.kernel)
    weight_dtype = np.int8 if x.dtype == "uint8" else np.float32
    weight = generator.integers(-64, 64, taps).astype(weight_dtype)
    multiplier = np.full(y.channels, 1e-4, np.float32)
    arrays = [activations(x), *pack_conv2d(workload, isa, weight, None, multiplier)]
    if workload.residual is not None:
        arrays.append(activations(workload.residual))
    return [tvm.runtime.tensor(array) for array in (*arrays, activations(y))]


def measure(workload: Conv2d, isa: Isa, peak: float) -> Row:
    """Best time of one layer on one thread."""
    function = conv2d(workload, isa, threads=1)
    name = str(function.attrs["global_symbol"])
    kernel = tvm.compile(function, target=isa.target())[name]
    arguments = _arguments(workload, isa)
    kernel(*arguments)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        kernel(*arguments)
        best = min(best, time.perf_counter() - before)
    plan = plan_conv2d(workload, isa)
    gops = 2 * workload.macs / best / 1e9
    return Row(name, f"{plan.pixels} x {plan.vectors}", best * 1e6, gops, gops / peak)


def main() -> None:
    """Print a table, or JSON with ``--json``."""
    networks = {"resnet50": resnet50, "mobilenet_v2": mobilenet_v2}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=ISAS, default="avx512-vnni")
    parser.add_argument("--network", choices=networks, default="resnet50")
    parser.add_argument("--dtype", choices=("uint8", "float32"), default="uint8")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    isa = ISAS[options.isa]
    peak = measure_peak(isa, options.dtype)
    rows = [measure(workload, isa, peak) for workload in networks[options.network](options.dtype)]
    if options.json:
        logger.info(json.dumps({"peak_gops": peak, "kernels": [vars(row) for row in rows]}))
        return
    logger.info("%s %s peak: %.0f GOPS", isa.name, options.dtype, peak)
    for row in rows:
        figures = f"{row.microseconds:9.1f} us {row.gops:6.0f} GOPS {row.share:5.0%}"
        logger.info("%-50s %7s %s", row.kernel, row.tile, figures)


if __name__ == "__main__":
    main()
