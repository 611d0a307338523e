"""Pruned models, then quantized: what works at which width and group, perplexity, size; patched, they run as before."""

from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import gluprune
from gluprune.demo.run import calibration_text
from gluprune.measure.records import Record
from serving.models import checkpoints

MODELS = ("dense", "1024", "896", "922")
LENGTH, WINDOWS = 256, 8
# Method -> (package, bits, group along a row; 0 is a scale for each row).
METHODS = {
    "none": ("transformers", 16, 0),
    "int8": ("torchao", 8, 0),
    "int4, groups of 32": ("torchao", 4, 32),
    "int4, groups of 64": ("torchao", 4, 64),
    "int4, groups of 128": ("torchao", 4, 128),
    "int8 (LLM.int8)": ("bitsandbytes", 8, 0),
    "nf4, blocks of 64": ("bitsandbytes", 4, 64),
    "GPTQ int4, groups of 64": ("llmcompressor", 4, 64),
}


def quantized(source, method, work):
    """The model of a checkpoint, quantized in its decoder layers: on a CPU, computing in float32."""
    package, bits, group = METHODS[method]
    pytest.importorskip(package)
    if package == "bitsandbytes":
        options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config).eval()
    model = gluprune.load(source, dtype=torch.float32).eval()
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(group))
        quantize_(model.model.layers, config)
    elif package == "llmcompressor":
        gptq(model, AutoTokenizer.from_pretrained(source), group)
        model.save_pretrained(work / "gptq", save_compressed=True)
        return AutoModelForCausalLM.from_pretrained(work / "gptq", dtype=torch.float32).eval()
    return model


def gptq(model, tokenizer, group):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    batches = gluprune.batches_from_text(tokenizer, calibration_text(), windows=8, length=256, batch_size=1)
    data = Dataset.from_list([{"input_ids": each[0].tolist(), "attention_mask": [1] * 256} for each in batches])
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=256, num_calibration_samples=len(data))


def stored_bytes(model, bits):
    """Bytes of all weights in 16 bits, except quantized ones: codes of `bits`, and scales in 16 bits.

    Packages may hold codes of 4 bits in bytes, and scales in float32, as long as a model is in memory.
    """
    total = 2 * sum(parameter.numel() for parameter in model.model.embed_tokens.parameters())
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                codes, scales = module.in_features * module.out_features, scales_of(module)
                total += 2 * codes if scales is None else codes * bits // 8 + 2 * scales.numel()
            else:
                total += 2 * sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return total + 2 * model.model.norm.weight.numel()


def scales_of(module):
    """The scales of a quantized linear layer; None if it is not quantized."""
    weight = getattr(module, "weight", None)
    state, quant_state = getattr(module, "state", None), getattr(weight, "quant_state", None)
    places = (weight, "scale"), (weight, "SCB"), (state, "SCB"), (module, "weight_scale"), (quant_state, "absmax")
    return next((found for owner, name in places if (found := getattr(owner, name, None)) is not None), None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_quantized(name, method, tmp_path, keep):
    package, bits, group = METHODS[method]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    provider, shape = f"{package} {version(package)}", {"model": name, "method": method}
    source = checkpoints()[name]
    text = (files("gluprune.demo") / "data" / "demo_text.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", verbose=False).input_ids[0]
    try:
        model = quantized(source, method, tmp_path)
        with torch.no_grad():
            before = model(ids[None, :32]).logits
    except (AssertionError, ValueError, RuntimeError) as error:
        assert not fits(name, group), error
        keep(Record.missing("perplexity", provider, shape, torch.float32, unit="", reason=str(error).splitlines()[0]))
        return
    assert fits(name, group)
    reason = ""
    if method != "none":
        gluprune.patch(model)
        status = gluprune.fusion_status(model)
        assert not any(entry.fused for entry in status)
        reason = status[0].reason
        with torch.no_grad():
            assert torch.equal(model(ids[None, :32]).logits, before)
    value = gluprune.perplexity(model, ids, LENGTH, windows=WINDOWS)
    keep(Record.of("perplexity", provider, shape, torch.float32, unit="", values=[value], method=reason or None))
    size = stored_bytes(model, bits)
    keep(Record.of("size", provider, shape, torch.float32, unit="bytes", values=[size]))


def fits(name, group):
    """Whether rows of all projections consist of whole groups; the hidden size is 576."""
    width = {"dense": 1536}.get(name) or int(name)
    return not group or (width % group == 0 and 576 % group == 0)
