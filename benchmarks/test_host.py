"""What an MLP and a norm cost the host, stock and patched, without a GPU: see `benchmarks.lib.host`."""

import json
import os
import subprocess
import sys

import torch

from gluprune.measure.records import Record


def measure():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.lib.host"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_host(benchmark, keep):
    """Every case is timed in the same process, in turns."""
    figures = benchmark.pedantic(measure, rounds=1)
    for figure in figures:
        shape, values = {"module": figure["what"]}, figure["seconds"]
        method = "CPU time of a thread, driver that does nothing, products only allocate"
        keep(Record.of("host", figure["provider"], shape, torch.bfloat16, unit="s", values=values, method=method))
    assert {figure["provider"] for figure in figures} == {"torch", "transformers", "gluprune"}
