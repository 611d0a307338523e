"""Compare recipes by perplexity: `python examples/evaluate_and_compare.py [MODEL] [--ratio 0.2] [--text FILE]`.

Without MODEL, it uses SmolLM2-135M-Instruct from its PyPI wheel. Without texts, it calibrates on the articles of
Wikipedia that come with gluprune and measures on the text included with the demo.
"""

import argparse
import copy
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gluprune
from gluprune.demo.smollm2 import smollm2_checkpoint

RECIPES = ("maw", "maw_gud", "hybrid+compensate")


def main() -> None:
    """Print the perplexity of the dense model and of each recipe."""
    parser = argparse.ArgumentParser(description="Compare recipes by perplexity.")
    parser.add_argument("model", nargs="?", help="folder or Hub id")
    parser.add_argument(
        "--ratio", type=float, default=0.2, help="share of the neurons to remove (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, help="calibration text")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument(
        "--windows", type=int, default=24, help="calibration windows of 256 tokens (default: %(default)s)"
    )
    options = parser.parse_args()
    name = options.model or smollm2_checkpoint()

    text = options.text.read_text("utf-8") if options.text else gluprune.wikipedia_text()
    shipped = files("gluprune.demo") / "data" / "demo_text.txt"
    test = options.test.read_text("utf-8") if options.test else shipped.read_text("utf-8")

    tokenizer = AutoTokenizer.from_pretrained(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(device)
    ids = tokenizer(test, return_tensors="pt").input_ids[0, :512]
    batches = gluprune.batches_from_text(tokenizer, text, windows=options.windows, length=256)
    statistics = gluprune.calibrate(dense, batches)  # serves every recipe and ratio

    before = gluprune.perplexity(dense, ids)
    print(f"{'dense':<20}{before:>10.2f}")
    for recipe in map(gluprune.Recipe.parse, RECIPES):
        model = copy.deepcopy(dense)
        calibration = statistics if recipe.needs.calibration else None
        gluprune.prune(model, pruning_ratio=options.ratio, **recipe.options(), calibration=calibration)
        after = gluprune.perplexity(model, ids)
        print(f"{recipe!s:<20}{after:>10.2f}  {after / before:.2f} times dense")


if __name__ == "__main__":
    main()
