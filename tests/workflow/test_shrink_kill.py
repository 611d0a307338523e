"""`shrink`, interrupted and killed at every stage: the same call continues and writes the same bytes."""

import json
import os
import random
import subprocess
import sys
import textwrap

import pytest

import gluprune
from gluprune.io.folder import partial_folders
from gluprune.io.progress import RESUMED
from gluprune.workflow import shrink, texts, work
from tests.helpers.streaming import contents

SCRIPT = """
    import json, os, random, shutil, signal, sys
    from pathlib import Path

    import torch

    torch.set_num_threads(1)  # a process that has used more cannot fork
    from gluprune.io import atomic
    from gluprune.workflow import texts
    from gluprune.workflow.shrink import shrink

    atomic.fsync = lambda descriptor: None  # slow, and a killed process loses nothing that it has written
    source, text, folder, seed, target = *map(Path, sys.argv[1:4]), int(sys.argv[4]), json.loads(sys.argv[5])
    out, rng, real = folder / "out", random.Random(seed), atomic.rename
    short = {"text": [text], "own_windows": 2, "windows": 6, "length": 24, "multiple_of": 16, "device": "cpu"}
    if "max_loss" in target:  # the narrower of the random models need not be the worse
        texts.perplexity = lambda model, *_, **__: 202 - model.config.intermediate_size


    def contents(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


    def run(kill_at=None):
        # A child, killed just before or after a file or folder gets its name; returns whether it finished.
        names, before = [], rng.random() < 0.5
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == 0

        def rename(old, new):
            names.append(Path(new).name)
            if names[-1] == kill_at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(old, new)
            if names[-1] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            atomic.rename = rename
            shrink(source, out, **target, **short)
            (folder / "names.json").write_text(json.dumps(names))
            status = 0
        finally:
            os._exit(status)


    assert run()
    names, expected = json.loads((folder / "names.json").read_text()), contents(out)
    shutil.rmtree(out)
    copied = {path.name for path in source.iterdir()}
    stages = [name for name in dict.fromkeys(names) if name not in copied]
    left = rng.sample(stages, len(stages))
    while left:
        first, second = left.pop(), left.pop() if left else rng.choice(stages)
        assert not run(first), first
        # Killed after the last rename, the output is complete.
        assert out.exists() or run(second) or out.exists() or run(), (first, second)
        assert contents(out) == expected, (first, second)
        for path in (out, *folder.glob(".out.*")):
            shutil.rmtree(path)
    print(json.dumps(stages))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("target", [{"pruning_ratio": 0.2}, {"max_loss": 0.4}])
def test_killed_twice_at_any_stage(source, text, tmp_path, target):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    (tmp_path / "work").mkdir()
    arguments = [source, text, tmp_path / "work", str(seed), json.dumps(target)]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"seed {seed}\n{run.stderr[-3000:]}"
    stages = set(json.loads(run.stdout.splitlines()[-1]))
    assert {"own.txt", "statistics", "measurements.json", "gluprune.json", "shrink.png", "out"} <= stages


@pytest.mark.slow
def test_finished_stages_are_not_computed_again(source, tmp_path, short, monkeypatch):
    """Interrupted while it prunes, then while it measures the pruned model."""
    gluprune.shrink(source, tmp_path / "expected", pruning_ratio=0.2, **short)
    calls = []
    places = {"sample_text": work, "calibrate_to_file": work, "prune": work, "perplexity": texts}
    real = {name: getattr(module, name) for name, module in places.items()}

    def counting(name):
        def call(*arguments, **options):
            calls.append(name)
            if calls in interrupted:
                raise KeyboardInterrupt
            return real[name](*arguments, **options)

        return call

    for name, module in places.items():
        monkeypatch.setattr(module, name, counting(name))
    said = []
    monkeypatch.setattr(shrink, "announce", said.append)
    first = ["sample_text", "calibrate_to_file", "perplexity", "prune"]
    second = [*first, "prune", "perplexity"]
    interrupted = [first, second]
    for _ in interrupted:
        with pytest.raises(KeyboardInterrupt):
            gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.2, **short)
        assert not (tmp_path / "out").exists() and len(partial_folders(tmp_path / "out")) == 1
    gluprune.shrink(source, tmp_path / "out", pruning_ratio=0.2, **short)
    assert calls == [*second, "perplexity"] and said.count(RESUMED) == 2 and said[0] != RESUMED
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
