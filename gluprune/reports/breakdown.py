"""Why one run takes more time or energy than another: longer output, prefill, what a token costs, or launching its kernels.

A generation costs `first + (tokens - 1) * each`. Between two generations the difference splits, without a rest, into

- output length: the tokens more, at what a token cost before;
- prefill: what the prompt and the first token cost more;
- per token: what each later token costs more in work, and
- launches: what it costs more in launching (the time or energy of a token beyond its CUDA graph's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gluprune.measure.records import Record


@dataclass(frozen=True)
class Cost:
    """Seconds or joules of one generation.

    tokens: generated.
    each: cost of a token after the first; of any token, if `first` is not known.
    first: cost up to the first token, the prefill included; None: not told apart from the other tokens.
    launch: the part of `each` that launching takes; None: not told apart from the work.
    """

    tokens: float
    each: float
    first: float | None = None
    launch: float | None = None

    @property
    def later_tokens(self) -> float:
        return self.tokens if self.first is None else self.tokens - 1

    @property
    def total(self) -> float:
        return (self.first or 0.0) + self.later_tokens * self.each


@dataclass(frozen=True)
class Split:
    """The parts of a difference, in its unit. None: not told apart, and contained in `per_token`."""

    output_length: float
    prefill: float | None
    per_token: float
    launches: float | None

    @property
    def total(self) -> float:
        return self.output_length + (self.prefill or 0.0) + self.per_token + (self.launches or 0.0)


def split(before: Cost, after: Cost) -> Split:
    """Split `after.total - before.total` into its parts.

    Raises:
        ValueError: the first token is told apart in one of the two alone.
    """
    if (before.first is None) != (after.first is None):
        raise ValueError("one cost tells the first token apart and the other does not: they cannot be compared")
    more_each = after.later_tokens * (after.each - before.each)
    launches = None
    if before.launch is not None and after.launch is not None:
        launches = after.later_tokens * (after.launch - before.launch)
    return Split(
        output_length=(after.tokens - before.tokens) * before.each,
        prefill=None if before.first is None else after.first - before.first,
        per_token=more_each - (launches or 0.0),
        launches=launches,
    )


def section(records: Sequence[Record], out: Path) -> str:
    """The records of `gluprune bench` explained as Markdown: every run against the dense model's plain `generate`."""
    tables = []
    for what, unit, costs in (("TTLT", "ms", _seconds(records)), ("Energy of a generation", "J", _joules(records))):
        lines = []
        for key, cost in costs.items():
            conditions, width, provider, decoding = key
            dense = max(w for c, w, p, d in costs if c == conditions)
            before = costs.get((conditions, dense, "transformers", "generate"))
            if before is None or before is cost:
                continue
            parts = split(before, cost)
            cells = (
                before.total,
                cost.total,
                parts.total,
                parts.output_length,
                parts.prefill,
                parts.per_token,
                parts.launches,
            )
            lines.append(
                f"| {_title(conditions)} | {width} | {provider} | {decoding} | {' | '.join(map(_cell, cells))} |"
            )
        if lines:
            head = "run | neurons | provider | decoding | dense, plain generate | this | difference | output length | prefill"
            tables += [
                f"### {what}, {unit}",
                "",
                f"| {head} | work per token | launches |",
                "|---|--:|---|---|" + "--:|" * 7,
                *lines,
                "",
            ]
    if tables:
        note = "A dash under launches: no CUDA graph was measured beside, so that launching is in the work per token."
        tables = ["## Where the difference comes from", "", note, "", *tables]
    return "\n".join(tables + _against_bytes(records))


def _against_bytes(records: Sequence[Record]) -> list[str]:
    """Markdown lines: how much of what the bytes of the weights promise each width reaches."""
    lines = []
    for what in ("TTFT", "TPOT"):
        figures = _figures(records, what)
        for (conditions, width, provider, decoding), record in figures.items():
            widest = max(w for c, w, p, d in figures if (c, p, d) == (conditions, provider, decoding))
            dense = figures[conditions, widest, provider, decoding]
            if dense is record or not (dense.nbytes and record.nbytes):
                continue
            gain, promise = dense.p50 / record.p50, dense.nbytes / record.nbytes
            cells = (
                f"{1e3 * dense.p50:.4g} | {1e3 * record.p50:.4g} | {gain:.3f} | {promise:.3f} | {gain / promise:.1%}"
            )
            lines.append(f"| {_title(conditions)} | {provider} | {decoding} | {what} | {width} | {cells} |")
    if not lines:
        return []
    head = "run | provider | decoding | figure | neurons | dense, ms | this, ms | times as fast | ratio of the bytes | reached"
    return ["## How close to the ratio of the bytes", "", f"| {head} |", "|---|---|---|---|" + "--:|" * 6, *lines, ""]


_Key = tuple[tuple, int, str, str]  # conditions, intermediate size, provider, decoding


def _figures(records: Sequence[Record], what: str) -> dict[_Key, Record]:
    found = {}
    for record in records:
        if record.what == f"generation: {what}" and record.p50 is not None:
            shape = dict(record.shape)
            width, decoding = shape.pop("I"), shape.pop("decoding")
            found[(*shape.items(), record.dtype, record.hardware), width, record.provider, decoding] = record
    return found


def _with_launches(costs: dict[_Key, Cost]) -> dict[_Key, Cost]:
    """Tell launching apart wherever the same model was measured as a CUDA graph."""
    told = {}
    for (*model, decoding), cost in costs.items():
        graph = costs.get((*model, "graph"))
        launch = None if graph is None else cost.each - graph.each
        told[(*model, decoding)] = Cost(cost.tokens, cost.each, cost.first, launch)
    return told


def _seconds(records: Sequence[Record]) -> dict[_Key, Cost]:
    """Milliseconds of each run."""
    first, each = _figures(records, "TTFT"), _figures(records, "TPOT")
    return _with_launches(
        {k: Cost(r.shape["new tokens"], 1e3 * r.p50, 1e3 * first[k].p50) for k, r in each.items() if k in first}
    )


def _joules(records: Sequence[Record]) -> dict[_Key, Cost]:
    """Joules of each run, of all its prompts together."""
    token, prefill = _figures(records, "energy"), _figures(records, "energy of the prefill")
    costs = {}
    for key, record in token.items():
        if key in prefill:
            tokens, first = record.shape["new tokens"], prefill[key].p50
            whole = record.p50 * tokens * record.shape["batch"]
            costs[key] = Cost(tokens, (whole - first) / (tokens - 1), first)
    return _with_launches(costs)


def _title(conditions: tuple) -> str:
    *shape, dtype, _ = conditions
    named = dict(shape)
    model = named.pop("model")
    return f"{model}, {dtype}, " + ", ".join(f"{name} {value}" for name, value in named.items() if name != "H")


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
