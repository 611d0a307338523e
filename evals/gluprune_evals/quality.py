"""What pruning costs in quality: perplexity over dense, method by ratio, on two kinds of text.

    python -m gluprune_evals.quality --calibration FILE [FILE ...] --text wikitext2=FILE --text lambada=FILE

lets the model write text of its own, calibrates, prunes by every method to every ratio, and writes records
(`quality.jsonl`), a table (`quality.md`) and a picture (`quality.png`). What is in the records already, on the very same
text, is not measured again, so an interrupted run goes on where it stopped. No gradient step is taken anywhere.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate
from gluprune.calibration.sample import sample_text
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints.load_save import load
from gluprune.demo.smollm2 import cache_folder, smollm2_checkpoint
from gluprune.io.atomic import write_file
from gluprune.measure.perplexity import perplexity
from gluprune.measure.records import Record, append, read
from gluprune.pruning.prune import prune
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.reconstruct import reconstruct
from gluprune_evals.study import Source, statistics_file
from gluprune_evals.text import digest, read_text


@dataclass(frozen=True)
class Method:
    """Arguments of `prune`, windows of text to calibrate on (0: none), and whether the model's own text joins them.

    reconstruction: windows of each text that `reconstruct` is given afterwards (0: it does not follow).
    """

    score: str
    compensate: bool = False
    allocation: str = "uniform"
    windows: int = 0
    own_text: bool = False
    reconstruction: int = 0

    @property
    def calibrated(self) -> tuple[int, bool, bool]:
        """Windows, own text, and whether sensitivities are needed."""
        return self.windows, self.own_text, Recipe(self.score, allocation=self.allocation).needs.sensitivity


RATIOS = (0.1, 0.2, 0.4, 0.6)
METHODS = {
    "surgeon by layer, reconstructed, + own text": Method(
        "surgeon", compensate=True, allocation="sensitivity", windows=128, own_text=True, reconstruction=16
    ),
    "surgeon, reconstructed, + own text": Method(
        "surgeon", compensate=True, windows=128, own_text=True, reconstruction=16
    ),
    "surgeon by layer, reconstructed": Method(
        "surgeon", compensate=True, allocation="sensitivity", windows=128, reconstruction=10
    ),
    "surgeon by layer, re-solved, + own text": Method(
        "surgeon", compensate=True, allocation="sensitivity", windows=128, own_text=True
    ),
    "surgeon, re-solved, + own text": Method("surgeon", compensate=True, windows=128, own_text=True),
    "surgeon, re-solved": Method("surgeon", compensate=True, windows=128),
    "hybrid, re-solved, + own text": Method("hybrid", compensate=True, windows=128, own_text=True),
    "hybrid, re-solved": Method("hybrid", compensate=True, windows=128),
    "MAW": Method("maw"),
    "hybrid": Method("hybrid", windows=128),
    "MAW gate+up+down": Method("maw_gud"),
    "activation, re-solved": Method("activation", compensate=True, windows=128),
    "MAW, re-solved": Method("maw", compensate=True, windows=128),
}
WINDOW = 512  # tokens, of calibration and of evaluation
OWN_WINDOWS = 64  # that the model writes


def windows_perplexity(model: nn.Module, windows: Sequence[torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood a token over windows `[1, WINDOW + 1]`; the first token is given."""
    return math.exp(sum(math.log(perplexity(model, window[0], WINDOW)) for window in windows) / len(windows))


class Measurements:
    """A file of records that every figure is looked up in before it is measured."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self._path, self._dtype = path, dtype
        self._known = {self._key(r.what, r.provider, r.shape): r for r in (read(path) if path.is_file() else [])}
        self.records: list[Record] = []

    @staticmethod
    def _key(what: str, provider: str, shape: dict) -> tuple:
        return (what, provider, *sorted(shape.items()))

    def has(self, what: str, provider: str, shape: dict) -> bool:
        """Whether a figure is known; it then counts as one of `records`."""
        record = self._known.get(self._key(what, provider, shape))
        self.records += [record] if record else []
        return record is not None

    def add(self, what: str, provider: str, shape: dict, unit: str, value: float) -> None:
        record = Record.of(what, provider, shape, self._dtype, unit, [value])
        self._known[self._key(what, provider, shape)] = record
        self.records.append(record)
        append(self._path, record)


def own_text(model: nn.Module, tokenizer, source: Source) -> str:
    """What the model writes, kept in the user's cache for later runs."""
    path = cache_folder() / f"quality-{source.name}-{source.revision}-own.txt"
    if not path.is_file():
        text = sample_text(copy.deepcopy(model).float(), tokenizer, OWN_WINDOWS, WINDOW)
        write_file(path, [text.encode()])
    return path.read_text(encoding="utf-8")


def measure(source: Source, calibration: str, texts: dict[str, str], windows: int, out: Path) -> list[Record]:
    """Measure every figure that is not in `out / "quality.jsonl"` yet.

    Args:
        source: the model.
        calibration: text to calibrate on.
        texts: name -> text to measure perplexity on.
        windows: how many windows of `WINDOW` tokens to measure on, spread evenly over each text.

    Returns:
        The records of these settings, those of earlier runs included.
    """
    model, tokenizer = load(source.path).eval(), AutoTokenizer.from_pretrained(source.path)
    measurements = Measurements(out / "quality.jsonl", model.dtype)
    settings = {"model": source.name, "window": WINDOW}
    held_out = {
        text: batches_from_text(tokenizer, content, windows, WINDOW + 1, batch_size=1)
        for text, content in texts.items()
    }
    batches_from_text(tokenizer, calibration, 1, WINDOW)  # too short a text is told before the model writes for minutes
    own = own_text(model, tokenizer, source)

    @lru_cache
    def calibrated_on(windows: int, with_own: bool, sensitivity: bool) -> dict:
        """What the shape of a record says of the calibration."""
        if not windows:
            return {}
        batches = calibration_batches(windows, with_own)
        text = {"calibration_windows": sum(map(len, batches)), "calibration_digest": digest(batches)}
        return text | ({"sensitivity": True} if sensitivity else {})

    def calibration_batches(windows: int, with_own: bool) -> list[torch.Tensor]:
        return batches_from_text(tokenizer, [calibration, own] if with_own else calibration, windows, WINDOW)

    @lru_cache
    def reconstructed_on(windows: int, with_own: bool) -> dict:
        """What the shape of a record says of the reconstruction."""
        if not windows:
            return {}
        batches = calibration_batches(windows, with_own)
        return {"reconstruction_windows": sum(map(len, batches)), "reconstruction_digest": digest(batches)}

    @lru_cache(maxsize=1)
    def statistics(windows: int, with_own: bool, sensitivity: bool) -> Statistics:
        """Collected, or read from the cache of an earlier run on the same text."""
        shape = settings | calibrated_on(windows, with_own, sensitivity)
        batches = calibration_batches(windows, with_own)
        path = statistics_file(f"quality-{source.name}", batches, sensitivity)
        if not (measurements.has("calibrate", "gluprune", shape) and path.is_file()):
            start = time.perf_counter()
            found = calibrate(model, batches, sensitivity=sensitivity)
            measurements.add("calibrate", "gluprune", shape, "s", time.perf_counter() - start)
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
        return Statistics.load(path)

    rows = [(label, method, ratio) for label, method in METHODS.items() for ratio in RATIOS]
    rows.insert(0, ("dense", Method(""), 0.0))
    for label, method, ratio in tqdm(rows, unit="row"):
        shape = settings | {"ratio": ratio} | calibrated_on(*method.calibrated)
        shape |= reconstructed_on(method.reconstruction, method.own_text)
        shapes = {
            text: shape | {"text": text, "windows": len(held), "text_digest": digest(held)}
            for text, held in held_out.items()
        }
        missing = [text for text in shapes if not measurements.has("perplexity", label, shapes[text])]
        if method.windows:
            measurements.has("calibrate", "gluprune", settings | calibrated_on(*method.calibrated))
        if not missing:
            measurements.has("prune", label, shape)
            continue
        pruned = copy.deepcopy(model)
        if ratio:
            found = statistics(*method.calibrated) if method.windows else None
            some = calibration_batches(method.reconstruction, method.own_text) if method.reconstruction else []
            start = time.perf_counter()
            prune(
                pruned,
                pruning_ratio=ratio,
                multiple_of=1,
                score=method.score,
                calibration=found,
                compensate=method.compensate,
                allocation=method.allocation,
            )
            if some:
                reconstruct(pruned, model, some)
            measurements.add("prune", label, shape, "s", time.perf_counter() - start)
        pruned.float()  # the weights stay those of the checkpoint; products in bf16 are slow on most CPUs
        for text in missing:
            value = windows_perplexity(pruned, held_out[text])
            measurements.add("perplexity", label, shapes[text], "perplexity", value)
    return measurements.records


def table(records: list[Record]) -> str:
    """Markdown: a table a text, perplexity and its ratio to dense, and the seconds that pruning took."""
    settings = records[-1].shape
    found = {(r.provider, r.shape["text"], r.shape["ratio"]): r for r in records if r.what == "perplexity"}
    seconds = {(r.provider, r.shape["ratio"]): r.p50 for r in records if r.what == "prune"}
    texts = list(dict.fromkeys(text for _, text, _ in found))
    lines = [
        f"# {settings['model']}: perplexity after pruning, without a gradient step",
        "",
        (
            f"Weights in {records[-1].dtype}, computed in float32, exact widths, windows of {WINDOW} tokens,"
            f" {records[-1].hardware}. Each cell: perplexity, and how many times that of the dense model it is."
            ' Re-solved: `compensate=True`. By layer: `allocation="sensitivity"`. Reconstructed: re-solved, then'
            " `reconstruct`. + own text: calibrated on what the model wrote itself (`gluprune sample`), too. Windows: of"
            " calibration + of reconstruction. –: not measured."
        ),
    ]
    for text in texts:
        dense = found["dense", text, 0.0]
        lines += [
            "",
            f"## {text}: {dense.shape['windows']} windows, dense {dense.p50:.2f}",
            "",
            "| method | windows | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " | seconds |",
            "|---|--:|" + "--:|" * (len(RATIOS) + 1),
        ]
        for name in METHODS:
            row = {ratio: found[name, text, ratio] for ratio in RATIOS if (name, text, ratio) in found}
            if not row:
                continue
            cells = [f"{row[r].p50:.1f} ({row[r].p50 / dense.p50:.2f}×)" if r in row else "–" for r in RATIOS]
            total = sum(seconds.get((name, ratio), 0) for ratio in RATIOS)
            shape = next(iter(row.values())).shape
            counts = [str(shape[name]) for name in ("calibration_windows", "reconstruction_windows") if name in shape]
            windows = " + ".join(counts) or "none"
            lines.append(f"| {name} | {windows} | {' | '.join(cells)} | {total:.0f} |")
    times = {str(r.shape): r for r in records if r.what == "calibrate"}.values()
    lines += [
        "",
        f"Seconds: scoring, selecting, re-solving, narrowing and reconstructing at all {len(RATIOS)} ratios together."
        " Calibration, once for all ratios: "
        + ", ".join(
            f"{r.p50:.0f} s for {r.shape['calibration_windows']} windows"
            + ", sensitivities included" * r.shape.get("sensitivity", False)
            for r in times
        )
        + ".",
    ]
    return "\n".join(lines) + "\n"


def plot(records: list[Record], path: Path) -> None:
    """Perplexity over dense against the pruning ratio, a panel a text."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = {(r.provider, r.shape["text"], r.shape["ratio"]): r.p50 for r in records if r.what == "perplexity"}
    texts = list(dict.fromkeys(text for _, text, _ in found))
    figure = Figure(figsize=(5.5 * len(texts), 5), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(texts), sharey=True, squeeze=False)[0], texts):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for method in METHODS:
            points = {ratio: found[method, text, ratio] for ratio in RATIOS if (method, text, ratio) in found}
            if points:
                values = [value / found["dense", text, 0.0] for value in points.values()]
                axes.plot([0, *points], [1, *values], marker="o", label=method)
        axes.set(yscale="log", title=text, xlabel="share of MLP neurons removed", ylim=(0.95, 20))
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.axes[0].set_ylabel("perplexity over dense (lower is better)")
    figure.suptitle(f"{records[-1].shape['model']}, no gradient step")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gluprune_evals.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", nargs="+", required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="to measure on; repeatable")
    parser.add_argument("--model", help="model folder or Hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows a text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="evals/results", metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        texts = {name: read_text(path) for name, _, path in (text.partition("=") for text in given.text)}
        calibration = "\n\n".join(read_text(path) for path in given.calibration)
        source = Source.find(given.model or smollm2_checkpoint())
        records = measure(source, calibration, texts, given.windows, given.out)
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
