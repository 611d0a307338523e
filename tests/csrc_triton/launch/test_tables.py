"""Tables of tuned launches: written tables can be read, and malformed ones are rejected."""

import json

import pytest
import torch

from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma
from csrc_triton.launch import tables
from csrc_triton.launch.configs import Launch, Problem

BF16, FP16 = torch.bfloat16, torch.float16


def test_m_buckets():
    assert [tables.m_bucket(M) for M in (1, 2, 3, 16, 17, 129, 8192, 8193, 100000)] == [
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


KEY = Problem(16, 2048, 6656, BF16, 90)
ENTRY = Launch(
    "decode",
    GateUpSwap(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3, pdl=True),
    DownSplitK(block_m=16, block_n=32, block_k=128, split_k=7, num_warps=4, num_stages=3, pdl=False),
)
TUNED = {
    KEY: ENTRY,
    Problem(1, 2048, 6656, BF16, 90): Launch(
        "gemv", GateUpGemv(block_n=4, num_warps=8, pdl=False), DownGemv(block_n=8, block_k=512, num_warps=8, pdl=True)
    ),
    Problem(2048, 2048, 6656, BF16, 90): Launch(
        "prefill", GateUpTma(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=4), None
    ),
    Problem(2048, 2048, 6656, FP16, 80): Launch(
        "prefill", GateUpTile(block_m=64, block_n=128, block_k=32, num_warps=4, num_stages=3), None
    ),
    Problem(4096, 2048, 6656, BF16, 90): Launch("cublas", None, None),
}


def write(path, entries):
    path.write_text(json.dumps({"entries": entries}))
    return path


@pytest.fixture
def rows():
    return [tables.entry_to_dict(key, decision) for key, decision in TUNED.items()]


def test_table_round_trip(tmp_path, rows):
    assert tables.load_table(write(tmp_path / "gpu.json", rows)) == TUNED


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
        tables.load_table(write(path, rows))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"entries": 3}'])
def test_a_file_that_is_not_a_table(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"malformed table .*gpu\.json: "):
        tables.load_table(path)


def test_table_of_a_device(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(tables, "TUNED_DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 {device.index}GB HBM3")
    tables._device_table.cache_clear()
    write(tmp_path / "nvidia-h100-80gb-hbm3.json", rows)
    try:
        assert tables.device_table(torch.device("cuda", 80)) == TUNED
        assert tables.device_table(torch.device("cuda", 40)) is None
    finally:
        tables._device_table.cache_clear()


def test_shipped_tables_load():
    """Every table in the package is well-formed (there may be none)."""
    for path in tables.TUNED_DIRECTORY.glob("*.json"):
        assert tables.load_table(path)
