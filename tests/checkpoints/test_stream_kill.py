"""Pruning on disk, killed at random moments."""

import json
import os
import random
import subprocess
import sys
import textwrap

import pytest

KILL_SCRIPT = """
    import json, os, random, shutil, signal, sys, time
    from pathlib import Path

    import torch

    torch.set_num_threads(1)  # a process that has used more cannot fork
    from gluprune.io import atomic
    from gluprune.checkpoints import write
    from gluprune.checkpoints.stream import prune_checkpoint

    atomic.fsync = lambda descriptor: None  # slow, and a killed process loses nothing that it has written
    source, work, seed, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng, out = random.Random(seed), work / "out"


    def contents(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


    def start(slow):
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            if slow:
                write._BLOCK_BYTES = 200
                real_write = atomic.write
                atomic.write = lambda descriptor, data: (time.sleep(0.0005), real_write(descriptor, data[:300]))[1]
            prune_checkpoint(source, out, intermediate_size=20, multiple_of=1, resume=True)
            status = 0
        finally:
            os._exit(status)


    assert os.waitpid(start(slow=False), 0)[1] == 0
    expected, before = contents(out), contents(source)
    shutil.rmtree(out)
    began = time.monotonic()
    assert os.waitpid(start(slow=True), 0)[1] == 0
    duration = time.monotonic() - began
    assert contents(out) == expected
    shutil.rmtree(out)

    found = {"absent": 0, "complete": 0, "with finished shards": 0}
    while found["absent"] + found["complete"] < kills:
        child = start(slow=True)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert contents(source) == before
        if out.exists():
            found["complete"] += 1
            duration *= 0.9  # too late, most likely: the machine has become faster
        else:
            found["absent"] += 1
            found["with finished shards"] += any(work.glob(".out.*.partial/checkpoint/*.safetensors"))
            if rng.random() < 0.3:
                continue  # killed again while it resumes
            assert os.waitpid(start(slow=False), 0)[1] == 0
        assert contents(out) == expected
        shutil.rmtree(out)
        for left in work.glob(".out.*.partial"):  # of a kill after the rename
            assert not contents(left / "checkpoint")
            shutil.rmtree(left)
    print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment(source, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(KILL_SCRIPT), source, tmp_path / "work", str(seed), "50"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"seed {seed}\n{run.stderr[-3000:]}"
    found = json.loads(run.stdout.splitlines()[-1])
    print(found)
    assert found["absent"] >= 25 and found["with finished shards"] >= 5
