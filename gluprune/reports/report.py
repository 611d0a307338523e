"""`gluprune report`: Markdown tables and plots from records.

A report is a sequence of sections. Each is a function of the records and the output folder: it writes its plots there
and returns its Markdown, or "" where it has no records. In the shape of a record `I` is the intermediate size that
latency, energy and speed-up are drawn against, `M` the number of tokens; `model` or `H` distinguishes models.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gluprune.io.atomic import write_file
from gluprune.measure.compare import Change
from gluprune.measure.records import Record, read
from gluprune.reports import breakdown, plots

OURS = "gluprune"  # the provider whose wins and losses are counted; "gluprune, ..." are its forced paths
NAME = "report.md"


def read_all(paths: Iterable[str | Path]) -> list[Record]:
    """Return the records of files and of the `*.jsonl` files in folders; keep the last one for each figure.

    Raises:
        ValueError: No path, a folder without record files, no records, or a line that is not a record.
        FileNotFoundError: A path does not exist.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} holds no file of records (*.jsonl)")
        files += found
    if not files:
        raise ValueError("give a file of records, or a folder of such files")
    latest = {record.key: record for file in files for record in read(file)}
    if not latest:
        raise ValueError(f"no record in {', '.join(map(str, files))}")
    return list(latest.values())


def write(records: Sequence[Record], out: str | Path) -> Path:
    """Write the report and its plots into a folder.

    Args:
        records: What was measured.
        out: The folder; created if it does not exist.

    Returns:
        The path of the report.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Report\n", *(section(records, out) for section in SECTIONS)]
    write_file(out / NAME, ["\n".join(part for part in parts if part).encode()])
    return out / NAME


def groups(records: Iterable[Record], key: Callable[[Record], object]) -> list[list[Record]]:
    """Return groups of records with equal keys, in the order in which the keys first appear."""
    found: dict[object, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return list(found.values())


def is_peer(record: Record) -> bool:
    """Whether a record is from another library."""
    return record.provider.partition(",")[0] != OURS


def _conditions(records: Sequence[Record], out: Path) -> str:
    """Hardware, versions and times."""
    lines = ["| hardware | driver | versions | commits | from | to | records |", "|---|---|---|---|---|---|--:|"]
    for group in groups(records, lambda r: (r.hardware, r.driver, tuple(sorted(r.versions.items())))):
        first = group[0]
        versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        commits = ", ".join(dict.fromkeys(record.commit or "–" for record in group))
        times = sorted(record.time for record in group)
        lines.append(
            f"| {first.hardware} | {first.driver or '–'} | {versions} | {commits} | {times[0]} | {times[-1]} |"
            f" {len(group)} |"
        )
    return "\n".join(lines) + "\n"


def _measurements(records: Sequence[Record], out: Path) -> str:
    """One table for each measurement: one row per shape, one column per provider."""
    titles = groups(records, lambda r: (r.what, r.dtype, r.hardware, r.method, r.unit))
    return "\n".join(table(group) for group in titles)


def table(records: Sequence[Record]) -> str:
    """Return one measurement as Markdown: medians, the best of a row in bold, why figures are missing below."""
    first = records[0]
    providers = list(dict.fromkeys(record.provider for record in records))
    keys = list(dict.fromkeys(key for record in records for key in record.shape))
    has_floor = any(record.floor for record in records)
    compared = OURS in providers and any(map(is_peer, records))
    extra = (["best, share of floor"] if has_floor else []) + ([f"{OURS} over best peer"] if compared else [])
    scale, unit = plots.readable([r.p50 for r in records if r.p50 is not None], first.unit)
    method = f", {first.method}" if first.method else ""
    reasons: list[str] = []
    lines = [
        f"## {first.what}",
        "",
        f"{unit}, {first.dtype}, {first.hardware}{method}. {_spread(records)}",
        "",
        f"| {' | '.join([*keys, *providers, *extra])} |",
        "|" + "--:|" * (len(keys) + len(providers) + len(extra)),
    ]
    for row in groups(records, lambda r: tuple(r.shape.items())):
        cells = [str(row[0].shape.get(key, "–")) for key in keys] + _row_cells(row, providers, scale, reasons)
        if has_floor:
            shares = [record.share_of_floor for record in row if record.share_of_floor]
            cells.append(f"{max(shares):.0%}" if shares else "–")
        if compared:
            advantage = win(row)
            cells.append(f"{advantage:.2f}×" if advantage else "–")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""] + [f"[{number}] {' '.join(text.split())}  " for number, text in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def _row_cells(row: Sequence[Record], providers: Sequence[str], scale: float, reasons: list[str]) -> list[str]:
    """One cell for each provider; new reasons for missing figures are appended to `reasons`."""
    of = {record.provider: record for record in row}
    values = {name: record.p50 for name, record in of.items() if record.p50 is not None}
    best = (max if row[0].higher_is_better else min)(values.values(), default=None)
    cells = []
    for name in providers:
        if name not in of:
            cells.append("–")
        elif name not in values:
            reason = of[name].refusal or ""
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"missing [{reasons.index(reason) + 1}]")
        else:
            text = plots.number(values[name] * scale)
            cells.append(f"**{text}**" if len(values) > 1 and values[name] == best else text)
    return cells


def rivals(records: Iterable[Record]) -> tuple[Record, Record] | None:
    """Return gluprune's record of one shape and the best peer's; None where either is missing."""
    records = [record for record in records if record.p50]
    ours = next((record for record in records if record.provider == OURS), None)
    peers = [record for record in records if is_peer(record)]
    if ours is None or not peers:
        return None
    return ours, (max if ours.higher_is_better else min)(peers, key=lambda record: record.p50)


def win(records: Iterable[Record]) -> float | None:
    """Return how many times better gluprune is than the best peer on one shape; None where one is missing."""
    pair = rivals(records)
    if pair is None:
        return None
    ours, peer = pair
    return ours.p50 / peer.p50 if ours.higher_is_better else peer.p50 / ours.p50


def _spread(records: Iterable[Record]) -> str:
    repeated = [record for record in records if record.p50 and record.repeats > 1]
    if not repeated:
        return "Measured once each."
    widths = [(record.p80 - record.p20) / 2 / record.p50 for record in repeated]
    counts = sorted({record.repeats for record in repeated})
    times = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"Medians of {times} repeats; half the p20–p80 range is {statistics.median(widths):.1%} of the median in the"
        f" typical cell, {max(widths):.1%} at most."
    )


def _rooflines(records: Sequence[Record], out: Path) -> str:
    """FLOP/s against FLOPs per byte, below the ceilings measured in the same run."""
    pictures = []
    for group in groups(records, lambda r: (r.hardware, r.dtype)):
        path = out / f"roofline{_suffix(len(pictures))}.png"
        if plots.roofline(group, path):
            pictures.append(f"![roofline, {group[0].dtype}]({path.name})\n")
    return "\n".join(["## Roofline\n", *pictures]) if pictures else ""


def _widths(records: Sequence[Record], out: Path) -> str:
    """Latency, energy and their improvement over the dense model, against the width."""
    pictures = []
    measured = [record for record in records if record.p50 and "I" in record.shape]
    for group in groups(measured, lambda r: (r.what, r.unit, r.dtype, r.hardware, r.method, _model(r))):
        path = out / f"width{_suffix(len(pictures))}.png"
        if len({record.shape["I"] for record in group}) > 1:
            plots.against_width(group, path)
            pictures.append(f"![{group[0].what} against width, {_model(group[0])}]({path.name})\n")
    return "\n".join(["## Against the width\n", *pictures]) if pictures else ""


def _wins(records: Sequence[Record], out: Path) -> str:
    """A heat map of how many times better than the best peer each cell is."""
    pictures, lines = [], []
    cells = [record for record in records if {"I", "M"} <= record.shape.keys()]
    for group in groups(cells, lambda r: (r.what, r.unit, r.dtype, r.hardware, r.method)):
        wins, lost = {}, 0
        for row in groups(group, lambda r: tuple(r.shape.items())):
            if pair := rivals(row):
                wins[(_model(row[0]), row[0].shape["I"]), row[0].shape["M"]] = win(row)
                lost += Change(pair[1], pair[0]).verdict == "worse"
        if not wins:
            continue
        path = out / f"wins{_suffix(len(pictures))}.png"
        title = f"{group[0].what}: times better than the best peer\n{group[0].dtype}, {group[0].hardware}"
        plots.heat_map(wins, title, path)
        mean = statistics.geometric_mean(wins.values())
        lines.append(
            f"- {group[0].what}: worse than the best peer by more than the spread in {lost} of {len(wins)} cells;"
            f" geometric mean {mean:.2f}×."
        )
        pictures.append(f"![{group[0].what}: wins and losses]({path.name})\n")
    return "\n".join(["## Wins and losses\n", *lines, "", *pictures]) if pictures else ""


def _model(record: Record) -> str:
    return str(record.shape.get("model", f"H {record.shape['H']}" if "H" in record.shape else ""))


def _suffix(count: int) -> str:
    return f"-{count + 1}" if count else ""


SECTIONS: tuple[Callable[[Sequence[Record], Path], str], ...] = (
    _conditions,
    _wins,
    breakdown.section,
    _widths,
    _rooflines,
    _measurements,
)
