"""The recommended recipe end to end: `python examples/best_recipe.py [MODEL] [--ratio 0.2] [--text FILE...]`.

Neurons are ranked by how much the loss on calibration text rises without them, the down projections are refitted, and
the layers are corrected in order to match the dense model. Without MODEL, it uses SmolLM2-135M-Instruct from its PyPI
wheel. `--windows` is small so that the example runs in minutes on a CPU. For real use, take 128 windows of 512
tokens and your own text: with so little text, the model loses more quality than necessary.
"""

import argparse
import copy
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gluprune
from gluprune.demo.smollm2 import smollm2_checkpoint


def main() -> None:
    """Calibrate, prune, reconstruct, save."""
    parser = argparse.ArgumentParser(description="The recommended recipe end to end.")
    parser.add_argument("model", nargs="?", help="folder or Hub id")
    parser.add_argument(
        "--ratio", type=float, default=0.2, help="share of the neurons to remove (default: %(default)s)"
    )
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="calibration texts of your own")
    parser.add_argument(
        "--windows", type=int, default=12, help="windows of 128 tokens from each text (default: %(default)s)"
    )
    parser.add_argument("--out", default="narrow", help="folder to write (default: %(default)s)")
    options = parser.parse_args()
    name = options.model or smollm2_checkpoint()

    tokenizer = AutoTokenizer.from_pretrained(name)
    # Half precision is slow on most CPUs.
    where = {"dtype": "auto", "device_map": "auto"} if torch.cuda.is_available() else {"dtype": torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(name, **where).eval()

    # Text from your own domain, or Wikipedia's; and text that the model writes.
    texts = [Path(file).read_text(encoding="utf-8") for file in options.text] or [gluprune.wikipedia_text()]
    texts.append(gluprune.sample_text(dense, tokenizer, windows=options.windows, length=128))
    batches = gluprune.batches_from_text(tokenizer, texts, windows=options.windows, length=128)
    statistics = gluprune.calibrate(dense, batches, sensitivity=True)

    recipe = gluprune.Recipe.parse("surgeon+compensate+reconstruct")
    model = copy.deepcopy(dense)
    print(gluprune.prune(model, pruning_ratio=options.ratio, **recipe.options(), calibration=statistics))
    gluprune.reconstruct(model, dense, batches[::2])  # a part of the text, to save time
    test = (files("gluprune.demo") / "data" / "demo_text.txt").read_text("utf-8")
    ids = tokenizer(test, return_tensors="pt").input_ids[0, :512]
    print(f"perplexity {gluprune.perplexity(dense, ids):.1f} -> {gluprune.perplexity(model, ids):.1f}")

    gluprune.save(model.to(torch.bfloat16), options.out, tokenizer)
    print(f"{options.out}: load it with AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    main()
