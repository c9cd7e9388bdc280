"""graphopt: a compiler for compressed neural networks.

    import graphopt as go
    program = go.capture(model, example_inputs)
    program = go.Pipeline([go.passes.FoldBatchNorm(), go.passes.Quantize(calibration=batches)])(program)
    go.compile(program, target="native").save("model.gopt")
    y = go.load("model.gopt")(x)

Names are imported when first used, so that ``go.load`` needs neither torch nor the TVM compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt import backends, bench, errors, ops, passes
    from graphopt.artifact import Artifact, load
    from graphopt.backends.integerize import integerize
    from graphopt.bench import benchmark
    from graphopt.compiler import CompileReport, compile
    from graphopt.contract import Contract, exact, lossy, within
    from graphopt.edit import Edit
    from graphopt.errors import Decline, GraphoptError
    from graphopt.export import export_c
    from graphopt.frontend import capture
    from graphopt.passing import Pass, RewritePass
    from graphopt.pattern import const, var
    from graphopt.pipeline import Pipeline
    from graphopt.program import Program
    from graphopt.registry import register
    from graphopt.rule import RewriteRule
    from graphopt.session import Session
    from graphopt.train import distill, evaluate, fine_tune
    from graphopt.tuning.options import Tuning
    from graphopt.tuning.search import tune

__version__ = "0.1.0"

_HOME = {
    "Artifact": "graphopt.artifact",
    "CompileReport": "graphopt.compiler",
    "Contract": "graphopt.contract",
    "Decline": "graphopt.errors",
    "Edit": "graphopt.edit",
    "GraphoptError": "graphopt.errors",
    "Pass": "graphopt.passing",
    "Pipeline": "graphopt.pipeline",
    "Program": "graphopt.program",
    "RewritePass": "graphopt.passing",
    "RewriteRule": "graphopt.rule",
    "Session": "graphopt.session",
    "Tuning": "graphopt.tuning.options",
    "benchmark": "graphopt.bench",
    "capture": "graphopt.frontend",
    "compile": "graphopt.compiler",
    "const": "graphopt.pattern",
    "distill": "graphopt.train",
    "evaluate": "graphopt.train",
    "exact": "graphopt.contract",
    "export_c": "graphopt.export",
    "fine_tune": "graphopt.train",
    "integerize": "graphopt.backends.integerize",
    "load": "graphopt.artifact",
    "lossy": "graphopt.contract",
    "register": "graphopt.registry",
    "tune": "graphopt.tuning.search",
    "var": "graphopt.pattern",
    "within": "graphopt.contract",
}
_MODULES = ("backends", "bench", "errors", "ops", "passes")

__all__ = [
    "Artifact",
    "CompileReport",
    "Contract",
    "Decline",
    "Edit",
    "GraphoptError",
    "Pass",
    "Pipeline",
    "Program",
    "RewritePass",
    "RewriteRule",
    "Session",
    "Tuning",
    "__version__",
    "backends",
    "bench",
    "benchmark",
    "capture",
    "compile",
    "const",
    "distill",
    "errors",
    "evaluate",
    "exact",
    "export_c",
    "fine_tune",
    "integerize",
    "load",
    "lossy",
    "ops",
    "passes",
    "register",
    "tune",
    "var",
    "within",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"graphopt.{name}")
    else:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
