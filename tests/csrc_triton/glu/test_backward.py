"""The backward pass of the MLP and its kernel, compared with float64 and with the PyTorch reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton.glu import backward
from csrc_triton.glu.backward import GluGradients, glu_gradient_call, glu_mlp_backward
from csrc_triton.glu.reference import activation_reference, glu_gradient_reference
from csrc_triton.glu.weights import GluWeights
from csrc_triton.layout import ACTIVATIONS
from tests.helpers.glu_cases import apart, make_case
from tests.helpers.poison import poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32, *([] if DEVICE == "cpu" else [torch.bfloat16])]  # the interpreter truncates
# What one rounding and a sum of some hundred products may be wrong by, relative to the sum of their magnitudes.
ROUNDING = {torch.float32: 16 * 2**-24, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


def training_case(seed, M, H, I, dtype=torch.float32, **options):
    """A case whose padding is finite, as the backward pass requires, and a gradient of its output."""
    case = make_case(seed, M, H, I, dtype, device=DEVICE, **options)
    case.weights.gate_up[1, I:] = 3.0  # any finite value; in a packed weight the first half has no padding of its own
    if not options.get("packed"):
        case.weights.gate_up[0, I:] = 3.0
    generator = torch.Generator().manual_seed(seed + 1)
    return case, torch.randn(M, H, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def slope_of(gate, activation):
    """The derivative of an activation, float64."""
    gate = gate.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(activation_reference(gate, activation).sum(), gate)
    return slope


def truth_and_bounds(case, grad):
    """The gradients in float64, and for each element the sum of the magnitudes that roundings are relative to.

    A relative rounding e of a projection or of the hidden gradient changes what is computed from it by e times its
    terms' magnitudes times the largest derivative: 1 bounds those of both activations' slopes, 1.13 the slopes.
    """
    weights, x, I = case.weights, case.x.double(), case.weights.intermediate_size
    (wg, wu), wd, grad = weights.gate_up[:, :I].double(), weights.down[:, :I].double(), grad.double()
    bg, bu = (0 if bias is None else bias.double() for bias in (weights.gate_bias, weights.up_bias))
    gate, up, hidden_grad = x @ wg.t() + bg, x @ wu.t() + bu, grad @ wd
    act, slope = activation_reference(gate, weights.activation), slope_of(gate, weights.activation)
    dg, du, a = hidden_grad * up * slope, hidden_grad * act, act * up
    found = dg @ wg + du @ wu, torch.stack((dg.t() @ x, du.t() @ x)), grad.t() @ a, torch.stack((dg.sum(0), du.sum(0)))

    tiny = torch.finfo(case.x.dtype).tiny  # below it, roundings are no longer relative
    gate_size, up_size = x.abs() @ wg.abs().t() + abs(bg) + tiny, x.abs() @ wu.abs().t() + abs(bu) + tiny
    hidden_size = grad.abs() @ wd.abs() + tiny
    dg_size = hidden_size * up_size * 1.13 + hidden_grad.abs() * up.abs() * gate_size
    du_size = hidden_size * act.abs() + 1.13 * hidden_grad.abs() * gate_size
    a_size = act.abs() * up_size + 1.13 * up.abs() * gate_size
    dg_size, du_size, a_size = dg_size + dg.abs() + tiny, du_size + du.abs() + tiny, a_size + a.abs() + tiny
    sizes = (
        dg_size @ wg.abs() + du_size @ wu.abs(),
        torch.stack((dg_size.t() @ x.abs(), du_size.t() @ x.abs())),
        grad.abs().t() @ a_size,
        torch.stack((dg_size.sum(0), du_size.sum(0))),
    )
    return GluGradients(*found), GluGradients(*(size + tiny for size in sizes))


def assert_gradients(found, case, grad, wanted=GluGradients._fields):
    expected, sizes = truth_and_bounds(case, grad)
    for name, got, exact, size in zip(GluGradients._fields, found, expected, sizes, strict=True):
        if name not in wanted:
            assert got is None, name
            continue
        assert got.shape == exact.shape and got.dtype == case.x.dtype and got.is_contiguous(), name
        wrong = (got.double() - exact).abs() / size
        assert wrong.max() < 2 * ROUNDING[case.x.dtype], f"{name}: {wrong.max():.1e}"  # its own rounding, and theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("biases, activation", [("", "silu"), ("g", "gelu_tanh"), ("u", "silu"), ("gu", "gelu_tanh")])
def test_gradients(biases, activation, packed, dtype):
    case, grad = training_case(1, 7, 40, 205, dtype, activation=activation, biases=biases, packed=packed)
    assert_gradients(glu_mlp_backward(grad, case.x, case.weights), case, grad)


@pytest.mark.parametrize(
    "wanted, hidden",
    [("x", [False]), ("gate_up", [False]), ("down", []), ("gate_up_bias", [False]), ("x down", [True]), ("", [])],
)
def test_only_wanted_gradients(wanted, hidden, monkeypatch):
    written, original = [], backward.glu_gradient_call

    def noted(*tensors, hidden):
        written.append(hidden)
        return original(*tensors, hidden=hidden)

    monkeypatch.setattr(backward, "glu_gradient_call", noted)
    case, grad = training_case(2, 5, 24, 70, biases="gu")
    assert_gradients(glu_mlp_backward(grad, case.x, case.weights, wanted.split()), case, grad, wanted.split())
    assert written == hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("I", [70, 128])
def test_weights_that_are_apart(I, dtype):
    case, grad = training_case(8, 6, 24, I, dtype, biases="gu")
    weights = apart(case.weights)
    assert_gradients(glu_mlp_backward(grad, case.x, weights), case, grad)
    assert_gradients(glu_mlp_backward(grad, case.x, weights, ["down"]), case, grad, ["down"])


def test_a_down_projection_without_padding():
    case, grad = training_case(3, 5, 24, 70)
    weights = case.weights
    plain = GluWeights(weights.gate_up, weights.down[:, :70].contiguous(), 70)
    for name, got, same in zip(
        GluGradients._fields,
        glu_mlp_backward(grad, case.x, plain),
        glu_mlp_backward(grad, case.x, weights),
        strict=True,
    ):
        assert torch.equal(got, same), name


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    M=st.integers(1, 6),
    H=st.integers(1, 40),
    I=st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 1025])),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    biases=st.sampled_from(["", "g", "u", "gu", "gud"]),
    packed=st.booleans(),
    layout=st.sampled_from(["contiguous", "unaligned rows", "transposed", "expanded"]),
    wanted=st.sets(st.sampled_from(GluGradients._fields)),
    seed=st.integers(0, 2**31),
)
def test_random_gradients(M, H, I, dtype, activation, biases, packed, layout, wanted, seed):
    options = dict(activation=activation, biases=biases, packed=packed, layout=layout)
    case, grad = training_case(seed, M, H, I, dtype, **options)
    assert_gradients(glu_mlp_backward(grad, case.x, case.weights, wanted), case, grad, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", ["", "gu"])
@pytest.mark.parametrize("I", [1, 127, 1100])
def test_kernel(I, biases, activation):
    case = make_case(4, 3, 24, I, activation=activation, biases=biases, device=DEVICE)
    IP, generator = case.weights.down.shape[1], torch.Generator().manual_seed(5)
    h, a = (torch.randn(3, width, generator=generator).to(DEVICE) for width in (2 * IP, IP))
    h.view(3, 2, -1)[:, :, I:] = a[:, I:] = float("nan")  # the values in the padding must not matter
    twins = glu_gradient_reference(h, a, case.weights)
    inputs = [tensor.clone() for tensor in (h, a)]
    glu_gradient_call(h, a, case.weights, hidden=True).run()
    for got, twin in zip((h, a), twins, strict=True):
        assert got.view(3, -1, IP)[:, :, I:].eq(0).all() and twin.shape == got.shape
        torch.testing.assert_close(got, twin, atol=1e-6, rtol=2e-6)
    again = [tensor.clone() for tensor in inputs]
    glu_gradient_call(*again, case.weights, hidden=False).run()
    assert torch.equal(again[0], h) and torch.equal(again[1].nan_to_num(), inputs[1].nan_to_num())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_over_its_whole_range(activation):
    """Includes the extremes: where exp overflows, where the sigmoid rounds to 0 or 1, and zero."""
    g = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([0.0, -1e4, 1e4, -1e15, 1e15, -200.0, 89.0, -89.0])])
    h, a = torch.zeros(1, 2 * 2048), torch.ones(1, 2048)
    h[0, : len(g)], h[0, 2048:] = g, 1
    zeros = torch.zeros(2, 2048, 1, device=DEVICE)
    h, a = h.to(DEVICE), a.to(DEVICE)
    glu_gradient_call(h, a, GluWeights(zeros, zeros[0].t(), len(g), activation), hidden=True).run()
    slope, act = (values[: len(g)].cpu().double() for values in (h[0], h[0, 2048:]))
    g = g.double()
    expected = F.silu(g) if activation == "silu" else g * torch.sigmoid(1.5957691216057308 * (g + 0.044715 * g**3))
    assert ((act - expected).abs() / g.abs().clamp_min(1)).max() < 4e-7 and torch.equal(act, a[0, : len(g)].cpu())
    assert (slope - slope_of(g, activation).nan_to_num(0)).abs().max() < 2e-6


def test_non_finite_values_stay_visible():
    case, grad = training_case(6, 4, 16, 30)
    case.x[1, 2], grad[2, 3] = float("nan"), float("inf")
    found = glu_mlp_backward(grad, case.x, case.weights)
    assert found.x[1].isnan().all() and found.x[[0, 3]].isfinite().all() and not found.x[2].isfinite().any()
    for gradient in found[1:]:
        assert not gradient.isfinite().all()


def test_products_take_the_whole_padded_width(monkeypatch):
    """No product reads or writes rows of an unaligned length, except for the gradients of gate and up themselves."""
    shapes = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: shapes.append((tuple(a.shape), tuple(b.shape))) or matmul(a, b)
    )
    case, grad = training_case(7, 5, 24, 70)
    glu_mlp_backward(grad, case.x, case.weights)
    assert shapes == [((5, 24), (24, 128)), ((24, 5), (5, 128)), ((5, 256), (256, 24))]
