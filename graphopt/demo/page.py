"""One HTML file that needs nothing else: the table, and a picture of it as inline SVG."""

from __future__ import annotations

import html
import io
from typing import Any

from graphopt.demo.result import EAGER, FLOAT, INT8, Result

_GREY, _BLUE, _GREEN = "#9aa3ad", "#3b6fb5", "#2b8a57"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d8dee4; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; }
"""


def _bars(axes: Any, title: str, bars: list[tuple[str, float, str, str]]) -> None:
    """Horizontal bars of (label, value, what to write beside it, colour), the first on top."""
    labels, values, texts, colours = zip(*bars, strict=True)
    drawn = axes.barh(labels, values, color=colours)
    axes.bar_label(drawn, texts, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.3)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def picture(result: Result) -> str:
    """The ``<svg>`` element: latency, size, accuracy, slowest kernels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "graphopt", "font.size": 10}):
        figure = Figure(figsize=(11, 6.2), layout="constrained")
        grid = figure.subplots(2, 2)
        colours = {EAGER: _GREY, FLOAT: _BLUE, INT8: _GREEN}
        _bars(
            grid[0, 0],
            "Latency, one thread",
            [(name, ms, f"{ms:.2f} ms", colours[name]) for name, ms in result.latency.items()],
        )
        sizes = (("float weights", result.float_bytes, _GREY), (".gopt", result.int8_bytes, _GREEN))
        _bars(
            grid[0, 1],
            "Size",
            [(label, count, f"{count / 1e6:.2f} MB", colour) for label, count, colour in sizes],
        )
        shares = (
            ("float top-1", result.float_correct, result.photos, _GREY),
            ("int8 top-1", result.int8_correct, result.photos, _GREEN),
            ("int8 = float", result.agreeing, result.crops, _BLUE),
        )
        _bars(
            grid[1, 0],
            "Accuracy and agreement",
            [(label, n / total, f"{n} of {total}", colour) for label, n, total, colour in shares],
        )
        kernels = [
            (
                f"{rank}. {slow.layer or slow.operator}",
                slow.milliseconds,
                f"{slow.share:.1%}",
                _GREEN,
            )
            for rank, slow in enumerate(result.slowest, 1)
        ]
        _bars(grid[1, 1], "Slowest int8 kernels, share of the time", kernels)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _cells(*values: tuple[str, str]) -> str:
    return "".join(f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in values)


def page(result: Result) -> str:
    """The whole document."""
    rows = [f"<tr>{_cells(('', name), ('', text))}</tr>" for name, text in result.rows()]
    slow = [
        "<tr>"
        + _cells(
            ("", row.layer),
            ("", row.operator),
            ("number", f"{row.milliseconds:.3f} ms"),
            ("number", f"{row.share:.1%}"),
            ("number", "" if row.gops is None else f"{row.gops:.0f}"),
            ("number", "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"),
        )
        + "</tr>"
        for row in result.slowest
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>graphopt: {html.escape(result.network)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(result.network)}, from PyTorch to one int8 file</h1>
{picture(result)}
<table>{"".join(rows)}</table>
<h2>The five slowest kernels</h2>
<table>
<tr><th>layer</th><th>operator</th><th>time</th><th>share</th><th>GOPS</th><th>of peak</th></tr>
{"".join(slow)}
</table>
<p>Made by <code>graphopt demo</code>; the same numbers are in <code>demo.json</code> beside this page.</p>
</body>
</html>
"""
