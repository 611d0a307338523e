"""Quality of healed models: perplexity relative to dense before and after training, by recipe and ratio.

    python -m gluprune_evals.healing --text wikitext2=FILE --text lambada=FILE

prunes by the recommended recipes as `gluprune_evals.quality` does, trains on the calibration text and the model's own
text, on equal numbers of windows as far as there are, and writes records (`healing.jsonl`) and a table (`healing.md`).
An interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from gluprune.calibration.batches import batches_from_text
from gluprune.checkpoints.load_save import load, round_weights, save
from gluprune.demo.smollm2 import cache_folder, smollm2_checkpoint
from gluprune.healing.student import TRAINED, as_student, with_weights
from gluprune.healing.training import Settings, arguments, last_checkpoint, train
from gluprune.io.atomic import write_file
from gluprune.io.text import WIKIPEDIA, read_text
from gluprune.measure.records import Record, read
from gluprune.pruning.history import loss_ends
from gluprune_evals import quality
from gluprune_evals.digests import digest
from gluprune_evals.folder import StudyModel
from gluprune_evals.methods import Method

# Which of `quality.METHODS`, and the names of their checkpoints.
METHODS = {
    "surgeon, reconstructed, + own text": "uniform-16",
    "surgeon, reconstructed on more, + own text": "uniform",
    "surgeon by layer, reconstructed on more, + own text": "by-layer",
}
_HEALED = ", healed"


class Healing:
    """Figures of one model before and after healing; see `quality.Measurements`.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        name: Name of the model.
        texts: Calibration text, and the model's own.
        held_out: Name -> windows to measure perplexity on.
        measurements: The file of records.
        bf16: Whether student and teacher compute in bfloat16.
        checkpoints: Where the models that are built are saved, and found by later runs; None: nowhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        texts: tuple[str, str],
        held_out: dict[str, list[torch.Tensor]],
        *,
        measurements: quality.Measurements,
        bf16: bool,
        checkpoints: Path | None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._texts, self._held_out, self._measurements, self._bf16 = texts, held_out, measurements, bf16
        self._calibrations = quality.Calibrations(model, tokenizer, name, texts, measurements)
        self._shape = {"model": name, "window": quality.WINDOW}
        self._checkpoints = checkpoints

    def measure(self, name: str, ratio: float, settings: Settings) -> None:
        """Measure perplexities of one method at one ratio: dense, pruned and healed."""
        method, healed = quality.METHODS[name], name + _HEALED
        self._perplexities("dense", self._shape | {"ratio": 0.0}, lambda: copy.deepcopy(self._model))
        before = self._shape | {"ratio": ratio}
        before |= self._calibrations.shape(method) | self._calibrations.reconstruction_shape(method)

        def pruned() -> PreTrainedModel:
            return self._kept(f"{METHODS[name]}-{ratio:g}-{_digest(before)}", lambda: self._pruned(method, ratio))

        self._perplexities(name, before, pruned)
        count = -(-settings.tokens // (len(self._texts) * settings.length))
        windows = torch.cat(batches_from_text(self._tokenizer, self._texts, count, settings.length))
        how = {**asdict(settings), "bf16": self._bf16, "training_digest": digest([windows])}
        shape = before | how

        def trained() -> PreTrainedModel:
            file = f"{METHODS[name]}-{ratio:g}-healed-{_digest(shape)}"
            return self._kept(file, lambda: self._healed(pruned(), windows, settings, shape, healed))

        self._perplexities(healed, shape, trained)
        for what in ("heal", "heal, processor time", "loss at first", "loss at last"):
            self._measurements.take(what, healed, shape)

    def _kept(self, name: str, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Return the model that an earlier run saved, or build and save it."""
        if self._checkpoints is None:
            return build()
        path = self._checkpoints / name
        if not path.exists():
            built: Any = build()
            save(built.to(self._model.dtype), path, self._tokenizer)
        found: Any = load(path).eval()
        return found.to(self._model.device)

    def _pruned(self, method: Method, ratio: float) -> PreTrainedModel:
        """Return a pruned copy of the dense model."""
        model = copy.deepcopy(self._model)
        quality._prune(model, self._model, method, ratio, self._calibrations)
        return model

    def _perplexities(self, provider: str, shape: dict, build) -> None:
        """Measure a model on every text on which it has not been measured."""
        shapes = {
            name: shape | {"text": name, "windows": len(held), "text_digest": digest(held)}
            for name, held in self._held_out.items()
        }
        missing = [name for name in shapes if not self._measurements.take("perplexity", provider, shapes[name])]
        if missing:
            model = build().float()
            for name in missing:
                value = quality.windows_perplexity(model, self._held_out[name])
                self._measurements.add("perplexity", provider, shapes[name], "perplexity", value)

    def _healed(
        self, pruned: Any, windows: torch.Tensor, settings: Settings, shape: dict, provider: str
    ) -> PreTrainedModel:
        """Return the healed model, with weights in the dtype of the checkpoint."""
        folder = cache_folder() / f"healing-{_digest(shape)}"
        dtype, before = pruned.dtype, copy.deepcopy(pruned)
        student = as_student(pruned.float(), settings.train, settings.hidden_weight)
        teacher: Any = copy.deepcopy(self._model)
        teacher.to(torch.bfloat16 if self._bf16 else torch.float32)
        options = arguments(folder, settings, processes=1, device=self._model.device.type, bf16=self._bf16)
        is_new, wall, processor = last_checkpoint(folder) is None, time.perf_counter(), time.process_time()
        losses, state = train(student, teacher, windows, settings=settings, options=options)
        if is_new:  # the time of an interrupted training is not known
            self._measurements.add("heal", provider, shape, "s", time.perf_counter() - wall)
            self._measurements.add("heal, processor time", provider, shape, "s", time.process_time() - processor)
        for end, value in loss_ends(losses).items():
            self._measurements.add(f"loss at {end}", provider, shape, "nats per token", value)
        healed: Any = with_weights(before.float(), state, settings.train)
        round_weights(healed, dtype)
        return healed


def _digest(shape: dict) -> str:
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def table(records: Sequence[Record]) -> str:
    """Return Markdown: perplexity over dense of pruned and healed models by ratio, and how they were trained."""
    measured = [r for r in records if r.what == "perplexity"]
    trained = [r for r in records if r.provider.endswith(_HEALED)]
    texts = list(dict.fromkeys(r.shape["text"] for r in trained if r.what == "perplexity"))
    dense = {r.shape["text"]: r.p50 for r in measured if r.provider == "dense"}
    before = {(r.provider, *_calibration(r.shape), r.shape["text"]): r.p50 for r in measured if r.provider in METHODS}
    lines = [
        f"# {records[0].shape['model']}: perplexity after healing",
        "",
        f"Times that of the dense model, {' · '.join(texts)}; shares of neurons removed, exact widths, windows of"
        f" {quality.WINDOW} tokens, {records[-1].hardware}. Seconds: of training, and of processor time.",
        "",
        "| method | removed | pruned | healed | tokens | trained | learning rate | loss | seconds | processor |",
        "|---|--:|---|---|--:|---|--:|---|--:|--:|",
    ]
    runs: dict[str, list[Record]] = {}
    for r in trained:
        runs.setdefault(json.dumps([r.provider, _training(r.shape)]), []).append(r)
    for own in runs.values():
        shape, method = _training(own[0].shape), own[0].provider.removesuffix(_HEALED)
        healed = {r.shape["text"]: r.p50 for r in own if r.what == "perplexity"}
        others = {r.what: r.p50 for r in own if r.what != "perplexity"}
        pruned = {text: before[method, *_calibration(shape), text] for text in texts}
        cells = [" · ".join(f"{each[text] / dense[text]:.2f}" for text in texts) for each in (pruned, healed)]
        loss = " -> ".join(f"{others[f'loss at {end}']:.3f}" for end in ("first", "last") if f"loss at {end}" in others)
        times = [f"{others[w]:.0f}" if w in others else "–" for w in ("heal", "heal, processor time")]
        steps = f"{shape['tokens']:,} | {shape['train']} | {shape['learning_rate']:g}"
        row = [method, f"{shape['ratio']:.0%}", *cells, steps, loss, *times]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _calibration(shape: dict) -> tuple:
    """Return what tells pruned models apart: the ratio, and on which text they were calibrated and reconstructed."""
    return shape["ratio"], shape["calibration_digest"], shape["reconstruction_digest"]


def _training(shape: dict) -> dict:
    return {name: value for name, value in shape.items() if name not in ("text", "windows", "text_digest")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gluprune_evals.healing", description="Perplexity of healed models, by recipe and ratio."
    )
    parser.add_argument("--calibration", metavar="FILE", default=WIKIPEDIA, help="as for `calibrate --text`")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="to measure on; repeatable")
    parser.add_argument("--model", help="model folder or Hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    parser.add_argument("--windows", type=int, default=24, help="to measure on, of each text (default: %(default)s)")
    names = f"one of: {'; '.join(METHODS)}. Repeatable; default: all"
    parser.add_argument("--method", action="append", choices=METHODS, metavar="NAME", help=names)
    parser.add_argument("--ratios", type=float, nargs="+", default=quality.RATIOS, help="default: %(default)s")
    parser.add_argument("--own-windows", type=int, default=quality.OWN_WINDOWS, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="where the models run (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400_000, help="to train on (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="default: %(default)s")
    parser.add_argument("--train", choices=TRAINED, default="all", help="default: %(default)s")
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 while training")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="FOLDER",
        help="where to save the models that are built, so that later runs find them",
    )
    parser.add_argument("--out", type=Path, default="evals/results", metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args(arguments)
    at_once = 4 if given.device == "cpu" else given.batch
    settings = Settings(
        given.train, given.tokens, quality.WINDOW, given.batch, at_once, given.learning_rate, given.hidden_weight
    )
    try:
        texts = quality.named_texts(given.text)
        calibration = read_text(given.calibration, quality.FIELDS)
        source = StudyModel.find(given.model or smollm2_checkpoint())
        result = _measured(source, calibration, texts, settings, given)
    except (ValueError, OSError) as error:
        print(f"gluprune_evals.healing: error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 0


def _measured(
    source: StudyModel, calibration: str, texts: dict[str, str], settings: Settings, given: argparse.Namespace
) -> str:
    """Measure all ratios and write the table of everything on record for these texts."""
    model: Any = load(source.path).eval().to(given.device)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    measurements = quality.Measurements(given.out / "healing.jsonl", model.dtype)
    held_out = {
        name: batches_from_text(tokenizer, content, given.windows, quality.WINDOW + 1, batch_size=1)
        for name, content in texts.items()
    }
    both = calibration, quality.own_text(model, tokenizer, source, given.own_windows)
    options = {"measurements": measurements, "bf16": given.bf16, "checkpoints": given.checkpoints}
    healing = Healing(model, tokenizer, source.name, both, held_out, **options)
    for method in given.method or METHODS:
        for ratio in given.ratios:
            healing.measure(method, ratio, settings)
    result = table([r for r in read(given.out / "healing.jsonl") if r.shape["model"] == source.name])
    write_file(given.out / "healing.md", [result.encode()])
    return result


if __name__ == "__main__":
    sys.exit(main())
