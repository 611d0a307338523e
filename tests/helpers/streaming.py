"""Tiny checkpoints of every family, and their comparison."""

import json
import random

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gluprune.io.shards import INDEX_FILE, SINGLE_FILE

HIDDEN, WIDTH, LAYERS = 24, 52, 3


EXTRA = {
    "llama": {"mlp_bias": True},
    "gemma3_text": {"layer_types": ["full_attention"] * LAYERS},
    "phi3": {"pad_token_id": 0},
}


def tiny_model(model_type, dtype=torch.bfloat16, seed=0, **overrides):
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 40,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **EXTRA.get(model_type, {}),
            **overrides,
        },
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)  # biases and norms too
    return model


def load(file):
    """Copies of the tensors of a file (the library maps the file, which the tests overwrite)."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def reshard(folder, count, seed):
    """Spread the tensors of a single-file checkpoint over `count` files, at random and in random order."""
    tensors = load(folder / SINGLE_FILE)
    rng = random.Random(seed)
    names = rng.sample(sorted(tensors), len(tensors))
    placed = {name: index if index < count else rng.randrange(count) for index, name in enumerate(names)}
    weight_map = {}
    for index in range(count):
        file = f"part-{index}.safetensors"
        raw_save({name: tensors[name] for name in names if placed[name] == index}, folder / file)
        weight_map |= {name: file for name in names if placed[name] == index}
    (folder / SINGLE_FILE).unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_save(tensors, file):
    """A safetensors file with the tensors in the order given (the library's own writer sorts them)."""
    header, data = {}, b""
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def stored(folder):
    """All tensors of a checkpoint, read with the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in tensors
            tensors[name] = tensor
    return tensors


def assert_same_tensors(folder, expected_folder):
    actual, expected = stored(folder), stored(expected_folder)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_same_config(folder, expected_folder):
    """Compare configs as transformers reads them, ignoring the keys that its writer adds."""
    actual, expected = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, expected_folder))
    for document in (actual, expected):
        for key in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            document.pop(key, None)
    assert actual == expected


def contents(folder):
    """The bytes of every file, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
