"""`prune` in place: remaining weights are bit-equal, and a failure changes nothing."""

import itertools
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gluprune
from gluprune.models.families import FAMILIES
from gluprune.models.glu import model_glus
from gluprune.pruning import narrow as narrow_module
from gluprune.pruning import prune as pruning_module
from tests.helpers.tiny_models import assert_unchanged, make_tiny_model, snapshot, token_ids

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pieces(glu):
    """Rows of gate and up, columns of down and the biases, copied."""
    gate, up, down = (weight.clone() for weight in glu.weights())
    if glu.family.packed:
        gate_bias, up_bias = (None, None) if glu.gate.bias is None else glu.gate.bias.detach().clone().chunk(2)
    else:
        gate_bias, up_bias = (
            None if projection.bias is None else projection.bias.detach().clone() for projection in (glu.gate, glu.up)
        )
    down_bias = None if glu.down.bias is None else glu.down.bias.detach().clone()
    return gate, up, down, gate_bias, up_bias, down_bias


def check_narrowed(glu, before, kept):
    gate, up, down, gate_bias, up_bias, down_bias = before
    after = pieces(glu)
    expected = (
        gate[kept],
        up[kept],
        down[:, kept],
        None if gate_bias is None else gate_bias[kept],
        None if up_bias is None else up_bias[kept],
        down_bias,
    )
    for found, wanted in zip(after, expected):
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)
    width = len(kept)
    assert glu.down.in_features == width
    assert glu.gate.out_features == glu.gate.weight.shape[0] == (2 * width if glu.family.packed else width)
    assert glu.up.out_features == glu.up.weight.shape[0]
    if hasattr(glu.mlp, "intermediate_size"):
        assert glu.mlp.intermediate_size == width


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(list(FAMILIES)),
    dtype=st.sampled_from(list(DTYPES)),
    neurons=st.integers(2, 70),
    ratio=st.floats(0.01, 0.99),
    multiple=st.sampled_from([1, 2, 8, 16]),
    score=st.sampled_from(["maw", "maw_gud", "vow", "pon", "l2", "random"]),
    layers=st.sampled_from([None, [0], [2], [0, 2], [1, 2]]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_narrowing_is_exact(family, dtype, neurons, ratio, multiple, score, layers, bias, seed):
    bias = {"mlp_bias": bias} if family in ("llama", "smollm3", "granite") else {}
    model = make_tiny_model(family, DTYPES[dtype], seed, intermediate_size=neurons, **bias)
    glus = model_glus(model)
    before = [pieces(glu) for glu in glus]
    criterion = (lambda gate, up, down: torch.rand(len(gate))) if score == "random" else score
    wanted = neurons - int(ratio * neurons)
    wanted = (2 * wanted + multiple) // (2 * multiple) * multiple
    if not 0 < wanted < neurons:
        with pytest.raises(ValueError):
            gluprune.prune(model, pruning_ratio=ratio, multiple_of=multiple, score=criterion, layers=layers)
        return
    original = sum(p.numel() for p in model.parameters())
    report = gluprune.prune(model, pruning_ratio=ratio, multiple_of=multiple, score=criterion, layers=layers)

    chosen = [0, 1, 2] if layers is None else layers
    assert list(report.kept) == chosen
    assert (report.intermediate_size, report.original_intermediate_size) == (wanted, neurons)
    for index, glu in enumerate(glus):
        kept = report.kept.get(index, torch.arange(neurons))
        check_narrowed(glu, before[index], kept)
    assert report.original_parameters == original
    assert report.parameters == sum(p.numel() for p in model.parameters())
    config = model.config.get_text_config()
    assert [layer.intermediate_size for layer in config.per_layer_config] == [glu.intermediate_size for glu in glus]


def test_output_equals_the_model_with_zeroed_neurons(family_name, tiny_model):
    """Narrowing equals setting the neurons' outputs to zero, in float64 with a tight tolerance."""
    model = tiny_model(family_name, torch.float64, seed=3)
    ids = torch.randint(3, 64, (2, 9))
    zeroed = tiny_model(family_name, torch.float64, seed=3)
    zeroed.load_state_dict(model.state_dict())
    report = gluprune.prune(model, pruning_ratio=0.3, multiple_of=1, score="l2")
    for index, glu in enumerate(model_glus(zeroed)):
        removed = torch.ones(101, dtype=torch.bool)
        removed[report.kept[index]] = False
        glu.down.weight.data[:, removed] = 0
    torch.testing.assert_close(model(ids).logits, zeroed(ids).logits, rtol=1e-10, atol=1e-12)


def test_pruning_in_training_asks_for_a_new_optimizer(tiny_model, caplog):
    model = tiny_model()
    gluprune.prune(model, pruning_ratio=0.2, multiple_of=1)
    assert not caplog.records
    model(torch.randint(3, 64, (1, 5))).logits.sum().backward()
    gluprune.prune(model, pruning_ratio=0.2, multiple_of=1)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.message.startswith("create a new optimizer")


@pytest.mark.parametrize("arguments", [{}, {"score": "hybrid", "compensate": True}])
def test_in_inference_mode(tiny_model, arguments):
    """The pruned weights are those of a call outside, and can be trained; a model made in that mode is pruned, too."""
    model, same, batch = tiny_model(seed=1), tiny_model(seed=1), token_ids()
    if arguments:
        arguments = arguments | {"calibration": [batch]}
    with torch.inference_mode():
        made_inside = tiny_model(seed=1)
        report = gluprune.prune(model, pruning_ratio=0.5, multiple_of=1, **arguments)
        assert gluprune.prune(made_inside, pruning_ratio=0.5, multiple_of=1, **arguments) == report
    assert gluprune.prune(same, pruning_ratio=0.5, multiple_of=1, **arguments) == report
    for name, parameter in same.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert torch.equal(made_inside.get_parameter(name), parameter)
    model(batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_layer_is_not_layers(tiny_model):
    assert "in 1 layer (" in str(gluprune.prune(tiny_model(), pruning_ratio=0.2, multiple_of=1, layers=[0]))
    assert " layers (" in str(gluprune.prune(tiny_model(), pruning_ratio=0.2, multiple_of=1))


def test_no_second_copy_remains(tiny_model):
    """Parameter objects are kept, their storage has no slack, and stale gradients are removed."""
    model = tiny_model("llama", mlp_bias=True)
    model(torch.randint(3, 64, (1, 5))).logits.sum().backward()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    for glu in model_glus(model):
        for projection in glu.projections.values():
            assert projection.weight.grad is None
            assert projection.weight.untyped_storage().nbytes() == projection.weight.nbytes
    assert model.lm_head.weight.grad is not None
    model(torch.randint(3, 64, (1, 5))).logits.sum().backward()
    assert model_glus(model)[0].gate.weight.grad.shape == model_glus(model)[0].gate.weight.shape


MEMORY_SCRIPT = """
import sys, torch, gluprune
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=1024, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=8, vocab_size=64)
config = LlamaConfig(**sizes)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16)
model.to_empty(device="cpu")
for parameter in model.parameters():
    for rows in parameter.data.split(64):
        rows.normal_()
def peak():  # of this process only: getrusage would return its parent's, if that is larger
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
gluprune.prune(model, pruning_ratio=0.5, multiple_of=1, score=sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("score", ["maw", "vow"])
def test_memory_above_the_model_stays_under_two_layers(score):
    """Peak resident memory of pruning, above the peak of the same process after loading the model."""
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, score], capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) < 2 * 3 * 1024 * 8192 * 2


def test_prune_twice_and_layer_by_layer(tiny_model):
    model = tiny_model()
    first = gluprune.prune(model, intermediate_size=80, multiple_of=1)
    second = gluprune.prune(model, intermediate_size=64, multiple_of=1)
    assert (first.intermediate_size, second.original_intermediate_size, second.intermediate_size) == (80, 80, 64)
    for index in range(3):
        gluprune.prune(model, intermediate_size=32, multiple_of=1, layers=[index])
    assert model.config.intermediate_size == 32 and not model.config.is_heterogeneous


def test_layers_of_different_widths_need_separate_calls(tiny_model, unchanged):
    model = tiny_model()
    gluprune.prune(model, intermediate_size=80, multiple_of=1, layers=[1])
    with unchanged(model), pytest.raises(ValueError, match=r"different widths \[80, 101\]"):
        gluprune.prune(model, intermediate_size=64, multiple_of=1)


def test_report(tiny_model):
    model = tiny_model()

    def by_index(gate, up, down):
        assert gate.shape == up.shape == (101, 32) and down.shape == (32, 101)
        return torch.arange(101)

    report = gluprune.prune(model, intermediate_size=90, multiple_of=1, score=by_index, layers=[2, 0])
    assert report.score == "by_index" and list(report.kept) == [0, 2]
    assert torch.equal(report.kept[2], torch.arange(11, 101))
    as_dict = report.to_dict()
    assert as_dict["kept"][0] == list(range(11, 101))
    assert as_dict["pruning_ratio"] == pytest.approx(11 / 101) and as_dict["expansion_ratio"] == 90 / 32
    assert "101 -> 90 neurons in 2 layers" in str(report)


NAN = float("nan")
BAD = {
    "no target": ({}, ValueError, "exactly one of"),
    "two targets": (dict(pruning_ratio=0.5, intermediate_size=8), ValueError, "exactly one of"),
    "ratio 0": (dict(pruning_ratio=0), ValueError, "between 0 and 1"),
    "ratio 1": (dict(pruning_ratio=1), ValueError, "between 0 and 1"),
    "ratio below 0": (dict(pruning_ratio=-0.5), ValueError, "between 0 and 1"),
    "expansion above the current": (dict(expansion_ratio=3.2), ValueError, "between 0 and the current 3.156"),
    "width above the current": (dict(intermediate_size=102), ValueError, "between 1 and 100"),
    "rounds to the current": (dict(intermediate_size=100, multiple_of=101), ValueError, "rounds to 101"),
    "rounds to 0": (dict(intermediate_size=3, multiple_of=128), ValueError, "rounds to 0"),
    "unknown score": (dict(pruning_ratio=0.5, score="wanda"), ValueError, "unknown score 'wanda'; allowed: maw"),
    "score with NaN": (
        dict(pruning_ratio=0.5, score=lambda g, u, d: torch.tensor([1.0] * 100 + [NAN])),
        ValueError,
        "layer 0 has 1 NaN of 101",
    ),
    "score of wrong shape": (
        dict(pruning_ratio=0.5, score=lambda g, u, d: torch.ones(32)),
        ValueError,
        r"layer 0 must be a tensor of shape \[101\], got \[32\]",
    ),
    "score that is not a tensor": (dict(pruning_ratio=0.5, score=lambda g, u, d: 3), ValueError, "got int"),
    "layer out of range": (dict(pruning_ratio=0.5, layers=[0, 3]), ValueError, "layer index 3 is out of range.*0 to 2"),
    "negative layer": (dict(pruning_ratio=0.5, layers=[-1]), ValueError, "layer index -1 is out of range"),
    "layer twice": (dict(pruning_ratio=0.5, layers=[1, 1]), ValueError, "layer index 1 is given twice"),
    "no layer": (dict(pruning_ratio=0.5, layers=[]), ValueError, "layers is empty"),
    "layers that are no list": (dict(pruning_ratio=0.5, layers=3), TypeError, "a list of layer indices, got 3"),
    "layers as text": (dict(pruning_ratio=0.5, layers="0,2"), TypeError, "a list of layer indices, got '0,2'"),
    "percent": (dict(pruning_ratio=20), ValueError, r"got 20: did you mean 0\.2\?"),
    "layer of wrong type": (dict(pruning_ratio=0.5, layers=["1"]), TypeError, "layers must hold integers, got '1'"),
}


@pytest.mark.parametrize("arguments, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_changes_nothing(tiny_model, unchanged, arguments, error, message):
    model = tiny_model("llama", mlp_bias=True)
    with unchanged(model), pytest.raises(error, match=message):
        gluprune.prune(model, **{"multiple_of": 1, **arguments})


def test_weights_with_nan(tiny_model, unchanged):
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight.data[7, 3] = NAN
    with pytest.raises(ValueError, match="score of layer 2 has 1 NaN"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)
    assert [glu.intermediate_size for glu in model_glus(model)] == [101] * 3


def test_meta_device(tiny_model):
    model = tiny_model().to("meta")
    with pytest.raises(ValueError, match="layer 0, gate_proj is on the meta device"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


def _tie_two_layers(model):
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _tie_gate_to_up(model):
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[1].mlp.up_proj.weight


def _share_the_module(model):
    model.model.layers[2].mlp = model.model.layers[0].mlp


def _share_storage(model):
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight = nn.Parameter(mlp.up_proj.weight.data[:])


@pytest.mark.parametrize("tie", [_tie_two_layers, _tie_gate_to_up, _share_the_module, _share_storage])
def test_shared_weights(tiny_model, unchanged, tie):
    model = tiny_model()
    tie(model)
    with unchanged(model), pytest.raises(ValueError, match="share memory"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


def test_projection_that_is_not_a_plain_linear(tiny_model, unchanged):
    class Adapted(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[1].mlp.down_proj.__class__ = Adapted
    with unchanged(model), pytest.raises(ValueError, match="layer 1, down_proj is Adapted, not nn.Linear"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


def test_quantized_dtype(tiny_model):
    model = tiny_model()
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(torch.ones(projection.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="layer 1, down_proj.weight has dtype torch.int8"):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


class Injected(Exception):
    pass


class _FailingStack(ExitStack):
    """An undo stack that fails at the n-th registration, which precedes the n-th change of the model."""

    countdown = 0

    def callback(self, *arguments, **options):
        type(self).countdown -= 1
        if type(self).countdown < 0:
            raise Injected
        return super().callback(*arguments, **options)


@pytest.mark.parametrize("family, least_steps", [("llama", 16), ("phi3", 9)])
def test_failure_before_every_step_changes_nothing(tiny_model, monkeypatch, family, least_steps):
    monkeypatch.setattr(pruning_module, "ExitStack", _FailingStack)
    options = {"mlp_bias": True} if family == "llama" else {}
    for step in itertools.count():
        model = tiny_model(family, **options)
        model(torch.randint(3, 64, (1, 5))).logits.sum().backward()
        before = snapshot(model)
        _FailingStack.countdown = step
        try:
            gluprune.prune(model, pruning_ratio=0.5, multiple_of=1, layers=[0, 2])
        except Injected:
            assert_unchanged(model, before)
        else:
            break
    assert step >= least_steps


@pytest.mark.parametrize("name, calls", [("narrow", 3), ("set_config_widths", 1), ("count_parameters", 2)])
def test_failure_after_every_step_changes_nothing(tiny_model, unchanged, monkeypatch, name, calls):
    original = getattr(pruning_module, name)
    for failing_call in range(calls):
        remaining = failing_call

        def failing(*arguments):
            nonlocal remaining
            result = original(*arguments)
            remaining -= 1
            if remaining < 0:
                raise Injected
            return result

        monkeypatch.setattr(pruning_module, name, failing)
        model = tiny_model("llama", mlp_bias=True)
        with unchanged(model), pytest.raises(Injected):
            gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)


def test_out_of_memory_in_the_middle(tiny_model, unchanged, monkeypatch):
    """The allocation of the 14th narrowed weight fails; the model must be restored."""
    original, calls = narrow_module._shrink, 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == 14:
            raise torch.OutOfMemoryError("injected")
        return original(*arguments)

    monkeypatch.setattr(narrow_module, "_shrink", failing)
    model = tiny_model("llama", mlp_bias=True)
    with unchanged(model), pytest.raises(torch.OutOfMemoryError):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)
    assert calls == 14


def test_restored_model_still_computes_the_same(tiny_model, monkeypatch):
    model = tiny_model("glm4", torch.float32)
    ids = torch.randint(3, 64, (1, 6))
    before = model(ids).logits
    monkeypatch.setattr(pruning_module, "PruneReport", lambda **_: (_ for _ in ()).throw(Injected()))
    with pytest.raises(Injected):
        gluprune.prune(model, pruning_ratio=0.5, multiple_of=1)
    assert torch.equal(model(ids).logits, before)
