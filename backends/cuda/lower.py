"""A plan's steps as CUDA kernels: which kernel a convolution becomes, and its packed constants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from graphopt.backends.cpu.pool import pack_pool2d
from graphopt.backends.cpu.workload import Conv2d, Convert, Layout
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.conv import conv
from graphopt.backends.cuda.conv_pack import (
    pack_conv,
    pack_depthwise,
    pack_dot,
    pack_float_conv,
)
from graphopt.backends.cuda.conv_plan import GROUP, ConvPlan, fits, plan_conv, split_steps
from graphopt.backends.cuda.conv_sums import finish_sums
from graphopt.backends.cuda.depthwise import depthwise, is_depthwise
from graphopt.backends.cuda.dot import dot_conv, has_few_outputs
from graphopt.backends.cuda.float_conv import float_conv, pack_float
from graphopt.backends.cuda.half_conv import half_conv, pack_half
from graphopt.backends.cuda.memory import INDEX_LIMIT
from graphopt.backends.cuda.narrow import narrowing, select_cast
from graphopt.backends.cuda.pointwise import add, concat, convert, mul
from graphopt.backends.cuda.pool import pool
from graphopt.backends.cuda.products import PRODUCTS, product_of
from graphopt.backends.cuda.sparse_conv import sparse_conv
from graphopt.backends.cuda.sparse_pack import KEPT, pack_sparse, pack_sparse_float
from graphopt.backends.cuda.sparse_plan import SparseForm, sparse_form
from graphopt.backends.lower import convolution, elementwise
from graphopt.backends.lower.convolution import BatchNormStep, ConvolutionStep
from graphopt.backends.lower.elementwise import AddStep, ConcatStep, ConvertStep, MulStep, PoolStep
from graphopt.backends.lower.plan import Selector
from graphopt.backends.lower.step import Before, Kernel, KernelSource, Step
from graphopt.errors import CompileError
from graphopt.precision import FLOAT32, TF32
from graphopt.program import Program

Array = np.ndarray[Any, Any]

# What has a kernel here; everything else is TVM's.
SELECTORS: tuple[Selector, ...] = (
    convolution.select_integer,
    narrowing(convolution.select_float),
    elementwise.select_integer,
    narrowing(elementwise.select_concat),
    narrowing(elementwise.select_float),
    select_cast,
)


def _kernel(
    function: Any, constants: tuple[Array, ...] = (), macs: int = 0, form: str = ""
) -> Kernel:
    return Kernel(str(function.attrs["global_symbol"]), function, constants, macs, form=form)


def _compared(kernel: Kernel, sparse: SparseForm | None) -> Kernel:
    """The kernel of a layer of which there is a sparse form, with what that would gain, or gains."""
    if sparse is None:
        return kernel
    return replace(kernel, density=KEPT / GROUP, sparse_gain=sparse.gain)


class CudaKernels(KernelSource):
    """Code for one architecture; ``precision`` is what float32 is multiplied in where tensor cores multiply it."""

    def __init__(self, program: Program, arch: Arch, precision: str = FLOAT32) -> None:
        self.program = program
        self.arch = arch
        self.precision = precision

    def convert(self, workload: Convert) -> Kernel:
        return _kernel(convert(workload))

    def kernel(self, step: Step, inputs: list[Layout], output: Layout) -> Kernel:
        for layout in (*inputs, output):
            self._check(step, layout)
        match step:
            case ConvolutionStep():
                return self._convolution(step, step.workload(inputs, output))
            case PoolStep():
                pooling = step.workload(inputs, output)
                return _kernel(pool(pooling), tuple(pack_pool2d(pooling, step.multiplier)))
            case ConvertStep():
                return self.convert(step.workload(inputs, output))
            case AddStep():
                return _kernel(add(step.workload(inputs, output)))
            case MulStep():
                return _kernel(mul(step.workload(inputs, output)))
            case ConcatStep():
                return _kernel(concat(step.workload(inputs, output)))
            case _:
                raise AssertionError(f"{type(step).__name__} is none of SELECTORS' steps")

    def _check(self, step: Step, layout: Layout) -> None:
        """Raise CompileError for elements that 32 bits do not number."""
        name = step.output.name
        _, largest = self.program.dynamic_batch or (1, 1)
        batch = largest if layout.batch is None else layout.batch
        if batch * math.prod(layout.shape) >= INDEX_LIMIT:
            raise CompileError(
                f"node {name!r}: a tensor of {batch} x {layout.shape} elements has 2**31 or more; compile a smaller batch"
            )

    def _convolution(self, step: ConvolutionStep, workload: Conv2d) -> Kernel:
        weight, bias, multiplier = step.arrays(self, workload)
        if multiplier is None:
            statistics = isinstance(step, BatchNormStep)
            return self._float_convolution(workload, weight, bias, statistics)
        assert bias is not None
        constants = (weight, bias, multiplier)
        zero_point = workload.x_zero_point
        if is_depthwise(workload):
            packed = pack_depthwise(*constants, zero_point)
            return _kernel(depthwise(workload), tuple(packed), workload.macs, "depthwise")
        if not fits(workload) or has_few_outputs(workload):
            packed = pack_dot(*constants, zero_point, workload.groups)
            return _kernel(dot_conv(workload), tuple(packed), workload.macs, "dp4a")
        plan = split_steps(plan_conv(workload, self.arch), self.arch)
        sparse = sparse_form(plan, weight, self.arch)
        if sparse is not None and sparse.pays:
            return self._sparse_product(sparse, pack_sparse(sparse.plan, *constants), "mma.sp")
        return _compared(self._product(plan, pack_conv(plan, *constants), "mma"), sparse)

    def _sparse_product(self, sparse: SparseForm, packed: list[Array], form: str) -> Kernel:
        function, macs = sparse_conv(sparse.plan, self.arch), sparse.plan.workload.macs
        return _compared(_kernel(function, tuple(packed), macs, form), sparse)

    def _product(self, plan: ConvPlan, packed: list[Array], form: str) -> Kernel:
        """A matrix product, by a second kernel where several blocks share a tile."""
        macs, function = plan.workload.macs, conv(plan, self.arch)
        if plan.splits == 1:
            return _kernel(function, tuple(packed), macs, form)
        weight, *others = packed
        part = _kernel(function, (weight,), macs, f"{form} / {plan.splits}")
        before = Before(part, plan.sums_shape, plan.product.sums)
        return replace(_kernel(finish_sums(plan), tuple(others), form="sums"), before=before)

    def _float_convolution(
        self, workload: Conv2d, weight: Array, bias: Array | None, statistics: bool
    ) -> Kernel:
        """A layer of floats: on tensor cores in float16 and tf32, else in float32; ``statistics``: of a batch norm."""
        x, y = workload.x, workload.y
        in_tf32 = self.precision == TF32 and x.dtype == FLOAT32
        product = PRODUCTS[TF32] if in_tf32 else product_of(x.dtype)
        if product is not None and not statistics and fits(workload, product):
            plan = split_steps(plan_conv(workload, self.arch, product=product), self.arch)
            sparse = sparse_form(plan, weight, self.arch)
            if sparse is not None and sparse.pays:
                packed = pack_sparse_float(sparse.plan, weight, bias)
                return self._sparse_product(sparse, packed, f"mma.sp {product.name}")
            packed = pack_float_conv(plan, weight, bias)
            return _compared(self._product(plan, packed, f"mma {product.name}"), sparse)
        if {x.dtype, y.dtype} == {FLOAT32}:
            packed = pack_float(workload, weight, bias)
            return _kernel(float_conv(workload), tuple(packed), workload.macs)
        dtype = "float32" if statistics else "float16"
        packed = pack_half(workload, weight, bias, dtype)
        return _kernel(half_conv(workload, dtype), tuple(packed), workload.macs, "direct")
