"""Training through the operator: its backward pass by kernels, at aligned and unaligned widths, and by PyTorch."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton.glu import backward
from csrc_triton.glu.weights import GluWeights
from csrc_triton.layout import padded_buffers
from gluprune.runtime import operator
from gluprune.runtime.aligned import align
from gluprune.runtime.gradients import eager_gradients
from tests.helpers.marks import slow
from tests.helpers.poison import poison_empty
from tests.runtime.test_ops import DEVICE, make_operands, with_strided_up

ATOL = {torch.float32: 2e-5, torch.float16: 2e-2}


def trained(width, dtype=torch.float32, *, bias=True, has_gaps=False):
    """Operands as in training: gate and up in the aligned layout, down without gaps unless `has_gaps`."""
    gate, up, down, *biases = make_operands(width, 48, dtype, bias=bias, aligned=False, device=DEVICE)
    align(gate, up, down if has_gaps else None)
    return [gate, up, down, *biases]


def inputs(dtype=torch.float32, shape=(2, 5, 48)):
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return x.requires_grad_(), grad


def eager(x, operands, activation):
    gate, up, down, gate_bias, up_bias, down_bias = operands
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    return F.linear(act(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)


def gradients(y, leaves, grad, **options):
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad, **options)


@pytest.fixture
def launches(monkeypatch):
    """What each call of the backward pass by kernels computed."""
    calls, original = [], backward.glu_mlp_backward
    monkeypatch.setattr(
        backward, "glu_mlp_backward", lambda *arguments: calls.append(list(arguments[-1])) or original(*arguments)
    )
    return calls


@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "width, has_gaps, are_apart",
    [(128, False, False), (77, False, False), (77, True, False), (128, False, True), (77, False, True)],
)
def test_kernels_compute_the_gradients(width, has_gaps, are_apart, dtype, activation, launches, monkeypatch):
    """Also of weights that are apart, as FSDP gathers them."""
    poison_empty(monkeypatch)
    operands, (x, grad) = trained(width, dtype, has_gaps=has_gaps), inputs(dtype)
    if are_apart:
        operands = make_operands(width, 48, dtype, aligned=False, device=DEVICE)
    y = operator.glu_mlp(x, *operands, activation, "triton")
    found = gradients(y, (x, *operands), grad)
    assert launches == [["x", "gate_up", "down", "gate_up_bias"]]
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, *operands)]
    expected = gradients(eager(doubles[0], doubles[1:], activation), doubles, grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, atol=ATOL[dtype], rtol=ATOL[dtype] / 2)


@pytest.mark.parametrize("wanted", range(7))
def test_only_wanted_gradients_are_computed(wanted, launches):
    operands, (x, grad) = trained(77), inputs()
    tensors = [tensor.detach() for tensor in (x, *operands)]
    tensors[wanted].requires_grad_()
    operator.glu_mlp(*tensors, "silu", "triton").backward(grad)
    assert [tensor.grad is not None for tensor in tensors] == [index == wanted for index in range(7)]
    names = ["x", "gate_up", "gate_up", "down", "gate_up_bias", "gate_up_bias"]
    assert launches == ([[names[wanted]]] if wanted < 6 else [])
    expected = eager_gradients(grad, tensors[:6], "silu", [index == wanted for index in range(6)])
    of_down_bias = grad.sum((0, 1))
    torch.testing.assert_close(tensors[wanted].grad, [*expected, of_down_bias][wanted], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
def test_second_order_runs_pytorch(activation, launches):
    operands, (x, grad) = trained(77), inputs()
    leaves = (x, *operands)

    def second(y):
        first = gradients(y, leaves, grad, create_graph=True)
        return gradients(sum(gradient.square().sum() for gradient in first[:4]), leaves[:6], None)

    found = second(operator.glu_mlp(x, *operands, activation, "triton"))
    assert not launches
    for ours, theirs in zip(found, second(eager(x, operands, activation)), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("aligned", [True, *slow(False)])
def test_opcheck(bias, aligned):
    operands = trained(77, bias=bias) if aligned else make_operands(77, 48, bias=bias, aligned=False, device=DEVICE)
    x, grad = inputs()
    tensors = [None if tensor is None else tensor.detach() for tensor in (x, *operands[:5])]
    for wanted in ([True] * 3 + [bias], [False, True, False, False]):
        arguments = (grad, *tensors, "silu", wanted)
        torch.library.opcheck(torch.ops.gluprune.glu_mlp_backward, arguments)


@pytest.mark.parametrize("shape", [(0, 48), (2, 5, 48)], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_what_kernels_cannot_take_runs_pytorch(aligned, shape, launches):
    """Weights that left the layout, as torch.compile cannot notice, and no tokens."""
    operands = trained(77) if aligned else with_strided_up(make_operands(77, 48, aligned=False, device=DEVICE))
    x, grad = inputs(shape=shape)
    found = gradients(operator.glu_mlp(x, *operands, "silu", "triton"), (x, *operands), grad)
    assert len(launches) == (aligned and x.numel() > 0)
    expected = gradients(eager(x, operands, "silu"), (x, *operands), grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


class Peak(TorchDispatchMode):
    """The largest number of bytes that tensors made in this mode take at a time."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {reference.cdata for reference, _ in self.made}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and all(
                    storage.data_ptr() != given.untyped_storage().data_ptr() for given in self.given
                ):
                    self.made.append((StorageWeakRef(storage), storage.nbytes()))
                del storage
        gc.collect()  # Triton's interpreter leaves the arguments of a launch in cycles
        self.made = [(reference, size) for reference, size in self.made if not reference.expired()]
        self.bytes = max(self.bytes, sum(size for _, size in self.made))
        return result

    def of(self, function, *given):
        self.given = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        gc.freeze()  # so that collecting is quick
        try:
            with self, torch.no_grad():
                results = function()
        finally:
            gc.unfreeze()
        del results
        return self.bytes


@pytest.mark.parametrize("width", [128, 77])
@pytest.mark.parametrize("tokens", [32, 192])
def test_memory_of_the_backward_pass(tokens, width):
    """Three tensors of the padded width at a time, two beside all gradients; PyTorch's formulas take seven."""
    H = 48
    gate, up, down, *_ = tensors = [tensor.detach() for tensor in trained(width, bias=False)[:3]]
    x, grad = (torch.randn(tokens, H, device=DEVICE) for _ in range(2))
    padded = trained(width, bias=False, has_gaps=True)
    gate_up, _ = padded_buffers(*padded[:3])
    weights = GluWeights(gate_up, down, width)
    names = ("x", "gate_up", "down")
    ours = Peak().of(lambda: backward.glu_mlp_backward(grad, x, weights, names), x, grad, gate_up, down)
    wanted = [True] * 4 + [False] * 2
    formulas = Peak().of(
        lambda: eager_gradients(grad, [x, gate, up, down, None, None], "silu", wanted), x, grad, *tensors
    )
    of_down, of_others = H * width, tokens * H + 2 * H * width
    copies = H * 128 if width % 128 else 0  # the padded down projection, then its padded gradient
    largest = max(3 * tokens * 128 + of_down + copies, 2 * tokens * 128 + of_down + of_others)
    assert ours == 4 * largest and ours < formulas
