"""The plots of a report. Every function takes records and writes one PNG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gluprune.measure.records import Record
from gluprune.runtime.aligned import ALIGNMENT

_SCALES = {
    "s": ((1.0, "s"), (1e3, "ms"), (1e6, "µs")),
    "B": ((1e-9, "GB"), (1e-6, "MB"), (1e-3, "kB"), (1.0, "B")),
    "bytes": ((1e-9, "GB"), (1e-6, "MB"), (1e-3, "kB"), (1.0, "B")),
}


def readable(values: Sequence[float], unit: str) -> tuple[float, str]:
    """Return a factor and a unit in which the smallest of `values` is at least one, if the unit has such prefixes."""
    scales = _SCALES.get(unit, ((1.0, unit),))
    smallest = min((value for value in values if value > 0), default=1.0)
    return next((scale for scale in scales if smallest * scale[0] >= 1), scales[-1])


def number(value: float) -> str:
    """Return four significant digits, never as a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)


def roofline(records: Sequence[Record], path: Path) -> bool:
    """Draw FLOP/s against FLOPs per byte, for one hardware and dtype.

    Returns:
        False, without a file, where ceilings or points below them are missing.
    """
    from matplotlib.figure import Figure

    ceilings = {record.what: record for record in records if record.what.startswith("ceiling: ") and record.p50}
    copy, gemm = ceilings.get("ceiling: copy"), ceilings.get("ceiling: gemm")
    points: list[Any] = [r for r in records if r.floor and r.p50 and r.nbytes and r.flops]
    if not (copy and gemm and points):
        return False
    bandwidth, peak = (copy.nbytes or 0) / copy.p50, (gemm.flops or 0) / gemm.p50
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [r.flops / r.nbytes for r in points]
    ends = (min(intensities) / 2, max(*intensities, peak / bandwidth) * 2)
    knee = peak / bandwidth
    axes.plot([ends[0], knee, ends[1]], [bandwidth * ends[0], peak, peak], color="black", zorder=1)
    for provider in dict.fromkeys(r.provider for r in points):
        own = [r for r in points if r.provider == provider]
        axes.scatter(
            [r.flops / r.nbytes for r in own], [r.flops / r.p50 for r in own], s=16, alpha=0.7, label=provider, zorder=2
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte moved, at least",
        ylabel="FLOP/s",
        title=f"{points[0].hardware}, {points[0].dtype}\nceilings as measured: copy {bandwidth / 1e9:.4g} GB/s,"
        f" GEMM {peak / 1e12:.4g} TFLOP/s",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    _save(figure, path)
    return True


def against_width(records: Sequence[Record], path: Path) -> None:
    """Draw a figure and its improvement over the first provider's dense model, against the intermediate size.

    One row of two panels for each shape without the width. Lines join the widths that are multiples of 128, crosses are
    the others, and bars extend from p20 to p80. The dotted line is the ratio of the bytes that must be moved.
    """
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(map(_cell, records)))
    colors = {provider: f"C{index}" for index, provider in enumerate(dict.fromkeys(r.provider for r in records))}
    figure = Figure(figsize=(11, 0.8 + 3.2 * len(cells)), layout="constrained")
    for name, (value, gain) in zip(cells, figure.subplots(len(cells), 2, squeeze=False), strict=True):
        here = [record for record in records if _cell(record) == name]
        dense = _first_of_the_widest(here)
        unit = _draw_cell(value, gain, here, dense, colors)
        value.set(ylabel=unit, title=name, ylim=(0, None))
        gain.set(ylabel=f"times better than\n{dense.provider} at {dense.shape['I']}", title=name)
        for axes in (value, gain):
            axes.set_xlabel("intermediate size")
            axes.invert_xaxis()
            axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize="x-small")
    model = records[0].shape.get("model", f"H {records[0].shape['H']}" if "H" in records[0].shape else "")
    title = f"{records[0].what}, {model}, {records[0].dtype}\n{records[0].hardware}"
    if any(r.shape["I"] % ALIGNMENT for r in records):
        title += f"; crosses: unaligned widths (not a multiple of {ALIGNMENT})"
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def _cell(record: Record) -> str:
    """The shape without the width and what all records of the picture have in common."""
    return ", ".join(f"{k} {v}" for k, v in record.shape.items() if k not in ("I", "H", "model"))


def _first_of_the_widest(records: Sequence[Record]) -> Record:
    widest = max(record.shape["I"] for record in records)
    return next(record for record in records if record.shape["I"] == widest)


def _draw_cell(value, gain, records: Sequence[Record], dense: Record, colors: dict[str, str]) -> str:
    """Draw the curves of one cell into its two panels; return the unit."""
    scale, unit = readable([record.p50 for record in records if record.p50 is not None], dense.unit)
    for provider, color in colors.items():
        own = sorted((r for r in records if r.provider == provider), key=lambda r: r.shape["I"])
        for aligned, style in ((True, {"marker": "o", "ms": 4}), (False, {"marker": "x", "linestyle": "none"})):
            part = [r for r in own if (r.shape["I"] % ALIGNMENT == 0) == aligned]
            if not part:
                continue
            widths = [r.shape["I"] for r in part]
            label = provider if aligned or all(r.shape["I"] % ALIGNMENT for r in own) else None
            spread = [[(r.p50 - r.p20) * scale for r in part], [(r.p80 - r.p50) * scale for r in part]]
            line = {"color": color, "label": label, **style}
            value.errorbar(widths, [r.p50 * scale for r in part], yerr=spread, lw=1, elinewidth=1, **line)
            gain.plot(widths, [_gain(dense, r) for r in part], lw=1, **line)
    bytes_of = {r.shape["I"]: r.nbytes for r in records if r.nbytes}
    if dense.nbytes and len(bytes_of) > 1:
        widths = sorted(bytes_of)
        ratios = [dense.nbytes / bytes_of[width] for width in widths]
        gain.plot(widths, ratios, ":", color="black", label="ratio of the bytes")
    return unit


def _gain(dense: Record, record: Record) -> float:
    return record.p50 / dense.p50 if record.higher_is_better else dense.p50 / record.p50


def heat_map(wins: dict[tuple[tuple[str, int], int], float], title: str, path: Path) -> None:
    """Draw the advantage by (model, intermediate size) and number of tokens: blue wins, red loses, white is equal.

    Args:
        wins: ((model, intermediate size), tokens) -> how many times better.
        title: Title of the plot.
        path: The file.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    rows = sorted({row for row, _ in wins}, key=lambda row: (row[0], -row[1]))
    columns = sorted({column for _, column in wins})
    grid = [[math.log2(wins[row, column]) if (row, column) in wins else math.nan for column in columns] for row in rows]
    limit = max(0.1, *(abs(v) for line in grid for v in line if not math.isnan(v)))
    figure = Figure(figsize=(max(6, 3.2 + 0.9 * len(columns)), 1.6 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, cmap="RdBu", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) in wins:
                dark = abs(grid[y][x]) > 0.7 * limit
                text = f"{wins[row, column]:.2f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), list(map(str, columns)))
    axes.set_yticks(range(len(rows)), [f"{model}, I {width}" for model, width in rows])
    axes.set(xlabel="M tokens")
    axes.set_title(title, fontsize="medium")
    _save(figure, path)
