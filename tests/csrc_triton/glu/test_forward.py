"""glu_mlp end to end, against float64. On the CPU the kernels run in Triton's interpreter."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.forward import _aligned, glu_mlp, plan, shipped_plans
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma
from csrc_triton.launch.call import KernelCall
from csrc_triton.launch.configs import Launch
from csrc_triton.launch.device import SHARED_MEMORY
from csrc_triton.launch.paths import PATHS
from tests.helpers.glu_cases import LAYOUTS, TOLERANCE, apart, error, make_case
from tests.helpers.marks import slow
from tests.helpers.poison import poison_empty

WIDTHS = (7373, 6554, 5735, 4916, 4096, 3277)  # widths of Llama-3.2 at pruning ratios 10 ... 60 %
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter is used without a GPU
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="blocks chosen for the interpreter")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


SEEDS = st.integers(0, 2**31)
TOKENS = st.one_of(st.integers(0, 3), st.integers(0, 200))
TOKENS_OF_SMALL_BLOCKS = st.one_of(st.just(1), st.integers(1, 70))
CASES = dict(
    seed=SEEDS,
    H=st.integers(1, 100),
    I=st.integers(1, 260),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    activation=st.sampled_from(("silu", "gelu_tanh")),
    biases=st.sampled_from(("", "", "g", "u", "d", "gu", "gud")),
    layout=st.sampled_from(LAYOUTS),
    packed=st.booleans(),
)
RANDOM = settings(
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@settings(RANDOM, max_examples=150)
@given(M=TOKENS, path=st.sampled_from((None, *PATHS)), **CASES)
def test_shipped_configurations(M, path, **shape):
    case = make_case(M=M, device=DEVICE, **shape)
    if path == "gemv" and M > 1:
        path = None
    y = glu_mlp(case.x, case.weights, path=path)
    assert y.shape == case.x.shape and y.dtype == case.x.dtype
    assert error(y, case) < TOLERANCE[case.x.dtype]


@pytest.mark.parametrize("I, M", [(7, 1), (128, 0), (128, 5), (197, 40)])
@pytest.mark.parametrize(
    "biases, activation, dtype", [("gud", "silu", torch.float32), ("", "gelu_tanh", torch.float16)]
)
def test_weights_that_are_apart(I, M, biases, activation, dtype):
    case = make_case(I + M, M, 40, I, dtype, activation=activation, biases=biases, device=DEVICE)
    for path in (None, "cublas"):
        assert error(glu_mlp(case.x, apart(case.weights), path=path), case) < TOLERANCE[dtype]


def power(low: int, high: int):
    return st.sampled_from([1 << n for n in range(low, high + 1)])


@st.composite
def decisions(draw, M: int, IP: int, tiled=("decode", "small", "prefill")) -> Launch:
    """Launches with small blocks, so that a small problem has many programs, K steps and tails."""
    pdl = draw(st.booleans())
    path = draw(st.sampled_from(tiled + ("gemv",) * (M == 1)))
    if path == "gemv":
        gate_up = GateUpGemv(block_n=draw(power(3, 6)), num_warps=4, pdl=pdl)
        return Launch(
            path, gate_up, DownGemv(block_n=draw(power(3, 6)), block_k=draw(power(4, 8)), num_warps=4, pdl=pdl)
        )
    tile = dict(
        block_m=draw(power(4, 6)), block_n=draw(power(5, 7)), block_k=draw(power(4, 6)), num_warps=4, num_stages=2
    )
    if path == "prefill":
        return Launch(path, draw(st.sampled_from((GateUpTile, GateUpTma)))(**tile), None)
    block_k = draw(power(5, 7))
    split_k = draw(st.integers(1, min(7, IP // block_k)))
    down = DownSplitK(
        block_m=draw(power(4, 6)),
        block_n=draw(power(5, 6)),
        block_k=block_k,
        split_k=split_k,
        num_warps=4,
        num_stages=2,
        pdl=pdl,
    )
    return Launch(path, GateUpSwap(**tile, pdl=pdl), down)


@pytest.mark.slow
@interpreted
@settings(RANDOM, max_examples=200)
@given(data=st.data(), M=TOKENS_OF_SMALL_BLOCKS, **CASES)
def test_small_blocks(data, M, **shape):
    case = make_case(M=M, device=DEVICE, **shape)
    problem = case.weights.problem(case.x)
    decision = data.draw(decisions(M, problem.I_padded))
    if isinstance(decision.gate_up, GateUpTma) and not decision.gate_up.valid(problem):
        decision = dataclasses.replace(decision, gate_up=GateUpTile(**vars(decision.gate_up)))
    y = plan(case.x, case.weights, decision).run()
    assert error(y, case) < TOLERANCE[case.x.dtype]


@pytest.mark.parametrize("packed", [True, *slow(False)])
@pytest.mark.parametrize("H", [16, *slow(96)])
@pytest.mark.parametrize("path", PATHS)
def test_aligned_sizes(path, H, packed):
    """Sizes without tails in H take the unmasked loops and, for prefill, the descriptors."""
    seed = torch.seed() % 2**31
    print("seed", seed)
    M = 1 if path == "gemv" else 150
    case = make_case(seed, M, H, 197, torch.float16, biases="gud", device=DEVICE, packed=packed)
    assert error(glu_mlp(case.x, case.weights, path=path), case) < TOLERANCE[torch.float16]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("I", WIDTHS)
def test_pruned_widths(I):
    """The paper's widths at a small H, in blocks large enough for the interpreter."""
    seed = torch.seed() % 2**31
    print("seed", seed)
    splits = DownSplitK(block_m=16, block_n=64, block_k=64, split_k=5, num_warps=4, num_stages=2, pdl=False)
    plans = {
        1: Launch(
            "gemv",
            GateUpGemv(block_n=64, num_warps=4, pdl=False),
            DownGemv(block_n=16, block_k=256, num_warps=4, pdl=False),
        ),
        5: Launch(
            "decode", GateUpSwap(block_m=16, block_n=128, block_k=32, num_warps=4, num_stages=2, pdl=False), splits
        ),
        33: Launch("prefill", GateUpTma(block_m=64, block_n=128, block_k=32, num_warps=4, num_stages=2), None),
        34: Launch("prefill", GateUpTile(block_m=64, block_n=128, block_k=32, num_warps=4, num_stages=2), None),
        35: Launch("cublas", None, None),
    }
    for (M, decision), dtype in zip(plans.items(), 3 * (torch.float16, torch.float32), strict=False):
        case = make_case(seed, M, 32, I, dtype)
        y = plan(case.x, case.weights, decision).run()
        assert error(y, case) < TOLERANCE[dtype], decision


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_same_bits_twice(path):
    seed = torch.seed() % 2**31
    print("seed", seed)
    M = 1 if path == "gemv" else 21
    case = make_case(seed, M, 72, 333, torch.float16, biases="gud", device=DEVICE)
    first, second = (glu_mlp(case.x, case.weights, path=path) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "gemv"])
def test_infinite_token_stays_in_its_row(path):
    seed = torch.seed() % 2**31
    print("seed", seed)
    case = make_case(seed, 20, 64, 100, torch.float16, device=DEVICE)
    expected = glu_mlp(case.x, case.weights, path=path)
    case.x[7, 3] = float("inf")
    y = glu_mlp(case.x, case.weights, path=path)
    others = [m for m in range(20) if m != 7]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("path", [None, *PATHS])
def test_no_tokens(path):
    case = make_case(0, 0, 24, 7, device=DEVICE)
    assert glu_mlp(case.x, case.weights, path=path).shape == (0, 24)


def test_input_is_not_changed():
    case = make_case(1, 9, 40, 77, biases="gud", layout="unaligned rows", device=DEVICE)
    tensors = [v for v in (case.x, *vars(case.weights).values()) if torch.is_tensor(v)]
    before = [tensor.clone() for tensor in tensors]
    for path in PATHS[1:]:
        glu_mlp(case.x, case.weights, path=path)
    assert len(tensors) == 6
    for old, new in zip(before, tensors, strict=True):
        torch.testing.assert_close(new, old, atol=0, rtol=0, equal_nan=True)


def test_no_autograd():
    case = make_case(2, 5, 40, 77, device=DEVICE)
    case.weights.down.requires_grad_()
    for path in PATHS[1:]:
        assert not glu_mlp(case.x, case.weights, path=path).requires_grad


def test_launches_on_the_device_of_x(monkeypatch):
    current = []
    device_of = torch.cuda.device_of

    class Guard(device_of):
        def __init__(self, tensor):
            super().__init__(tensor)
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)
            return super().__enter__()

        def __exit__(self, *error):
            current.pop()
            return super().__exit__(*error)

    seen = []
    run = KernelCall.run
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(KernelCall, "run", lambda call: (seen.append(current[-1]), run(call)))
    case = make_case(5, 2, 32, 40, device=DEVICE)
    glu_mlp(case.x, case.weights, path="decode")
    assert len(seen) == 3 and all(tensor is case.x for tensor in seen)


def halves_apart(distance):
    return torch.zeros(7000).as_strided((2, 128, 24), (distance, 24, 1))


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(x=torch.zeros(2, 3, 24)), ValueError, r"x must be \[M, H\] with H >= 1, got \[2, 3, 24\]"),
        (dict(x=torch.zeros(2, 25)), ValueError, r"gate_up must be \[2, 128, 25\]"),
        (dict(x=torch.zeros(2, 24, dtype=torch.float64)), TypeError, "x must be one of bfloat16, float16, float32"),
        (dict(x=torch.zeros(2, 24, dtype=torch.float16)), TypeError, "gate_up must be torch.float16 on cpu like x"),
        (dict(intermediate_size=0), ValueError, "intermediate_size must be at least 1, got 0"),
        (dict(intermediate_size=129), ValueError, r"gate_up must be \[2, 256, 24\]"),
        (dict(activation="relu"), ValueError, "activation must be one of silu, gelu_tanh, got 'relu'"),
        (dict(down=torch.zeros(128, 24).t()), ValueError, r"down must be contiguous .* got strides \(1, 24\)"),
        (dict(down=torch.zeros(24 * 128 + 1)[1:].view(24, 128)), ValueError, "down must be contiguous from a 16-byte"),
        (dict(gate_up=torch.zeros(24, 2, 128).movedim(0, 2)), ValueError, "gate_up must be contiguous from a 16-byte"),
        (dict(gate_up=halves_apart(6 * 24)), ValueError, r"gate_up must be contiguous .* strides \(144, 24, 1\)"),
        (dict(gate_up=halves_apart(7 * 24 + 4)), ValueError, r"gate_up must be contiguous .* strides \(172, 24, 1\)"),
        (dict(up=torch.zeros(7, 24)), ValueError, r"gate_up must be \[1, 7, 24\]"),
        (dict(gate_up=torch.zeros(1, 7, 24), up=torch.zeros(8, 24)), ValueError, r"up must be \[7, 24\]"),
        (
            dict(gate_up=torch.zeros(1, 7, 24), up=torch.zeros(24, 7).t()),
            ValueError,
            "up must be contiguous from a 16-",
        ),
        (dict(gate_up=torch.zeros(1, 7, 24), up=torch.zeros(169)[1:].view(7, 24)), ValueError, "up must be contiguous"),
        (dict(gate_up=torch.zeros(1, 7, 24), up=torch.zeros(7, 24).half()), TypeError, "up must be torch.float32"),
        (dict(gate_bias=torch.zeros(128)), ValueError, r"gate_bias must be \[7\]"),
        (dict(down_bias=torch.zeros(24, dtype=torch.float16)), TypeError, "down_bias must be torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(change, kind, message):
    case = make_case(3, 2, 24, 7)
    x = change.get("x", case.x)
    weights = dataclasses.replace(case.weights, **{name: value for name, value in change.items() if name != "x"})
    with pytest.raises(kind, match=message):
        glu_mlp(x, weights)


@pytest.mark.parametrize("M", [1, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_aligned(layout, M):
    """Rows meet the requirements of descriptors and 16-byte loads; x is copied only if its rows do not."""
    x = make_case(8, M, 40, 7, torch.float16, layout=layout).x
    y = _aligned(x)
    assert torch.equal(x, y)
    assert y.stride(1) == 1 and y.stride(0) >= 40 and y.stride(0) % 8 == 0 and y.data_ptr() % 16 == 0
    held = layout in ("contiguous", "aligned rows") or (
        M == 1 and layout in ("unaligned rows", "transposed", "expanded")
    )
    assert (y.data_ptr() == x.data_ptr()) == held


def test_rows_that_cannot_be_aligned_are_not_copied():
    x = make_case(8, 6, 41, 7, torch.float16).x
    assert _aligned(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("M", [0, 2])
def test_bad_path(M):
    case = make_case(4, M, 24, 7)
    with pytest.raises(ValueError, match=r"path must be one of gemv, .* cublas or None, got 'fast'"):
        glu_mlp(case.x, case.weights, path="fast")
    if M > 1:
        with pytest.raises(ValueError, match="path 'gemv' takes exactly one token, got 2"):
            glu_mlp(case.x, case.weights, path="gemv")


def test_what_needs_one_buffer():
    case = make_case(5, 2, 24, 7)
    with pytest.raises(ValueError, match="path 'decode' needs gate and up in one buffer; allowed: 'cublas'"):
        glu_mlp(case.x, apart(case.weights), path="decode")
    with pytest.raises(ValueError, match="fp8 weights of gate and up must be in one buffer"):
        glu_mlp(case.x, apart(make_case(5, 2, 24, 7, fp8=True).weights))


@pytest.mark.parametrize("sm", SHARED_MEMORY)
@pytest.mark.parametrize("H, I", [(2048, 6554), (3072, 7373), (100, 33)])
def test_shipped_plans(sm, H, I):
    """Every kernel that can be launched is planned, on meta tensors, for the given shape."""
    plans = shipped_plans(sm, torch.bfloat16, H, I)
    kernels = {call.kernel.__name__ for _, _, call in plans}
    gemms = "gate_up_tma_kernel" if 90 <= sm < 120 and H > 100 else "gate_up_tile_kernel"
    assert kernels == {
        "gate_up_gemv_kernel",
        "down_gemv_kernel",
        "gate_up_swap_kernel",
        "down_splitk_kernel",
        "sum_partials_kernel",
        "act_mul_kernel",
        gemms,
    }
    assert {M for _, M, _ in plans} >= {1, 16, 128, 2048}
    for label, M, call in plans:
        assert isinstance(call, KernelCall) and label.endswith("/" + call.kernel.__name__)
        tensors = [getattr(value, "base", value) for value in call.args.values()]
        assert all(value.is_meta for value in tensors if torch.is_tensor(value))
        assert all(1 <= n <= limit for n, limit in zip(call.grid, (2**31 - 1, 65535, 65535), strict=False))
        assert call.args.get("I", I) == I and call.args.get("M", M) == M
        assert set(call.args) | set(call.constants) == set(call.kernel.arg_names)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 2, 16, 17, 64, 128, 200, 1000])
@pytest.mark.parametrize("I", [3277, 7373])
@pytest.mark.parametrize("path", [None, *PATHS])
def test_on_gpu(path, I, M, dtype):
    if path == "gemv" and M > 1:
        pytest.skip("one token only")
    seed = torch.seed() % 2**31
    print("seed", seed)
    case = make_case(seed, M, 1024, I, dtype, biases="gud", device="cuda")
    assert error(glu_mlp(case.x, case.weights, path=path), case) < TOLERANCE[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("path", PATHS)
def test_cuda_graph(path):
    """A captured call uses the values that its input has at replay."""
    M = 1 if path == "gemv" else 40
    case, other = (make_case(seed, M, 1024, 1500, torch.float16, device="cuda") for seed in (5, 6))
    other.weights = case.weights
    glu_mlp(case.x, case.weights, path=path)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = glu_mlp(case.x, case.weights, path=path)
    case.x.copy_(other.x)
    graph.replay()
    assert error(y, other) < TOLERANCE[torch.float16]
