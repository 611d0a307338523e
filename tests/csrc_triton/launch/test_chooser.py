"""The chooser: paths by problem, heuristics, and tables, which take precedence. No test here runs a kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma
from csrc_triton.launch import chooser, device, tables
from csrc_triton.launch.chooser import choose, choose_path, heuristic
from csrc_triton.launch.configs import Problem
from csrc_triton.launch.paths import PATH_KINDS, PATHS
from tests.csrc_triton.launch.test_tables import ENTRY, TUNED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMS = tuple(device.SHARED_MEMORY)
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
    assert choose_path(Problem(M, H, 8192, dtype, sm)) == path
    assert choose(Problem(M, H, 8192, dtype, sm)).path == path


def test_triton_path():
    assert [chooser.triton_path(M) for M in (1, 2, 16, 17, 128, 129)] == [
        "gemv",
        "decode",
        "decode",
        "small",
        "small",
        "prefill",
    ]


SHAPES = dict(
    M=st.one_of(st.integers(1, 300), st.integers(1, 100_000)),
    H=st.one_of(st.integers(1, 20_000), st.integers(1, 160).map(lambda n: 128 * n)),
    IP=st.integers(1, 250).map(lambda n: 128 * n),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    sm=st.sampled_from(SMS),
)


@settings(max_examples=500, deadline=None)
@given(path=st.sampled_from(PATHS), **SHAPES)
def test_heuristics_are_valid_everywhere(path, M, H, IP, dtype, sm):
    if path == "gemv":
        M = 1
    problem = Problem(M, H, IP, dtype, sm)
    decision = heuristic(path, problem)
    assert decision.path == path
    gate_up_kinds, down_kind = PATH_KINDS[path]
    assert type(decision.gate_up) in gate_up_kinds and type(decision.down) is down_kind
    for config in (decision.gate_up, decision.down):
        assert config is None or config.valid(problem), config


def test_prefill_kernel_by_architecture_and_shape():
    def kind(M, H, IP, sm, dtype=BF16):
        return heuristic("prefill", Problem(M, H, IP, dtype, sm)).gate_up

    assert kind(2048, 2048, 8192, 90) == GateUpTma(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4)
    assert kind(256, 2048, 8192, 90) == GateUpTma(
        block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=4
    )  # 128 large tiles do not fill 132 multiprocessors
    assert kind(256, 2048, 8192, 100) == GateUpTma(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3)
    assert (
        kind(2048, 2048, 8192, 120)
        == kind(2048, 2048, 8192, 80)
        == GateUpTile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3)
    )
    assert isinstance(kind(2048, 2020, 8192, 90), GateUpTile)  # rows off the 16-byte boundary
    assert isinstance(kind(2048, 2080, 8192, 90), GateUpTile)  # a ragged last K tile


def test_splits_fill_the_gpu_and_never_exceed_the_steps():
    assert heuristic("decode", Problem(8, 2048, 8192, BF16, 90)).down.split_k == 8
    assert heuristic("decode", Problem(8, 3072, 8192, BF16, 90)).down.split_k == 5
    assert heuristic("decode", Problem(8, 16384, 8192, BF16, 90)).down.split_k == 1
    assert heuristic("decode", Problem(8, 64, 128, BF16, 90)).down.split_k == 1
    assert heuristic("small", Problem(64, 64, 128, BF16, 90)).down.split_k == 2


def test_forced_path():
    for path in PATHS[1:]:
        assert choose(Problem(1, 64, 128, BF16, 90), path).path == path
    with pytest.raises(ValueError, match="got 'quick'"):
        choose(Problem(1, 64, 128, BF16, 90), "quick")
    with pytest.raises(ValueError, match="exactly one token, got 2"):
        choose(Problem(2, 64, 128, BF16, 90), "gemv")


def test_other_devices_have_a_default_and_no_table():
    assert device.compute_capability(CPU) == device.DEFAULT_SM == 90
    assert device.sm_count(CPU, 80) == 108
    assert tables.device_table(CPU) is None


def test_tables_take_precedence_over_the_heuristic():
    assert choose(Problem(9, 2048, 6656, BF16, 90), table=TUNED) == ENTRY
    assert choose(Problem(16, 2048, 6656, BF16, 90), table=TUNED) == ENTRY
    assert choose(Problem(4000, 2048, 6656, BF16, 90), table=TUNED).path == "cublas"
    for problem in (
        Problem(8, 2048, 6656, BF16, 90),  # another bucket
        Problem(16, 3072, 6656, BF16, 90),
        Problem(16, 2048, 6784, BF16, 90),
        Problem(16, 2048, 6656, FP16, 90),
        Problem(16, 2048, 6656, BF16, 80),
    ):
        assert choose(problem, table=TUNED) == heuristic("decode", problem) != ENTRY


def test_forced_path_uses_the_table_of_that_path_only():
    assert choose(Problem(16, 2048, 6656, BF16, 90), "decode", TUNED) == ENTRY
    assert choose(Problem(16, 2048, 6656, BF16, 90), "small", TUNED) == heuristic(
        "small", Problem(16, 2048, 6656, BF16, 90)
    )
