import copy
import logging
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from gluprune.runtime import operator
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch
from tests.helpers.marks import each_family, slow
from tests.helpers.patching import TOLERANCE, assert_fused, assert_same
from tests.helpers.tiny_models import DEVICE, gradients, logits, mlps, tiny_model, token_ids


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids), **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("family", each_family())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_family_fused(family, dtype, kernel_calls):
    model, ids = tiny_model(family, dtype=dtype, device=DEVICE), token_ids(device=DEVICE)
    one = ids[:1, :1]
    expected, expected_one = logits(model, ids), logits(model, one)
    assert patch(model, "triton") is model
    # The interpreter's dot reads bf16 as integers; `cublas` uses PyTorch's product here.
    if dtype != torch.bfloat16 or not operator.INTERPRETED:
        assert_fused(model)
    assert_same(logits(model, ids), expected, dtype)
    assert_same(logits(model, one), expected_one, dtype)
    patch(model, "cublas")
    assert_fused(model)
    kernel_calls.clear()
    assert_same(logits(model, ids), expected, dtype)
    assert kernel_calls == ["cublas"] * 2
    unpatch(model)
    kernel_calls.clear()
    assert torch.equal(logits(model, ids), expected) and not kernel_calls


@pytest.mark.parametrize("family", each_family())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_family_on_the_cpu_is_bit_equal_and_moves_nothing(family, dtype):
    model, ids = tiny_model(family, dtype=dtype), token_ids()
    expected, grads = logits(model, ids), gradients(model, ids)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    patch(model)
    assert torch.equal(logits(model, ids), expected)
    for name, grad in gradients(model, ids).items():
        assert torch.equal(grad, grads[name]), name
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("phi3", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "silu"}),
        ("granite", {"mlp_bias": True}),
        ("smollm3", {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    ],
    ids=str,
)
def test_unusual_activations_and_biases_of_a_family(family, settings, kernel_calls):
    model, ids = tiny_model(family, device=DEVICE, **settings), token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("family, width", [("llama", 1), ("llama", 130), ("phi3", 1), ("phi3", 130), ("phi3", 128)])
def test_biases_and_widths(family, width):
    model = tiny_model(family, width, mlp_bias=True, device=DEVICE)
    assert len(list(mlps(model)[0].parameters())) == (6 if family == "llama" else 2)
    ids = token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model, "triton")
    assert_fused(model)
    assert_same(logits(model, ids), expected)


def test_float64_runs_in_pytorch():
    model, ids = tiny_model(dtype=torch.float64), token_ids()
    expected = logits(model, ids)
    patch(model, "triton")
    assert {entry.reason for entry in fusion_status(model)} == {"the weights are float64"}
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.skipif(not operator.INTERPRETED, reason="of Triton's interpreter")
def test_bfloat16_is_left_to_pytorch_in_the_interpreter():
    model, ids = tiny_model(dtype=torch.bfloat16), token_ids()
    expected = logits(model, ids)
    patch(model, "triton", norms=True)
    assert {entry.reason for entry in fusion_status(model)} == {
        "Triton's interpreter computes products of bfloat16 wrongly"
    }
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("cache", ["static", *slow(None)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_generate(family, cache, kernel_calls):
    model, ids = tiny_model(family, device=DEVICE), token_ids(device=DEVICE)
    expected = greedy(model, ids, cache_implementation=cache)
    patch(model, "triton")
    assert torch.equal(greedy(model, ids, cache_implementation=cache), expected)
    assert len(kernel_calls) == 2 * 6


@pytest.mark.parametrize("width, family", [(77, "llama"), (128, "llama"), (77, "phi3")])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_training_gradients_equal_eager(width, family, checkpointing):
    model, ids = tiny_model(family, width=width, device=DEVICE).train(), token_ids(device=DEVICE)
    expected = gradients(model, ids)
    patch(model, "triton")
    assert_fused(model)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(
            grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_in_eval_mode_flow_through_the_operator(kernel_calls):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    expected = gradients(model, ids)
    patch(model, "triton")
    for name, grad in gradients(model, ids).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("fused_optimizer", [False, True])
@pytest.mark.parametrize("width", [77, 128])
def test_training_continues_after_patching(width, fused_optimizer):
    """Optimizer states from before patching stay valid, and fused optimizers get no weights with gaps."""
    model, ids = tiny_model(width=width, device=DEVICE), token_ids(device=DEVICE)
    plain = copy.deepcopy(model)

    def steps(model, before_last):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused_optimizer)
        model.train()
        for step in range(3):
            if step == 2:
                before_last()
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    steps(plain, lambda: None)
    steps(model, lambda: patch(model, "triton").eval().train())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert_fused(model.eval())
    assert_same(logits(model, ids), logits(plain.eval(), ids))


def test_autocast_runs_the_modules(kernel_calls):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = logits(model, ids)
        patch(model, "triton")
        assert torch.equal(logits(model, ids), expected)
    assert not kernel_calls
    logits(model, ids)
    assert len(kernel_calls) == 2


def test_function_transforms_run_the_modules():
    model = patch(tiny_model(device=DEVICE), "triton")
    mlp = mlps(model)[0]
    x = torch.randn(3, 5, 48, device=DEVICE)
    with torch.no_grad():
        assert_same(torch.vmap(mlp)(x), mlp(x))


@pytest.mark.parametrize("x", [torch.randn(3, 47), torch.randn(3, 48, dtype=torch.float16)], ids=["width", "dtype"])
def test_bad_inputs_raise_the_stock_errors(x):
    mlp, x = mlps(tiny_model(device=DEVICE))[0], x.to(DEVICE)
    with pytest.raises(RuntimeError) as stock:
        mlp(x)
    patch(mlp, "triton")
    with pytest.raises(RuntimeError) as patched:
        mlp(x)
    assert str(patched.value) == str(stock.value)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_conversions_keep_the_weights_aligned(family):
    model, ids = tiny_model(family, device=DEVICE), token_ids(device=DEVICE)
    reference = copy.deepcopy(model)
    patch(model, "triton")
    for convert in (lambda m: m.half(), lambda m: m.to(torch.float32), lambda m: m.to("cpu", torch.float16).to(DEVICE)):
        model, reference = convert(model), convert(reference)
        assert_fused(model)
        assert_same(logits(model, ids), logits(reference, ids), next(model.parameters()).dtype)
    assert_fused(model.to(torch.float16))
    assert not any(entry.fused for entry in fusion_status(model.double()))


def test_built_on_meta_then_loaded_with_assign():
    source, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    with torch.device("meta"):
        model = tiny_model(device="meta")
    patch(model, "triton")
    assert "meta device" in fusion_status(model)[0].reason
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    assert_fused(model)
    assert_same(logits(model, ids), logits(source, ids))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_after_patching(family, assign):
    model, other = tiny_model(family, device=DEVICE), tiny_model(family, seed=1, device=DEVICE)
    ids = token_ids(device=DEVICE)
    patch(model, "triton")
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_fused(model)
    assert_same(logits(model, ids), logits(other, ids))
    other.load_state_dict(model.state_dict(), assign=assign)
    assert_same(logits(other, ids), logits(model, ids))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_fused_and_independent(copied):
    model, ids = tiny_model(device=DEVICE), token_ids(device=DEVICE)
    expected = logits(model, ids)
    patch(model, "triton")
    twin = copied(model)
    assert_fused(twin)
    assert type(mlps(twin)[0]) is type(mlps(model)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(logits(twin, ids), expected)
    unpatch(twin)
    assert type(mlps(twin)[0]) is LlamaMLP and torch.equal(logits(twin, ids), expected)


@pytest.mark.parametrize("family, width", [("llama", 77), ("llama", 128), ("phi3", 77)])
def test_saves_bit_equal_and_without_a_copy(family, width, tmp_path, monkeypatch, caplog):
    model = tiny_model(family, width, dtype=torch.float16, device=DEVICE)
    model.save_pretrained(tmp_path / "before")
    patch(model, "triton")
    assert_fused(model)
    clones = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kwargs: clones.append(self) or clone(self, **kwargs))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "after")
    assert not clones and not caplog.records
    files = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "after").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].cpu())


@pytest.mark.parametrize("width", [77, 128])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_way_to_save(family, width, tmp_path):
    model = tiny_model(family, width, device=DEVICE)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model, "triton")

    save_file(model.state_dict(), tmp_path / "a.safetensors")
    save_model(model, str(tmp_path / "b.safetensors"))
    torch.save(model.state_dict(), tmp_path / "c.pt")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "d", no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "d", no_dist=True)
    files = [load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for loaded in (*files, torch.load(tmp_path / "c.pt"), found):
        assert all(torch.equal(loaded[name].to(DEVICE), expected[name]) for name in expected)
    assert (tmp_path / "c.pt").stat().st_size < 1.2 * sum(tensor.nbytes for tensor in expected.values()) + 20000


def test_state_dict_has_the_same_names_and_values_and_no_padding():
    model = tiny_model(device=DEVICE)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model, "triton")
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    weight = state["model.layers.0.mlp.up_proj.weight"]
    assert weight.untyped_storage().nbytes() == weight.nbytes
    weight[0, 0] = 5  # still the model's memory
    assert mlps(model)[0].up_proj.weight[0, 0] == 5
    kept = model.state_dict(keep_vars=True)
    assert kept["model.layers.0.mlp.up_proj.weight"] is mlps(model)[0].up_proj.weight
    assert list(mlps(model)[0].state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


@pytest.mark.skipif(not operator.INTERPRETED, reason="counts the CPU's memory")
def test_extra_memory_stays_under_one_layer():
    config = dict(hidden_size=256, intermediate_size=1000, num_hidden_layers=6, vocab_size=8, num_attention_heads=4)
    with torch.profiler.profile(profile_memory=True) as profile:
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        layer = sum(parameter.nbytes for parameter in mlps(model)[0].parameters())
        for action in (lambda: patch(model, "triton"), lambda: unpatch(model)):
            with torch.profiler.record_function("gluprune"):
                action()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = [(event.start_ns(), event.end_ns()) for event in events if event.name() == "gluprune"]
    memory = [event for event in events if event.name() == "[memory]"]
    assert len(spans) == 2
    for start, end in spans:
        held = highest = 0
        for event in memory:
            if start <= event.start_ns() <= end:
                held += event.nbytes()
                highest = max(highest, held)
        assert layer / 4 < highest < layer and abs(held) < 6 * layer * 0.03
