"""The inner loop of a sparse kernel: the blocks of one output channel times the pixels of a tile."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import INT8_STEP, Isa
from graphopt.backends.cpu.sparse_plan import SparsePlan

AHEAD = 4  # taps behind the last block, which are loaded and not used
_LONG = 64  # taps of a row from which on turns of four blocks pay for one branch more at its end


class Products:
    """``sums(row) + sum over the row's blocks b of x[tap(b)] * w(b)``.

    Four blocks a turn, or two where rows are short. Their taps are one word, loaded a turn ahead: an address that waits for a
    load keeps the vector loads behind it from going two a cycle (0.57 to 0.65 cycles a product with the word ahead, 0.7 to 0.8
    without). A product waits 4 cycles for the one before it, but rows overlap: two sets of sums in turns gain nothing.
    """

    def __init__(
        self, plan: SparsePlan, isa: Isa, constants: tuple[Buffer, Buffer, Buffer], source: Buffer
    ) -> None:
        self.plan = plan
        self.isa = isa
        self.values, self.taps, self.starts = constants
        self.source = source
        self.integer = plan.workload.x.dtype == "uint8"
        self.dtype = "int32" if self.integer else "float32"
        height, width = plan.workload.kernel
        self.turn = 4 if plan.part_planes * height * width > _LONG else 2
        self.word = f"uint{16 * self.turn}"

    def sums(self, start: Expr, row: Expr, before: list[Expr]) -> list[Expr]:
        """The vectors of the tile that begins at pixel ``start``; ``before`` is what they are added to."""
        plan = self.plan
        sums = emit.Accumulators(plan.high, plan.wide, self.dtype, plan.lanes)
        places = [(i, j) for i in range(plan.high) for j in range(plan.wide)]
        for place, value in zip(places, before, strict=True):
            sums.set(*place, value)
        first = bind(emit.load(self.starts, row, 1))
        count = bind(emit.load(self.starts, row + 1, 1) - first)
        ahead = T.alloc_buffer((1,), self.word, scope="global")
        self._fetch(ahead, first)

        def step(word: Expr, number: int, k: Expr) -> None:
            shifted = word >> emit.constant(self.word, 16 * number)
            tap = T.cast(shifted & emit.constant(self.word, 0xFFFF), "int32")
            x = bind(start + tap * plan.unit)
            weight = self._weight(k + number)
            for i, j in places:
                index = x + (i * plan.row_pitch + j * plan.lanes)
                sums.set(i, j, self._multiply_add(sums.get(i, j), index, weight))

        with T.serial(0, count >> (self.turn // 2)) as turn:
            k = bind(first + turn * self.turn)
            word = bind(emit.load(ahead, 0, 1))
            self._fetch(ahead, k + self.turn)
            for number in range(self.turn):
                step(word, number, k)
        left = bind(count & (self.turn - 1))
        if self.turn > 2:
            with T.If(left >= 2), T.Then():
                word = bind(emit.load(ahead, 0, 1))
                for number in range(2):
                    step(word, number, first + count - left)
                emit.store(ahead, 0, word >> emit.constant(self.word, 32))
        with T.If((left & 1) == 1), T.Then():
            step(bind(emit.load(ahead, 0, 1)), 0, first + count - 1)
        return [bind(sums.get(*place)) for place in places]

    def _fetch(self, ahead: Buffer, k: Expr) -> None:
        """The word of taps from block ``k`` on; behind the last there are some that nothing reads."""
        emit.store(ahead, 0, T.reinterpret(self.word, emit.load(self.taps, k, self.turn)))

    def _weight(self, k: Expr) -> list[Expr]:
        """A block in every lane as the right operands of the row's products with a vector of pixels."""
        lanes = self.plan.lanes
        words = emit.broadcast(emit.load(self.values, k, 1), lanes)
        if not self.integer:
            return [bind(words)]
        if self.isa.form == "dot":
            return [bind(T.reinterpret(f"int8x{4 * lanes}", words))]
        if self.isa.form == "long":
            return emit.halves_of_lanes(self.isa, words)
        pairs = bind(T.reinterpret(f"int16x{2 * lanes}", words))
        eight = emit.constant("int16", 8, 2 * lanes)
        return [bind((pairs << eight) >> eight), bind(pairs >> eight)]

    def _multiply_add(self, total: Expr, pixel: Expr, weight: list[Expr]) -> Expr:
        lanes, isa = self.plan.lanes, self.isa
        if not self.integer:
            value = emit.load(self.source, pixel, lanes)
            return emit.multiply_add(isa, value, weight[0], total)
        value = emit.load(self.source, pixel * INT8_STEP, INT8_STEP * lanes)
        if isa.form == "pairs":
            return emit.dot(isa, total, emit.spread_bytes(isa, value), weight)
        value = T.reinterpret(f"int8x{4 * lanes}", value)  # flipped when it was copied
        x = emit.halves_of_lanes(isa, value) if isa.form == "long" else [value]
        return emit.dot(isa, total, x, weight)
