"""Quality with fp8 weights: perplexity of models whose MLPs `patch(weights="fp8")` has rounded.

    python -m gluprune_evals.fp8 --model FOLDER --model PRUNED --text wikitext2=FILE --text lambada=FILE

measures in float32 with the weights of each checkpoint and with the rounded ones, and writes records (`fp8.jsonl`) and
a table (`fp8.md`). Figures already recorded are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.checkpoints.load_save import load
from gluprune.demo.smollm2 import smollm2_checkpoint
from gluprune.io.atomic import write_file
from gluprune.measure.records import Record
from gluprune.models.widths import layer_widths
from gluprune.runtime.patching import patch
from gluprune_evals import quality
from gluprune_evals.digests import digest
from gluprune_evals.folder import StudyModel


def measure(source: StudyModel, texts: dict[str, str], windows: int, out: Path) -> list[Record]:
    """Measure every figure of one model that is not in `out / "fp8.jsonl"` yet; return all of them."""
    model, tokenizer = load(source.path).eval(), AutoTokenizer.from_pretrained(source.path)
    measurements = quality.Measurements(out / "fp8.jsonl", model.dtype)
    for weights in ("checkpoint", "fp8"):
        if weights == "fp8":
            patch(model, weights="fp8")
        for name, content in texts.items():
            held = batches_from_text(tokenizer, content, windows, quality.WINDOW + 1, batch_size=1)
            shape = {"model": source.name, "neurons": sum(layer_widths(model.config)), "window": quality.WINDOW}
            shape |= {"text": name, "windows": len(held), "text_digest": digest(held)}
            if not measurements.take("perplexity", weights, shape):
                value = quality.windows_perplexity(copy.deepcopy(model).float(), held)
                measurements.add("perplexity", weights, shape, "perplexity", value)
    return measurements.records


def table(records: Sequence[Record]) -> str:
    """Return Markdown: perplexity with the weights of the checkpoint and with fp8 weights, and the change."""
    found = {(r.provider, r.shape["model"], r.shape["text"]): r.p50 for r in records}
    first = records[0]
    lines = [
        "# Perplexity with fp8 weights",
        "",
        f'Gate, up and down rounded by `patch(weights="fp8")`; {first.shape["windows"]} windows of'
        f" {quality.WINDOW} tokens of each text, float32, {first.hardware}.",
        "",
        f"| model | text | {first.dtype} | fp8 | change |",
        "|---|---|--:|--:|--:|",
    ]
    for provider, model, text in found:
        if provider == "fp8":
            before, after = found["checkpoint", model, text], found["fp8", model, text]
            assert before is not None and after is not None
            lines.append(f"| {model} | {text} | {before:.3f} | {after:.3f} | {after / before - 1:+.2%} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gluprune_evals.fp8", description="Perplexity with fp8 weights.")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="to measure on; repeatable")
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="model folder or Hub id; repeatable (default: SmolLM2-135M-Instruct from its PyPI wheel)",
    )
    parser.add_argument("--windows", type=int, default=24, help="of each text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="evals/results", metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        texts = quality.named_texts(given.text)
        sources = [StudyModel.find(model) for model in given.model or [smollm2_checkpoint()]]
        records = [measure(source, texts, given.windows, given.out) for source in sources]
        result = table([record for found in records for record in found])
        write_file(given.out / "fp8.md", [result.encode()])
    except (ValueError, OSError) as error:
        print(f"gluprune_evals.fp8: error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
