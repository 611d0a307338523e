"""Each planned kernel separately, compared with float64 and with its PyTorch reference."""

import pytest
import torch
import torch.nn.functional as F

from csrc_triton.glu import gate_up_prefill
from csrc_triton.glu.act_mul import plan_act_mul
from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma, tile_position
from csrc_triton.glu.reference import act_mul_reference, down_reference, gate_up_reference, glu_mlp_reference
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.device import input_precision
from tests.helpers.glu_cases import TOLERANCE, error, hidden_error, make_case
from tests.helpers.marks import slow
from tests.helpers.poison import poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = TOLERANCE[torch.float32]
GATE_UP = {
    "gemv": (1, GateUpGemv(block_n=4, num_warps=4, pdl=False)),
    "swap": (19, GateUpSwap(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, pdl=False)),
    "tile": (37, GateUpTile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2)),
    "tma": (37, GateUpTma(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=2)),
}
DOWN = {
    "gemv": (1, DownGemv(block_n=4, block_k=64, num_warps=4, pdl=False)),
    "gemv, one short step": (1, DownGemv(block_n=4, block_k=512, num_warps=4, pdl=False)),
    "split 1": (19, DownSplitK(block_m=16, block_n=32, block_k=64, split_k=1, num_warps=4, num_stages=2, pdl=False)),
    "split 3": (19, DownSplitK(block_m=16, block_n=32, block_k=64, split_k=3, num_warps=4, num_stages=2, pdl=False)),
    "split 5 of 6": (
        5,
        DownSplitK(block_m=16, block_n=32, block_k=64, split_k=5, num_warps=4, num_stages=2, pdl=False),
    ),
}


@pytest.fixture
def seed():
    value = torch.seed() % 2**31
    print("seed", value)
    return value


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


def planned(config, case):
    """The planned calls of one config for the case; for sm_90 if there is no GPU."""
    return config.plan(case.x, case.weights, case.weights.problem(case.x))


@pytest.mark.parametrize("packed", [True, *slow(False)])
@pytest.mark.parametrize("biases, activation", [("", "silu"), ("g", "gelu_tanh"), ("u", "silu"), ("gu", "gelu_tanh")])
@pytest.mark.parametrize("kernel", GATE_UP)
def test_gate_up(kernel, activation, biases, packed, seed):
    M, config = GATE_UP[kernel]
    H = 96 if kernel == "tma" else 90  # the other kernels mask a tail of K
    case = make_case(seed, M, H, 205, activation=activation, biases=biases, device=DEVICE, packed=packed)
    a = planned(config, case).run()
    assert hidden_error(a, case) < FLOAT32
    twin = gate_up_reference(case.x, case.weights)
    assert twin.shape == a.shape and hidden_error(twin, case) < FLOAT32


@pytest.mark.parametrize("kernel", GATE_UP)
def test_padding_of_an_infinite_token_is_zero(kernel, seed):
    M, config = GATE_UP[kernel]
    case = make_case(seed, M, 64, 130, device=DEVICE)
    case.x[0, 5] = float("inf")
    a = planned(config, case).run()
    assert a[:, 130:].eq(0).all()


def test_persistent_programs_process_every_nth_tile(seed, monkeypatch):
    monkeypatch.setattr(gate_up_prefill, "sm_count", lambda device, sm: 5)
    case = make_case(seed, 37, 64, 300, device=DEVICE)  # 3 x 6 tiles: some programs process four, some three
    plan = planned(GATE_UP["tma"][1], case)
    assert plan.calls[0].grid == (5,)
    assert hidden_error(plan.run(), case) < FLOAT32


@pytest.mark.parametrize("biases", ["", "gu"])
@pytest.mark.parametrize("I", [1, 127, 1100])
def test_act_mul(I, biases, seed):
    case = make_case(seed, 7, 24, I, activation="gelu_tanh", biases=biases, device=DEVICE)
    h = case.x @ case.weights.gate_up.flatten(0, 1).t()
    h.view(7, 2, -1)[:, :, I:] = float("nan")  # the values in the padding must not matter
    a = plan_act_mul(h, case.weights).run()
    assert hidden_error(a, case) < FLOAT32
    twin = act_mul_reference(h, case.weights)
    assert twin.shape == a.shape and hidden_error(twin, case) < FLOAT32


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kernel", DOWN)
def test_down(kernel, bias, seed):
    M, config = DOWN[kernel]
    H, I = 101, 300
    generator = torch.Generator().manual_seed(seed)
    a, down = torch.zeros(M, 384), torch.zeros(H, 384)
    a[:, :I] = torch.randn(M, I, generator=generator)
    down[:, :I] = torch.randn(H, I, generator=generator)
    shift = torch.randn(H, generator=generator) * I**0.5 if bias else None
    a, down, shift = (v if v is None else v.to(DEVICE) for v in (a, down, shift))
    expected = a.double() @ down.double().t() + (0 if shift is None else shift.double())
    weights = GluWeights(torch.zeros(2, 384, H, device=DEVICE), down, I, down_bias=shift)
    problem = weights.problem(a.new_empty(M, H))
    for y in (config.plan(a, weights, problem).run(), down_reference(a, weights)):
        assert y.shape == (M, H)
        assert (y - expected).abs().max() / expected.abs().max() < FLOAT32


def test_reference_mlp(seed):
    case = make_case(seed, 11, 33, 70, activation="gelu_tanh", biases="gud")
    assert error(glu_mlp_reference(case.x, case.weights), case) < FLOAT32


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activation_over_its_whole_range(activation):
    """Includes the extremes: where exp overflows, where tanh rounds to -1, and zero."""
    g = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -1e4, 1e4, -1e15, 1e15, -200.0, 89.0, -89.0])])
    h = torch.zeros(1, 2 * 4096)
    h[0, : len(g)] = g
    h[0, 4096:] = 1
    zeros = torch.zeros(2, 4096, 1, device=DEVICE)
    weights = GluWeights(zeros, zeros[0].t(), len(g), activation)
    a = plan_act_mul(h.to(DEVICE), weights).run()[0, : len(g)].cpu().double()
    g = g.double()
    if activation == "silu":
        expected = F.silu(g)
    else:  # without the cancellation in torch's 1 + tanh(z)
        expected = g * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))
        assert (expected - F.gelu(g, approximate="tanh")).abs().max() < 1e-14
    assert ((a - expected).abs() / g.abs().clamp_min(1)).max() < 4e-7
    inner = (g.abs() < 9) & (g != 0)
    assert ((a - expected).abs() / expected.abs())[inner].max() < 2e-5


@pytest.mark.parametrize("tiles_m, tiles_n", [(1, 1), (1, 7), (7, 1), (8, 5), (9, 5), (17, 3)])
def test_every_tile_is_visited_once(tiles_m, tiles_n):
    import triton
    import triton.language as tl

    @triton.jit
    def visit_kernel(visits, tiles_m, tiles_n, GROUP_M: tl.constexpr):
        m, n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
        tl.atomic_add(visits + m * tiles_n + n, 1)

    visits = torch.zeros(tiles_m, tiles_n, dtype=torch.int32, device=DEVICE)
    visit_kernel[(tiles_m * tiles_n,)](visits, tiles_m, tiles_n, GROUP_M=8)
    assert visits.eq(1).all()


def test_float32_precision_follows_torch():
    saved = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert input_precision(torch.float32) == precision
            assert input_precision(torch.bfloat16) == "ieee"
            case = make_case(0, 3, 32, 40)
            call = planned(GATE_UP["swap"][1], case).calls[0]
            assert call.constants["INPUT_PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = saved


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_no_dependent_launch_in_the_interpreter(monkeypatch):
    config = GateUpSwap(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, pdl=True)
    assert config.uses_pdl is False
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert config.uses_pdl is True
