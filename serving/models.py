"""The models that are served: SmolLM2-135M-Instruct, dense and pruned, as `gluprune` writes them.

`python -m serving.models` prints where they lie.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gluprune
from gluprune.demo.run import calibration_text
from gluprune.demo.smollm2 import cache_folder, smollm2_checkpoint

# Name -> widths of the layers, in turns. The dense model has 1536 neurons; 922, which the paper measures, is unaligned.
MODELS: dict[str, tuple[int, ...]] = {
    "dense": (1536,),
    "1024": (1024,),
    "896": (896,),
    "922": (922,),
    "by layer, multiples of 256": (768, 1024, 1280),
    "by layer, multiples of 128": (896, 1024, 1152),
    "by layer, unaligned": (901, 1023, 1151),
}
WINDOWS, LENGTH = 16, 256


def folder() -> Path:
    """Return the folder of the checkpoints, in the user's cache."""
    return cache_folder() / f"served-{gluprune.__version__}"


def checkpoints() -> dict[str, Path]:
    """Return name -> folder of every model, in bfloat16; written on first use, which takes minutes."""
    found = {name: folder() / name.replace(",", "").replace(" ", "-") for name in MODELS}
    missing = {name: path for name, path in found.items() if not path.is_dir()}
    if missing:
        _write(missing)
    return found


def _write(missing: dict[str, Path]) -> None:
    source = smollm2_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense: Any = gluprune.load(source, dtype=torch.float32).eval()
    batches = gluprune.batches_from_text(tokenizer, calibration_text(), WINDOWS, LENGTH)
    statistics = gluprune.calibrate(dense, batches)
    for name, path in missing.items():
        model, widths = copy.deepcopy(dense), MODELS[name]
        options = {"score": "hybrid", "compensate": True, "calibration": statistics}
        for turn, width in enumerate(widths):
            layers = range(turn, dense.config.num_hidden_layers, len(widths))
            if width < dense.config.intermediate_size:
                gluprune.prune(model, intermediate_size=width, layers=layers, multiple_of=1, **options)
        gluprune.save(model.to(torch.bfloat16), path, tokenizer)


def served(name: str, work: Path) -> Path:
    """Return the folder of a model as servers take it: exported if its layers differ.

    Args:
        name: A key of `MODELS`.
        work: Where the export is written, unless it is there already.
    """
    source = checkpoints()[name]
    if not name.startswith("by layer"):
        return source
    exported = work / source.name
    if not exported.is_dir():
        gluprune.export(source, exported, format="nemotron-nas")
    return exported


def random_model(folder: Path, model_type: str, widths: tuple[int, ...], **options: Any) -> Path:
    """Write a small random model with a layer for each width, in float32; returns its folder.

    Its weights are large, so that its greedy tokens are many different ones.

    Args:
        folder: Where it is written.
        model_type: As in the configs of transformers.
        widths: The width of each layer, at most 300.
        options: Further entries of the config.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints()["dense"])
    config = AutoConfig.for_model(
        model_type,
        hidden_size=128,
        intermediate_size=300,
        num_hidden_layers=len(widths),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **options,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for layer, width in enumerate(widths):
        gluprune.prune(model, intermediate_size=width, layers=[layer], multiple_of=1)
    gluprune.save(model, folder, tokenizer)
    return folder


if __name__ == "__main__":
    for name, path in checkpoints().items():
        print(f"{name:<14} {path}")
