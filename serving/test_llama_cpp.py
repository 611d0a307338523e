"""Pruned models in llama.cpp: negative log likelihood as in transformers, sizes of files, speed.

The library and the converter come from the source of llama-cpp-python, which contains a copy of llama.cpp.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import gluprune
from gluprune.measure.perplexity import cut_windows
from gluprune.measure.records import Record
from serving.models import checkpoints

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")

LENGTH, WINDOWS, STEPS, THREADS = 256, 8, 64, 1
MODELS = ("dense", "1024", "922", "896", "by layer, multiples of 256", "by layer, unaligned")
# The cache is in F16, and llama.cpp rounds activations: to F16 before a product with F16, to 8 bits, with one scale for
# 32 or 256 of them, before a product with quantized blocks. transformers computes with the same weights in float32.
ROUNDING = {"F16": 1e-3, "Q8_0": 1e-2, "Q4_K_M": 3e-2}


def ask(**task):
    command = [sys.executable, "-m", "serving.libllama"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def windows_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (files("gluprune.demo") / "data" / "demo_text.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return [window.tolist() for window in cut_windows(ids, LENGTH, WINDOWS) if len(window) == LENGTH + 1]


@torch.no_grad()
def stock_nll(model, windows):
    ids = torch.tensor(windows)
    losses = [
        torch.nn.functional.cross_entropy(model(each[None, :-1]).logits[0].double(), each[1:]).item() for each in ids
    ]
    return sum(losses) / len(losses)


def dequantized(file):
    """The weights of a GGUF file in transformers, as float32."""
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options).eval()


def mlp_types(file):
    """Number of MLP weights by type."""
    from gguf import GGUFReader

    types = [each.tensor_type.name for each in GGUFReader(file).tensors if ".ffn_down" in each.name]
    return {name: types.count(name) for name in sorted(set(types))}


@pytest.mark.parametrize("name", MODELS)
def test_likelihood_size_and_speed(name, request, tmp_path, keep):
    converter = request.config.getoption("--converter")
    if not converter.is_file():
        pytest.skip(f"needs llama.cpp's converter: {converter} is missing")
    source = checkpoints()[name]
    gluprune.export(source, tmp_path / "gguf", format="gguf", converter=converter)
    windows, build = windows_of(source), f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"
    expected = stock_nll(gluprune.load(source, dtype=torch.float32).eval(), windows)
    failures = {}
    for form, tolerance in ROUNDING.items():
        file = tmp_path / f"{form}.gguf"
        ask(source=str(tmp_path / "gguf" / "model.gguf"), output=str(file), form=form, threads=THREADS)
        found = ask(file=str(file), threads=THREADS, steps=STEPS, windows=windows)
        # transformers reads no files of the architecture `deci`.
        is_read = form == "F16" or not name.startswith("by layer")
        stock = expected if form == "F16" else stock_nll(dequantized(file), windows) if is_read else None
        shape = {"model": name, "format": form, "tokens": len(windows) * LENGTH, "threads": THREADS}
        down = " + ".join(f"{count} {kind}" for kind, count in mlp_types(file).items())
        for what, unit, values, options in (
            ("negative log likelihood", "nat", [found["nll"]], {}),
            ("size", "bytes", [file.stat().st_size], {"method": f"down projections: {down}"}),
            ("decode step", "ms", [1000 * seconds for seconds in found["times"]], {}),
        ):
            keep(Record.of(what, build, shape, torch.bfloat16, unit=unit, values=values, **options))
        if stock is not None:
            options = {"method": "the weights of the file, dequantized to float32" if form != "F16" else None}
            keep(
                Record.of(
                    "negative log likelihood",
                    "transformers",
                    shape,
                    torch.float32,
                    unit="nat",
                    values=[stock],
                    **options,
                )
            )
            if not abs(found["nll"] - stock) < tolerance:
                failures[form] = found["nll"], stock
    assert not failures
