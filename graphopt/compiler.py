"""``compile``: a program becomes an artifact for one target."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from graphopt.artifact import Artifact, deflate
from graphopt.backends.targets import Target, resolve
from graphopt.errors import CompileError
from graphopt.manifest import Manifest, Peak, TensorSpec
from graphopt.modes import is_training
from graphopt.precision import FLOAT32, check_precision
from graphopt.preparation import prepare, thread_count
from graphopt.program import Program
from graphopt.signature import check_signature, input_specs, output_specs, output_structure

if TYPE_CHECKING:
    from graphopt.backends.cpu.conv_plan import ConvChoice
    from graphopt.backends.cpu.rivals import Rivals
    from graphopt.backends.lower.float_fallback import Times
    from graphopt.tuning.options import Tuning
    from graphopt.tuning.report import TuningReport
    from graphopt.tuning.search import Search

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileReport:
    """What ``compile`` did: seconds a stage, the layers that stayed float in a quantized program, with reasons, what
    tuning chose, whether the images of a batch run one by one, and why, and what floats are multiplied in."""

    target: str
    threads: int
    stages: dict[str, float]
    float_layers: tuple[tuple[str, str], ...] = ()
    tuning: TuningReport | None = None
    image_by_image: bool = False
    images: str = ""
    precision: str = FLOAT32

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "target": self.target,
            "threads": self.threads,
            "float_layers": [
                {"node": node, "reason": reason} for node, reason in self.float_layers
            ],
            "images": self.images,
            "precision": self.precision,
        }
        return body if self.tuning is None else {**body, "tuning": self.tuning.summary()}


def compile(
    program: Program,
    target: str = "native",
    tune: str | None = None,
    threads: int | None = None,
    tuning: Tuning | str | os.PathLike[str] | None = None,
    precision: str = FLOAT32,
) -> Artifact:
    """Lower ``program`` to machine code for ``target`` and return it as an ``Artifact``.

    A fake-quantized program is lowered in integers, bit for bit equal to ``artifact.program``; a float one in float32.
    ``target`` is a name of ``graphopt targets`` or "native" (this CPU). ``threads`` is the number the kernels are
    split for (default: the CPUs of this machine). A cost model chooses how kernels are cut; ``tune``, a clock budget like
    "30s", measures other choices first and compiles the winners. A layer whose integer form is slower than its float form on
    this target stays float; ``artifact.report.float_layers`` says which, and why. The images of a batch run one by one where
    the network treats each alone and that is faster (``artifact.report.images``). ``tuning`` is the file that keeps the measurements (default:
    in the user's cache folder) or a ``Tuning`` with a remote device; without ``tune`` its winners are used as they are.
    ``precision`` is for GPUs, where floats may be multiplied on tensor cores: "float16" rewrites the float parts of the program
    (``artifact.program``; inputs and outputs stay float32), "tf32" rounds the operands of convolutions and linear layers.

    Raises TargetError for an unknown target, CompileError for a program in training mode, for a precision that the target
    lacks, or naming the operator that cannot be lowered, TuneError.
    """
    row = resolve(target)
    check_precision(precision, row)
    count = thread_count(threads)
    if is_training(program.graph):
        raise CompileError("the program is in training mode; call program.eval() before compile")
    check_signature(program)
    if row.kind == "cuda":
        return _for_gpu(program, row, count, precision, tune is not None or tuning is not None)
    if tune is None and tuning is None:
        return _Compiler(program, row, count, None).run()
    from graphopt.tuning.search import Search

    return _Compiler(program, row, count, Search(row, count, tuning, tune)).run()


def _for_gpu(
    program: Program, target: Target, threads: int, precision: str, tuned: bool
) -> Artifact:
    if tuned:
        raise CompileError(
            f"target {target.name}: nothing is tuned for GPUs yet; leave the options tune and tuning out"
        )
    from graphopt.backends.cuda.compiler import GpuCompiler

    return GpuCompiler(program, target, threads, precision).run()


class _Compiler:
    def __init__(
        self, program: Program, target: Target, threads: int, search: Search | None
    ) -> None:
        self.source = program
        self.target = target
        self.threads = threads
        self.search = search
        self.stages: dict[str, float] = {}

    def run(self) -> Artifact:
        # TVM is imported by the stages below, when they first need it.
        from graphopt.backends.integerize import kept_in_float
        from graphopt.backends.isas import ISAS
        from graphopt.backends.link import linker
        from graphopt.backends.lower.emit import emit
        from graphopt.backends.lower.images import choose
        from graphopt.backends.lower.module import build_library, export, import_module
        from graphopt.backends.lower.plan import make_plan
        from graphopt.backends.lower.step import Context

        linker(self.target.triple)  # an error now, and not after the work
        isa = ISAS[self.target.isa]
        program = self._timed(
            "prepare", lambda: prepare(self.source, isa, self.threads, self._times)
        )
        images = self._timed("images", lambda: choose(program, isa, self.threads))
        choices, tuning = self._choices(images.program)
        context = Context(images.program, isa, self.threads, choices)
        lowered = self._timed("kernels", lambda: emit(make_plan(images.program), context))
        inputs = tuple(pytree.tree_leaves(images.program.example_inputs))
        bounds = images.program.dynamic_batch
        exported = self._timed("export", lambda: export(lowered, inputs, bounds))
        module, weights = self._timed("import", lambda: import_module(exported))
        weights.update(lowered.stored)
        peaks = [_add_peak(lowered.functions, isa, dtype) for dtype in ("uint8", "float32")]
        built = self._timed(
            "codegen", lambda: build_library(module, lowered.functions, isa.target(), weights)
        )
        weights.update(built.constants)
        report = CompileReport(
            self.target.name,
            self.threads,
            self.stages,
            kept_in_float(program),
            tuning,
            images.alone,
            images.reason,
        )
        manifest = Manifest(
            target=self.target.name,
            triple=self.target.triple,
            features=tuple(sorted(self.target.features)),
            inputs=input_specs(program, lowered.unaligned),
            outputs=output_specs(program),
            output_structure=output_structure(program),
            weights=tuple(weights),
            weight_transforms=tuple(lowered.transforms),
            threads=self.threads,
            image_by_image=images.alone,
            kernels=tuple(lowered.calls),
            line=built.line,
            peaks=tuple(peaks),
            history=tuple(record.to_json() for record in program.history),
            stats=self.source.stats().to_json(),
            report=report.to_json(),
            versions=versions(),
        )
        return Artifact(manifest, built.library, weights, deflate(built.kernels), program, report)

    def _timed(self, stage: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        self.stages[stage] = time.perf_counter() - started
        log.info("compile: %s took %.2f s", stage, self.stages[stage])
        return result

    def _times(self, layers: Mapping[str, Rivals]) -> dict[str, Times]:
        """Integer layers against their float forms, measured now where a budget was given."""
        search = self.search
        if search is None:
            return {}
        return self._timed("compare", lambda: search.compare(layers))  # type: ignore[no-any-return]

    def _choices(self, program: Program) -> tuple[dict[str, ConvChoice], TuningReport | None]:
        """The tuned choices, measured now where a budget was given."""
        search = self.search
        if search is None:
            return {}, None
        choices, tuning = self._timed("tune", lambda: search.run(program))
        if tuning.interrupted:
            raise KeyboardInterrupt
        return choices, tuning


def _add_peak(functions: dict[str, Any], isa: Any, dtype: str) -> Peak:
    """Put the loop that measures the machine's peak beside the kernels, for benchmarks."""
    from graphopt.backends.cpu.peak import CHAINS, peak_kernel, peak_name, peak_operations

    name = peak_name(dtype)
    functions[name] = peak_kernel(isa, dtype)
    element = "int32" if dtype == "uint8" else "float32"
    arguments = (
        TensorSpec("x", element, (isa.lanes,)),
        TensorSpec("y", element, (CHAINS * isa.lanes,)),
    )
    compared = "int8" if dtype == "uint8" else "float32"
    return Peak(name, compared, peak_operations(isa, dtype) // 2, arguments)


def versions() -> dict[str, str]:
    """Of what a compilation depends on, for the manifest."""
    from importlib.metadata import version

    import graphopt

    return {
        "graphopt": graphopt.__version__,
        "tvm": version("apache-tvm"),
        "torch": torch.__version__,
    }
