"""Pruning a checkpoint on disk: time compared with `cp` of the same folder, memory with OptiPFair's load, prune, save.

The checkpoints have random weights and take up to 45 GB of disk, in the folder given by `--basetemp`. The records do
not name the disk; the time of `cp` shows its speed. gluprune's time includes the flush to disk; `cp` and OptiPFair
leave up to a few GB in memory for the kernel to write later.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import safe_open

from benchmarks.lib.checkpoints import write_random_checkpoint
from gluprune.io.shards import INDEX_FILE
from gluprune.measure.random_models import CONFIGS
from gluprune.measure.records import Record

EXPANSION_RATIO = 2.4
REPEATS = 3
CASES = {
    "llama-3.2-1b": (10**9, ["cp", "gluprune", "optipfair"], 8e9),
    "llama-3.1-8b": (5 * 10**9, ["cp", "gluprune"], 45e9),
}
PROGRAMS = {
    "gluprune": """
        from gluprune.checkpoints.stream import prune_checkpoint

        start = time.perf_counter()
        prune_checkpoint(source, destination, expansion_ratio=ratio, score="maw")
    """,
    "optipfair": """
        from optipfair import prune_model
        from transformers import AutoModelForCausalLM

        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source)
        model = prune_model(
            model, neuron_selection_method="PPM", pruning_percentage=None, expansion_rate=100 * ratio,
            expansion_divisor=128, show_progress=False,
        )
        model.save_pretrained(destination)
    """,
}
PROLOGUE = "import json, re, sys, time; source, destination, ratio = sys.argv[1], sys.argv[2], float(sys.argv[3])\n"
# Not getrusage, whose maximum starts from that of the parent process.
EPILOGUE = """
seconds = time.perf_counter() - start
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps({"without imports": seconds, "peak": peak}))
"""


def run(provider, source, destination):
    """Return the seconds of one command, and its output: seconds without imports, and peak resident memory."""
    command = ["cp", "-r", source, destination]
    if provider in PROGRAMS:
        program = PROLOGUE + textwrap.dedent(PROGRAMS[provider]) + EPILOGUE
        command = [sys.executable, "-c", program, source, destination, str(EXPANSION_RATIO)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1]) if provider in PROGRAMS else {"without imports": seconds}
    return {"seconds": seconds, **report}


def mlp(folder, layer):
    """Yield gate, up and down of one layer, read with the safetensors library."""
    places = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensor = f"model.layers.{layer}.mlp.{name}.weight"
        with safe_open(folder / places[tensor], "pt") as file:
            yield file.get_tensor(tensor)


def check(source, destination, layers):
    """Compare the first and the last layer with the result computed here."""
    for layer in (0, layers - 1):
        gate, up, down = mlp(source, layer)
        narrow = list(mlp(destination, layer))
        score = sum(w.amax(1).double() + w.amin(1).double().abs() for w in (gate, up))
        kept = score.float().topk(len(narrow[0])).indices.sort().values
        for weight, expected in zip(narrow, (gate[kept], up[kept], down[:, kept]), strict=True):
            assert torch.equal(weight, expected)


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", CASES)
def test_prune_checkpoint(benchmark, keep, tmp_path, name):
    """All providers in turns, so that temporary load on the machine or the disk affects all of them."""
    shard_bytes, providers, disk_bytes = CASES[name]
    if shutil.disk_usage(tmp_path).free < disk_bytes:
        pytest.skip(f"needs {disk_bytes / 1e9:.0f} GB of free disk")
    source, config = tmp_path / "source", CONFIGS[name]
    size = write_random_checkpoint(source, config, shard_bytes)
    runs, written = {provider: [] for provider in providers}, {}

    def one_round():
        for provider in providers:
            destination = tmp_path / provider
            os.sync()  # no provider waits for data that another left unwritten
            runs[provider].append(run(provider, source, destination))
            written[provider] = sum(file.stat().st_size for file in destination.iterdir())
            if provider == "gluprune":
                check(source, destination, config.num_hidden_layers)
            shutil.rmtree(destination)

    try:
        benchmark.pedantic(one_round, rounds=REPEATS)
    finally:
        shutil.rmtree(tmp_path)

    shape = {"model": name, "checkpoint_bytes": size, "expansion_ratio": EXPANSION_RATIO, "cores": os.cpu_count()}
    copying = [copied["seconds"] for copied in runs["cp"]]
    for provider in providers:
        whole, bare = ([one[key] for one in runs[provider]] for key in ("seconds", "without imports"))
        measured = {
            ("prune checkpoint", "s"): whole,
            ("prune checkpoint, time over cp", "1"): [
                ours / copied for ours, copied in zip(whole, copying, strict=True)
            ],
        }
        if provider in PROGRAMS:
            ratios = [ours / copied for ours, copied in zip(bare, copying, strict=True)]
            measured[("prune checkpoint, without imports", "s")] = bare
            measured[("prune checkpoint, without imports, time over cp", "1")] = ratios
            measured[("prune checkpoint, peak resident memory", "B")] = [one["peak"] for one in runs[provider]]
        for (what, unit), values in measured.items():
            own = {**shape, "bytes_written": written[provider]}
            keep(record := Record.of(what, provider, own, torch.bfloat16, unit=unit, values=values))
            benchmark.extra_info[f"{provider}, {what}"] = f"{record.p50:.4g} {unit}"
    assert max(one["peak"] for one in runs["gluprune"]) < 1.5e9
