"""Pruning on the disk when things go wrong: failing calls, kills at any moment, corrupt and lying files."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from gluprune.checkpoints import write
from gluprune.checkpoints.load_save import save
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic, shards
from gluprune.io.atomic import complete_folder
from gluprune.io.shards import INDEX_FILE, read_shard

ARGUMENTS = dict(intermediate_size=20, multiple_of=1)


def make_source(folder, sharded=True):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size=2_500 if sharded else "5GB")
    (folder / "tokenizer.json").write_text("{}")
    assert (folder / INDEX_FILE).exists() == sharded
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def expected(source, tmp_path):
    """What comes out when nothing goes wrong."""
    prune_checkpoint(source, tmp_path / "expected", **ARGUMENTS)
    result = contents(tmp_path / "expected")
    shutil.rmtree(tmp_path / "expected")
    return result


class FaultyCalls:
    """Counts the calls of `files.write`, `files.fsync` and `files.rename` and makes one of them fail.

    Nothing is flushed in truth: that takes most of the time, and only a power cut would tell.
    """

    def __init__(self, patch, fail_at=None, error=None):
        self.log, self.lock = [], threading.Lock()
        for name, call in {"write": os.write, "fsync": lambda descriptor: None, "rename": os.rename}.items():
            patch.setattr(atomic, name, self.wrap(name, call, fail_at, error))

    def wrap(self, name, call, fail_at, error):
        def faulty(*arguments):
            place = arguments[0]
            with self.lock:
                self.log.append((name, os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)))
                number = len(self.log)
            if number == fail_at:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])  # a full disk takes a part
                raise error
            if name == "write":
                return call(arguments[0], arguments[1][:1500])  # calls may write less than they were given
            return call(*arguments)

        return faulty


def in_order(patch):
    """Small blocks, and none read ahead, so that the same calls come in the same order."""
    patch.setattr(write, "_BLOCK_BYTES", 700)
    patch.setattr(write, "_ahead", lambda items, *_: items)


@pytest.fixture
def calls(source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_order(patch)
        calls = FaultyCalls(patch)
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert contents(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    return calls.log


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fault_at_every_call(source, expected, calls, tmp_path):
    before, out = contents(source), tmp_path / "out"
    error = OSError(errno.ENOSPC, "No space left on device")
    assert {name for name, _ in calls} == {"write", "fsync", "rename"} and len(calls) > 60
    for fail_at in range(1, len(calls) + 1):
        with pytest.MonkeyPatch.context() as patch:
            in_order(patch)
            faulty = FaultyCalls(patch, fail_at, error)
            with pytest.raises(OSError) as raised:
                prune_checkpoint(source, out, **ARGUMENTS)
        assert len(faulty.log) == fail_at and faulty.log == calls[:fail_at]
        if calls[fail_at - 1][0] != "rename":
            path = calls[fail_at - 1][1].removesuffix(".unfinished")
            assert str(raised.value) == f"[Errno {errno.ENOSPC}] No space left on device: {path!r}"
        assert contents(source) == before
        if out.exists():  # only the last flush, after the rename, comes too late to stop it
            assert contents(out) == expected and fail_at == len(calls)
        else:
            assert not list(tmp_path.rglob("*.unfinished"))
            with pytest.MonkeyPatch.context() as patch:
                FaultyCalls(patch)
                prune_checkpoint(source, out, resume=True, **ARGUMENTS)
            assert contents(out) == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
        shutil.rmtree(out)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interruption_while_reading_ahead(source, expected, calls, tmp_path):
    """The same with the reading thread at work, where the order of calls is not fixed."""
    for fail_at in range(1, len(calls), 4):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(write, "_BLOCK_BYTES", 700)
            FaultyCalls(patch, fail_at, KeyboardInterrupt())
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
        assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))
        prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
        assert contents(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_everything_is_on_the_disk_before_it_gets_its_name(calls, source):
    """The order that survives a power cut: data, flush, rename, flush of the folder; then the same for the whole."""
    for (name, path), following in zip(calls, [*calls[1:], None]):
        if name == "rename":  # a finished shard must not outlive the selection that it was made with
            parent = Path(path).parents[1] if path.endswith("checkpoint") else Path(path).parent
            assert following == ("fsync", str(parent))

    dirty = {}  # file or folder -> what was done to it since it was flushed
    for name, path in calls:
        if name == "fsync":
            dirty.pop(path, None)
        elif name == "write":
            dirty[path] = "written"
        else:
            assert path not in dirty, f"{path} is renamed before it is flushed"
            assert not [p for p in dirty if p.startswith(path + "/")], f"{path} is renamed before what it holds"
            dirty[str(Path(path).parent)] = "renamed into"
    folders_gone = {path for path in dirty if ".partial" in path}
    assert set(dirty) == folders_gone, "not flushed at the end"
    assert calls[-1][0] == "fsync"
    assert sum(name == "rename" and path.endswith("checkpoint") for name, path in calls) == 1


def test_resume_keeps_finished_shards(source, expected, tmp_path, monkeypatch):
    names = sorted(name for name in expected if name.endswith(".safetensors"))
    assert len(names) >= 4
    real, written = atomic.write_file, []

    def write_file(path, chunks, progress=None):
        if path.name == names[2]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, chunks, progress)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", write_file)
        with pytest.raises(OSError, match="No space left"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    assert sorted(contents(partial / "checkpoint")) == names[:2]

    # Another recipe does not take them; its own failure leaves them alone.
    prune_checkpoint(source, tmp_path / "other", resume=True, intermediate_size=21, multiple_of=1)
    assert contents(tmp_path / "other").keys() == expected.keys() and contents(tmp_path / "other") != expected

    # A stranger under a shard's name is not believed.
    (partial / "checkpoint" / names[1]).write_bytes(b"\0" * len(expected[names[1]]))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", lambda path, *rest: (written.append(path.name), real(path, *rest))[1])
        report = prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert names[0] not in written and set(names[1:]) <= set(written)
    assert contents(tmp_path / "out") == expected
    assert {layer: len(kept) for layer, kept in report.kept.items()} == {0: 20, 1: 20}
    assert not partial.exists()


@contextmanager
def without_the_last_rename():
    def rename(path, target):
        if Path(path).name == "checkpoint":
            raise KeyboardInterrupt
        os.rename(path, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "rename", rename)
        yield


def test_without_resume_it_begins_anew(source, expected, tmp_path):
    with without_the_last_rename():
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    assert contents(partial / "checkpoint") == expected
    # Whole as they look, they come from who knows where.
    for file in (partial / "selections").iterdir():
        file.write_text(json.dumps({layer: list(range(20)) for layer in (0, 1)}))
    for file in (partial / "checkpoint").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-2] + b"??")
    (partial / "checkpoint" / "stranger").mkdir()
    prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert contents(tmp_path / "out") == expected


def test_a_selection_once_made_is_kept(source, expected, tmp_path):
    """Shards that are finished and shards to come must agree, so no layer is scored a second time."""
    with without_the_last_rename():
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    other = list(range(20))
    for file in (partial / "selections").iterdir():
        saved = json.loads(file.read_text())
        file.write_text(json.dumps({layer: other if layer == "1" else kept for layer, kept in saved.items()}))
    shutil.rmtree(partial / "checkpoint")
    report = prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert report.kept[1].tolist() == other and report.kept[0].tolist() != other


def test_two_runs_do_not_mix(source, tmp_path):
    with without_the_last_rename():
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    (partial,) = tmp_path.glob(".out.*.partial")
    with atomic.locked(partial), pytest.raises(ValueError, match="another process is writing"):
        prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_is_noticed(source, tmp_path, monkeypatch):
    real, shard = atomic.write_file, max(source.glob("*.safetensors"))

    def touch(path, *rest):
        real(path, *rest)
        os.utime(shard, ns=(1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", touch)
        with pytest.raises(ValueError, match="changed while it was read"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]

    def truncate(path, *rest):
        os.truncate(shard, shard.stat().st_size - 1)
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", truncate)
        with pytest.raises(ValueError, match=f"{shard.name} ends within tensor"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_full_disk(source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
        with pytest.raises(OSError, match=r"bytes are to be written, 10 are free"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]

    # The kernel's own refusal in the middle of a file.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*safetensors'"):
            prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))
    prune_checkpoint(source, tmp_path / "out", resume=True, **ARGUMENTS)
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written(source, tmp_path):
    with pytest.raises(OSError, match="/proc/gluprune"):
        prune_checkpoint(source, "/proc/gluprune/out", **ARGUMENTS)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prune_checkpoint(source, tmp_path / "file" / "out", **ARGUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "file"

    def chunks(expected):
        for number in range(3):
            assert (path.read_bytes() if path.exists() else None) == expected
            yield bytes([number]) * 10

    atomic.write_file(path, chunks(None))
    whole = b"".join(bytes([number]) * 10 for number in range(3))
    path.write_bytes(b"old")
    atomic.write_file(path, chunks(b"old"))
    assert contents(tmp_path) == {"folder/file": whole}


def test_saving_a_model_leaves_nothing_behind(tmp_path, monkeypatch):
    """`save` goes the same way, without a second try to keep anything for."""
    model = LlamaForCausalLM.from_pretrained(make_source(tmp_path / "source"))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            save(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with monkeypatch.context() as patch:
        calls = FaultyCalls(patch)
        with complete_folder(tmp_path / "out") as folder:
            (folder / "weights").write_bytes(b"1")
    flushed = [Path(path).name for name, path in calls.log if name == "fsync"]
    assert flushed == ["weights", "checkpoint", tmp_path.name]
    assert [name for name, _ in calls.log] == ["fsync", "fsync", "rename", "fsync"]


KILL_SCRIPT = """
    import json, os, random, shutil, signal, sys, time
    from pathlib import Path

    import torch

    torch.set_num_threads(1)  # a process that has used more cannot fork
    from gluprune.io import atomic
    from gluprune.checkpoints import write
    from gluprune.checkpoints.stream import prune_checkpoint

    atomic.fsync = lambda descriptor: None  # slow, and a killed process loses nothing that it wrote
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

    found = {"absent": 0, "whole": 0, "with finished shards": 0}
    while found["absent"] + found["whole"] < kills:
        child = start(slow=True)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert contents(source) == before
        if out.exists():
            found["whole"] += 1
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


# ------------------------------------------------------------------ files that lie

ODD_VALUES = [
    None, True, -1, 0, 1, 3, 2**31, 2**62, 2**63, 2**64, 10**400, 1.5, "", "F32", "BF16", "F4", "\ud800", "../x", [],
    [0], [1, 2], [2**40, 2**40], [-1, -1], [[]], {}, {"dtype": "BF16"}, "x" * 5000,
]  # fmt: skip


def split(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def join(file, text, data):
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def flip(rng, data):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 4, 30])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def odd_place(rng, document):
    """Change one value somewhere in a JSON document."""
    parents = [document]
    for parent in parents:
        values = parent.values() if isinstance(parent, dict) else parent
        parents += [value for value in values if isinstance(value, (dict, list)) and value]
    parent = rng.choice(parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    action = rng.randrange(5)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        names = ["x", "__metadata__", key + "x", "model.layers.7.mlp.up_proj.weight", "\udfff"]
        parent[rng.choice(names)] = parent[key]
    elif action == 2 and isinstance(parent[key], int):
        parent[key] += rng.choice([-8, -2, -1, 1, 2, 8, 10**6])
    else:
        parent[key] = rng.choice(ODD_VALUES)


def change_header(rng, file):
    text, data = split(file)
    header = json.loads(text)
    odd_place(rng, header)
    join(file, json.dumps(header).encode(), data)


def swap_entries(rng, file):
    text, data = split(file)
    header = json.loads(text)
    one, two = rng.choices([name for name in header if name != "__metadata__"], k=2)
    what = rng.choice(["data_offsets", "shape", "dtype"])
    header[one][what], header[two][what] = header[two][what], header[one][what]
    join(file, json.dumps(header).encode(), data)


def lie_about_length(rng, file):
    data = file.read_bytes()
    length = rng.choice([0, 1, 2**24 + 1, 10**8, 2**40, 2**63, 2**64 - 1, len(data) - 8, rng.randrange(len(data))])
    file.write_bytes(length.to_bytes(8, "little") + data[8:])


def raw_header(rng, file):
    text = rng.choice([
        b"", b"null", b"[]", b"{}", b"{", b"[" * 10**5, b'{"a":' * 10**5, b'{"a":' + b"[" * 10**5, b" {}",
        b"\xff\xfe{}",
        b'{"a": ' + b"9" * 5000 + b"}", b'{"a":{"dtype":"BF16","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[0,' + b"9" * 4000 + b'],"data_offsets":[0,0]}}', b'{"a": NaN}',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": 1}}', b'{"__metadata__": {"\\ud800": "\\ud800"}}', b'{"a": 1, "a": 1}',
    ])  # fmt: skip
    join(file, text, rng.choice([b"", split(file)[1]]))


def change_index(rng, file):
    index = json.loads(file.read_bytes())
    places, names = index["weight_map"], sorted(index["weight_map"])
    action = rng.randrange(5)
    if action == 0:
        odd_place(rng, index)
    elif action == 1:
        places[rng.choice(names)] = rng.choice(sorted(set(places.values())))
    elif action == 2:
        places[rng.choice(["model.x", *names]) + "y"] = rng.choice(list(places.values()))
    elif action == 3:
        del places[rng.choice(names)]
    else:
        lies = ["../source.safetensors", "/etc/passwd", "a/b.safetensors", "no.safetensors", "", "\0.safetensors"]
        places[rng.choice(names)] = rng.choice(lies)
    file.write_text(json.dumps(index))


def damage_any(rng, file):
    data = file.read_bytes()
    action = rng.randrange(6)
    if action == 0:
        file.write_bytes(data[: rng.randrange(len(data))])
    elif action == 1:
        file.write_bytes(data + rng.randbytes(rng.choice([1, 8, 1000])))
    elif action == 2:
        file.write_bytes(flip(rng, data))
    elif action == 3:
        file.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 8, 9, 200])))
    elif action == 4:
        file.unlink()
    else:
        file.unlink()
        file.mkdir()


def flip_header(rng, file):
    text, data = split(file)
    join(file, flip(rng, text), data)


def change_config(rng, file):
    config = json.loads(file.read_bytes())
    odd_place(rng, config)
    file.write_text(json.dumps(config))


def exchange(rng, folder):
    one, two = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def damage(rng, folder):
    shard = rng.choice(sorted(folder.glob("*.safetensors")))
    index = folder / INDEX_FILE
    cases = [
        *[(change_header, shard)] * 4, *[(flip_header, shard)] * 4, (swap_entries, shard), (lie_about_length, shard),
        (raw_header, shard), *[(damage_any, shard)] * 3, *[(change_index, index)] * 4, (damage_any, index),
        (change_config, folder / "config.json"), (damage_any, folder / "config.json"), (exchange, folder),
    ]  # fmt: skip
    change, place = rng.choice(cases)
    change(rng, place)
    return f"{change.__name__} {place.name}"


@contextmanager
def memory_below(growth):
    """The resident memory of this process rises by less than `growth` bytes at any moment of the block."""

    def status(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < growth


def prune_damaged(case, what):
    """Prune `case/source`, whatever is in it; True if something came out."""
    damaged = contents(case / "source")
    try:
        prune_checkpoint(case / "source", case / "out", **ARGUMENTS)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(case / "source") in message, f"{what}: {message}"
        assert len(message) < 1000 and message.isprintable(), what
        assert [path.name for path in case.iterdir()] == ["source"], what
    else:
        for path in (case / "out").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert sum(file.get_tensor(key).nbytes for key in file.keys()) < path.stat().st_size, what
    assert contents(case / "source") == damaged, what
    return (case / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_corrupt_files_are_refused_or_pruned(source, tmp_path, monkeypatch):
    """Whatever is in the files, a checkpoint comes out or one clear error that names the file, in little memory."""
    seed = random.randrange(10**6)
    rng, case, pruned = random.Random(seed), tmp_path / "case", 0
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: None)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"seed {seed} hangs"))
    with memory_below(150e6):
        for number in range(600):
            shutil.copytree(source, case / "source")
            what = f"seed {seed}, case {number}: {damage(rng, case / 'source')}"
            signal.alarm(30)
            pruned += prune_damaged(case, what)
            signal.alarm(0)
            shutil.rmtree(case)
    print(f"seed {seed}: {pruned} of 600 were pruned, the others refused")
    assert 10 < pruned < 300


def test_headers_that_the_library_refuses_are_refused(source, tmp_path):
    """Nothing is believed that safetensors itself would not read."""
    seed = random.randrange(10**6)
    rng, original = random.Random(seed), max(source.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    file, both = tmp_path / "case.safetensors", 0
    changes = [change_header, flip_header, swap_entries, lie_about_length, raw_header]
    for number in range(800):
        shutil.copy(original, file)
        rng.choice(changes)(rng, file)
        try:
            read_shard(file)
        except ValueError:
            continue
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            pytest.fail(f"seed {seed}, case {number}: accepted, but the library says {error}")
        both += 1
    print(f"seed {seed}: {both} accepted by both")
    assert both > 10


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS = {  # header for 10 bytes of data -> what is said about it
    "hole": ({"a": entry(0, 4), "b": entry(6, 10)}, "tensor 'b' leaves a hole before it"),
    "hole at the beginning": ({"a": entry(2, 10)}, "tensor 'a' leaves a hole before it"),
    "overlap": ({"a": entry(0, 6), "b": entry(4, 10)}, "tensor 'b' overlaps the tensor before it"),
    "the same twice": ({"a": entry(0, 10), "b": entry(0, 10)}, "tensor 'b' overlaps"),
    "too short": ({"a": entry(0, 11)}, "is truncated: "),
    "too long": ({"a": entry(0, 9)}, "has bytes after its data"),
    "nothing": ({}, "has bytes after its data"),
    "backwards": ({"a": entry(10, 0, shape=[0])}, "spans -10 bytes"),
    "shape too small": ({"a": entry(0, 10, shape=[9])}, r"spans 10 bytes, but U8 \[9\] takes 9"),
    "shape too large": ({"a": entry(0, 10, shape=[11])}, r"spans 10 bytes, but U8 \[11\] takes 11"),
    "dtype": ({"a": entry(0, 10, "F4")}, "unknown dtype 'F4': known are F64"),
    "no size": ({"a": entry(0, 10, shape=[-10])}, "must have a shape"),
    "true": ({"a": entry(0, 10, shape=[10, True])}, "must have a shape"),
    "huge sizes": ({"a": entry(0, 10, shape=[2**63, 0])}, "must have a shape"),
    "many sizes": ({"a": entry(0, 10, shape=[10] + [1] * 8)}, "must have a shape"),
    "offsets": ({"a": {"dtype": "U8", "shape": [10], "data_offsets": [0, 10, 10]}}, "two data_offsets"),
    "missing key": ({"a": {"dtype": "U8", "shape": [10]}}, "exactly dtype, shape and data_offsets"),
    "more keys": ({"a": entry(0, 10) | {"x": 1}}, "exactly dtype, shape and data_offsets"),
    "list": ({"a": []}, "exactly dtype, shape and data_offsets"),
    "name": ({"a" * 1025: entry(0, 10)}, "name of up to 1024"),
    "half a character": ({"\ud800": entry(0, 10)}, "not valid JSON"),
    "metadata": ({"__metadata__": {"x": 1}, "a": entry(0, 10)}, "__metadata__ must map strings"),
}


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS.keys())
def test_bad_headers_are_told_apart(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    join(file, json.dumps(header).encode(), bytes(10))
    with pytest.raises(ValueError, match=f"x.safetensors.*{message}"):
        read_shard(file)


def test_truncated_files_are_called_truncated(source):
    file = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole, header = file.read_bytes(), len(split(file)[0])
    cuts = ((0, "too short"), (7, "too short"), (8, "truncated"), (header // 2, "truncated or corrupt"))
    for length, message in cuts:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{file.name} is truncated.*{message}|{file.name} is {message}"):
            read_shard(file)
    for length in (header + 8, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{file.name} is truncated: {length:,} bytes"):
            read_shard(file)


NORM = "model.norm.weight"
INDEXES = {  # change of the weight map -> what is said about it
    "leads out": (lambda places: places.update({NORM: "../outside.safetensors"}), "not the name of a safetensors file"),
    "absolute": (lambda places: places.update({NORM: "/outside.safetensors"}), "not the name of a safetensors file"),
    "no safetensors": (lambda places: places.update({NORM: "model.bin"}), "not the name of a safetensors file"),
    "number": (lambda places: places.update({NORM: 3}), "not the name of a safetensors file"),
    "missing file": (lambda places: places.update({NORM: "gone.safetensors"}), "gone.safetensors"),
    "missing tensor": (lambda places: places.update(more=places[NORM]), "names tensor 'more', which .* does not hold"),
    "wrong file": (lambda places: places.update({NORM: min(places.values())}), f"holds tensor '{NORM}', which .* not"),
    "left out": (lambda places: places.pop(NORM), f"holds tensor '{NORM}', which .* does not put there"),
    "empty": (lambda places: places.clear(), "has no weight_map"),
}


@pytest.mark.parametrize("change, message", INDEXES.values(), ids=INDEXES.keys())
def test_lying_indexes_are_told_apart(source, tmp_path, change, message):
    index = json.loads((source / INDEX_FILE).read_text())
    shutil.copy(source / index["weight_map"][NORM], tmp_path / "outside.safetensors")
    assert index["weight_map"][NORM] != min(index["weight_map"].values())
    change(index["weight_map"])
    (source / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match=message):
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside.safetensors", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lying_length_allocates_nothing(tmp_path):
    """Sparse files: gigabytes on paper, nothing on the disk."""
    big, index = tmp_path / "big.safetensors", tmp_path / "index.json"
    with memory_below(20e6):
        for size, length in ((1 << 40, 1 << 39), (1 << 40, shards.MAX_JSON_BYTES + 1), (1 << 36, (1 << 36) - 8)):
            with open(big, "wb") as file:
                file.write(length.to_bytes(8, "little"))
                file.truncate(size)
            with pytest.raises(ValueError, match="big.safetensors has a header of"):
                read_shard(big)
        with open(index, "wb") as file:
            file.truncate(1 << 36)
        with pytest.raises(ValueError, match="index.json has 68,719,476,736 bytes"):
            shards.read_json_object(index)
