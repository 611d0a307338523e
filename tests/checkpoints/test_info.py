"""`info` of checkpoints whose config says less or more than their files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gluprune.checkpoints.info import info
from gluprune.cli import main
from gluprune.io.shards import SINGLE_FILE
from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture
def folder(tmp_path):
    make_tiny_model(seed=1, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "an unknown method": {"bits": 8},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights(folder, method, capsys):
    """Sizes are those of the files, and nothing is fused."""
    dense = info(folder)
    tensors = {name: tensor.to(torch.float8_e4m3fn) if ".mlp." in name else tensor for name, tensor in load(folder)}
    scales = {f"model.layers.{layer}.mlp.down_proj.weight_scale": torch.ones(8) for layer in range(3)}
    save_file(tensors | scales, folder / SINGLE_FILE)
    configure(folder, quantization_config=QUANTIZED[method])
    found = info(folder)
    assert (found.parameters, found.widths) == (dense.parameters, dense.widths)
    assert found.mlp_bytes == dense.mlp_bytes // 2 + 3 * 8 * 4
    assert found.bytes == dense.bytes - dense.mlp_bytes + found.mlp_bytes
    assert (found.dtype, found.fusible, found.not_fusible) == (method, 0, {f"quantized by {method}": 3})
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"({method})" in text and f"0 of 3 MLPs by gluprune.patch_llama on a GPU; 3 x quantized by {method}" in text


def load(folder):
    return [(name, tensor.clone()) for name, tensor in load_file(folder / SINGLE_FILE).items()]


def test_quantized_weights_that_are_elsewhere(folder, capsys):
    (folder / SINGLE_FILE).unlink()
    assert info(folder).bytes == 2 * info(folder).parameters
    configure(folder, quantization_config=QUANTIZED["gptq"])
    assert info(folder).bytes is None and info(folder).mlp_bytes is None
    assert main(["info", str(folder)]) == 0
    assert "not known: the weights are not on this disk (gptq)" in capsys.readouterr().out


def test_a_config_without_a_dtype(folder):
    """Older checkpoints do not say it."""
    expected = info(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    found = info(folder)
    assert (found.bytes, found.mlp_bytes, found.dtype) == (expected.bytes, expected.mlp_bytes, "bfloat16")


def test_mixed_dtypes(folder):
    before = info(folder)
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in load(folder)}
    save_file(tensors, folder / SINGLE_FILE)
    norms = sum(tensor.numel() for name, tensor in tensors.items() if "norm" in name)
    assert info(folder).bytes == before.bytes + 2 * norms and info(folder).dtype == "bfloat16"


@pytest.mark.parametrize("stored", [True, False], ids=["head in the file", "head left out"])
def test_tied_weights_count_once(tmp_path, stored):
    model = make_tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    if stored:
        tensors = dict(load(tmp_path))
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / SINGLE_FILE)
    found = info(tmp_path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.bytes == 4 * found.parameters


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_files_that_are_not_readable_leave_the_config(folder, content):
    expected = info(folder)
    (folder / SINGLE_FILE).write_bytes(content)
    assert info(folder).bytes == expected.bytes
