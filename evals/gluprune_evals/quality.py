"""Loss of quality by pruning: perplexity relative to dense, for each method and ratio, on several texts.

    python -m gluprune_evals.quality --text wikitext2=FILE --text lambada=FILE

samples text from the model, calibrates, prunes by every method to every ratio, and writes records (`quality.jsonl`), a
table (`quality.md`) and a plot (`quality.png`). Figures already recorded on the same text are not measured
again, so an interrupted run can be continued. No gradient step is taken anywhere.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate
from gluprune.calibration.sample import sample_text
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints.load_save import load
from gluprune.demo.smollm2 import cache_folder, smollm2_checkpoint
from gluprune.io.atomic import write_file
from gluprune.io.progress import progress
from gluprune.io.text import WIKIPEDIA, read_text
from gluprune.measure.perplexity import perplexity
from gluprune.measure.records import Record, append, read
from gluprune.pruning.prune import prune
from gluprune.pruning.reconstruct import reconstruct
from gluprune_evals.digests import digest
from gluprune_evals.folder import StudyModel
from gluprune_evals.methods import METHODS, Method
from gluprune_evals.study import statistics_file

RATIOS = (0.1, 0.2, 0.4, 0.6)
# Fields that hold the text in JSON Lines: of plain text, of WikiText's pages, of questions with answers.
FIELDS = ("text", "page", "question", "answer")
WINDOW = 512  # tokens, of calibration and of evaluation
OWN_WINDOWS = 64  # of the model's own text


def windows_perplexity(model: PreTrainedModel, windows: Sequence[torch.Tensor]) -> float:
    """Return exp of the mean negative log-likelihood per token over windows `[1, WINDOW + 1]`."""
    return math.exp(sum(math.log(perplexity(model, window[0], WINDOW)) for window in windows) / len(windows))


class Measurements:
    """A file of records in which every figure is looked up before it is measured."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self._path, self._dtype = path, dtype
        self._known = {self._key(r.what, r.provider, r.shape): r for r in (read(path) if path.is_file() else [])}
        self.records: list[Record] = []

    @staticmethod
    def _key(what: str, provider: str, shape: dict) -> tuple:
        return (what, provider, *sorted(shape.items()))

    def take(self, what: str, provider: str, shape: dict) -> bool:
        """Add a known figure to `records`; return whether it is known."""
        record = self._known.get(self._key(what, provider, shape))
        self.records += [record] if record else []
        return record is not None

    def add(self, what: str, provider: str, shape: dict, unit: str, value: float) -> None:
        """Add a new figure to `records` and to the file."""
        record = Record.of(what, provider, shape, self._dtype, unit=unit, values=[value])
        self._known[self._key(what, provider, shape)] = record
        self.records.append(record)
        append(self._path, record)


def own_text(model: PreTrainedModel, tokenizer, source: StudyModel, windows: int) -> str:
    """Return text that the model writes, kept in the user's cache for later runs."""
    count = "" if windows == OWN_WINDOWS else f"-{windows}"
    path = cache_folder() / f"quality-{source.name}-{source.revision}-own{count}.txt"
    if not path.is_file():
        text = sample_text(copy.deepcopy(model).float(), tokenizer, windows, WINDOW)
        write_file(path, [text.encode()])
    return path.read_text(encoding="utf-8")


class Calibrations:
    """Batches, statistics and their descriptions in records, for every choice of windows; each computed once.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        name: Name of the model.
        texts: The text to calibrate on, and the model's own.
        measurements: Where the seconds of calibrations are recorded.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer, name: str, texts: tuple[str, str], measurements: Measurements
    ):
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._texts, self._measurements = texts, measurements
        self._shape = {"model": name, "window": WINDOW}
        self._batches: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._latest: tuple[tuple, Statistics] | None = None

    def batches(self, windows: int, text: str) -> list[torch.Tensor]:
        """Return a number of windows, at most, of each text that a method uses; see `Method.text`."""
        key = windows, text
        if key not in self._batches:
            texts = {"given": self._texts[:1], "own": self._texts[1:], "both": self._texts}[text]
            self._batches[key] = batches_from_text(self._tokenizer, list(texts), windows, WINDOW)
        return self._batches[key]

    def shape(self, method: Method) -> dict:
        """Return what the shape of a record says about the calibration: nothing for methods without one."""
        if not method.windows:
            return {}
        batches = self.batches(method.windows, method.text)
        text = {"calibration_windows": sum(map(len, batches)), "calibration_digest": digest(batches)}
        return text | ({"sensitivity": True} if method.recipe.needs.sensitivity else {})

    def reconstruction_shape(self, method: Method) -> dict:
        """Return what the shape of a record says about the reconstruction."""
        if not method.reconstruction:
            return {}
        batches = self.batches(method.reconstruction, method.text)
        return {"reconstruction_windows": sum(map(len, batches)), "reconstruction_digest": digest(batches)}

    def is_on_record(self, method: Method) -> bool:
        """Whether the seconds of a method's calibration are known; they then belong to the records of this run."""
        return self._measurements.take("calibrate", "gluprune", self._shape | self.shape(method))

    def statistics(self, method: Method) -> Statistics:
        """Return the statistics of a method: collected, or from the cache of an earlier run on the same text."""
        key = method.windows, method.text, method.recipe.needs.sensitivity
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self._collected(method)
        return self._latest[1]

    def _collected(self, method: Method) -> Statistics:
        batches, sensitivity = self.batches(method.windows, method.text), method.recipe.needs.sensitivity
        path = statistics_file(f"quality-{self._name}", batches, sensitivity)
        if not (self.is_on_record(method) and path.is_file()):
            start = time.perf_counter()
            found = calibrate(self._model, batches, sensitivity=sensitivity)
            seconds = time.perf_counter() - start
            self._measurements.add("calibrate", "gluprune", self._shape | self.shape(method), "s", seconds)
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
        return Statistics.load(path)


def measure(
    source: StudyModel,
    calibration: str,
    texts: dict[str, str],
    windows: int,
    out: Path,
    *,
    methods: Sequence[str],
    ratios: Sequence[float],
) -> list[Record]:
    """Measure every figure that is not in `out / "quality.jsonl"` yet.

    Args:
        source: The model.
        calibration: Text to calibrate on.
        texts: Name -> text to measure perplexity on.
        windows: How many windows of `WINDOW` tokens to measure on, spread evenly over each text.
        out: Folder of the records.
        methods: Which of `METHODS`.
        ratios: Pruning ratios.

    Returns:
        The records of these settings, those of earlier runs included.
    """
    model, tokenizer = load(source.path).eval(), AutoTokenizer.from_pretrained(source.path)
    measurements = Measurements(out / "quality.jsonl", model.dtype)
    held_out = {
        text: batches_from_text(tokenizer, content, windows, WINDOW + 1, batch_size=1)
        for text, content in texts.items()
    }
    both = calibration, ""
    if any(METHODS[label].windows for label in methods):
        batches_from_text(tokenizer, calibration, 1, WINDOW)  # raises for a short text before minutes of sampling
        both = calibration, own_text(model, tokenizer, source, OWN_WINDOWS)
    calibrations = Calibrations(model, tokenizer, source.name, both, measurements)
    rows = [("dense", None, 0.0), *((label, METHODS[label], ratio) for label in methods for ratio in ratios)]
    for label, method, ratio in progress(rows, desc="quality", unit="row"):
        shape = {"model": source.name, "window": WINDOW, "ratio": ratio}
        if method:
            shape |= calibrations.shape(method) | calibrations.reconstruction_shape(method)
        shapes = {
            text: shape | {"text": text, "windows": len(held), "text_digest": digest(held)}
            for text, held in held_out.items()
        }
        missing = [text for text in shapes if not measurements.take("perplexity", label, shapes[text])]
        if method and method.windows:
            calibrations.is_on_record(method)
        if not missing:
            measurements.take("prune", label, shape)
            continue
        pruned = copy.deepcopy(model)
        if method:
            seconds = _prune(pruned, model, method, ratio, calibrations)
            measurements.add("prune", label, shape, "s", seconds)
        pruned.float()  # the weights keep the values of the checkpoint; products in bf16 are slow on most CPUs
        for text in missing:
            value = windows_perplexity(pruned, held_out[text])
            measurements.add("perplexity", label, shapes[text], "perplexity", value)
    return measurements.records


def _prune(
    model: PreTrainedModel, dense: PreTrainedModel, method: Method, ratio: float, calibrations: Calibrations
) -> float:
    """Prune a model by a method; return the time in seconds, without calibration."""
    statistics = calibrations.statistics(method) if method.windows else None
    batches = calibrations.batches(method.reconstruction, method.text) if method.reconstruction else []
    start = time.perf_counter()
    prune(model, pruning_ratio=ratio, **method.recipe.options(), calibration=statistics)
    if batches:
        reconstruct(model, dense, batches)
    return time.perf_counter() - start


def table(records: list[Record]) -> str:
    """Return Markdown: one table for each text with perplexity, its ratio to dense, and the seconds of pruning."""
    settings = records[-1].shape
    found = {(r.provider, r.shape["text"], r.shape["ratio"]): r for r in records if r.what == "perplexity"}
    seconds = {(r.provider, r.shape["ratio"]): r.p50 for r in records if r.what == "prune"}
    texts = list(dict.fromkeys(text for _, text, _ in found))
    ratios = sorted({ratio for _, _, ratio in found} - {0.0})
    hardware = " and ".join(dict.fromkeys(r.hardware for r in records))
    lines = [
        f"# {settings['model']}: perplexity after pruning, without a gradient step",
        "",
        (
            f"Weights in {records[-1].dtype}, computed in float32, exact widths, windows of {WINDOW} tokens,"
            f" {hardware}. Each cell: perplexity, and how many times that of the dense model it is."
            ' Re-solved: `compensate=True`. By layer: `allocation="sensitivity"`. Reconstructed: re-solved, then'
            " `reconstruct`; on more: on more text. + own text: also calibrated on text of the model"
            " (`gluprune sample`); own text only: on no other. Windows: of calibration + of reconstruction."
            " –: not measured."
        ),
    ]
    for text in texts:
        dense = found["dense", text, 0.0]
        lines += [
            "",
            f"## {text}: {dense.shape['windows']} windows, dense {dense.p50:.2f}",
            "",
            "| method | windows | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " | seconds |",
            "|---|--:|" + "--:|" * (len(ratios) + 1),
        ]
        for name in METHODS:
            row = {ratio: found[name, text, ratio] for ratio in ratios if (name, text, ratio) in found}
            if not row:
                continue
            cells = [f"{row[r].p50:.1f} ({row[r].p50 / dense.p50:.2f}×)" if r in row else "–" for r in ratios]
            total = sum(seconds.get((name, ratio), 0) for ratio in ratios)
            shape = next(iter(row.values())).shape
            counts = [str(shape[name]) for name in ("calibration_windows", "reconstruction_windows") if name in shape]
            windows = " + ".join(counts) or "none"
            lines.append(f"| {name} | {windows} | {' | '.join(cells)} | {total:.0f} |")
    times = {str(r.shape): r for r in records if r.what == "calibrate"}.values()
    seconds_of_calibrations = ", ".join(
        f"{r.p50:.0f} s for {r.shape['calibration_windows']} windows"
        + (", sensitivities included" if r.shape.get("sensitivity") else "")
        for r in times
    )
    lines += [
        "",
        f"Seconds: scoring, selecting, re-solving, narrowing and reconstructing at all {len(ratios)} ratios together."
        + (f" Calibration, once for all ratios: {seconds_of_calibrations}." if times else ""),
    ]
    return "\n".join(lines) + "\n"


# The methods of the picture; the table has all.
DRAWN = (
    "MAW",
    "MAW gate+up+down",
    "hybrid",
    "hybrid, re-solved, + own text",
    "surgeon, reconstructed, + own text",
    "surgeon, reconstructed on more, + own text",
)


def plot(records: list[Record], path: Path) -> None:
    """Draw perplexity relative to dense against the pruning ratio, one panel for each text, for some methods."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    found = {(r.provider, r.shape["text"], r.shape["ratio"]): r.p50 for r in records if r.what == "perplexity"}
    texts = list(dict.fromkeys(text for _, text, _ in found))
    figure = Figure(figsize=(5.5 * len(texts), 5), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(texts), sharey=True, squeeze=False)[0], texts, strict=True):
        for method in DRAWN:
            points = {ratio: found[method, text, ratio] for ratio in RATIOS if (method, text, ratio) in found}
            if points:
                values = [value / found["dense", text, 0.0] for value in points.values()]
                axes.plot([0, *points], [1, *values], marker="o", label=method)
        axes.set(yscale="log", title=text, xlabel="MLP neurons removed", ylim=(0.95, 20))
        axes.set_yticks([1, 1.5, 2, 3, 5, 10, 20], ["1×", "1.5×", "2×", "3×", "5×", "10×", "20×"])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.axes[0].set_ylabel("perplexity over dense (lower is better)")
    figure.suptitle(f"{records[-1].shape['model']}, no gradient step")
    figure.savefig(path, dpi=120)


def named_texts(given: Sequence[str]) -> dict[str, str]:
    """Read the texts of `--text NAME=FILE`: name -> content."""
    return {name: read_text(path, FIELDS) for name, _, path in (text.partition("=") for text in given)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write table and picture; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gluprune_evals.quality", description="Perplexity after pruning, for each method and ratio."
    )
    parser.add_argument("--calibration", metavar="FILE", default=WIKIPEDIA, help="as for `calibrate --text`")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="to measure on; repeatable")
    parser.add_argument("--model", help="model folder or Hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    parser.add_argument(
        "--windows", type=int, default=24, help="evaluation windows of each text (default: %(default)s)"
    )
    names = f"one of: {'; '.join(METHODS)}. Repeatable; default: all"
    parser.add_argument("--method", action="append", choices=METHODS, metavar="NAME", help=names)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default="evals/results", metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        texts = named_texts(given.text)
        calibration = read_text(given.calibration, FIELDS)
        source = StudyModel.find(given.model or smollm2_checkpoint())
        methods = list(given.method or METHODS)
        records = measure(source, calibration, texts, given.windows, given.out, methods=methods, ratios=given.ratios)
        result = table(records)
        (given.out / "quality.md").write_text(result, encoding="utf-8")
        plot(records, given.out / "quality.png")
    except (ValueError, OSError) as error:
        print(f"gluprune_evals.quality: error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
