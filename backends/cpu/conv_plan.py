"""How a dense or grouped convolution is cut: groups merged into vectors, register tile, channel blocks, chunks of pixels.

Everything here is a function of the workload and the ISA row, so that the kernel and the packed weights agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.backends.cpu.conv_check import check_conv2d
from graphopt.backends.cpu.epilogue import PACKED_VECTORS
from graphopt.backends.cpu.isa import INT8_STEP, Isa
from graphopt.backends.cpu.workload import Conv2d
from graphopt.errors import CompileError

_PIXEL_CYCLES = 0.05  # a broadcast, beside arithmetic that hides most of it
_WEIGHT_CYCLES = 0.25  # a vector of weights likewise: a whole line, often from L2
_SIZES = {"uint8": 1, "float32": 4}
_DYNAMIC_LINE = 14  # pixels that a tile of a dynamic batch of few pixels is made for
_LOOP_CYCLES = 0.5  # an int8 step's loop counter and branch; a float32 step hides them
_LINE_BYTES = 64
_QUEUED_LINES = 12  # lines of y and residual that a float32 tile touches beside its arithmetic
_LINE_CYCLES = 16.0  # each further one: 14 x 2 with a residual at 0.75 of 7 x 2
_EPILOGUE_CYCLES = 5.0  # a vector: convert, scale, clamp, round, narrow, store
_TAIL_PENALTY = 1.05  # a narrower last block is code of its own
_TILE_CYCLES = 12.0  # a tile: addresses, accumulators, loop exits
_BESIDE_REGISTERS = 12  # besides accumulators: weights, a spread pixel, an epilogue in progress
_BESIDE_LEAST_REGISTERS = 32  # with 16, tiles that leave so many free are too small
_BESIDE_CYCLES = 0.75  # a vector's epilogue where it runs beside the next tile's steps
_BESIDE_PIXEL_CYCLES = 0.5  # a store of its own
_BESIDE_TILE_CYCLES = 2.0
_BESIDE_WEIGHT_CYCLES = 0.02  # a vector of weights
_BESIDE_LATENCY = 4.0  # of a dot product alone
_CROWDED_CYCLES = (
    1.0  # an accumulator above half the registers: the epilogue's constants leave theirs
)
_BURST_PENALTY = 3.0  # three packs at once are more than the steps around them hide
_FEW_STEPS = 12  # that leave an epilogue little to run beside
_FEW_SUMS = 12
_HURRIED_PENALTY = 1.25  # 224 x 224 x 3 -> 32: 8 x 2 takes 60 us, 6 x 2 and 8 x 1 take 45
_SHARED_WEIGHTS = 0.3  # of L2, up to which every core reads all weights
# A step's instructions beside its products: of a pixel, and of a vector of weights.
_SPREAD_INSTRUCTIONS = {"dot": (0.0, 0), "pairs": (2.0, 2), "long": (2.0, 0), "matrix": (0.5, 0)}
_PAGE_BYTES = 4096  # pixels this far apart share one set of the L1 cache
_ALIASED_PIXELS = 7  # more of them push each other out: 14 x 2 at half the speed of 7 x 2


@dataclass(frozen=True)
class ConvChoice:
    """What is free in the cut of a convolution: the register tile, and the tiles of a chunk (0: ``chunk_tiles`` says)."""

    pixels: int
    vectors: int
    chunk: int = 0

    def __str__(self) -> str:
        chunks = f", {self.chunk} tiles a chunk" if self.chunk else ""
        return f"{self.pixels} x {self.vectors}{chunks}"


@dataclass(frozen=True)
class ConvPlan:
    """The cut of one convolution.

    ``groups`` groups of ``in_channels`` -> ``out_channels`` after merging neighbours (block-diagonal weights) up to one
    vector. The kernel walks ``taps_high x taps_wide`` spans of ``span`` consecutive input elements, ``step`` at a time; the
    columns of a window are one span where they lie side by side in memory (``merged_columns``).
    ``pixels x vectors`` is the register tile. ``flat_pixels``: the whole image is one line of pixels (1x1, no margins);
    ``may_not_fit``: of a dynamic batch, that line can be shorter than the tile. ``isa`` is the one of the row's ``dense`` forms
    that multiplies. ``chunk``: as in ``ConvChoice``.
    """

    groups: int
    in_channels: int
    out_channels: int
    step: int
    taps_high: int
    taps_wide: int
    span: int
    merged_columns: bool
    pixels: int
    vectors: int
    lanes: int
    flat_pixels: bool
    may_not_fit: bool
    isa: Isa
    chunk: int = 0

    @property
    def line(self) -> str:
        """One line for a log."""
        return f"{self.groups} x ({self.in_channels} -> {self.out_channels}), tile {self.pixels} x {self.vectors}"

    @property
    def steps(self) -> int:
        """Steps of a span; the last may be partial."""
        return -(-self.span // self.step)

    @property
    def all_steps(self) -> int:
        """Steps of a whole window: the packed weight's depth."""
        return self.taps_high * self.taps_wide * self.steps

    @property
    def group_vectors(self) -> int:
        """Channel vectors of a group, the last one perhaps partial."""
        return -(-self.out_channels // self.lanes)

    @property
    def full_blocks(self) -> int:
        """Blocks of ``vectors`` whole channel vectors in a group."""
        return self.out_channels // (self.lanes * self.vectors)

    @property
    def tail_channels(self) -> int:
        """Output channels of a group's last, narrower block; 0 where there is none."""
        return self.out_channels - self.full_blocks * self.vectors * self.lanes

    @property
    def tail_vectors(self) -> int:
        """Channel vectors of that block."""
        return -(-self.tail_channels // self.lanes)

    @property
    def blocks(self) -> int:
        """Channel blocks of a group."""
        return self.full_blocks + (self.tail_channels > 0)

    @property
    def step_elements(self) -> int:
        """Packed weights that one step of one channel vector takes."""
        return self.step * self.lanes

    @property
    def packed_weights(self) -> int:
        """Elements of the packed weight."""
        return self.groups * self.group_vectors * self.all_steps * self.step_elements

    @property
    def packed_channels(self) -> int:
        """Elements of the packed bias and multiplier: whole vectors of every group."""
        return self.groups * self.group_vectors * self.lanes


def _merge(groups: int, out_channels: int, lanes: int) -> int:
    """How many neighbouring groups share one channel vector: the extra products are zeros in otherwise idle lanes."""
    fits = [m for m in range(1, groups + 1) if groups % m == 0 and m * out_channels <= lanes]
    return max(fits, default=1)


def _is_flat(workload: Conv2d) -> bool:
    """True where output pixel i reads input pixel i alone, over the whole tensor."""
    x, y = workload.x, workload.y
    layouts = [x, y] + ([workload.residual] if workload.residual else [])
    return (
        workload.kernel == (1, 1)
        and workload.stride == (1, 1)
        and workload.padding == (0, 0)
        and all(t.rows == t.height and t.columns == t.width for t in layouts)
        and (x.height, x.width) == (y.height, y.width)
    )


def _tile_cycles(
    isa: Isa, dtype: str, pixels: int, vectors: int, steps: int, residual: bool
) -> float:
    """Estimated cycles of a whole tile: arithmetic, loads or latency bound, whichever is most."""
    if dtype == "float32":
        products, spread, widen = 1, 0.0, 0
    else:
        products = isa.products
        spread, widen = _SPREAD_INSTRUCTIONS[isa.form]
    whole = -(-pixels // isa.sum_pixels) * isa.sum_pixels
    arithmetic = whole * vectors * products + pixels * spread + vectors * widen
    loads = pixels / isa.steps_a_load + vectors * isa.sum_pixels
    step = max(arithmetic / isa.pipes, loads / isa.loads_a_cycle, isa.latency)
    step += pixels * _PIXEL_CYCLES + vectors * _WEIGHT_CYCLES
    weight_bytes = vectors * isa.vector_bytes * isa.sum_pixels
    if steps * weight_bytes > isa.l1_bytes // 2:
        step = max(step, weight_bytes / isa.l2_bytes_a_cycle)
    tile = pixels * vectors * _EPILOGUE_CYCLES + _TILE_CYCLES
    if dtype != "float32":
        return steps * (step + _LOOP_CYCLES) + tile
    lines = pixels * -(-weight_bytes // _LINE_BYTES) * (1 + residual)
    return steps * step + tile + max(0, lines - _QUEUED_LINES) * _LINE_CYCLES


def overlaps(isa: Isa, dtype: str, pixels: int, vectors: int) -> bool:
    """True where a tile's requantizing epilogue runs beside the next tile's steps: there are registers for both.

    A row whose dot product does not accumulate keeps all pipes busy with its steps: it loses 4 %.
    """
    if dtype != "uint8" or not isa.can_overlap or isa.registers < _BESIDE_LEAST_REGISTERS:
        return False
    return pixels > 1 and pixels * vectors + _BESIDE_REGISTERS <= isa.registers


def _overlapped_cycles(isa: Isa, pixels: int, vectors: int, steps: int) -> float:
    """``_tile_cycles`` of such a tile: no more than what its instructions take of the pipes."""
    step = max(pixels * vectors * isa.halves / isa.pipes, (pixels + vectors) / 2, _BESIDE_LATENCY)
    step += vectors * _BESIDE_WEIGHT_CYCLES
    weight_bytes = vectors * isa.vector_bytes
    if steps * weight_bytes > isa.l1_bytes // 2:
        step = max(step, weight_bytes / isa.l2_bytes_a_cycle)
    unit = PACKED_VECTORS // math.gcd(PACKED_VECTORS, vectors)  # pixels of a whole pack
    finished = -(-pixels // unit) * unit
    burst = _BURST_PENALTY if unit * vectors > 2 * PACKED_VECTORS else 1.0
    epilogue = finished * (vectors * _BESIDE_CYCLES * burst + _BESIDE_PIXEL_CYCLES)
    crowded = max(0, pixels * vectors - isa.registers // 2) * _CROWDED_CYCLES
    cycles = steps * step + epilogue + crowded + _BESIDE_TILE_CYCLES
    hurried = steps < _FEW_STEPS and vectors < PACKED_VECTORS and pixels * vectors > _FEW_SUMS
    return cycles * (_HURRIED_PENALTY if hurried else 1.0)


def estimate_cycles(
    isa: Isa,
    dtype: str,
    line: int,
    vectors: int,
    steps: int,
    tile: tuple[int, int],
    residual: bool = False,
) -> float:
    """The cost model: cycles of a line of pixels by a group's channel vectors, cut by ``tile``."""
    pixels, width = tile
    full, tail = divmod(vectors, width)

    def cycles(width: int) -> float:
        if overlaps(isa, dtype, *tile):
            return _overlapped_cycles(isa, pixels, width, steps)
        return _tile_cycles(isa, dtype, pixels, width, steps, residual)

    one = full * cycles(width)
    if tail:
        one += cycles(tail)
        one *= _TAIL_PENALTY
    return math.ceil(line / pixels) * one


def choose_tile(
    isa: Isa,
    dtype: str,
    line: int,
    pitch: int,
    vectors: int,
    steps: int,
    residual: bool = False,
) -> tuple[int, int]:
    """The register tile of least estimated time for a line of pixels ``pitch`` bytes apart and a group's vectors."""
    most = line if pitch % _PAGE_BYTES else min(line, _ALIASED_PIXELS)
    fitting = [t for t in isa.tiles(dtype) if t[0] <= most and t[1] <= vectors]
    return min(
        fitting,
        key=lambda tile: estimate_cycles(isa, dtype, line, vectors, steps, tile, residual),
    )


def line_pixels(workload: Conv2d) -> int:
    """Output pixels that tiles are cut from: a row of the map, or the whole tensor where it is one line."""
    x, y = workload.x, workload.y
    if not _is_flat(workload):
        return y.width
    line = y.height * y.width * (x.batch or 1)
    return line if x.batch is not None else max(line, _DYNAMIC_LINE)


def _check_choice(choice: ConvChoice, isa: Isa, dtype: str, line: int, group_vectors: int) -> None:
    """Refuse a tile that spills or is larger than the output."""
    tile = choice.pixels, choice.vectors
    fits = choice.pixels <= line and choice.vectors <= group_vectors
    if tile not in isa.tiles(dtype) or not fits or choice.chunk < 0:
        raise CompileError(
            f"conv2d cannot be cut by {choice!r} on {isa.name}, for {line} pixels by {group_vectors} channel vectors; "
            "leave the choice out"
        )


def plan_conv2d(workload: Conv2d, isa: Isa, choice: ConvChoice | None = None) -> ConvPlan:
    """Cut a convolution for an ISA row, by ``choice`` or else by the cost model, which also says what multiplies.

    Raises ``CompileError`` on a workload that is not consistent, or a choice that does not fit it.
    """
    check_conv2d(workload)
    dtype = workload.x.dtype
    first, *others = isa.dense(dtype)
    if choice is not None:
        tile = choice.pixels, choice.vectors
        first, *others = [row for row in (first, *others) if tile in row.tiles(dtype)] or [first]
    plan = _cut(workload, first, choice)
    for row in others:
        other = _cut(workload, row, choice)
        if _cycles(workload, other) < _cycles(workload, plan):
            plan = other
    return plan


def _cut(workload: Conv2d, isa: Isa, choice: ConvChoice | None) -> ConvPlan:
    x, y = workload.x, workload.y
    granule = INT8_STEP if x.dtype == "uint8" else 1  # channels that tensors are padded to
    step = isa.step if x.dtype == "uint8" else 1
    merge = _merge(workload.groups, y.channels // workload.groups, isa.lanes)
    groups = workload.groups // merge
    in_channels = x.channels // groups
    out_channels = y.channels // groups
    kh, kw = workload.kernel
    adjacent = kw > 1 and workload.dilation[1] == 1 and not x.shared
    merged = groups == 1 and adjacent and x.channel_stride % granule == 0
    span = in_channels
    if groups == 1:
        # the pad channels meet zero weights
        padded = [-(-in_channels // size) * size for size in (step, granule)]
        span = next((size for size in padded if size <= x.channel_stride), in_channels)
    if merged:
        span = (kw - 1) * x.channel_stride + span
    wide = 1 if merged else kw
    line = line_pixels(workload)
    steps = kh * wide * -(-span // step)
    pitch = workload.stride[1] * x.channel_stride * _SIZES[x.dtype]
    group_vectors = -(-out_channels // isa.lanes)
    if choice is None:
        residual = workload.residual is not None
        tile = choose_tile(isa, x.dtype, line, pitch, group_vectors, steps, residual)
        choice = ConvChoice(*tile)
    else:
        _check_choice(choice, isa, x.dtype, line, group_vectors)
    return ConvPlan(
        groups=groups,
        in_channels=in_channels,
        out_channels=out_channels,
        step=step,
        taps_high=kh,
        taps_wide=wide,
        span=span,
        merged_columns=merged,
        pixels=choice.pixels,
        vectors=choice.vectors,
        lanes=isa.lanes,
        flat_pixels=_is_flat(workload),
        may_not_fit=choice.pixels > y.height * y.width * (x.batch or 1),
        isa=isa,
        chunk=choice.chunk,
    )


def _cycles(workload: Conv2d, plan: ConvPlan) -> float:
    """Estimated cycles of a plan on one thread."""
    lines = 1 if plan.flat_pixels else workload.y.height * (workload.y.batch or 1)
    tile, residual = (plan.pixels, plan.vectors), workload.residual is not None
    pixels, vectors, steps = line_pixels(workload), plan.group_vectors, plan.all_steps
    one = estimate_cycles(plan.isa, workload.x.dtype, pixels, vectors, steps, tile, residual)
    return lines * plan.groups * one


def estimate(workload: Conv2d, isa: Isa) -> float:
    """Estimated cycles on one thread, cut by the cost model."""
    return _cycles(workload, plan_conv2d(workload, isa))


def chunk_tiles(
    workload: Conv2d, plan: ConvPlan, isa: Isa, tiles: int | None, image: int, threads: int
) -> int:
    """Tiles of a chunk: x and y of a chunk fill at most half the L2 cache, and the threads get equal shares.

    Where the weights leave room in every core's L2, threads share the map rather than the channels: a core then reads the
    pixels that it wrote itself in the layer before. A chunk runs over all channel blocks before the next one starts; a large chunk reads the weights fewer times, one that
    outgrows L2 reads x from further away for every block. ``tiles`` is None where the batch is dynamic, ``image`` the tiles
    of one image.
    """
    if plan.chunk:
        return plan.chunk if tiles is None else min(plan.chunk, tiles)
    x, y = workload.x, workload.y
    x_bytes = workload.stride[0] * workload.stride[1] * x.channel_stride * _SIZES[x.dtype]
    pixel = x_bytes + y.channel_stride * _SIZES[y.dtype]
    chunk = max(1, isa.l2_bytes // 2 // (plan.pixels * pixel))
    blocks = plan.groups * plan.blocks
    shares = threads == 1 or blocks % threads == 0 or blocks >= 8 * threads
    if tiles is None and shares:
        return chunk
    total = image if tiles is None else tiles
    chunks = -(-total // min(total, chunk))
    weight_bytes = plan.packed_weights * _SIZES[x.dtype]
    if threads > 1 and weight_bytes <= _SHARED_WEIGHTS * isa.l2_bytes:
        chunks = -(-chunks // threads) * threads
    while chunks < total and chunks * blocks < 8 * threads and (chunks * blocks) % threads:
        chunks += 1
    return -(-total // chunks)
