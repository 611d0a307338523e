"""Nemotron-NAS (DeciLM): the format of configs in which every layer of a Llama has its own width.

Weights keep their names and shapes. `block_configs` holds an entry for each layer, whose width is written in one of two
ways: `intermediate_size`, which vLLM reads, or `ffn_mult`, which vLLM, SGLang, TensorRT-LLM and llama.cpp's converter
read, and which expresses multiples of 256.

Sources: vllm/model_executor/models/nemotron_nas.py, sglang/srt/models/nemotron_nas.py,
tensorrt_llm/_torch/models/modeling_nemotron_nas.py, and `DeciModel` of llama.cpp's converter.
"""

from __future__ import annotations

# Readers build the layers of Llama: RMSNorm, rotary embeddings in every layer, attention and a SiLU GLU.
_OBSTACLES = {
    "qwen2": "its query, key and value projections have biases",
    "qwen3": "its attention normalises queries and keys",
    "ministral3": "its attention scales queries by their position",
    "smollm3": "some of its layers have no rotary embedding",
    "olmo2": "its norms follow attention and MLP",
    "granite": "it multiplies embeddings, attention, residuals and logits by constants",
    "gemma": "it scales its embeddings, and its MLP uses GELU",
    "gemma2": "it has norms after attention and MLP, and its MLP uses GELU",
    "gemma3_text": "it has norms after attention and MLP, and its MLP uses GELU",
    "phi3": "its projections are packed",
    "glm": "its projections are packed",
    "glm4": "its projections are packed, and it has norms after attention and MLP",
}
FAMILIES = ("llama", "mistral")


def obstacle(model_type: str) -> str:
    """Return why the format does not hold models of a type; empty if it holds them."""
    if model_type in FAMILIES:
        return ""
    return _OBSTACLES.get(model_type, "it is not a plain Llama")
