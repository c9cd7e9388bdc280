"""TVM's passes on a Relax module, ours among them, after which the kernels join it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from graphopt.backends.lower.one_tensor import unify_tensors
from graphopt.backends.lower.scratch import hoist_scratch


def relax_pipeline(
    stages: Any,
    target: tvm.target.Target,
    functions: Mapping[str, Any],
    before_plan: Sequence[Any] = (),
    after_plan: Sequence[Any] = (),
) -> Any:
    """The stages of TVM's pipeline for a target, with allocations made one or moved out of ``main``.

    ``before_plan`` and ``after_plan`` are passes around the planning of memory. ``functions`` are the kernels: TVM's passes
    expect scheduled blocks and never see them.
    """
    plan_memory, *lower = stages.finalize_passes(target)
    default = tvm.transform.Sequential(
        [
            *stages.library_dispatch_passes(target),
            *stages.legalize_passes(target),
            *stages.dataflow_lower_passes(target),
            *before_plan,
            unify_tensors,
            plan_memory,
            *after_plan,
            hoist_scratch,
            *lower,
        ]
    )

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        with target:
            module = default(module)
        for name, function in functions.items():
            module[name] = function
        return module

    return run
