"""Records as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from gluprune.measure.records import Record
from gluprune.reports.plots import number


def bench_table(records: Sequence[Record]) -> str:
    """Return the records of `gluprune bench` as text: one line for each model, way of decoding and workload."""
    columns = {
        "TTFT ms": ("generation: TTFT", 1e3),
        "TPOT ms": ("generation: TPOT", 1e3),
        "TTLT ms": ("generation: TTLT", 1e3),
        "tokens/s": ("generation: tokens per second", 1),
        "peak GB": ("generation: peak memory", 1e-9),
        "J/token": ("generation: energy", 1),
        "above idle": ("generation: energy above idle", 1),
    }
    rows: dict[tuple, dict[str, Record]] = {}
    for record in records:
        shape = record.shape
        place = shape.get("workload", f"batch {shape['batch']}, {shape['prompt']}+{shape['new tokens']} tokens")
        rows.setdefault((shape["I"], record.provider, shape["decoding"], place), {})[record.what] = record
    head = f"{'neurons':>8}  {'provider':<13}{'decoding':<16}{'workload':<26}" + "".join(
        f"{name:>11}" for name in columns
    )
    lines, reasons = [head], []
    for (width, provider, decoding, place), row in rows.items():
        cells = []
        for what, scale in columns.values():
            value = row[what].p50 if what in row else None
            cells.append("–" if value is None else number(value * scale))
        lines.append(f"{width:>8}  {provider:<13}{decoding:<16}{place:<26}" + "".join(f"{cell:>11}" for cell in cells))
        reasons += [
            f"{record.what.removeprefix('generation: ')}: {record.refusal}" for record in row.values() if record.refusal
        ]
    return "\n".join([*lines, *(["", *dict.fromkeys(reasons)] if reasons else [])])
