"""What tuning may choose for a convolution: the candidates of a workload, and how workloads and choices are written down.

A choice is one dataclass an algorithm (``ALGORITHMS``); ``None`` is the cost model's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

from graphopt.backends.cpu.conv_plan import (
    ConvChoice,
    chunk_tiles,
    estimate_cycles,
    line_pixels,
    plan_conv2d,
)
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import Conv2d, QuantizedAdd, Requantize
from graphopt.errors import CompileError

ALGORITHMS: dict[str, type[ConvChoice]] = {"direct": ConvChoice}

_MOST_TILES = 24  # the tuned tile was among the 12 of least estimated time in every layer measured


def write_choice(choice: ConvChoice) -> str:
    """``{"algorithm": "direct", "pixels": 14, ...}``."""
    (name,) = (name for name, kind in ALGORITHMS.items() if type(choice) is kind)
    return json.dumps({"algorithm": name, **dataclasses.asdict(choice)}, sort_keys=True)


def read_choice(text: str) -> ConvChoice:
    """The choice that ``write_choice`` wrote; raises ``ValueError``."""
    try:
        fields = json.loads(text)
        return ALGORITHMS[fields.pop("algorithm")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{text!r} is no choice") from error


def _rounded(requantize: Requantize) -> Requantize:
    """Which of its numbers are at the ends of their range; the numbers themselves are only constants of the code."""
    return Requantize(
        min(requantize.zero_point, 1), min(requantize.qmin, 1), max(requantize.qmax, 254)
    )


def tuned_form(workload: Conv2d) -> Conv2d:
    """The workload without the numbers of a calibration, and at batch 1 where the batch is dynamic.

    Layers that differ in zero points, multipliers and fills alone are one to measure.
    """
    epilogue = workload.epilogue
    if epilogue.requantize is not None:
        bounds, factor = _rounded(epilogue.requantize), 1.5 if epilogue.inverse_scale else 0.0
        epilogue = dataclasses.replace(epilogue, requantize=bounds, inverse_scale=factor)
    add = epilogue.residual_add
    if add is not None:
        rounded = QuantizedAdd(
            a_multiplier=700_001,  # no power of two: LLVM would shift, which costs less than a product
            b_multiplier=511_111,
            shift=20,
            a_zero_point=min(add.a_zero_point, 1),
            b_zero_point=min(add.b_zero_point, 1),
            zero_point=min(add.zero_point, 1),
            qmin=min(add.qmin, 1),
            qmax=max(add.qmax, 254),
        )
        epilogue = dataclasses.replace(epilogue, residual_add=rounded)
    layouts = {
        name: dataclasses.replace(layout, fill=0, batch=layout.batch or 1)
        for name in ("x", "y", "residual")
        if (layout := getattr(workload, name)) is not None
    }
    return dataclasses.replace(workload, **layouts, x_zero_point=0, epilogue=epilogue)


def workload_key(workload: Conv2d) -> str:
    """What a store files the measurements of a workload under."""
    return hashlib.sha256(repr(tuned_form(workload)).encode()).hexdigest()[:24]


def _tiles(workload: Conv2d, isa: Isa) -> list[tuple[int, int]]:
    """Register tiles, least estimated time first, without those that need as many tiles a line as a smaller one."""
    dtype, line = workload.x.dtype, line_pixels(workload)
    plan = plan_conv2d(workload, isa)
    least: dict[tuple[int, int], int] = {}  # (tiles of a line, vectors) -> pixels
    for pixels, vectors in plan.isa.tiles(dtype):
        if pixels <= line and vectors <= plan.group_vectors:
            count = -(-line // pixels), vectors
            least[count] = min(pixels, least.get(count, pixels))
    tiles = [(pixels, vectors) for (_, vectors), pixels in least.items()]
    vectors, steps, residual = plan.group_vectors, plan.all_steps, workload.residual is not None
    tiles.sort(
        key=lambda tile: estimate_cycles(plan.isa, dtype, line, vectors, steps, tile, residual)
    )
    return tiles[:_MOST_TILES]


def candidates(workload: Conv2d, isa: Isa) -> list[ConvChoice]:
    """Choices to measure, the most promising first; the cost model's own is not among them."""
    plan = plan_conv2d(workload, isa)
    tiles = _tiles(workload, isa)
    return [ConvChoice(*tile) for tile in tiles if tile != (plan.pixels, plan.vectors)]


def refinements(
    workload: Conv2d, isa: Isa, threads: int, best: ConvChoice | None
) -> list[ConvChoice]:
    """Other chunks for the best tile: parts of the cost model's, down to a single tile, and the whole tensor."""
    plan = plan_conv2d(workload, isa, best)
    y, line = workload.y, line_pixels(workload)
    tiles = -(-line // plan.pixels)
    if not plan.flat_pixels:
        tiles *= y.height * (y.batch or 1)
    usual = min(tiles, chunk_tiles(workload, plan, isa, tiles, tiles, threads))
    others = {tiles, -(-tiles // threads), -(-usual // 2), -(-usual // 4), -(-usual // 16), 1}
    if best is not None and best.chunk:
        usual = best.chunk
    return [ConvChoice(plan.pixels, plan.vectors, chunk) for chunk in sorted(others - {usual})]


def fits(workload: Conv2d, isa: Isa, choice: ConvChoice) -> bool:
    """True where a choice, measured at batch 1 of a dynamic batch perhaps, can cut the workload."""
    try:
        plan_conv2d(workload, isa, choice)
    except CompileError:
        return False
    return True
