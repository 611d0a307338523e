"""The demonstration's record as text."""

from __future__ import annotations

import shlex
from pathlib import Path

from gluprune.demo.rows import QUESTION, RECIPES


def markdown(record: dict) -> str:
    """Return the record as a page with a table."""
    lines = [
        f"# {record['model']}, pruned",
        "",
        f"Measured on {record['hardware']}, weights in {record['dtype']} computed in {record['computed_in']}:"
        f" {record['prompt_tokens']} prompt tokens,"
        f" {record['new_tokens']} forced new tokens, batch 1. Each width is timed {record['rounds']} times, in turns"
        " with the others; the fastest run counts. Speed depends on the width only, not on the recipe. Perplexity is on"
        " a short text that comes with gluprune: only its ratios mean anything.",
        "",
        *(f"- `{name}`: {label}" for name, label in RECIPES.items()),
        f"- Text: {record['calibration_windows']} windows of {record['window']} tokens of Python's documentation,"
        f" {record['reconstruction_windows']} of them for `reconstruct`.",
        "",
        "| recipe | neurons | expansion ratio | parameters (M) | MB | perplexity | prefill tok/s | decode tok/s | "
        f"answer to “{QUESTION}” |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in record["rows"]:
        sample = " ".join(row["sample"].split()).replace("|", "\\|")
        lines.append(
            f"| {row['recipe']} | {row['intermediate_size']} | {row['expansion_ratio']:.2f} |"
            f" {row['parameters'] / 1e6:.1f} | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.1f} |"
            f" {row['prefill_tokens_per_second']:.0f} | {row['decode_tokens_per_second']:.1f} | {sample} |"
        )
    return "\n".join([*lines, "", "Next:", "", *(f"    {command}" for command in next_steps(record))]) + "\n"


def summary(record: dict) -> str:
    """Return the record for a terminal, with suggested next steps."""
    width = max(len(row["recipe"]) for row in record["rows"]) + 2
    head = (
        f"{'recipe':<{width}}{'neurons':>8}{'MB':>6}{'perplexity':>12}{'vs dense':>10}{'prefill/s':>11}{'decode/s':>10}"
    )
    lines, dense = [head], record["rows"][0]
    for row in record["rows"]:
        times = f"{row['perplexity'] / dense['perplexity']:.2f}×"
        lines.append(
            f"{row['recipe']:<{width}}{row['intermediate_size']:>8}{row['bytes'] / 1e6:>6.0f}{row['perplexity']:>12.1f}"
            f"{times:>10}{row['prefill_tokens_per_second']:>11.0f}{row['decode_tokens_per_second']:>10.1f}"
        )
    output = Path(record["checkpoint"]).parent
    lines += [
        "",
        f"{record['checkpoint']}: loaded with stock transformers, logits equal bit for bit",
        f"{output / 'demo.md'}: the table, with an answer of each model",
        f"{output / 'demo.png'}: the picture",
        "",
        "The same with the score surgeon, the best recipe that loads everywhere (use your own model and text):",
        *(f"  {command}" for command in next_steps(record)),
    ]
    return "\n".join(lines)


def next_steps(record: dict) -> list[str]:
    """Return the three commands of the recommended recipe; they work as printed."""
    output, model = Path(record["checkpoint"]).parent, shlex.quote(record["path"])
    text, statistics, pruned, best = (
        shlex.quote(str(output / name)) for name in ("calibration.txt", "model.stats", "pruned", "best")
    )
    recipe = f"--score surgeon --compensate --statistics {statistics}"
    return [
        f"gluprune calibrate {model} --text {text} --sensitivity --out {statistics}",
        f"gluprune prune {model} --pruning-ratio 0.2 {recipe} --out {pruned}",
        f"gluprune reconstruct {pruned} --dense {model} --text {text} --out {best}",
    ]
