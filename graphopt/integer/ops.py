"""The ``graphopt::`` operators: schemas, PyTorch implementations (the definition) and shape functions.

Quantized tensors are uint8, or int8 where ``qmin`` is negative; results are contiguous. Compiled kernels equal these
implementations bit for bit. Scale and multiplier arguments are rounded to float32 before use.
``torch.ops.graphopt.<name>.default`` is the overload that a graph holds.
"""

from __future__ import annotations

from graphopt.integer.convolution import conv2d, conv2d_dequantize, linear, linear_dequantize
from graphopt.integer.elementwise import add, dequantize, quantize, requantize
from graphopt.integer.pooling import (
    avg_pool2d,
    global_avg_pool,
    global_avg_pool_dequantize,
    max_pool2d,
)

__all__ = [
    "add",
    "avg_pool2d",
    "conv2d",
    "conv2d_dequantize",
    "dequantize",
    "global_avg_pool",
    "global_avg_pool_dequantize",
    "linear",
    "linear_dequantize",
    "max_pool2d",
    "quantize",
    "requantize",
]
