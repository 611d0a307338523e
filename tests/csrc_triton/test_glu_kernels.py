"""Each planned kernel alone, against float64 and against its PyTorch twin."""

import pytest
import torch
import torch.nn.functional as F

from csrc_triton import glu_prefill, launch
from csrc_triton.activations import plan_act_mul
from csrc_triton.down_decode import plan_down_gemv, plan_down_splitk
from csrc_triton.glu_decode import plan_gate_up_gemv, plan_gate_up_swap
from csrc_triton.glu_prefill import plan_gate_up_tile, plan_gate_up_tma, tile_position
from csrc_triton.launch import DownGemv, DownSplitK, GateUpGemv, GateUpSwap, GateUpTile, GateUpTma, KernelCall
from csrc_triton.reference import act_mul_reference, down_reference, gate_up_reference, glu_mlp_reference
from tests.helpers.glu_cases import TOLERANCE, error, hidden_error, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = TOLERANCE[torch.float32]
GATE_UP = {
    "gemv": (1, plan_gate_up_gemv, (GateUpGemv(4, 4, False),)),
    "swap": (19, plan_gate_up_swap, (GateUpSwap(16, 32, 32, 4, 2, False),)),
    "tile": (37, plan_gate_up_tile, (GateUpTile(16, 32, 32, 4, 2),)),
    "tma": (37, plan_gate_up_tma, (GateUpTma(16, 64, 32, 4, 2), 90)),
}
DOWN = {
    "gemv": (1, plan_down_gemv, DownGemv(4, 64, 4, False)),
    "gemv, one short step": (1, plan_down_gemv, DownGemv(4, 512, 4, False)),
    "split 1": (19, plan_down_splitk, DownSplitK(16, 32, 64, 1, 4, 2, False)),
    "split 3": (19, plan_down_splitk, DownSplitK(16, 32, 64, 3, 4, 2, False)),
    "split 5 of 6": (5, plan_down_splitk, DownSplitK(16, 32, 64, 5, 4, 2, False)),
}


@pytest.fixture
def seed():
    value = torch.seed() % 2**31
    print("seed", value)
    return value


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biases, activation", [("", "silu"), ("g", "gelu_tanh"), ("u", "silu"), ("gu", "gelu_tanh")])
@pytest.mark.parametrize("kernel", GATE_UP)
def test_gate_up(kernel, activation, biases, packed, seed):
    M, plan, config = GATE_UP[kernel]
    H = 96 if kernel == "tma" else 90  # the others mask a tail of K
    case = make_case(seed, M, H, 205, activation=activation, biases=biases, device=DEVICE, packed=packed)
    a = plan(*case.arguments()[:2], 205, activation, case.gate_bias, case.up_bias, *config).run()
    assert hidden_error(a, case) < FLOAT32
    twin = gate_up_reference(case.x, case.gate_up, 205, activation, case.gate_bias, case.up_bias)
    assert twin.shape == a.shape and hidden_error(twin, case) < FLOAT32


@pytest.mark.parametrize("kernel", GATE_UP)
def test_pad_columns_of_an_infinite_token_are_zero(kernel, seed):
    M, plan, config = GATE_UP[kernel]
    case = make_case(seed, M, 64, 130, device=DEVICE)
    case.x[0, 5] = float("inf")
    a = plan(case.x, case.gate_up, 130, "silu", None, None, *config).run()
    assert a[:, 130:].eq(0).all()


def test_persistent_programs_take_every_nth_tile(seed, monkeypatch):
    monkeypatch.setattr(glu_prefill, "multiprocessors", lambda device, sm: 5)
    case = make_case(seed, 37, 64, 300, device=DEVICE)  # 3 x 6 tiles: some programs take four, some three
    plan = plan_gate_up_tma(case.x, case.gate_up, 300, "silu", None, None, GateUpTma(16, 64, 32, 4, 2), 90)
    assert plan.calls[0].grid == (5,)
    assert hidden_error(plan.run(), case) < FLOAT32


@pytest.mark.parametrize("biases", ["", "gu"])
@pytest.mark.parametrize("I", [1, 127, 1100])
def test_act_mul(I, biases, seed):
    case = make_case(seed, 7, 24, I, activation="gelu_tanh", biases=biases, device=DEVICE)
    h = case.x @ case.gate_up.flatten(0, 1).t()
    h.view(7, 2, -1)[:, :, I:] = float("nan")  # what the pads hold must not matter
    a = plan_act_mul(h, I, "gelu_tanh", case.gate_bias, case.up_bias).run()
    assert hidden_error(a, case) < FLOAT32
    twin = act_mul_reference(h, I, "gelu_tanh", case.gate_bias, case.up_bias)
    assert twin.shape == a.shape and hidden_error(twin, case) < FLOAT32


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kernel", DOWN)
def test_down(kernel, bias, seed):
    M, plan, config = DOWN[kernel]
    H, I = 101, 300
    generator = torch.Generator().manual_seed(seed)
    a, down = torch.zeros(M, 384), torch.zeros(H, 384)
    a[:, :I] = torch.randn(M, I, generator=generator)
    down[:, :I] = torch.randn(H, I, generator=generator)
    shift = torch.randn(H, generator=generator) * I**0.5 if bias else None
    a, down, shift = (v if v is None else v.to(DEVICE) for v in (a, down, shift))
    expected = a.double() @ down.double().t() + (0 if shift is None else shift.double())
    for y in (plan(a, down, shift, config).run(), down_reference(a, down, shift)):
        assert y.shape == (M, H)
        assert (y - expected).abs().max() / expected.abs().max() < FLOAT32


def test_reference_mlp(seed):
    case = make_case(seed, 11, 33, 70, activation="gelu_tanh", biases="gud")
    assert error(glu_mlp_reference(*case.arguments()), case) < FLOAT32


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activation_over_its_whole_range(activation):
    """Tails included: where exp overflows, where tanh rounds to -1, and at zero."""
    g = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -1e4, 1e4, -1e15, 1e15, -200.0, 89.0, -89.0])])
    h = torch.zeros(1, 2 * 4096)
    h[0, : len(g)] = g
    h[0, 4096:] = 1
    a = plan_act_mul(h.to(DEVICE), len(g), activation).run()[0, : len(g)].cpu().double()
    g = g.double()
    if activation == "silu":
        expected = F.silu(g)
    else:  # without the cancellation of torch's 1 + tanh(z)
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
            assert launch.input_precision(torch.float32) == precision
            assert launch.input_precision(torch.bfloat16) == "ieee"
            case = make_case(0, 3, 32, 40)
            call = plan_gate_up_swap(case.x, case.gate_up, 40, "silu", None, None, GATE_UP["swap"][2][0]).calls[0]
            assert call.constants["INPUT_PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = saved


@pytest.mark.parametrize("pdl", [False, True])
def test_call_passes_its_options(pdl):
    class Kernel(dict):
        def __getitem__(self, grid):
            return lambda **options: self.update(grid=grid, options=options)

    kernel = Kernel()
    KernelCall(kernel, (3, 2), dict(x=1), dict(BLOCK=16), num_warps=2, num_stages=5, launch_pdl=pdl).run()
    expected = dict(x=1, BLOCK=16, num_warps=2, num_stages=5) | (dict(launch_pdl=True) if pdl else {})
    assert dict(kernel) == dict(grid=(3, 2), options=expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells the interpreter apart")
def test_no_dependent_launch_in_the_interpreter(monkeypatch):
    config = GateUpSwap(16, 32, 32, 4, 2, True)
    assert launch.uses_pdl(config) is False
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert launch.uses_pdl(config) is True
