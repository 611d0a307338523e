"""Every change takes effect at the very next call of a patched MLP that has kept what its last call found out."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from gluprune.runtime import fusion, operator, patching, prepared
from tests.helpers.marks import slow
from tests.helpers.poison import poison_empty
from tests.helpers.tiny_models import DEVICE

H, I = 48, 77
# Largest error over the largest magnitude. The interpreter's dot reads bf16 as integers.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
if not operator.INTERPRETED:
    TOLERANCE[torch.bfloat16] = 2e-2


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def make_mlp(owner=LlamaMLP, bias=False, backend="triton", width=I, dtype=torch.float32):
    config = LlamaConfig(hidden_size=H, intermediate_size=width, num_attention_heads=4, mlp_bias=bias)
    mlp = owner(config).eval().to(DEVICE, dtype)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3)
    return patching.patch(mlp, backend=backend)


def by_modules(mlp, x):
    """What the MLP's modules compute."""
    return mlp.original_class.forward(mlp, x)


@pytest.fixture
def prepared_calls(monkeypatch):
    """The outputs of all prepared calls."""
    taken, run = [], prepared.Prepared.run

    def noted(self, mlp, x):
        taken.append(run(self, mlp, x))
        return taken[-1]

    monkeypatch.setattr(prepared.Prepared, "run", noted)
    return taken


def warm(mlp, prepared_calls, tokens=3):
    """Call an MLP until its call is prepared; return the input and the output."""
    x = randn(1, tokens, H, dtype=mlp.down_proj.weight.dtype)
    with torch.no_grad():
        mlp(x)
        y = mlp(x)
    assert len(prepared_calls) == 1 and prepared_calls[0] is y
    prepared_calls.clear()
    return x, y


@pytest.mark.parametrize("owner, bias", [(LlamaMLP, False), (LlamaMLP, True), (Phi3MLP, False)])
@pytest.mark.parametrize("backend", ["triton", "cublas"])
@pytest.mark.parametrize("tokens", [3, *slow(1, 16, 130)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_a_prepared_call_computes_what_the_modules_compute(
    owner, bias, backend, tokens, dtype, prepared_calls, monkeypatch
):
    """For other tokens at another address than those of the call that was kept."""
    poison_empty(monkeypatch)
    monkeypatch.setattr(operator, "_replays", {})
    mlp = make_mlp(owner, bias, backend, dtype=dtype)
    first, _ = warm(mlp, prepared_calls, tokens)
    for shape in ((1, tokens, H), (tokens, H), (tokens, 1, H)):
        x = randn(*shape, dtype=dtype)
        assert x.data_ptr() != first.data_ptr()
        y = mlp(x)
        assert y.shape == x.shape and y.is_contiguous()
        expected = by_modules(mlp, x)
        torch.testing.assert_close(y, expected, atol=TOLERANCE[dtype] * expected.abs().max().item(), rtol=0)
    assert len(prepared_calls) == 3 and all(y is not None for y in prepared_calls)


@pytest.mark.parametrize("tokens", [3, *slow(1)])
@torch.no_grad()
def test_layers_share_launches_but_not_weights(tokens, prepared_calls, monkeypatch):
    monkeypatch.setattr(operator, "_replays", {})
    mlps = [make_mlp() for _ in range(3)]
    for mlp in mlps:
        x, y = warm(mlp, prepared_calls, tokens)
        torch.testing.assert_close(y, by_modules(mlp, x), atol=2e-5, rtol=2e-5)
    assert len(operator._replays) == 1


def double_output(module, inputs, output):
    return 2 * output


def double_input(module, inputs):
    return (2 * inputs[0],)


def replace_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def set_weight(module, change):
    module.weight = nn.Parameter(change(module.weight.detach().clone()))


def set_data(module, change):
    module.weight.data = change(module.weight.detach().clone())


def fresh(*shape):
    return nn.Linear(*shape, bias=False, device=DEVICE)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def narrow(mlp):
    for name in PROJECTIONS[:2]:
        weight = getattr(mlp, name).weight
        weight.data = weight.data[: I - 1]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, : I - 1]


CHANGES = {
    **{f"forward hook of {n}": lambda m, n=n: getattr(m, n).register_forward_hook(double_output) for n in PROJECTIONS},
    **{f"pre-hook of {n}": lambda m, n=n: getattr(m, n).register_forward_pre_hook(double_input) for n in PROJECTIONS},
    **{f"forward of {n}": lambda m, n=n: replace_forward(getattr(m, n)) for n in PROJECTIONS},
    **{f"weight of {n}": lambda m, n=n: set_weight(getattr(m, n), lambda w: 2 * w) for n in PROJECTIONS},
    **{f"data of {n}": lambda m, n=n: set_data(getattr(m, n), lambda w: 2 * w) for n in PROJECTIONS},
    "hook of the activation": lambda m: m.act_fn.register_forward_hook(double_output),
    "pre-hook of the activation": lambda m: m.act_fn.register_forward_pre_hook(double_input),
    "forward of the activation": lambda m: replace_forward(m.act_fn),
    "activation": lambda m: setattr(m, "act_fn", nn.ReLU()),
    "gate_proj": lambda m: setattr(m, "gate_proj", fresh(H, I)),
    "up_proj": lambda m: setattr(m, "up_proj", fresh(H, I)),
    "down_proj": lambda m: setattr(m, "down_proj", fresh(I, H)),
    "bias": lambda m: setattr(m.down_proj, "bias", nn.Parameter(torch.ones(H, device=DEVICE))),
    "subclass": lambda m: setattr(m.down_proj, "__class__", type("Doubled", (nn.Linear,), {"forward": doubled})),
    "width": lambda m: (
        [set_data(getattr(m, n), lambda w: w[: I - 1]) for n in PROJECTIONS[:2]]
        and set_data(m.down_proj, lambda w: w[:, : I - 1])
    ),
    "a narrower slice of the same buffers": narrow,
}


def doubled(self, x):
    return 2 * nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_of_the_modules_takes_effect_at_the_next_call(name, prepared_calls):
    mlp = make_mlp()
    x, before = warm(mlp, prepared_calls)
    CHANGES[name](mlp)
    expected = by_modules(mlp, x)
    assert not torch.allclose(before, expected, atol=1e-3), "the change does not show"
    torch.testing.assert_close(mlp(x), expected, atol=2e-5, rtol=2e-5)
    assert not prepared_calls


@pytest.mark.parametrize("module", [*PROJECTIONS, "act_fn"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@torch.no_grad()
def test_backward_hooks_call_the_modules(module, register, prepared_calls):
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    getattr(getattr(mlp, module), register)(lambda *args: None)
    mlp(x)
    assert not prepared_calls


@torch.no_grad()
def test_a_changed_storage_at_the_same_address_is_noticed(prepared_calls, monkeypatch):
    """Its size determines which columns are padding."""
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    monkeypatch.setattr(mlp.__dict__["_prepared"], "_sizes", (0, 0))
    mlp(x)
    assert not prepared_calls


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is nn.functional.linear else result


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.gluprune.glu_mlp)
        return func(*args, **(kwargs or {}))


@contextmanager
def global_hook(register, hook):
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def linear_forward_doubled():
    forward = nn.Linear.forward
    nn.Linear.forward = doubled
    try:
        yield
    finally:
        nn.Linear.forward = forward


SURROUNDINGS = {
    "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "function mode": Doubling,
    "forward of every Linear": linear_forward_doubled,
    "global forward hook": lambda: global_hook(
        nn.modules.module.register_module_forward_hook, lambda m, i, o: 2 * o if isinstance(m, nn.Linear) else None
    ),
    "global pre-hook": lambda: global_hook(
        nn.modules.module.register_module_forward_pre_hook,
        lambda m, i: (2 * i[0],) if isinstance(m, nn.Linear) else None,
    ),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
@torch.no_grad()
def test_surroundings_take_effect_at_the_next_call(name, prepared_calls):
    mlp = make_mlp()
    x, before = warm(mlp, prepared_calls)
    with SURROUNDINGS[name]():
        expected, actual = by_modules(mlp, x), mlp(x)
    assert not torch.equal(before, expected), "they do not show"
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert not prepared_calls
    mlp(x)
    assert len(prepared_calls) == 1, "afterwards it is prepared again"


@torch.no_grad()
def test_a_dispatch_mode_sees_the_operator(prepared_calls):
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    with Counting() as mode:
        mlp(x)
    assert mode.products >= 1 and not prepared_calls


def test_gradients_flow_at_the_next_call(prepared_calls):
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    mlp(x).sum().backward()
    assert mlp.down_proj.weight.grad is not None and not prepared_calls
    mlp.requires_grad_(False)
    mlp(x)
    mlp(x)
    assert prepared_calls
    prepared_calls.clear()
    trained = x.clone().requires_grad_()
    mlp(trained).sum().backward()
    assert trained.grad is not None and not prepared_calls


@torch.no_grad()
def test_replicas_of_data_parallel_call_their_modules(prepared_calls):
    """A replica's weights are attributes, not parameters, on another device."""
    mlp = make_mlp()
    x, y = warm(mlp, prepared_calls)
    replica = mlp._replicate_for_data_parallel()
    for name, child in mlp.named_children():
        replica._modules[name] = copied = child._replicate_for_data_parallel()
        for key in list(child._parameters):
            copied._parameters.pop(key, None)
            setattr(copied, key, None if child._parameters[key] is None else 2 * child._parameters[key].detach())
    expected = by_modules(replica, x)
    assert not torch.allclose(expected, y)
    assert torch.equal(replica(x), expected) and not prepared_calls
    assert any("no parameter" in entry.reason for entry in fusion.fusion_status(replica))


@torch.no_grad()
def test_transforms_call_the_modules(prepared_calls):
    mlp = make_mlp()
    x, y = warm(mlp, prepared_calls)
    torch.testing.assert_close(torch.vmap(mlp)(x[0])[None], y, atol=2e-5, rtol=2e-5)
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(lambda x: by_modules(mlp, x), (x,), (tangent,))[1]
    torch.testing.assert_close(torch.func.jvp(mlp, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(out.tangent, expected)
    traced = torch.jit.trace(mlp, x, check_trace=False)
    assert "aten::linear" in str(traced.inlined_graph)
    assert not prepared_calls


@pytest.mark.parametrize(
    "first, second", [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)]
)
def test_inference_mode_and_back(first, second, prepared_calls):
    mlp = make_mlp()
    x = randn(1, 3, H)
    with torch.no_grad():
        expected = by_modules(mlp, x)
    for mode in (first, second, first):
        with mode():
            for _ in range(2):
                torch.testing.assert_close(mlp(x), expected, atol=2e-5, rtol=2e-5)
    assert len(prepared_calls) >= 3


@torch.no_grad()
def test_other_inputs(prepared_calls):
    """Inputs that the recorded launches cannot take are computed right, too."""
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    wide, flat = randn(1, 3, 2 * H), randn(3 * H + 1)
    for other in (
        wide[..., :H],
        wide[..., ::2],
        flat[1:].view(1, 3, H),
        x.transpose(0, 1),
        torch._neg_view(x),
        torch.empty(0, H, device=DEVICE),
        x.expand(2, 3, H),
    ):
        torch.testing.assert_close(mlp(other), by_modules(mlp, other), atol=2e-5, rtol=2e-5)
    for wrong in (x.double(), randn(3, H - 1), randn(3, 2 * H)):
        with pytest.raises(RuntimeError):
            mlp(wrong)


@torch.no_grad()
def test_other_inputs_leave_the_launches(prepared_calls):
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    before = mlp.__dict__["_prepared"]
    mlp(randn(1, 3, 2 * H)[..., ::2])
    assert mlp.__dict__["_prepared"] is before and not prepared_calls
    mlp(x)
    assert len(prepared_calls) == 1


@torch.no_grad()
def test_unaligned_tokens_do_not_take_launches_of_aligned_ones(prepared_calls):
    mlp = make_mlp()
    warm(mlp, prepared_calls)
    mlp(randn(3 * H + 1)[1:].view(1, 3, H))
    assert prepared_calls == [None]


@torch.no_grad()
def test_nothing_is_kept_alive(prepared_calls):
    mlp = make_mlp(backend="cublas")
    warm(mlp, prepared_calls, tokens=130)
    projection, storage = weakref.ref(mlp.up_proj), weakref.ref(mlp.down_proj.weight)
    mlp.up_proj, mlp.down_proj.weight = fresh(H, I), nn.Parameter(randn(H, I))
    gc.collect()
    assert projection() is None and storage() is None


def test_the_state_of_a_model_stays_the_same(prepared_calls):
    import copy
    import pickle

    mlp = make_mlp()
    before = set(vars(mlp)) | {"_prepared"}
    x, y = warm(mlp, prepared_calls)
    for other in (copy.deepcopy(mlp), copy.copy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert "_prepared" not in vars(other)
        with torch.no_grad():
            torch.testing.assert_close(other(x), y)
    assert set(vars(mlp)) == before
    assert "_prepared" not in vars(patching.unpatch(mlp))


@pytest.mark.slow
@torch.no_grad()
def test_launches_are_bounded(prepared_calls, monkeypatch):
    monkeypatch.setattr(prepared, "MOST_LENGTHS", 2)
    monkeypatch.setattr(operator, "MOST_REPLAYS", 3)
    monkeypatch.setattr(operator, "_replays", {})
    mlp = make_mlp()
    for _ in range(2):
        for tokens in range(1, 6):
            x = randn(tokens, H)
            torch.testing.assert_close(mlp(x), by_modules(mlp, x), atol=2e-5, rtol=2e-5)
    assert len(operator._replays) <= 3 and len(mlp.__dict__["_prepared"]._launches) <= 2


@torch.no_grad()
def test_the_precision_of_float32_is_part_of_a_launch(prepared_calls, monkeypatch):
    monkeypatch.setattr(operator, "_replays", {})
    mlp = make_mlp()
    x, _ = warm(mlp, prepared_calls)
    saved = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        mlp(x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = saved
    assert len(operator._replays) == 2
