"""Memory as a grid of threads sees it: whose byte, written when and by whom, and what a GPU would do wrongly there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Fault(AssertionError):
    """What a GPU would do wrongly, or not at all."""


@dataclass
class Pointer:
    """The address of an element, a lane each."""

    storage: Storage
    byte: Array


@dataclass
class Storage:
    """The bytes of a buffer: ``[copies, bytes]``, a copy for the grid, a block or a thread."""

    name: str
    data: Array
    copy_of_lane: Array
    written: Array
    shared: bool = False
    # of shared memory, per byte: the phase and the lane of the last write and of a read, copies on their way
    write_phase: Array = field(default_factory=lambda: np.empty(0))
    writer: Array = field(default_factory=lambda: np.empty(0))
    read_phase: Array = field(default_factory=lambda: np.empty(0))
    reader: Array = field(default_factory=lambda: np.empty(0))
    pending: Array = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if self.shared:
            shape = self.data.shape
            self.write_phase, self.read_phase = np.full(shape, -1), np.full(shape, -1)
            self.writer, self.reader = np.full(shape, -1), np.full(shape, -1)
            self.pending = np.zeros(shape, bool)


class Memory:
    """Reads and writes of all threads at once, checked.

    ``mask`` are the threads that run now; ``phase`` counts the barriers of each block, ``groups`` are copies since each commit.
    """

    def __init__(self) -> None:
        self.lanes = self.threads = 1
        self.mask = np.ones(1, bool)
        self.phase = np.zeros(1, int)
        self.asynchronous = True
        self.is_ours = (
            True  # TVM's reductions shuffle registers that hold nothing, into lanes that drop them
        )
        self.groups: list[list[Callable[[], None]]] = [[]]

    def _range(self, pointer: Pointer, size: int) -> tuple[Array, Array, Array]:
        """Active lanes, their copy and bytes of a storage, checked."""
        active = np.flatnonzero(self.mask)
        storage = pointer.storage
        first = np.broadcast_to(pointer.byte, (self.lanes,))[active]
        outside = (first < 0) | (first + size > storage.data.shape[1])
        if outside.any():
            where = first[outside][0]
            raise Fault(f"{storage.name}: bytes {where}.. of {storage.data.shape[1]} are touched")
        if (first % size).any():
            raise Fault(
                f"{storage.name}: an access of {size} bytes at {first[first % size > 0][0]}"
            )
        copies = np.broadcast_to(storage.copy_of_lane, (self.lanes,))[active]
        return active, copies[:, None], first[:, None] + np.arange(size)

    def write(self, pointer: Pointer, data: Array, landing: bool = False) -> None:
        """``data`` ``[lanes, bytes]`` to memory; ``landing``: by a copy that was ``announced`` before."""
        storage = pointer.storage
        active, copies, bytes_ = self._range(pointer, data.shape[1])
        if storage.shared and not landing:
            self._claim(storage, active, copies, bytes_)
        storage.data[copies, bytes_] = data[active]
        storage.written[copies, bytes_] = True
        if landing:
            storage.pending[copies, bytes_] = False
            storage.write_phase[copies, bytes_] = self.phase[copies]

    def _claim(self, storage: Storage, active: Array, copies: Array, bytes_: Array) -> None:
        phase, lane = self.phase[copies], active[:, None]
        if storage.pending[copies, bytes_].any():
            raise Fault(f"{storage.name} is written while a copy to it is on its way")
        for phases, lanes, what in (
            (storage.write_phase, storage.writer, "written"),
            (storage.read_phase, storage.reader, "read"),
        ):
            same = (phases[copies, bytes_] == phase) & (lanes[copies, bytes_] != lane)
            if same.any():
                raise Fault(
                    f"{storage.name} is {what} by one thread and written by another between two barriers"
                )
        storage.write_phase[copies, bytes_] = phase
        storage.writer[copies, bytes_] = lane
        if (storage.writer[copies, bytes_] != lane).any():
            raise Fault(f"{storage.name}: two threads write one byte at once")

    def read(self, pointer: Pointer, size: int, mask: Array | None = None) -> Array:
        """``[lanes, bytes]``; zeros in lanes that do not run."""
        outer, self.mask = self.mask, self.mask if mask is None else mask
        storage = pointer.storage
        active, copies, bytes_ = self._range(pointer, size)
        if storage.shared and storage.pending[copies, bytes_].any():
            raise Fault(f"{storage.name} is read while a copy to it is on its way")
        if (self.is_ours or storage.shared) and not storage.written[copies, bytes_].all():
            raise Fault(f"{storage.name} is read before it is written")
        if storage.shared:
            phase, lane = self.phase[copies], active[:, None]
            fresh = storage.write_phase[copies, bytes_] == phase
            if (fresh & (storage.writer[copies, bytes_] != lane)).any():
                raise Fault(
                    f"{storage.name} is written by one thread and read by another between two barriers"
                )
            # a second reader of a phase: whoever writes then, another thread has read
            again = (storage.read_phase[copies, bytes_] == phase) & (
                storage.reader[copies, bytes_] != lane
            )
            storage.reader[copies, bytes_] = np.where(again, -2, lane)
            if len(active) > 1:
                mixed = storage.reader[copies, bytes_] != np.where(again, -2, lane)
                storage.reader[copies, bytes_] = np.where(mixed, -2, storage.reader[copies, bytes_])
            storage.read_phase[copies, bytes_] = phase
        result = np.zeros((self.lanes, size), np.uint8)
        result[active] = storage.data[copies, bytes_]
        self.mask = outer
        return result

    def announce(
        self,
        target: Pointer,
        source: Pointer,
        size: int,
        asynchronous: bool,
        valid: Any = None,
        fill: int = 0,
    ) -> None:
        """A copy to shared memory, there when its group has been waited for.

        Only the first ``valid`` bytes are read where that is given; behind them comes ``fill``.
        """
        if valid is None:
            data = self.read(source, size)
        else:
            data = self._read_part(source, size, valid, fill)
        if not asynchronous:
            self.write(target, data)
            return
        active, copies, bytes_ = self._range(target, size)
        self._claim(target.storage, active, copies, bytes_)
        target.storage.pending[copies, bytes_] = True
        mask = self.mask

        def land() -> None:
            outer, self.mask = self.mask, mask
            self.write(target, data, landing=True)
            self.mask = outer

        self.groups[-1].append(land)

    def _read_part(self, source: Pointer, size: int, valid: Any, fill: int) -> Array:
        count = np.broadcast_to(np.asarray(valid), (self.lanes,))
        first = np.broadcast_to(source.byte, (self.lanes,))
        active = self.mask & (count > 0)
        if (count[active] > size).any() or (first[active] % size).any():
            raise Fault(
                f"{source.storage.name}: a copy of {size} bytes that is larger, or misaligned"
            )
        data = np.full((self.lanes, size), fill, np.uint8)
        for i in range(size):
            there = self.mask & (i < count)
            if there.any():
                byte = Pointer(source.storage, source.byte + i)
                data[there, i] = self.read(byte, 1, there)[there, 0]
        return data

    def commit(self) -> None:
        if not self.mask.all():
            raise Fault("a commit that not every thread makes is not modelled")
        self.groups.append([])

    def wait(self, count: int) -> None:
        if not self.mask.all():
            raise Fault("a wait that not every thread makes is not modelled")
        done = self.groups[: max(0, len(self.groups) - 1 - count)]
        for group in done:
            for land in group:
                land()
            group.clear()
        self.groups = self.groups[len(done) :]

    def barrier(self) -> None:
        reached = self.mask.reshape(-1, self.threads)
        if not reached.all():
            raise Fault("a barrier is not reached by every thread")
        self.phase += 1
