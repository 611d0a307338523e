"""Pruning on disk: corrupt files, and headers and indexes that contradict the data."""

import json
import random
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io import atomic, shards
from gluprune.io.shards import INDEX_FILE, read_shard
from tests.helpers.streaming import contents
from tests.helpers.streaming_faults import ARGUMENTS

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


def change_length(rng, file):
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
        wrong = ["../source.safetensors", "/etc/passwd", "a/b.safetensors", "no.safetensors", "", "\0.safetensors"]
        places[rng.choice(names)] = rng.choice(wrong)
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
        *[(change_header, shard)] * 4, *[(flip_header, shard)] * 4, (swap_entries, shard), (change_length, shard),
        (raw_header, shard), *[(damage_any, shard)] * 3, *[(change_index, index)] * 4, (damage_any, index),
        (change_config, folder / "config.json"), (damage_any, folder / "config.json"), (exchange, folder),
    ]  # fmt: skip
    change, place = rng.choice(cases)
    change(rng, place)
    return f"{change.__name__} {place.name}"


@contextmanager
def memory_below(growth):
    """Check that the peak resident memory of this process grows by less than `growth` bytes within the block."""

    def status(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < growth


@contextmanager
def time_below(seconds, what):
    """Stop what hangs within the block; no alarm is left to a later test."""

    def stop(*_):
        pytest.fail(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prune_damaged(case, what):
    """Prune `case/source`; return whether a checkpoint was written."""
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_corrupt_files_are_rejected_or_pruned(source, tmp_path, monkeypatch):
    """Any content leads either to a checkpoint or to one clear error that names the file, with little memory."""
    seed = random.randrange(10**6)
    rng, case, pruned = random.Random(seed), tmp_path / "case", 0
    monkeypatch.setattr(atomic, "fsync", lambda descriptor: None)
    with memory_below(150e6):
        for number in range(600):
            shutil.copytree(source, case / "source")
            what = f"seed {seed}, case {number}: {damage(rng, case / 'source')}"
            with time_below(30, what):
                pruned += prune_damaged(case, what)
            shutil.rmtree(case)
    print(f"seed {seed}: {pruned} of 600 were pruned, the others rejected")
    assert 10 < pruned < 300


def test_headers_that_the_library_rejects_are_rejected(source, tmp_path):
    """No header is accepted that the safetensors library rejects."""
    seed = random.randrange(10**6)
    rng, original = random.Random(seed), max(source.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    file, both = tmp_path / "case.safetensors", 0
    changes = [change_header, flip_header, swap_entries, change_length, raw_header]
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


HEADERS = {  # header for 10 bytes of data -> error message
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
def test_bad_headers_get_specific_messages(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    join(file, json.dumps(header).encode(), bytes(10))
    with pytest.raises(ValueError, match=f"x.safetensors.*{message}"):
        read_shard(file)


def test_truncated_files_are_reported_as_truncated(source):
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


INDEXES = {  # change of the weight map -> error message
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
def test_wrong_indexes_get_specific_messages(source, tmp_path, change, message):
    index = json.loads((source / INDEX_FILE).read_text())
    shutil.copy(source / index["weight_map"][NORM], tmp_path / "outside.safetensors")
    assert index["weight_map"][NORM] != min(index["weight_map"].values())
    change(index["weight_map"])
    (source / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match=message):
        prune_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside.safetensors", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_wrong_length_allocates_nothing(tmp_path):
    """Sparse files: gigabytes in size, almost nothing on disk."""
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
