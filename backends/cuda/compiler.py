"""``compile`` for a GPU: the prepared program, our kernels and TVM's for the rest, one shared library."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils import _pytree as pytree

from graphopt.artifact import Artifact
from graphopt.backends.cuda.arch import ARCHS
from graphopt.backends.cuda.build import build_library
from graphopt.backends.cuda.cast_to_float16 import CastToFloat16, kept_in_float32
from graphopt.backends.cuda.half_products import spell_half_products
from graphopt.backends.cuda.lower import SELECTORS, CudaKernels
from graphopt.backends.integerize import integerize, kept_in_float
from graphopt.backends.lower.emit import emit_kernels
from graphopt.backends.lower.module import export, import_module
from graphopt.backends.lower.plan import make_plan
from graphopt.backends.lower.sparse import Orders
from graphopt.backends.targets import Target
from graphopt.compiler import CompileReport, versions
from graphopt.manifest import Manifest
from graphopt.precision import FLOAT16
from graphopt.preparation import is_quantized, simplified
from graphopt.program import Program
from graphopt.signature import input_specs, output_specs, output_structure

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class GpuReport(CompileReport):
    """With the architecture that device code is for, and its form in the file: "cubin", or "source" without nvcc."""

    arch: str = ""
    code: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "device": {"arch": self.arch, "code": self.code}}


class GpuCompiler:
    """One compilation; ``threads`` only goes into the manifest."""

    def __init__(self, program: Program, target: Target, threads: int, precision: str) -> None:
        self.source = program
        self.target = target
        self.threads = threads
        self.precision = precision
        self.arch = ARCHS[target.isa]
        self.stages: dict[str, float] = {}

    def run(self) -> Artifact:
        """The artifact, every quantized layer in integers, the others in ``precision``. Raises CompileError."""
        program = self._timed("prepare", self._prepare)
        plan = make_plan(spell_half_products(program), SELECTORS, margins=False)
        kernels = CudaKernels(plan.program, self.arch, self.precision)
        lowered = self._timed("kernels", lambda: emit_kernels(plan, kernels, Orders()))
        inputs = tuple(pytree.tree_leaves(program.example_inputs))
        exported = self._timed("export", lambda: export(lowered, inputs, program.dynamic_batch))
        module, weights = self._timed("import", lambda: import_module(exported))
        library = self._timed(
            "codegen",
            lambda: build_library(module, lowered.functions, self.arch, self.target.triple),
        )
        report = GpuReport(
            self.target.name,
            self.threads,
            self.stages,
            (*kept_in_float(program), *kept_in_float32(program)),
            images="a GPU takes the images of a batch together",
            precision=self.precision,
            arch=self.arch.name,
            code=library.code,
        )
        manifest = Manifest(
            target=self.target.name,
            triple=self.target.triple,
            features=tuple(sorted(self.target.features)),
            inputs=input_specs(program, frozenset()),
            outputs=output_specs(program),
            output_structure=output_structure(program),
            weights=tuple(weights),
            threads=self.threads,
            gpu=self.arch.name,
            kernels=tuple(lowered.calls),
            history=tuple(record.to_json() for record in program.history),
            stats=self.source.stats().to_json(),
            report=report.to_json(),
            versions=versions(),
        )
        return Artifact(manifest, library.data, weights, program=program, report=report)

    def _prepare(self) -> Program:
        program = simplified(self.source)
        quantized = is_quantized(program)
        if quantized:
            program = integerize(program, measure=False)
        if self.precision != FLOAT16:
            return program
        return CastToFloat16(measure=not quantized)(program)

    def _timed(self, stage: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        self.stages[stage] = time.perf_counter() - started
        log.info("compile: %s took %.2f s", stage, self.stages[stage])
        return result
