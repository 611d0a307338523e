"""`shrink`: from a dense checkpoint to a measured, pruned one by the recommended recipe.

Composes the public functions: the model writes text, `calibrate`, `perplexity`, `prune`, `reconstruct`, `save`. Every
stage leaves its result in the work folder next to the output (`gluprune.io.folder.complete_folder`), where the same
call continues after an interruption. The folder's key does not depend on the target width: results serve all widths.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from gluprune.calibration.sensitivity import removed_counts
from gluprune.checkpoints.card import read_history
from gluprune.checkpoints.load_save import build_empty, read_config, stock_class
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic
from gluprune.io.folder import complete_folder, folder_state
from gluprune.io.hub import local_folder, model_name
from gluprune.io.progress import RESUMED, announce
from gluprune.models.consumers import sizes_of
from gluprune.models.device import choose_device, dtype_name
from gluprune.models.glu import check_head
from gluprune.models.widths import layer_widths
from gluprune.pruning.checks import check_deploy
from gluprune.pruning.history import measure_step, versions
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.widths import percent_hint
from gluprune.workflow import picture
from gluprune.workflow.heal import check_place
from gluprune.workflow.report import ShrinkReport
from gluprune.workflow.search import narrowest
from gluprune.workflow.texts import GivenTexts, check_lengths
from gluprune.workflow.work import Settings, Work

logger = logging.getLogger(__name__)

PICTURE = "shrink.png"


@dataclass(frozen=True)
class _Goal:
    """What is to be reached.

    Attributes:
        widths: The widths that may be chosen, ascending.
        dense_width: That of the dense model.
        max_loss: Of several widths, the narrowest whose perplexity rises by at most this share is chosen.
    """

    widths: Sequence[int]
    dense_width: int
    max_loss: float | None = None


def shrink(
    source: str | Path,
    destination: str | Path,
    *,
    pruning_ratio: float | None = None,
    max_loss: float | None = None,
    text: str | Path | Sequence[str | Path] = (),
    test_text: str | Path | Sequence[str | Path] = (),
    fields: str | Sequence[str] = "text",
    own_windows: int = 64,
    windows: int = 128,
    length: int = 512,
    allocation: str = "uniform",
    multiple_of: int = 128,
    deploy: str | None = None,
    heal_tokens: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> ShrinkReport:
    """Prune a checkpoint by the recommended recipe, measure what it costs, and write the result.

    The model writes text, which is added to the given text, or to Wikipedia. It is calibrated once, pruned by
    `surgeon+compensate`, reconstructed, written, loaded again and compared with the model in memory. Perplexity before
    and after is measured on text that is held apart, and written to `gluprune.json` and the model card, with a picture
    where matplotlib is installed.

    After an interruption, the same call continues: results of finished stages lie in a hidden folder next to the
    destination, and the files written are the same, byte for byte. Memory: the dense model twice, in float32 on a CPU,
    and what `calibrate_to_file` and `reconstruct` describe.

    Args:
        source: A folder or a Hub id. It is never written to.
        destination: A folder that does not exist or is empty, outside the source.
        pruning_ratio: Share of the neurons to remove, between 0 and 1. Give either this or `max_loss`.
        max_loss: Choose the narrowest width whose perplexity is at most this much above the dense model's: 0.05 is
            5 %. Several widths are pruned and measured.
        text: A file of text to calibrate on, or several, as `gluprune.io.text.read_text` reads them. If none are given:
            `wikipedia`.
        test_text: A file of text to measure perplexity on, or several. If none are given, the last tenth of each
            text to calibrate on is held apart.
        fields: The field that holds the text in JSON files, or several.
        own_windows: Number of windows that the model writes. 0: none.
        windows: Windows of each text to calibrate on, at most.
        length: Tokens per window.
        allocation: "uniform" gives every layer the same width; the checkpoint then loads everywhere. "sensitivity"
            gives sensitive layers more neurons, which is better, but only `gluprune.load` can load it.
        multiple_of: Widths are multiples of this.
        deploy: Where the model will run, as in `prune`: widths are multiples of what it needs as well.
        heal_tokens: Train the chosen model on about this many tokens, as `heal` does by default. 0: not at all.
        device: Where the model runs; "auto" is cuda if available, otherwise cpu.
        dtype: Dtype of the weights in memory and in the result; "auto" is that of the checkpoint. With "auto", a CPU
            computes in float32.

    Returns:
        A `ShrinkReport`; `print` shows it as a table.

    Raises:
        ValueError: Bad arguments, too little text, or a model that cannot be pruned.
        RuntimeError: No width stays within `max_loss` (finished stages are kept for another call), or the checkpoint
            does not have the logits of the model in memory.
        OSError: A file cannot be read or written.

    Example:
        >>> import gluprune
        >>> _ = (folder / "notes.txt").write_text("A long text. " * 200)
        >>> texts = {"text": [folder / "notes.txt"], "own_windows": 0, "length": 32}
        >>> report = gluprune.shrink(model_path, folder / "narrow", pruning_ratio=0.25, **texts)
        >>> report.chosen.width
        384
    """
    recipe = Recipe(
        "surgeon", compensate=True, reconstruct=True, allocation=allocation, multiple_of=multiple_of, deploy=deploy
    )
    device, dtype = str(device), dtype_name(dtype)
    _check_target(pruning_ratio, max_loss)
    _check_windows(own_windows, windows, length)
    _check_healing(heal_tokens, device, dtype)
    texts = GivenTexts.read(text, test_text, fields)
    choose_device(device)
    folder = local_folder(source)
    config = read_config(folder)
    check_head(build_empty(config), "shrink")
    _check_runs_on_text(config)
    goal = _goal(folder, config, destination, recipe, pruning_ratio=pruning_ratio, max_loss=max_loss)
    settings = Settings(recipe, own_windows, windows, length, device, dtype)
    if check_lengths(texts, AutoTokenizer.from_pretrained(folder), length) + own_windows < 2:
        raise ValueError(f"the calibration text has one window of {length} tokens: give two or more")
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no picture will be drawn: pip install 'gluprune[demo]'")
    with complete_folder(destination, _key(folder, settings, texts), resume=True, in_stages=True) as output:
        work = Work(output.parent, folder, settings=settings, texts=texts)
        report = _run(work, goal, str(destination), recipe)
        if heal_tokens:
            announce("        heal; left: write")
            healed = work.healed(report.chosen.width, heal_tokens)[1]
            report = replace(report, curve=[*report.curve, healed], chosen=healed, heal_tokens=heal_tokens)
        _write(output, work, report, model_name(source))
    return report


def _check_target(pruning_ratio: float | None, max_loss: float | None) -> None:
    if (pruning_ratio is None) == (max_loss is None):
        raise ValueError("give exactly one of pruning_ratio and max_loss")
    if max_loss is not None and not 0 < max_loss <= 1:
        raise ValueError(f"max_loss must be above 0 and at most 1, got {max_loss}{percent_hint(max_loss)}")


def _check_windows(own_windows: int, windows: int, length: int) -> None:
    for name, value, smallest, why in (
        ("own_windows", own_windows, 0, ""),
        ("windows", windows, 2, ": reconstruction is checked on text that it was not fitted on"),
        ("length", length, 1, ""),
    ):
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}{why}")


def _check_healing(tokens: int, device: str, dtype: str) -> None:
    if tokens < 0:
        raise ValueError(f"heal_tokens must be at least 0, got {tokens}")
    if tokens:
        check_place(device, dtype)


def _check_runs_on_text(config: PreTrainedConfig) -> None:
    attending = getattr(config.get_text_config(), "cross_attention_layers", None)
    if attending:
        raise ValueError(
            f"layers {', '.join(map(str, attending))} attend to images and do not run on text: shrink cannot calibrate"
            " them; prune the others with gluprune.prune(layers=...)"
        )


def _goal(
    folder: Path,
    config: PreTrainedConfig,
    destination: str | Path,
    recipe: Recipe,
    *,
    pruning_ratio: float | None,
    max_loss: float | None,
) -> _Goal:
    """Return the widths to choose from, after everything about the checkpoint has been checked."""
    multiple = recipe.width_multiple
    target: dict = {"pruning_ratio": pruning_ratio}
    if max_loss is not None:  # any width, to check all else
        widest = max(layer_widths(config))
        target = {"intermediate_size": (widest - 1) // multiple * multiple}
        if widest <= multiple:
            raise ValueError(f"no multiple of {multiple} is below the width {widest}: use a smaller multiple_of")
    planned = prune_checkpoint(
        folder, destination, **target, multiple_of=recipe.multiple_of, deploy=recipe.deploy, dry_run=True
    )
    dense_width, width = planned.original_intermediate_size, planned.intermediate_size
    least = 1
    if recipe.allocation == "sensitivity":
        check_deploy(recipe, [multiple, 2 * multiple], **sizes_of(config))
        least = -(-(dense_width - removed_counts(dense_width)[-1]) // multiple) * multiple
    if max_loss is None:
        if width < least:
            raise ValueError(
                f"allocation='sensitivity' leaves every layer at least {least} of {dense_width} neurons, which is more"
                f" than {width}: give a smaller pruning_ratio"
            )
        return _Goal([width], dense_width)
    return _Goal([w for w in range(multiple, dense_width, multiple) if w >= least], dense_width, max_loss)


def _key(folder: Path, settings: Settings, texts: GivenTexts) -> str:
    """Return a digest that changes with the model, the texts, the settings and the versions, not with the target."""
    device = choose_device(settings.device).type
    task = [folder_state(folder), list(texts.calibration), list(texts.test), texts.digests, asdict(settings), device]
    return hashlib.sha256(json.dumps([*task, versions()], sort_keys=True).encode()).hexdigest()[:16]


def _run(work: Work, goal: _Goal, destination: str, recipe: Recipe) -> ShrinkReport:
    """Run all stages up to a checkpoint of the chosen width in the work folder."""
    if work.is_resumed:
        announce(RESUMED)
    does = "the model writes text" if work.settings.own_windows else "read the text"
    announce(f"1 of 5: {does}; left: calibrate, measure, prune, write")
    texts = work.texts
    announce("2 of 5: calibrate; left: measure, prune, write")
    work.statistics()
    announce("3 of 5: measure the dense model; left: prune, write")
    dense, measured = work.dense_point(), {}
    limit = math.inf if goal.max_loss is None else math.log1p(goal.max_loss)

    def loss(width: int) -> float:
        removed = f"{1 - width / goal.dense_width:.1%}; widths are multiples of {recipe.width_multiple}"
        announce(f"4 of 5: prune to {width} of {goal.dense_width} neurons ({removed}) and measure; left: write")
        point = measured[width] = work.point(width)
        announce(f"        perplexity {point.perplexity / dense.perplexity:.3f} times dense")
        value = math.log(point.perplexity / dense.perplexity)
        if value > limit:
            work.remove(width)
        return value

    if goal.max_loss is None:
        (width,) = goal.widths
        loss(width)
    else:
        width = narrowest(goal.widths, goal.dense_width, limit, loss)
    if width is None:
        widest = max(measured)
        raise RuntimeError(
            f"at {widest} of {goal.dense_width} neurons, the widest multiple of {recipe.width_multiple}, perplexity is"
            f" {measured[widest].perplexity / dense.perplexity - 1:.1%} above dense; max_loss={goal.max_loss} allows"
            f" less: allow more, and the run continues from here; or use a smaller multiple_of, and it starts over"
        )
    has_picture = importlib.util.find_spec("matplotlib") is not None
    return ShrinkReport(
        folder=destination,
        recipe=str(recipe),
        dense=dense,
        curve=[measured[width] for width in sorted(measured, reverse=True)],
        chosen=measured[width],
        max_loss=goal.max_loss,
        texts=list(texts.test),
        tokens=work.held_apart.tokens,
        length=work.settings.length,
        picture=str(Path(destination) / PICTURE) if has_picture else None,
    )


def _write(output: Path, work: Work, report: ShrinkReport, name: str) -> None:
    """Write the chosen checkpoint, its history with what was measured, and the picture to the output folder."""
    announce("5 of 5: write")
    width, tokens = report.chosen.width, report.heal_tokens
    checkpoint = work.healed(width, tokens)[0] if tokens else work.checkpoint(width)
    shutil.rmtree(output)  # of an interrupted run, perhaps for another target
    shutil.copytree(checkpoint, output, copy_function=atomic.link_file)
    history, config = read_history(checkpoint), read_config(checkpoint)
    assert history is not None
    steps = [step for step in history.steps if step["step"] != "measure"]
    history = replace(history, steps=steps)
    step = measure_step(
        perplexity=report.chosen.perplexity,
        dense_perplexity=report.dense.perplexity,
        tokens=report.tokens,
        length=report.length,
        texts=work.texts.test_digests,
    )
    shown = PICTURE if report.picture else None
    files = history.documents([step], stock_class(config).__name__, layer_widths(config), shown)
    if report.picture:
        files[PICTURE] = picture.draw(report, name)
    for file, content in files.items():
        atomic.write_file(output / file, [content])
