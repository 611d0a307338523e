"""`gluprune.patch_llama` on SmolLM2-135M-Instruct: its peak memory, and the memory that stays allocated.

On the CPU the kernels' storage is used only with Triton's interpreter, so each measurement runs with it, in a separate
process. On a GPU the same amount is allocated, by a different allocator.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from csrc_triton.layout import padded_width
from gluprune.measure.records import Record

PERCENTS = {1536: 0, 922: 40}  # the model's width, a multiple of 128, and 922, which remains at a ratio of 40 %
SCRIPT = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
import gluprune
from gluprune.runtime.fusion import fusion_status
from gluprune.demo.smollm2 import smollm2_checkpoint

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def storage():
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())

model = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint())
for parameter in model.parameters():  # copy from the mapped file into memory
    parameter.data = parameter.data.clone()
if int(sys.argv[1]):
    gluprune.prune(model, pruning_ratio=int(sys.argv[1]) / 100, multiple_of=1)
before = storage()
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
start = resident("VmRSS")
gluprune.patch_llama(model, backend="triton")
peak = resident("VmHWM") - start
assert all(entry.fused for entry in fusion_status(model))
after = storage()
gluprune.unpatch_llama(model)
layer = sum(p.nbytes for p in model.model.layers[0].mlp.parameters())
print(json.dumps({"width": model.config.intermediate_size, "layer": layer, "above": peak, "before": before,
                  "after": after, "unpatched": storage()}))
"""


def measure(percent):
    command = [sys.executable, "-c", SCRIPT, str(percent)]
    # A separate mapping for every tensor, so that freed memory is returned at once and does not count in the peak.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("width", PERCENTS)
def test_memory(benchmark, keep, width):
    """At most one layer of memory above the model during patching, only the padding afterwards, none once unpatched."""
    found = benchmark.pedantic(measure, args=(PERCENTS[width],), rounds=1)
    assert found["width"] == width and found["unpatched"] == found["before"]
    padding = found["after"] - found["before"]
    assert found["above"] - padding < found["layer"]
    benchmark.extra_info.update(found)
    shape = {
        "model": "SmolLM2-135M-Instruct",
        "width": width,
        "padded width": padded_width(width),
        "bytes of one layer's MLP": found["layer"],
    }
    for what, key in {
        "patch: peak memory above the model": "above",
        "patch: storage of all parameters before": "before",
        "patch: storage of all parameters after": "after",
    }.items():
        keep(Record.of(what, "gluprune", shape, torch.bfloat16, unit="bytes", values=[found[key]]))
