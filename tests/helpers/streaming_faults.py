"""Checkpoints for the tests of faults on disk."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gluprune.io.shards import INDEX_FILE

ARGUMENTS = dict(intermediate_size=20, multiple_of=1)


def make_source(folder, sharded=True):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size=2_500 if sharded else "5GB")
    (folder / "tokenizer.json").write_text("{}")
    assert (folder / INDEX_FILE).exists() == sharded
    return folder
