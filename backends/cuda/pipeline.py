"""The main loop of a matrix product: copies run stages ahead of the fragments, fragments one part of a step ahead of products.

A step's k is cut into parts of one product each. While a part is multiplied, the fragments of the next one are on their way to
the other half of the registers, across the step's barrier too: the last part waits for the next stage before it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cuda.device import Device, synchronize
from graphopt.backends.cuda.epilogue import int32

HALVES = 2  # of the registers of fragments


class Ring:
    """The number of a stage, in a register: a remainder of the step would take a multiplication."""

    def __init__(self, first: int, stages: int) -> None:
        self.register: Buffer = T.alloc_buffer((1,), "int32", scope="local")
        self.stages = stages
        T.buffer_store(self.register, int32(first), [0])

    @property
    def stage(self) -> Expr:
        return self.register[0]

    def advance(self) -> None:
        following = bind(self.register[0] + 1)
        wrapped = tirx.Select(following == self.stages, int32(0), following)
        T.buffer_store(self.register, wrapped, [0])


def pipeline(
    device: Device,
    steps: int,
    stages: int,
    parts: int,
    copy: Callable[[Expr, Expr, Expr], None],
    load: Callable[[Expr, int, int], None],
    multiply: Callable[[int], None],
) -> None:
    """Multiply all steps; every thread of the block comes here, and leaves after a barrier.

    ``copy(step, stage, wanted)`` asks for a step's bytes where ``wanted``; ``load(stage, part, half)`` brings the fragments of a
    part into half ``half`` of the registers, which ``multiply(half)`` multiplies. ``parts`` is even.
    """
    assert parts % HALVES == 0, "the next step's first part goes where this step's first part was"
    for stage in range(stages - 1):
        if stage < steps:
            copy(int32(stage), int32(stage), True)
        device.commit()
    device.wait(stages - 2)
    synchronize()
    reading, writing = Ring(0, stages), Ring(stages - 1, stages)
    load(reading.stage, 0, 0)
    if steps > 1:
        with T.serial(0, steps - 1) as step:
            for part in range(parts):
                if part == parts - 1:
                    device.commit()
                    device.wait(stages - 2)
                    synchronize()
                    reading.advance()
                load(reading.stage, (part + 1) % parts, (part + 1) % HALVES)
                if part == 0:
                    later = bind(step + (stages - 1))
                    copy(later, writing.stage, later < steps)
                    writing.advance()
                multiply(part % HALVES)
    for part in range(parts):
        if part + 1 < parts:
            load(reading.stage, part + 1, (part + 1) % HALVES)
        multiply(part % HALVES)
    device.wait(0)
    synchronize()
