"""The rows of the check as text, Markdown and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csrc_triton.tools.aot.bounds import worst
from csrc_triton.tools.aot.check import Shape
from csrc_triton.tools.aot.predict import BANDWIDTH, LATENCY, RATE
from csrc_triton.tools.aot.ptx import Access

COLUMNS = (
    "sm", "kernel", "configuration", "tokens", "hidden", "regs", "spill", "shared", "matrix", "weight loads",
    "programs", "waves", "H100 µs", "verdict",
)  # fmt: skip

NOTE = f"""`H100 µs` is arithmetic, not a measurement: {LATENCY} µs for each launch in a CUDA graph, plus the larger of
bytes over {BANDWIDTH / 1e12:g} TB/s and operations over {RATE / 1e12:.0f} TFLOP/s (longer where the last round of tiles
does not fill the GPU). `csrc_triton/tools/aot/predict.py` says how they are counted."""


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row as text.

    Waves are programs over the programs that the chip's usual board holds at a time; the times are those of
    `csrc_triton.tools.aot.predict`.
    """
    config = row["config"]
    blocks = "x".join(str(value) for name, value in config.items() if name.startswith("BLOCK_"))
    split = f" split {config['SPLIT_K']}" if "SPLIT_K" in config else ""
    plans = [Shape(*shape) for *shape, _ in row["plans"]]
    head = (
        str(row["sm"]),
        row["kernel"],
        f"{blocks}{split} w{config['num_warps']} s{config['num_stages']}",
        span(shape.M for shape in plans),
        span(shape.H for shape in plans),
    )
    programs = span(programs for *_, programs in row["plans"])
    verdict = f"FAIL {'; '.join(row['failures'])}" if row["failures"] else "ok"
    if "registers" not in row:
        return *head, "", "", "", "", "", programs, "", "", verdict
    spills = f"{row['stack']}B+{row['local_accesses']}" if row["stack"] or row["local_accesses"] else "-"
    matrix = " ".join(f"{name} {count}" for name, count in row["matrix_instructions"].items()) or "-"
    accesses = [Access(*access) for access in row["accesses"]]
    loads = [access for access in accesses if access.instruction != "st" and access.argument in row["weights"]]
    widths = ", ".join(f"{load.argument} {load.count} x {load.instruction} {load.width}" for load in loads) or "-"
    shared = f"{row['shared'] / 1024:.0f}K"
    times = span(round(microseconds, 1) for *_, microseconds in row["predicted"]) if "predicted" in row else ""
    return *head, str(row["registers"]), spills, shared, matrix, widths, programs, span(row["waves"]), times, verdict


def span(values: Iterable[float]) -> str:
    """Return "low-high" of the values, or the value if they are all equal."""
    known = list(values)
    low, high = min(known), max(known)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def table(rows: list[dict[str, Any]], *, markdown: bool) -> str:
    """Return the rows as a table, in Markdown or in columns of text."""
    body = [cells(row) for row in rows]
    if markdown:
        lines = [COLUMNS, tuple("---" for _ in COLUMNS), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in [COLUMNS, *body]) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [COLUMNS, *body]
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """Return one line about rows of one version of Triton and one dtype."""
    plans = sum(len(row["plans"]) for row in rows)
    failed = sum(bool(row["failures"]) for row in rows)
    head = f"Triton {rows[0]['triton']}, {rows[0]['dtype']}"
    return f"{head}: {plans} kernel calls, {len(rows)} distinct compilations, {failed} failed"


def _worst(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines about the calls furthest above their bound; none if no row has a prediction."""
    found = worst(rows)
    if not found:
        return []
    lines = [
        f"| {cell.path} | {cell.tokens} | {cell.hidden} | {cell.neurons} | {cell.microseconds:.1f} | {cell.bound:.1f} |"
        f" {cell.ratio:.2f} |"
        for cell in found
    ]
    head = ["| path | tokens | hidden | neurons | H100 µs | bound | ratio |", "|---|--:|--:|--:|--:|--:|--:|"]
    intro = "Furthest above the bound, which is each byte of weights and tokens moved once, or the operations:"
    return [intro, "", *head, *lines, ""]


def record(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `rows` as JSON lines to `path`, and as a Markdown table to the file of the same name with suffix .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ["# Kernels compiled ahead of time", "", NOTE, ""]
    for version in dict.fromkeys(row["triton"] for row in rows):
        of_version = [row for row in rows if row["triton"] == version]
        text += [f"## {summary(of_version)}", "", *_worst(of_version), table(of_version, markdown=True), ""]
    path.with_suffix(".md").write_text("\n".join(text))
