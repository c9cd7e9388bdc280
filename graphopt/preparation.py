"""What stands between a user's program and lowering: the program that is really compiled, and the number of its threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from graphopt.errors import CompileError
from graphopt.program import Program
from graphopt.runtime import available_cpus

if TYPE_CHECKING:
    from graphopt.backends.cpu.isa import Isa
    from graphopt.backends.cpu.rivals import Rivals
    from graphopt.backends.lower.float_fallback import Times


def thread_count(threads: int | None) -> int:
    """The option ``threads``, by default the CPUs that this process may use. Raises CompileError."""
    count = available_cpus() if threads is None else threads
    if count < 1:
        raise CompileError(f"option threads must be at least 1, not {threads}")
    return count


def simplified(program: Program) -> Program:
    """Identities removed, masks applied, batch norm folded."""
    from graphopt.passes import ApplyMasks, FoldBatchNorm, RemoveIdentities

    for pass_ in (RemoveIdentities(), ApplyMasks(), FoldBatchNorm()):
        program = pass_(program)
    return program


def is_quantized(program: Program) -> bool:
    """True where something is fake-quantized."""
    from graphopt import ops

    found = map(ops.info, program.graph.nodes)
    return any(op is not None and op.kind == "fake_quantize" for op in found)


def prepare(
    program: Program,
    isa: Isa,
    threads: int,
    times: Callable[[Mapping[str, Rivals]], Mapping[str, Times]],
) -> Program:
    """The program that is really compiled: identities removed, masks applied, batch norm folded, integer where quantized, unless float is
    faster: ``times`` says what was measured of these layers.
    """
    from graphopt.backends.integerize import integerize
    from graphopt.backends.lower.float_fallback import faster_in_float, integer_layers
    from graphopt.backends.lower.images import choose

    program = simplified(program)
    if not is_quantized(program):
        return program
    integer = integerize(program, measure=False)
    layers = integer_layers(choose(integer, isa, threads).program)
    slower = faster_in_float(layers, isa, threads, times(layers))
    return integerize(program, slower, measure=False) if slower else integer
