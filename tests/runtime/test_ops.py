import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from csrc_triton.glu import forward
from csrc_triton.launch import replay
from gluprune.runtime import operator
from gluprune.runtime.aligned import align
from tests.helpers.marks import slow
from tests.helpers.poison import poison_empty

interpreter_only = pytest.mark.skipif(not operator.INTERPRETED, reason="needs Triton's interpreter")
DEVICE = "cpu" if operator.INTERPRETED else "cuda"


def make_operands(width, hidden, dtype=torch.float32, bias=True, seed=0, aligned=True, device="cpu"):
    """Operands whose MLP output is of order one."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale):
        return nn.Parameter((torch.randn(shape, generator=generator) * scale).to(device, dtype))

    weights = [random(width, hidden, scale=hidden**-0.5) for _ in range(2)] + [random(hidden, width, scale=width**-0.5)]
    biases = [random(size, scale=0.5) for size in (width, width, hidden)] if bias else [None] * 3
    if aligned:
        align(*weights)
    return weights + biases


def with_strided_up(operands):
    """The operands with an up projection whose rows are not contiguous, which no kernel takes."""
    gate, up, *others = operands
    return [gate, nn.Parameter(up.detach().t().contiguous().t()), *others]


def truth(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    """float64, written with exp and tanh instead of PyTorch's activations."""
    x, gate, up, down, gate_bias, up_bias, down_bias = (
        None if tensor is None else tensor.detach().double().cpu()
        for tensor in (x, gate, up, down, gate_bias, up_bias, down_bias)
    )
    g, u = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
    if activation == "silu":
        a = g / (1 + torch.exp(-g))
    else:
        a = 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))
    return F.linear(a * u, down, down_bias)


# For outputs of order one: float32 sums of tens of terms; half precision rounds the result and the activation `a`.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("backend", ["triton", "cublas", "torch", "auto"])
@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 3, 48), (0, 48), *slow((48,), (1, 48), (1, 1, 48), (2, 0, 48))], ids=str)
@pytest.mark.parametrize("width", [37, *slow(128)])
def test_matches_float64_for_every_leading_shape(backend, activation, shape, width):
    operands = make_operands(width, 48, device=DEVICE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = operator.glu_mlp(x, *operands, activation, backend)
    assert y.shape == x.shape and y.dtype == x.dtype
    expected = truth(x, *operands, activation)
    torch.testing.assert_close(y.double().cpu(), expected, atol=TOLERANCE[torch.float32], rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_half_precision(backend):
    operands = make_operands(77, 48, torch.float16, device=DEVICE)
    for tokens in (1, 5, 20):
        x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(tokens)).to(DEVICE, torch.float16)
        y = operator.glu_mlp(x, *operands, "silu", backend)
        assert y.dtype == torch.float16
        expected = truth(x, *operands, "silu")
        torch.testing.assert_close(y.double().cpu(), expected, atol=TOLERANCE[torch.float16], rtol=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend, aligned", [("torch", True), ("auto", False), ("triton", False)])
def test_pytorch_path_is_bit_equal_to_the_eager_formula(dtype, backend, aligned):
    operands = make_operands(77, 48, dtype, aligned=aligned)
    gate, up, down, *biases = operands if aligned else with_strided_up(operands)
    x = torch.randn(2, 5, 48).to(dtype)
    y = operator.glu_mlp(x, gate, up, down, *biases, "silu", backend)
    eager = F.linear(F.silu(F.linear(x, gate, biases[0])) * F.linear(x, up, biases[1]), down, biases[2])
    assert torch.equal(y, eager)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 21, *slow(1, 128, 200)])
def test_other_tensors_of_the_same_shapes(tokens, bias, monkeypatch):
    """From the second call on, the launches are replays of the first."""
    monkeypatch.setattr(operator, "_replays", {})
    poison_empty(monkeypatch)
    for number in range(3):
        operands = make_operands(77, 48, torch.float16, bias=bias, device=DEVICE, seed=number)
        x = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(number)).to(DEVICE, torch.float16)
        y = operator.glu_mlp(x, *operands, "silu", "triton")
        expected = truth(x, *operands, "silu")
        torch.testing.assert_close(y.double().cpu(), expected, atol=TOLERANCE[torch.float16], rtol=4e-3)
        assert [found is not None for found in operator._replays.values()] == [True]


@interpreter_only
def test_kernels_run_exactly_when_backend_dtype_and_storage_allow(monkeypatch):
    calls = []
    plan_checked = forward.plan_checked

    def noted(x, weights, *, path):
        calls.append(path)
        return plan_checked(x, weights, path=path)

    monkeypatch.setattr(forward, "plan_checked", noted)
    monkeypatch.setattr(operator, "_replays", {})
    aligned, separate = make_operands(37, 48), make_operands(37, 48, aligned=False)
    shifted = make_operands(128, 48, aligned=False)
    shifted[2] = torch.empty(48 * 128 + 1)[1:].view(48, 128).copy_(shifted[2].detach())
    x = torch.randn(3, 48)
    for backend, operands, path in [
        ("triton", aligned, ["decode"]),
        ("cublas", aligned, ["cublas"]),
        ("auto", aligned, []),
        ("torch", aligned, []),
        ("triton", separate, ["cublas"]),
        ("cublas", separate, ["cublas"]),
        ("auto", separate, []),
        ("triton", with_strided_up(separate), []),
        ("triton", shifted, []),
    ]:
        calls.clear()
        operator.glu_mlp(x, *operands, "silu", backend)
        assert calls == path, backend
    double = make_operands(37, 48, torch.float64)
    calls.clear()
    operator.glu_mlp(x.double(), *double, "silu", "triton")
    assert not calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["torch", *slow("triton")])
def test_opcheck(backend, bias):
    operands = make_operands(37, 48, bias=bias, device=DEVICE)
    x = torch.randn(2, 3, 48, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.gluprune.glu_mlp, (x, *operands, "silu", backend))


@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 4), (4,)], ids=str)
def test_gradients_of_first_and_second_order_in_float64(activation, bias, shape):
    operands = make_operands(5, 4, torch.float64, bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(*tensors):
        return operator.glu_mlp(*tensors, *[None] * (7 - len(tensors)), activation, "auto")

    tensors = (x, *(operand for operand in operands if operand is not None))
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_equal_eager(activation, create_graph):
    operands = make_operands(77, 48, device=DEVICE)
    x = torch.randn(2, 5, 48, device=DEVICE, requires_grad=True)
    grad = torch.randn(2, 5, 48, device=DEVICE)
    leaves = (x, *operands)
    fused = torch.autograd.grad(
        operator.glu_mlp(x, *operands, activation, "triton"), leaves, grad, create_graph=create_graph
    )
    gate, up, down, gate_bias, up_bias, down_bias = operands
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    eager = F.linear(act(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)
    for ours, theirs in zip(fused, torch.autograd.grad(eager, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


# Two products recompute gate and up, one computes the hidden gradient; the others depend on what is wanted.
@pytest.mark.parametrize("wanted, products", [(0, 5), (1, 4), (2, 4), (3, 4), (4, 3), (5, 3), (6, 3)])
def test_only_wanted_gradients_are_computed(wanted, products):
    operands = make_operands(37, 48)
    tensors = [tensor.detach() for tensor in (torch.randn(3, 48), *operands)]
    tensors[wanted].requires_grad_()
    loss = operator.glu_mlp(*tensors, "silu", "torch").sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert [tensor.grad is not None for tensor in tensors] == [index == wanted for index in range(7)]
    assert counter.get_total_flops() == products * 2 * 3 * 48 * 37


def test_keeps_nothing_of_the_intermediate_width_for_backward():
    operands = make_operands(512, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        operator.glu_mlp(torch.randn(7, 16, requires_grad=True), *operands, "silu", "torch")
    weights = {operand.data_ptr() for operand in operands}
    assert sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in weights) == 7 * 16


def test_compiles_without_a_break_with_dynamic_tokens():
    operands = make_operands(37, 48, device=DEVICE)
    compiled = torch.compile(
        lambda x: operator.glu_mlp(x, *operands, "silu", "triton") * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for tokens in (2, 3, 5):
        x = torch.randn(tokens, 48, device=DEVICE)
        expected = 2 * truth(x, *operands, "silu")
        torch.testing.assert_close(compiled(x).double().cpu(), expected, atol=1e-5, rtol=1e-5)


def test_bad_names_are_rejected():
    operands, x = make_operands(37, 48), torch.randn(3, 48)
    with pytest.raises(ValueError, match="unknown activation 'relu'; allowed: silu, gelu_tanh"):
        operator.glu_mlp(x, *operands, "relu", "torch")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; allowed: auto, triton, cublas, torch"):
        operator.glu_mlp(x, *operands, "silu", "cuda")


@pytest.fixture
def warm(monkeypatch):
    """Operands of 37 neurons and hidden size 48, with a replay for 3 tokens."""
    monkeypatch.setattr(operator, "_replays", {})
    operands = make_operands(37, 48, device=DEVICE)
    x = torch.randn(3, 48, device=DEVICE)
    operator.glu_mlp(x, *operands, "silu", "triton")
    assert [found is not None for found in operator._replays.values()] == [True]
    return x, operands


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (lambda x, o: (x, [*o[:3], torch.zeros(1, device=DEVICE), *o[4:]]), ValueError, "gate_bias must be"),
        (lambda x, o: (x, [*o[:5], torch.zeros(96, device=DEVICE)[::2]]), ValueError, "down_bias must be contiguous"),
        (lambda x, o: (x, make_operands(37, 64, device=DEVICE)), ValueError, "gate_up must be"),
        (lambda x, o: (x.half(), o), TypeError, "gate_up must be torch.float16"),
    ],
    ids=["length of a bias", "strides of a bias", "hidden size", "dtype"],
)
def test_bad_operands_are_named_where_there_is_a_replay(warm, change, kind, words):
    x, operands = change(*warm)
    with torch.no_grad(), pytest.raises(kind, match=words):
        operator.glu_mlp(x, *operands, "silu", "triton")


def test_one_tensor_for_two_inputs_is_not_replayed(monkeypatch):
    monkeypatch.setattr(operator, "_replays", {})
    x = torch.randn(3, 48, device=DEVICE)
    for tied in (True, False):
        gate, up, down, gate_bias, up_bias, down_bias = make_operands(37, 48, device=DEVICE)
        operands = gate, up, down, gate_bias, gate_bias if tied else up_bias, down_bias
        y = operator.glu_mlp(x, *operands, "silu", "triton")
        torch.testing.assert_close(y.double().cpu(), truth(x, *operands, "silu"), atol=1e-5, rtol=1e-5)
    assert list(operator._replays.values()) == [None]


def test_replays_know_the_precision_of_float32(warm):
    x, operands = warm
    saved = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        operator.glu_mlp(x, *operands, "silu", "triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = saved
    assert len(operator._replays) == 2


def test_a_replay_that_differs_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(operator, "_replays", {})
    monkeypatch.setattr(replay.Replay, "run", lambda self, x, weights: torch.ones_like(x))
    operands = make_operands(37, 48, device=DEVICE)
    for _ in range(2):
        x = torch.randn(3, 48, device=DEVICE)
        y = operator.glu_mlp(x, *operands, "silu", "triton")
        torch.testing.assert_close(y.double().cpu(), truth(x, *operands, "silu"), atol=1e-5, rtol=1e-5)
    assert list(operator._replays.values()) == [None] and "differs from its first run" in caplog.text


def test_an_input_of_nan_is_replayed_as_any_other(monkeypatch):
    monkeypatch.setattr(operator, "_replays", {})
    operator.glu_mlp(
        torch.full((3, 48), torch.nan, device=DEVICE), *make_operands(37, 48, device=DEVICE), "silu", "triton"
    )
    assert [found is not None for found in operator._replays.values()] == [True]
