"""`heal` in several processes, and killed: losses and files are those of one process that nothing interrupted."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import gluprune
from gluprune.io.folder import partial_folders
from gluprune.io.progress import RESUMED
from tests.helpers.processes import ROOT
from tests.helpers.streaming import contents

SCRIPT = """
    import json, os, sys
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    import gluprune

    folder, name, train, kill_at = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    kinds = set()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards only what runs on accelerators; FSDP2 itself runs on CPUs too.
        from accelerate import state

        real = state.AcceleratorState.__init__

        def init(self, *arguments, fsdp_plugin=None, **options):
            real(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
            if self.distributed_type == state.DistributedType.MULTI_CPU and fsdp_plugin is not None:
                self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
                state.PartialState._shared_state["distributed_type"] = self.distributed_type

        state.AcceleratorState.__init__ = init
    from gluprune.healing import training

    calls, answer = [], training.answer

    def counted(teacher, *others):
        calls.append(1)
        kinds.update(type(p.data).__name__ for p in teacher.get_decoder().layers.parameters())
        if len(calls) == kill_at:
            os._exit(137)  # as kill -9 would
        return answer(teacher, *others)

    training.answer = counted
    texts = {"text": [folder / "notes.txt"], "own_windows": 2, "length": 24, "device": "cpu"}
    report = gluprune.heal(
        folder / "pruned", folder / "source", folder / name, **texts, tokens=576, batch=4, device_batch=1,
        learning_rate=3e-3, train=train, hidden_weight=0.1,
    )
    assert (report is None) == (os.environ.get("RANK", "0") != "0")
    if report is not None:
        (folder / f"{name}.json").write_text(json.dumps({**report.to_dict(), "kinds": sorted(kinds)}))
"""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture
def folder(tiny_model, tokenizer, text, tmp_path):
    """A dense model, a pruned one and a text."""
    model = tiny_model(seed=1, vocab_size=len(tokenizer), initializer_range=0.3)
    gluprune.save(model, tmp_path / "source", tokenizer)
    gluprune.prune_checkpoint(tmp_path / "source", tmp_path / "pruned", pruning_ratio=0.5, multiple_of=16)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path


def run(folder, name, train="all", *, processes=1, kill_at=0, **environment):
    """Run the script; return its exit code and what it reports."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, folder / "script.py", folder, name, train, kill_at]
    environment = {**os.environ, "TQDM_DISABLE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    (folder / f"{name}.log").write_text(done.stderr)
    report = folder / f"{name}.json"
    assert report.is_file() or kill_at, done.stderr[-3000:]
    return done.returncode, json.loads(report.read_text()) if report.is_file() else None


def close(found, expected):
    """Losses, perplexity and written weights agree; sums are computed in another order."""
    folder, (name, report), (other, reference) = found[0], found[1:], expected
    assert report["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert report["healed"] == pytest.approx(reference["healed"], rel=1e-5)
    weights = [gluprune.load(folder / each).state_dict() for each in (name, other)]
    for key, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][key], atol=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "lora"])
def test_processes_have_the_losses_of_one(folder, train):
    """Two processes over gloo, with DDP and with FSDP2, which divides student and teacher."""
    one = run(folder, "one", train)[1]
    assert len(one["losses"]) == 6 and one["losses"][-1] < 0.95 * one["losses"][0]
    if train == "all":
        two = run(folder, "two", train, processes=2)[1]
        assert two["kinds"] == ["Tensor"]
        close((folder, "two", two), ("one", one))
    sharded = run(folder, "sharded", train, processes=2, **FSDP)[1]
    assert sharded["kinds"] == ["DTensor"]
    close((folder, "sharded", sharded), ("one", one))


@pytest.mark.slow
def test_killed_it_continues(folder):
    """In one process the files are the same, byte for byte; in two, sharded, the losses."""
    expected = run(folder, "expected")[1]
    code, report = run(folder, "out", kill_at=4 * 4 + 2)  # in the fifth of six steps
    assert code == 137 and report is None and not (folder / "out").exists()
    (left,) = partial_folders(folder / "out")
    assert [path.name for path in (left / "training").iterdir()] == ["checkpoint-4"]
    assert RESUMED not in (folder / "out.log").read_text()
    assert run(folder, "out")[1]["losses"] == expected["losses"] and RESUMED in (folder / "out.log").read_text()
    assert contents(folder / "out") == contents(folder / "expected") and not partial_folders(folder / "out")
    code, report = run(folder, "sharded", processes=2, kill_at=4 * 2 + 1, **FSDP)
    assert code and report is None
    sharded = run(folder, "sharded", processes=2, **FSDP)[1]
    close((folder, "sharded", sharded), ("expected", expected))
