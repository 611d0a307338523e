"""Why one run takes more time or energy than another: output length, prefill, cost per token, or kernel launches.

A generation costs `first + (tokens - 1) * each`. The difference of two generations splits exactly into

- output length: the additional tokens, at the previous cost of a token;
- prefill: the additional cost of the prompt and the first token;
- per token: the additional cost of the work for each later token;
- launches: its additional cost in launches (time or energy of a token beyond that of its CUDA graph).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gluprune.measure.records import Record


@dataclass(frozen=True)
class Cost:
    """Seconds or joules of one generation.

    Attributes:
        tokens: Generated tokens.
        each: Cost of a token after the first; of any token, if `first` is not known.
        first: Cost up to the first token, including the prefill. None: not separated from the other tokens.
        launch: The part of `each` that launches take. None: not separated from the work.
    """

    tokens: float
    each: float
    first: float | None = None
    launch: float | None = None

    @property
    def later_tokens(self) -> float:
        """Tokens that cost `each`."""
        return self.tokens if self.first is None else self.tokens - 1

    @property
    def total(self) -> float:
        """Cost of the whole generation."""
        return (self.first or 0.0) + self.later_tokens * self.each


@dataclass(frozen=True)
class Split:
    """The parts of a difference, in its unit. None: not separated, and contained in `per_token`."""

    output_length: float
    prefill: float | None
    per_token: float
    launches: float | None

    @property
    def total(self) -> float:
        """The difference."""
        return self.output_length + (self.prefill or 0.0) + self.per_token + (self.launches or 0.0)


def split(before: Cost, after: Cost) -> Split:
    """Split `after.total - before.total` into its parts.

    Raises:
        ValueError: The first token is separated in only one of the two.
    """
    prefill = None
    if before.first is not None and after.first is not None:
        prefill = after.first - before.first
    elif before.first is not after.first:
        raise ValueError("the first token is separated in only one of the two costs: they cannot be compared")
    more_each = after.later_tokens * (after.each - before.each)
    launches = None
    if before.launch is not None and after.launch is not None:
        launches = after.later_tokens * (after.launch - before.launch)
    return Split(
        output_length=(after.tokens - before.tokens) * before.each,
        prefill=prefill,
        per_token=more_each - (launches or 0.0),
        launches=launches,
    )


def section(records: Sequence[Record], out: Path) -> str:
    """Explain the records of `gluprune bench` in Markdown: every run against the dense model's plain `generate`."""
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
            head = "run | neurons | provider | decoding | dense, plain generate | this | difference"
            tables += [
                f"### {what}, {unit}",
                "",
                f"| {head} | output length | prefill | work per token | launches |",
                "|---|--:|---|---|" + "--:|" * 7,
                *lines,
                "",
            ]
    if tables:
        note = "A dash under launches: no CUDA graph was measured, so launches are part of the work per token."
        tables = ["## Where the difference comes from", "", note, "", *tables]
    return "\n".join(tables + _against_bytes(records))


def _against_bytes(records: Sequence[Record]) -> list[str]:
    """Markdown lines: how close each width comes to the speed-up that the size of the weights allows."""
    lines = []
    for what in ("TTFT", "TPOT"):
        figures = _figures(records, what)
        for (conditions, width, provider, decoding), record in figures.items():
            widest = max(w for c, w, p, d in figures if (c, p, d) == (conditions, provider, decoding))
            dense = figures[conditions, widest, provider, decoding]
            if dense is record or not (dense.nbytes and record.nbytes):
                continue
            gain, limit = dense.p50 / record.p50, dense.nbytes / record.nbytes
            cells = f"{1e3 * dense.p50:.4g} | {1e3 * record.p50:.4g} | {gain:.3f} | {limit:.3f} | {gain / limit:.1%}"
            lines.append(f"| {_title(conditions)} | {provider} | {decoding} | {what} | {width} | {cells} |")
    if not lines:
        return []
    head = "run | provider | decoding | figure | neurons | dense, ms | this, ms"
    head += " | times as fast | ratio of the bytes | reached"
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
    """Separate launches wherever the same model was measured as a CUDA graph."""
    found = {}
    for key, cost in costs.items():
        conditions, width, provider, _ = key
        graph = costs.get((conditions, width, provider, "graph"))
        launch = None if graph is None else cost.each - graph.each
        found[key] = Cost(cost.tokens, cost.each, cost.first, launch)
    return found


def _seconds(records: Sequence[Record]) -> dict[_Key, Cost]:
    """Milliseconds of each run."""
    first, each = _figures(records, "TTFT"), _figures(records, "TPOT")
    return _with_launches(
        {k: Cost(r.shape["new tokens"], 1e3 * r.p50, 1e3 * first[k].p50) for k, r in each.items() if k in first}
    )


def _joules(records: Sequence[Record]) -> dict[_Key, Cost]:
    """Joules of each run, for all its prompts together."""
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
