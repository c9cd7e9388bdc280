"""What lies around the logical tensor in memory: margins and pad channels, which hold the layout's fill."""

from __future__ import annotations

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.workload import Layout


def fill_surroundings(buffer: Buffer, layout: Layout, batch: Expr) -> None:
    """Write the fill into margins and pad channels of a flat tensor; plain loops, which LLVM turns into memset."""
    pad = layout.pad_channels
    if not pad and (layout.rows, layout.columns) == (layout.height, layout.width):
        return
    fill = emit.constant(layout.dtype, layout.fill)
    row_size = layout.columns * layout.channel_stride

    def run(start: Expr, count: int) -> None:
        if count == 0:
            return
        with emit.loop(count) as i:
            emit.store(buffer, start + i, fill)

    with emit.loop(batch) as image:
        start = bind(image * (layout.rows * row_size))
        run(start, layout.top * row_size)
        run(start + (layout.top + layout.height) * row_size, layout.bottom * row_size)
        if not (layout.left or layout.right or pad):
            return
        with emit.loop(layout.height) as row:
            line = bind(start + (layout.top + row) * row_size)
            run(line, layout.left * layout.channel_stride)
            run(
                line + (layout.left + layout.width) * layout.channel_stride,
                layout.right * layout.channel_stride,
            )
            if not pad:
                return
            with emit.loop(layout.width) as column:
                pixel = bind(line + (layout.left + column) * layout.channel_stride)
                run(pixel + layout.channels, pad)
