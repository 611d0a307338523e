"""Launch configurations: validity, heuristics, the chooser and tables. Nothing here runs a kernel."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton import launch
from csrc_triton.launch import (
    DownGemv,
    DownSplitK,
    GateUpGemv,
    GateUpSwap,
    GateUpTile,
    GateUpTma,
    KernelCall,
    Launch,
    choose,
    choose_path,
    heuristic,
    is_valid,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMS = tuple(launch.SHARED_MEMORY)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "M, H, dtype, sm, path",
    [
        (1, 2048, BF16, 90, "gemv"),
        (1, 2048, FP32, 80, "gemv"),
        (1, 2047, BF16, 90, "gemv"),
        (2, 2048, BF16, 90, "decode"),
        (16, 2048, FP16, 80, "decode"),
        (17, 2048, BF16, 90, "small"),
        (128, 2048, BF16, 120, "small"),
        (129, 2048, BF16, 90, "cublas"),
        (1023, 2048, BF16, 90, "cublas"),
        (1024, 2048, BF16, 90, "prefill"),
        (129, 2048, BF16, 86, "prefill"),
        (8192, 2048, BF16, 120, "prefill"),
        (129, 2048, BF16, 100, "cublas"),
        (128, 2048, BF16, 100, "small"),
        (2, 2048, FP32, 90, "cublas"),
        (2, 2047, BF16, 90, "cublas"),
        (1, 2048, FP16, 75, "cublas"),
    ],
)
def test_path_by_shape(M, H, dtype, sm, path):
    assert choose_path(M, H, 8192, dtype, sm) == path
    assert choose(M, H, 8192, dtype, sm).path == path


def test_triton_path():
    assert [launch.triton_path(M) for M in (1, 2, 16, 17, 128, 129)] == [
        "gemv",
        "decode",
        "decode",
        "small",
        "small",
        "prefill",
    ]


def test_m_buckets():
    assert [launch.m_bucket(M) for M in (1, 2, 3, 16, 17, 129, 8192, 8193, 100000)] == [
        1,
        2,
        4,
        16,
        32,
        256,
        8192,
        8192,
        8192,
    ]


SHAPES = dict(
    M=st.one_of(st.integers(1, 300), st.integers(1, 100_000)),
    H=st.one_of(st.integers(1, 20_000), st.integers(1, 160).map(lambda n: 128 * n)),
    IP=st.integers(1, 250).map(lambda n: 128 * n),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    sm=st.sampled_from(SMS),
)


@settings(max_examples=500, deadline=None)
@given(path=st.sampled_from(launch.PATHS), **SHAPES)
def test_heuristics_are_valid_everywhere(path, M, H, IP, dtype, sm):
    if path == "gemv":
        M = 1
    decision = heuristic(path, M, H, IP, dtype, sm)
    assert decision.path == path
    gate_up_kinds, down_kind = launch.PATH_KINDS[path]
    assert type(decision.gate_up) in gate_up_kinds and type(decision.down) is down_kind
    for config in (decision.gate_up, decision.down):
        assert config is None or is_valid(config, sm, M, H, IP, dtype), config


def test_prefill_kernel_by_chip_and_shape():
    def kind(M, H, IP, sm, dtype=BF16):
        return heuristic("prefill", M, H, IP, dtype, sm).gate_up

    assert kind(2048, 2048, 8192, 90) == GateUpTma(128, 128, 64, 8, 4)
    assert kind(256, 2048, 8192, 90) == GateUpTma(128, 64, 64, 8, 4)  # 128 large tiles do not fill 132 multiprocessors
    assert kind(256, 2048, 8192, 100) == GateUpTma(128, 64, 64, 8, 3)
    assert kind(2048, 2048, 8192, 120) == kind(2048, 2048, 8192, 80) == GateUpTile(128, 128, 32, 8, 3)
    assert isinstance(kind(2048, 2020, 8192, 90), GateUpTile)  # rows off the 16-byte boundary
    assert isinstance(kind(2048, 2080, 8192, 90), GateUpTile)  # a ragged last K tile


def test_splits_fill_the_chip_and_never_exceed_the_steps():
    assert heuristic("decode", 8, 2048, 8192, BF16, 90).down.split_k == 8
    assert heuristic("decode", 8, 3072, 8192, BF16, 90).down.split_k == 5
    assert heuristic("decode", 8, 16384, 8192, BF16, 90).down.split_k == 1
    assert heuristic("decode", 8, 64, 128, BF16, 90).down.split_k == 1
    assert heuristic("small", 64, 64, 128, BF16, 90).down.split_k == 2


VALID = {
    "gemv": GateUpGemv(2, 4, True),
    "swap": GateUpSwap(16, 32, 128, 4, 4, True),
    "tile": GateUpTile(128, 128, 32, 8, 3),
    "tma": GateUpTma(128, 128, 64, 8, 3),
    "down gemv": DownGemv(4, 256, 4, True),
    "split": DownSplitK(16, 64, 128, 8, 4, 4, True),
}


@pytest.mark.parametrize(
    "name, change, where",
    [
        ("gemv", dict(block_n=256), {}),  # more neurons than a pad
        ("gemv", dict(num_warps=3), {}),
        ("gemv", dict(pdl=True), dict(sm=89)),
        ("gemv", {}, dict(M=2)),
        ("swap", dict(block_m=8), {}),
        ("swap", dict(block_n=8), {}),
        ("swap", dict(block_n=48), {}),
        ("swap", dict(block_n=256), {}),
        ("swap", dict(num_stages=0), {}),
        ("swap", dict(num_stages=12), {}),  # 12 x 20 KB
        ("swap", dict(pdl=True), dict(sm=86)),
        ("tile", dict(num_stages=6), dict(sm=86)),  # 5 x 24 KB
        ("tma", {}, dict(sm=89)),
        ("tma", {}, dict(sm=120)),  # 2 x 48 + 32 KB
        ("tma", {}, dict(H=2056)),  # ragged K
        ("tma", dict(num_stages=5), {}),
        ("down gemv", {}, dict(M=2)),
        ("split", dict(split_k=0), {}),
        ("split", dict(split_k=65), {}),  # 64 steps
        ("split", dict(block_k=256), {}),  # steps beyond the pad
    ],
    ids=str,
)
def test_invalid_configurations(name, change, where):
    def valid(config, M=1, H=2048, sm=90):
        return is_valid(config, sm, M, H, 8192, BF16)

    assert valid(VALID[name])
    assert not valid(dataclasses.replace(VALID[name], **change), **where)


def test_shared_memory_limit_is_exact():
    fits = GateUpSwap(128, 32, 64, 4, 4, False)  # a stage is 24 KB; four on sm_90, three of four elsewhere
    assert fits.shared_memory(90, 2) == 96 << 10
    assert fits.shared_memory(89, 2) == 72 << 10
    assert is_valid(GateUpSwap(128, 32, 64, 4, 5, False), 89, 128, 2048, 8192, BF16)
    assert not is_valid(GateUpSwap(128, 32, 64, 4, 6, False), 89, 128, 2048, 8192, BF16)
    assert is_valid(GateUpSwap(128, 32, 64, 4, 9, False), 90, 128, 2048, 8192, BF16)
    assert not is_valid(GateUpSwap(128, 32, 64, 4, 10, False), 90, 128, 2048, 8192, BF16)
    assert not is_valid(GateUpSwap(128, 32, 64, 4, 6, False), 87, 128, 2048, 8192, BF16)  # unknown chip: the least


def test_forced_path():
    for path in launch.PATHS[1:]:
        assert choose(1, 64, 128, BF16, 90, path).path == path
    with pytest.raises(ValueError, match="got 'quick'"):
        choose(1, 64, 128, BF16, 90, "quick")
    with pytest.raises(ValueError, match="exactly one token, got 2"):
        choose(2, 64, 128, BF16, 90, "gemv")


def test_other_devices_have_a_default_and_no_table():
    assert launch.compute_capability(CPU) == launch.DEFAULT_SM == 90
    assert launch.multiprocessors(CPU, 80) == 108
    assert launch.device_table(CPU) is None


# --- tables ---

KEY = (90, 2048, 6656, 16, BF16)
ENTRY = Launch("decode", GateUpSwap(16, 64, 64, 4, 3, True), DownSplitK(16, 32, 128, 7, 4, 3, False))
TUNED = {
    KEY: ENTRY,
    (90, 2048, 6656, 1, BF16): Launch("gemv", GateUpGemv(4, 8, False), DownGemv(8, 512, 8, True)),
    (90, 2048, 6656, 2048, BF16): Launch("prefill", GateUpTma(128, 64, 64, 4, 4), None),
    (80, 2048, 6656, 2048, FP16): Launch("prefill", GateUpTile(64, 128, 32, 4, 3), None),
    (90, 2048, 6656, 4096, BF16): Launch("cublas", None, None),
}


def write(path, entries):
    path.write_text(json.dumps({"entries": entries}))
    return path


@pytest.fixture
def rows():
    return [launch.entry_to_dict(key, decision) for key, decision in TUNED.items()]


def test_table_round_trip(tmp_path, rows):
    assert launch.load_table(write(tmp_path / "gpu.json", rows)) == TUNED


def test_table_goes_before_the_heuristic():
    assert choose(9, 2048, 6656, BF16, 90, table=TUNED) == ENTRY
    assert choose(16, 2048, 6656, BF16, 90, table=TUNED) == ENTRY
    assert choose(4000, 2048, 6656, BF16, 90, table=TUNED).path == "cublas"
    for M, H, IP, dtype, sm in (
        (8, 2048, 6656, BF16, 90),  # another bucket
        (16, 3072, 6656, BF16, 90),
        (16, 2048, 6784, BF16, 90),
        (16, 2048, 6656, FP16, 90),
        (16, 2048, 6656, BF16, 80),
    ):
        assert choose(M, H, IP, dtype, sm, table=TUNED) == heuristic("decode", M, H, IP, dtype, sm) != ENTRY


def test_forced_path_uses_the_table_of_that_path_only():
    assert choose(16, 2048, 6656, BF16, 90, "decode", TUNED) == ENTRY
    assert choose(16, 2048, 6656, BF16, 90, "small", TUNED) == heuristic("small", 16, 2048, 6656, BF16, 90)


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows[0].pop("tokens"),
        lambda rows: rows[0].update(tokens=15),
        lambda rows: rows[0].update(sm="ninety"),
        lambda rows: rows[0].update(dtype="int8"),
        lambda rows: rows[0].update(path="fast"),
        lambda rows: rows[0].update(path="gemv"),
        lambda rows: rows[0].update(down=None),
        lambda rows: rows[0]["gate_up"].update(kind="GateUpFast"),
        lambda rows: rows[0]["gate_up"].update(block_z=16),
        lambda rows: rows[0]["gate_up"].update(block_n=48),
        lambda rows: rows[0]["gate_up"].pop("block_n"),
        lambda rows: rows[0]["gate_up"].update(num_stages="4"),
        lambda rows: rows.append(3),
        lambda rows: rows.append(dict(rows[0])),
    ],
)
def test_malformed_table(tmp_path, rows, damage):
    path = tmp_path / "nvidia-h100.json"
    damage(rows)
    with pytest.raises(ValueError, match=r"malformed table .*nvidia-h100\.json: "):
        launch.load_table(write(path, rows))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"entries": 3}'])
def test_table_that_is_no_table(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"malformed table .*gpu\.json: "):
        launch.load_table(path)


def test_table_of_a_device(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(launch, "TUNED_DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 {device.index}GB HBM3")
    launch._device_table.cache_clear()
    write(tmp_path / "nvidia-h100-80gb-hbm3.json", rows)
    try:
        assert launch.device_table(torch.device("cuda", 80)) == TUNED
        assert launch.device_table(torch.device("cuda", 40)) is None
    finally:
        launch._device_table.cache_clear()


def test_shipped_tables_load():
    """Every table in the package is well formed (there may be none)."""
    for path in launch.TUNED_DIRECTORY.glob("*.json"):
        assert launch.load_table(path)


def test_compilations_are_told_apart():
    """What `KernelCall.run` has compiled is found again exactly where Triton would compile the same."""
    kernel = SimpleNamespace(fn=test_compilations_are_told_apart, do_not_specialize=["M"])
    memory = torch.zeros(64, dtype=torch.float16)
    args = dict(x=memory[:8], bias=None, M=3, H=32)

    def key(constants=(("BLOCK", 16),), num_warps=4, num_stages=2, launch_pdl=False, **changes):
        return KernelCall(kernel, (1,), args | changes, dict(constants), num_warps, num_stages, launch_pdl)._key()

    same = [key(), key(M=1), key(M=16), key(H=64), key(x=memory[8:40])]
    assert len(set(same)) == 1
    others = [
        key(H=40),
        key(H=1),
        key(H=1 << 32),
        key(x=memory[1:9]),
        key(x=memory[:8].float()),
        key(x=memory[:8].to("meta")),
        key(bias=memory[:8]),
        key(constants=(("BLOCK", 32),)),
        key(num_warps=8),
        key(num_stages=3),
        key(launch_pdl=True),
    ]
    assert len({same[0], *others}) == 1 + len(others)
