"""The plugin of vLLM on stand-ins for vLLM's modules; serving/test_vllm_plugin.py runs it in vLLM."""

import logging
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from csrc_triton import layout
from gluprune.runtime import operator, vllm_mlp, vllm_plugin
from tests.helpers.poison import poison_empty

HIDDEN = 24


class ModelWeightParameter(nn.Parameter):
    """Like vLLM's, a subclass of the parameter."""


class UnquantizedLinearMethod:
    def apply(self, projection, x):
        return F.linear(x, projection.weight, projection.bias)


class Fp8LinearMethod(UnquantizedLinearMethod):
    pass


class ParallelLinear(nn.Module):
    def __init__(self, rows, columns, dtype, bias):
        super().__init__()
        self.weight = ModelWeightParameter(torch.randn(rows, columns).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(rows).to(dtype)) if bias else None
        self.quant_method, self.reduce_results, self.tp_size = UnquantizedLinearMethod(), True, 1

    def forward(self, x):
        return self.quant_method.apply(self, x), None


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class GeluAndMul(SiluAndMul):
    pass


class LlamaMLP(nn.Module):
    def __init__(self, width, dtype=torch.float32, *, bias=False):
        super().__init__()
        self.gate_up_proj = ParallelLinear(2 * width, HIDDEN, dtype, bias)
        self.down_proj = ParallelLinear(HIDDEN, width, dtype, bias)
        self.act_fn = SiluAndMul()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Qwen2MLP(LlamaMLP):
    pass


LlamaMLP.__module__ = "vllm.model_executor.models.llama"
Qwen2MLP.__module__ = "vllm.model_executor.models.qwen2"


def reference(mlp, x):
    """What an MLP computes, in float64."""
    gate, up = F.linear(x.double(), mlp.gate_up_proj.weight.double()).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, mlp.down_proj.weight.double())


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "vllm.gluprune")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "vllm.gluprune"]


@pytest.mark.parametrize("kind", [LlamaMLP, Qwen2MLP])
@pytest.mark.parametrize("width", [1, 37, 128, 200, 256])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
def test_a_fused_mlp_computes_the_same(kind, width, dtype, tolerance, monkeypatch):
    poison_empty(monkeypatch)
    model = nn.Sequential(kind(width, dtype), nn.Identity())
    x, mlp = torch.randn(5, HIDDEN).to(dtype), model[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, parameters = reference(mlp, x), list(model.parameters())
    vllm_mlp.fuse_mlps(model, "torch")
    assert isinstance(mlp, kind) and isinstance(mlp, vllm_mlp.FusedVllmMLP)
    assert error(mlp(x), expected) < tolerance
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    assert layout.first_up_row(gate, up, mlp.down_proj.weight) == width


@pytest.mark.skipif(not operator.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("width", [100, 128])
@pytest.mark.parametrize("tokens", [1, 20])
def test_kernels_run_on_the_packed_weight(width, tokens, kernel_calls):
    mlp, x = LlamaMLP(width), torch.randn(tokens, HIDDEN)
    expected = reference(mlp, x)
    vllm_mlp.fuse_mlps(mlp, "triton")
    assert error(mlp(x), expected) < 2e-6
    assert kernel_calls == ["triton"]


def test_aligned_weights_stay_where_they_are_and_padding_is_reported(log):
    model = nn.ModuleList([LlamaMLP(256), LlamaMLP(200)])
    before = [weight.data_ptr() for weight in model.parameters()]
    vllm_mlp.fuse_mlps(model, "torch")
    moved = [weight.data_ptr() != old for weight, old in zip(model.parameters(), before)]
    assert moved == [False, False, True, True]
    elements = sum(layout.storage_elements(weight) for weight in model[1].parameters())
    assert elements == 3 * 200 * HIDDEN + 2 * 56 * HIDDEN + 2 * 56  # rows of up, columns of down, and the ends
    assert log() == ["gluprune: 2 of 2 MLPs are fused (backend torch); padding takes 0.0 MiB"]


def test_weights_that_are_loaded_later_are_used():
    mlp, x = LlamaMLP(100), torch.randn(3, HIDDEN)
    vllm_mlp.fuse_mlps(mlp, "torch")
    for weight in mlp.parameters():
        weight.data.narrow(0, 0, weight.shape[0]).copy_(torch.randn(weight.shape))
    assert error(mlp(x), reference(mlp, x)) < 2e-6


def test_it_compiles_without_breaks_and_for_any_number_of_tokens():
    mlp = LlamaMLP(100)
    vllm_mlp.fuse_mlps(mlp, "torch")
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 7):
        x = torch.randn(tokens, HIDDEN)
        with torch.inference_mode():
            assert error(compiled(x), reference(mlp, x)) < 2e-6


@pytest.mark.parametrize("reduces, ranks, calls", [(True, 2, 1), (False, 2, 0), (True, 1, 0)])
def test_ranks_are_summed_where_vllm_sums_them(reduces, ranks, calls, monkeypatch):
    summed, distributed = [], ModuleType("vllm.distributed")
    distributed.tensor_model_parallel_all_reduce = lambda y: summed.append(y) or 2 * y
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    mlp, x = LlamaMLP(100), torch.randn(3, HIDDEN)
    mlp.down_proj.reduce_results, mlp.down_proj.tp_size = reduces, ranks
    vllm_mlp.fuse_mlps(mlp, "torch")
    y = mlp(x)
    assert len(summed) == calls
    assert error(y, reference(mlp, x) * (2 if calls else 1)) < 2e-6


def quantize(mlp):
    mlp.down_proj.quant_method = Fp8LinearMethod()


def offload(mlp):
    mlp.gate_up_proj.weight._vllm_is_uva_offloaded = True


def share(mlp):
    mlp.down_proj.weight.data = torch.randn(2 * HIDDEN, 100)[:HIDDEN]


def transpose(mlp):
    mlp.down_proj.weight.data = torch.randn(100, HIDDEN).t()


OBSTACLES = [
    ("down_proj is quantized (Fp8LinearMethod)", quantize),
    ("activation GeluAndMul is not supported (allowed: SiluAndMul)", lambda mlp: setattr(mlp, "act_fn", GeluAndMul())),
    ("gate_up_proj is offloaded", offload),
    ("gate_up_proj is float64", lambda mlp: mlp.double()),
    ("down_proj shares its memory, or is not contiguous", share),
    ("down_proj shares its memory, or is not contiguous", transpose),
    ("down_proj has a bias", lambda mlp: setattr(mlp.down_proj, "bias", nn.Parameter(torch.randn(HIDDEN)))),
]


@pytest.mark.parametrize("reason, change", OBSTACLES)
def test_what_cannot_be_fused_stays_and_the_line_says_why(reason, change, log):
    model = nn.ModuleList([LlamaMLP(100), LlamaMLP(100)])
    change(model[1])
    before = [weight.data_ptr() for weight in model[1].parameters()]
    vllm_mlp.fuse_mlps(model, "torch")
    assert type(model[1]) is LlamaMLP and isinstance(model[0], vllm_mlp.FusedVllmMLP)
    assert [weight.data_ptr() for weight in model[1].parameters()] == before
    assert log() == [f"gluprune: 1 of 2 MLPs are fused (backend torch); padding takes 0.0 MiB; not fused: 1 x {reason}"]


def test_nothing_is_fused_on_a_cpu_or_for_a_reason_of_the_model(log):
    model = nn.ModuleList([LlamaMLP(100)])
    vllm_mlp.fuse_mlps(model, "auto")
    vllm_mlp.fuse_mlps(model, "torch", reason="LoRA is enabled")
    assert type(model[0]) is LlamaMLP
    assert log() == [
        "gluprune: 0 of 1 MLPs are fused (backend auto); not fused: 1 x no kernels run on cpu",
        "gluprune: 0 of 1 MLPs are fused (backend torch); not fused: 1 x LoRA is enabled",
    ]


def test_mlps_of_other_packages_are_left():
    class LlamaMLP(nn.Module):  # as in transformers, whose modules vLLM can run too
        pass

    model = nn.ModuleList([LlamaMLP()])
    vllm_mlp.fuse_mlps(model, "torch")
    assert type(model[0]) is LlamaMLP


class DecoderLayer:
    def __init__(self, vllm_config, prefix="", config=None):
        self.width = (config or vllm_config.model_config.hf_config).intermediate_size


class QwenDecoderLayer:
    def __init__(self, config, prefix=""):
        self.width = config.intermediate_size


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM, as far as the plugin knows it."""
    state = SimpleNamespace(environment_variables={}, VLLM_BATCH_INVARIANT=False, lora=None, processed=[])
    originals = DecoderLayer, QwenDecoderLayer, QwenDecoderLayer
    Layer, *QwenLayers = (type(each.__name__, (), dict(vars(each))) for each in originals)
    contents = {
        "vllm": {"envs": state},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: SimpleNamespace(lora_config=state.lora)},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.base_loader": {
            "process_weights_after_loading": lambda model, *others: state.processed.append((type(model), others))
        },
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": {"LlamaDecoderLayer": Layer},
        "vllm.model_executor.models.qwen2": {"Qwen2DecoderLayer": QwenLayers[0]},
        "vllm.model_executor.models.qwen3": {"Qwen3DecoderLayer": QwenLayers[1]},
        "vllm.model_executor.models.utils": {"extract_layer_index": lambda prefix: int(prefix.split(".")[-1])},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
    state.loader = sys.modules["vllm.model_executor.model_loader.base_loader"]
    state.Layer, state.QwenLayers = Layer, QwenLayers
    vllm_plugin._install.cache_clear()
    yield state
    vllm_plugin._install.cache_clear()
    CONFIG_MAPPING._extra_content.pop("nemotron-nas", None)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_is_off_without_the_variable(value, vllm, monkeypatch):
    monkeypatch.delenv("GLUPRUNE_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("GLUPRUNE_VLLM", value)
    before = vllm.loader.process_weights_after_loading, vllm.Layer.__init__
    vllm_plugin.register()
    assert (vllm.loader.process_weights_after_loading, vllm.Layer.__init__) == before
    assert vllm.environment_variables == {}


@pytest.mark.parametrize("value, kind", [("torch", vllm_mlp.FusedVllmMLP), ("1", LlamaMLP)])
def test_loaded_models_are_fused_before_vllm_prepares_their_weights(value, kind, vllm, monkeypatch, log):
    monkeypatch.setenv("GLUPRUNE_VLLM", value)
    for _ in range(2):  # as vLLM may
        vllm_plugin.register()
    mlp = LlamaMLP(100)
    vllm.loader.process_weights_after_loading(mlp, "config", "device")
    [(seen, others)] = vllm.processed
    assert issubclass(seen, kind) and others == ("config", "device") and len(log()) == 1
    assert vllm.environment_variables["GLUPRUNE_VLLM"]() == value


@pytest.mark.parametrize(
    "setting, reason",
    [({"lora": object()}, "LoRA is enabled"), ({"VLLM_BATCH_INVARIANT": True}, "VLLM_BATCH_INVARIANT is set")],
)
def test_settings_of_vllm_that_replace_projections_prevent_fusing(setting, reason, vllm, monkeypatch, log):
    monkeypatch.setenv("GLUPRUNE_VLLM", "torch")
    vllm_plugin.register()
    vars(vllm).update(setting)
    mlp = LlamaMLP(100)
    vllm.loader.process_weights_after_loading(mlp)
    assert type(mlp) is LlamaMLP and log()[0].endswith(f"not fused: 1 x {reason}")


def test_another_value_is_an_error_before_anything_is_changed(vllm, monkeypatch):
    monkeypatch.setenv("GLUPRUNE_VLLM", "yes")
    with pytest.raises(ValueError, match="GLUPRUNE_VLLM is 'yes'; allowed: 1, torch, and 0 for off"):
        vllm_plugin.register()
    assert vllm.environment_variables == {}


def test_each_layer_gets_its_own_config_if_layers_differ(vllm, monkeypatch):
    monkeypatch.setenv("GLUPRUNE_VLLM", "1")
    vllm_plugin.register()
    layers = {index: SimpleNamespace(intermediate_size=width) for index, width in enumerate((100, 200))}
    config = SimpleNamespace(is_heterogeneous=True, per_layer_config=layers)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    assert [vllm.Layer(vllm_config, prefix=f"layers.{index}").width for index in (0, 1)] == [100, 200]
    assert [vllm.Layer(vllm_config, f"layers.{index}", config).width for index in (0, 1)] == [100, 200]
    uniform = SimpleNamespace(intermediate_size=300)
    for layer in vllm.QwenLayers:
        assert [layer(config, prefix=f"layers.{index}").width for index in (0, 1)] == [100, 200]
        assert layer(uniform, prefix="layers.0").width == 300
    assert vllm.Layer(SimpleNamespace(model_config=SimpleNamespace(hf_config=uniform))).width == 300


def test_exports_can_be_read_without_their_code(vllm, monkeypatch):
    monkeypatch.setenv("GLUPRUNE_VLLM", "1")
    vllm_plugin.register()
    blocks = [{"attention": {}, "ffn": {"intermediate_size": width}} for width in (100, 200)]
    assert AutoConfig.for_model("nemotron-nas", block_configs=blocks).layer_widths == [100, 200]


def test_vllm_finds_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["gluprune"].partition(":")
    assert getattr(import_module(module), name) is vllm_plugin.register


def test_a_plugin_that_is_off_imports_nothing():
    code = "import sys, gluprune; from gluprune.runtime.vllm_plugin import register; register(); print(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GLUPRUNE_VLLM"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert not {"vllm", "torch", "transformers"} & set(done.stdout.split())
