"""fp8 weights in the kernels, against float64 of the scaled weights. On the CPU the kernels run in the interpreter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton.glu.dequantize import plan_dequantize
from csrc_triton.glu.forward import glu_mlp, plan, plan_checked, shipped_plans
from csrc_triton.launch import device
from csrc_triton.launch.chooser import choose, choose_path, heuristic
from csrc_triton.launch.configs import Problem
from csrc_triton.launch.paths import FP8_PATHS, PATHS
from csrc_triton.layout import FP8
from tests.csrc_triton.glu.test_forward import (
    CASES,
    DEVICE,
    RANDOM,
    TOKENS,
    TOKENS_OF_SMALL_BLOCKS,
    decisions,
    interpreted,
)
from tests.csrc_triton.launch.test_tables import ENTRY, TUNED
from tests.helpers.glu_cases import TOLERANCE, error, make_case
from tests.helpers.marks import slow
from tests.helpers.poison import poison_empty

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.slow
@settings(RANDOM, max_examples=150)
@given(M=TOKENS, path=st.sampled_from((None, *PATHS)), **CASES)
def test_shipped_configurations(M, path, **shape):
    case = make_case(M=M, device=DEVICE, fp8=True, **shape)
    y = glu_mlp(case.x, case.weights, path=None if path == "gemv" and M > 1 else path)
    assert y.shape == case.x.shape and y.dtype == case.x.dtype
    assert error(y, case) < TOLERANCE[case.x.dtype]


@pytest.mark.slow
@interpreted
@settings(RANDOM, max_examples=200)
@given(data=st.data(), M=TOKENS_OF_SMALL_BLOCKS, **CASES)
def test_small_blocks(data, M, **shape):
    """On the paths whose kernels read fp8."""
    case = make_case(M=M, device=DEVICE, fp8=True, **shape)
    decision = data.draw(decisions(M, case.weights.down.shape[1], ("decode", "small")))
    y = plan(case.x, case.weights, decision).run()
    assert error(y, case) < TOLERANCE[case.x.dtype]


@pytest.mark.parametrize(
    "activation, packed", [("silu", True), pytest.param("gelu_tanh", False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("H", [80, 90])  # rows on 16-byte boundaries, or not
@pytest.mark.parametrize("dtype", [FP16, *slow(FP32)])
@pytest.mark.parametrize("path", PATHS)
def test_paths(path, dtype, H, activation, packed):
    seed = torch.seed() % 2**31
    print("seed", seed)
    M = 1 if path == "gemv" else 37
    options = dict(activation=activation, biases="gud", device=DEVICE, packed=packed, fp8=True)
    case = make_case(seed, M, H, 197, dtype, **options)
    assert error(glu_mlp(case.x, case.weights, path=path), case) < TOLERANCE[dtype]


@pytest.mark.parametrize("M, kernels", [(1, 2), (5, 3), (37, 3), (150, 5)])
def test_few_tokens_read_the_fp8_weights(M, kernels):
    case = make_case(0, M, 64, 100, FP16, fp8=True, device=DEVICE)
    plan = plan_checked(case.x, case.weights)
    given = {case.weights.gate_up.data_ptr(), case.weights.down.data_ptr()}
    read = [
        call.kernel.__name__
        for call in plan.calls
        if any(torch.is_tensor(value) and value.data_ptr() in given for value in vars(call).get("args", {}).values())
    ]
    dequantized = ["dequantize_kernel"] * 2  # gate and down start where the weights start
    assert (
        read
        == {
            1: ["gate_up_gemv_kernel", "down_gemv_kernel"],
            5: ["gate_up_swap_kernel", "down_splitk_kernel"],
            37: ["gate_up_swap_kernel", "down_splitk_kernel"],
            150: dequantized,
        }[M]
    )
    assert len(plan.calls) >= kernels


@settings(RANDOM, max_examples=10)
@given(**{name: CASES[name] for name in ("seed", "H", "I", "packed")}, dtype=st.sampled_from((FP32, FP16)))
def test_dequantized_weights_are_exact(seed, H, I, packed, dtype):
    weights = make_case(seed, 1, H, I, dtype, packed=packed, fp8=True, device=DEVICE).weights
    plain, calls = plan_dequantize(weights)
    for call in calls:
        call.run()
    expected = zip(weights.gate_up, (weights.gate_scale, weights.up_scale))
    for half, (values, scale) in zip(plain.gate_up, expected):
        assert torch.equal(half[:I].double(), values[:I].double() * scale.double()[:, None])
        assert half[I:].eq(0).all()
    assert torch.equal(plain.down.double(), weights.down.double() * weights.down_scale.double()[:, None])
    assert not plain.is_fp8 and plain.gate_up.is_contiguous() and plain.down.dtype == dtype


@pytest.mark.parametrize("path", [path for path in PATHS if path != "gemv"])
def test_same_bits_twice(path):
    case = make_case(torch.seed() % 2**31, 21, 80, 150, FP16, biases="gud", device=DEVICE, fp8=True)
    first, second = (glu_mlp(case.x, case.weights, path=path) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(up_scale=None), ValueError, "gate_scale, up_scale and down_scale must be given together"),
        (dict(down_scale=None), ValueError, "gate_scale, up_scale and down_scale must be given together"),
        (dict(gate_scale=torch.ones(128)), ValueError, r"gate_scale must be \[7\]"),
        (dict(down_scale=torch.ones(7)), ValueError, r"down_scale must be \[24\]"),
        (dict(up_scale=torch.ones(7, dtype=FP16)), TypeError, "up_scale must be torch.float32 on cpu like x, got"),
        (dict(down=torch.zeros(24, 128)), TypeError, "down must be torch.float8_e4m3fn on cpu, got torch.float32"),
        (dict(gate_up=torch.zeros(2, 128, 24)), TypeError, "gate_up must be torch.float8_e4m3fn on cpu, got"),
        (dict(gate_scale=None, up_scale=None, down_scale=None), TypeError, "gate_up must be torch.float32 on cpu like"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(change, kind, message):
    case = make_case(3, 2, 24, 7, fp8=True)
    with pytest.raises(kind, match=message):
        glu_mlp(case.x, dataclasses.replace(case.weights, **change))


def test_old_gpus_are_refused(monkeypatch):
    case = make_case(3, 2, 24, 7, fp8=True)
    monkeypatch.setattr("csrc_triton.glu.weights.compute_capability", lambda device: 86)
    with pytest.raises(ValueError, match=r"fp8 weights need compute capability 8.9, cpu has 8.6"):
        glu_mlp(case.x, case.weights)
    glu_mlp(case.x, make_case(3, 2, 24, 7).weights)
    monkeypatch.setattr("csrc_triton.glu.weights.compute_capability", lambda device: 89)
    glu_mlp(case.x, case.weights)


@pytest.mark.parametrize(
    "M, H, dtype, sm, path",
    [
        (1, 2047, BF16, 90, "gemv"),
        (16, 2048, BF16, 89, "decode"),
        (128, 2048, FP16, 100, "small"),
        (16, 2040, BF16, 90, "cublas"),  # rows of 2-byte weights would be aligned
        (16, 2048, FP32, 90, "cublas"),
        (129, 2048, BF16, 90, "cublas"),
        (1024, 2048, BF16, 90, "prefill"),
    ],
)
def test_path_by_shape(M, H, dtype, sm, path):
    problem = Problem(M, H, 8192, dtype, sm, fp8=True)
    assert choose_path(problem) == path
    launch = choose(problem)
    assert launch.path == path
    if path not in FP8_PATHS:  # what follows the dequantization
        assert launch == heuristic(path, problem._replace(fp8=False))


def test_tables_are_of_other_weights():
    """A tuned entry was timed with weights of the tokens' dtype: it serves only where the weights become that."""
    problem = next(problem for problem, launch in TUNED.items() if launch == ENTRY)
    assert problem.M <= 128 and choose(problem, table=TUNED) == ENTRY
    fp8 = problem._replace(fp8=True)
    assert choose(fp8, table=TUNED) == heuristic(choose_path(fp8), fp8) != ENTRY
    long, tuned = next((key, launch) for key, launch in TUNED.items() if key.M == 2048 and key.sm == 90)
    assert choose(long._replace(fp8=True), tuned.path, TUNED) == tuned


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(FP8_PATHS),
    M=st.integers(1, 128),
    H=st.one_of(st.integers(1, 20_000), st.integers(1, 160).map(lambda n: 128 * n)),
    IP=st.integers(1, 250).map(lambda n: 128 * n),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    sm=st.sampled_from([sm for sm in device.SHARED_MEMORY if sm >= 89]),
)
def test_heuristics_are_valid_and_avoid_wgmma(path, M, H, IP, dtype, sm):
    problem = Problem(1 if path == "gemv" else M, H, IP, dtype, sm, fp8=True)
    launch = heuristic(path, problem)
    assert launch.gate_up.valid(problem) and launch.down.valid(problem)
    if path != "gemv":
        assert 2 * launch.gate_up.block_n < 64 and launch.down.block_n < 64


def test_shared_memory_counts_bytes_of_weights():
    plain, fp8 = (Problem(16, 2048, 8192, BF16, 90, fp8) for fp8 in (False, True))
    launch = heuristic("decode", fp8)
    assert launch.gate_up.shared_memory(fp8) == 4 * 128 * (16 * 2 + 2 * 16)
    assert launch.gate_up.shared_memory(plain) == 4 * 128 * (16 * 2 + 2 * 16 * 2)
    assert launch.down.shared_memory(fp8) == 4 * 128 * (16 * 2 + 32)


@pytest.mark.parametrize("sm", [89, 90, 100, 120])
def test_shipped_plans(sm):
    plans = shipped_plans(sm, BF16, 2048, 6554, fp8=True)
    kernels = {call.kernel.__name__ for _, _, call in plans}
    assert kernels == {
        "dequantize_kernel",
        "gate_up_gemv_kernel",
        "down_gemv_kernel",
        "gate_up_swap_kernel",
        "down_splitk_kernel",
        "sum_partials_kernel",
    }
    for label, _, call in plans:
        assert label.endswith("/" + call.kernel.__name__)
        read = {value.dtype for value in call.args.values() if torch.is_tensor(value)}
        assert (FP8 in read) == (call.kernel.__name__ != "sum_partials_kernel")
        assert set(call.args) | set(call.constants) == set(call.kernel.arg_names)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("M", [1, 2, 16, 17, 64, 128, 200, 1000])
@pytest.mark.parametrize("I", [3277, 7373])
def test_on_gpu(I, M, dtype):
    seed = torch.seed() % 2**31
    print("seed", seed)
    case = make_case(seed, M, 1024, I, dtype, biases="gud", device="cuda", fp8=True)
    assert error(glu_mlp(case.x, case.weights), case) < TOLERANCE[dtype]
