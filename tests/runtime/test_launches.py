"""Kept launches: the device that they belong to and run on, CUDA graphs, and what they keep."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from csrc_triton import layout
from csrc_triton.launch import replay
from gluprune.runtime import operator
from gluprune.runtime.prepared import Prepared
from tests.runtime.test_fusion import NORM_INPUTS
from tests.runtime.test_ops import make_operands

H = 48


@pytest.fixture
def case():
    """Tokens, the row of up, and operands."""
    operands = tuple(tensor if tensor is None else tensor.detach() for tensor in make_operands(37, H, bias=False))
    return torch.randn(3, H), layout.first_up_row(*operands[:3]), (*operands, None, None, None)


def test_a_launch_belongs_to_one_device(case, monkeypatch):
    keys = []
    monkeypatch.setattr(operator, "_kept", lambda key, x, record: keys.append(key))
    x, up_row, operands = case
    for device in ("cpu", "meta"):
        operator.find_replay(x.to(device), up_row, operands, "silu", "triton")
        operator.find_norm_replay(x.to(device), torch.ones(H, device=device), 1e-5, "llama")
    assert len(set(keys)) == 4


@pytest.fixture
def entered(monkeypatch):
    """The devices of CUDA that are entered at the moment."""
    stack = []

    @contextmanager
    def enter(device):
        stack.append(device.device if isinstance(device, torch.Tensor) else device)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device_of", enter)
    monkeypatch.setattr(torch.cuda, "device", enter)
    return stack


def test_kernels_run_on_the_device_of_the_tokens(case, entered, monkeypatch):
    seen = []
    launches = SimpleNamespace(run=lambda x, weights: seen.append(list(entered)))
    monkeypatch.setattr(operator, "find_replay", lambda *args: seen.append(list(entered)) or launches)
    x, up_row, operands = case
    operator.run_kernels(x, up_row, operands, "silu", "triton")
    assert seen == [[x.device]] * 2


class Kept(Prepared):
    """Prepared launches that note the device they run on."""

    def __init__(self, tensors, entered):
        super().__init__(tensors, hidden=H, dtype=tensors[0].dtype)
        self.seen, self._entered = [], entered

    def _note(self, *args):
        self.seen.append(list(self._entered))
        return self

    def _replay(self, module, x):
        self._note()
        return SimpleNamespace(bind=lambda addresses, device: None, run=self._note)

    def _weights(self, module):
        return (None,) * 5


def test_prepared_launches_run_on_the_device_of_the_weights(case, entered, monkeypatch):
    x, _, operands = case
    kept = Kept(list(operands[:3]), entered)
    kept.run(None, x)
    assert kept.seen == [[x.device], []], "it looks for launches on the device, and a CPU needs none"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index, expected in ((0, []), (1, [1])):
        kept._device = torch.device("cuda", index)
        kept.run(None, x)
        assert kept.seen[-1] == expected


@pytest.mark.parametrize("name", [*sorted(set(NORM_INPUTS) - {"empty"}), "device"])
def test_inputs_that_kept_launches_cannot_take(case, name):
    x, _, operands = case
    kept = Kept(list(operands[:3]), [])
    assert kept.takes(x)
    assert not kept.takes(x.to("meta") if name == "device" else NORM_INPUTS[name](x[None].repeat(2, 1, 1)))


def test_weights_that_need_a_gradient(case):
    x, _, operands = case
    kept = Kept([tensor.clone().requires_grad_() for tensor in operands[:3]], [])
    assert not kept.takes(x)
    with torch.no_grad():
        assert kept.takes(x) and kept.takes(x.clone().requires_grad_())


def test_nothing_is_recorded_while_a_graph_is_captured(monkeypatch):
    recorded = []
    monkeypatch.setattr(operator, "_replays", {})
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        operator._kept(("key",), SimpleNamespace(is_cuda=True), lambda: recorded.append(1))
        assert len(recorded) == len(operator._replays) == (not capturing)


def test_a_plan_on_a_part_of_the_tokens_is_not_replayed():
    """Other tokens of the same shape may lie elsewhere."""
    x, y = torch.randn(3, H), torch.empty(3, H)

    def plan(tokens):
        call = SimpleNamespace(compiled=lambda: None, grid_3d=(1, 1, 1), arguments=lambda: [tokens, y])
        return SimpleNamespace(calls=[call], output=y)

    weights = (None,) * 5
    replay.Replay(plan(x), x, weights)
    assert replay.make_replay(plan(x[1:]), x, weights) is None
