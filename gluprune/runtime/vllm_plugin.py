"""The plugin of vLLM (entry point `vllm.general_plugins`), off unless the environment variable GLUPRUNE_VLLM is set.

vLLM calls `register` in each of its processes. vLLM is imported only if the plugin is on.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

VARIABLE = "GLUPRUNE_VLLM"
# Value -> the operator's backend. The second is for tests: PyTorch's operations, on any device.
BACKENDS = {"1": "auto", "torch": "torch"}


def register() -> None:
    """Make vLLM fuse the MLPs of every model that it loads from now on; do nothing if GLUPRUNE_VLLM is unset or "0".

    vLLM then also reads checkpoints whose layers have different widths: as gluprune saves them, and exports in the
    format nemotron-nas without running the code in them.

    Raises:
        ValueError: another value of GLUPRUNE_VLLM.
    """
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return
    if value not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {value!r}; allowed: {', '.join(BACKENDS)}, and 0 for off")
    _install(value)


@functools.cache  # the second call in a process does nothing
def _install(value: str) -> None:
    from transformers import AutoConfig
    from vllm import envs  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.model_loader import base_loader  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import llama, qwen2, qwen3  # pyright: ignore[reportMissingImports]

    from gluprune.models.decilm.configuration_decilm import DeciLMConfig

    # vLLM keeps compiled models under a key of the variables it knows. Without this one, a model that was compiled
    # without the plugin would be taken for one with it. vLLM also copies the variables it knows to Ray's workers.
    envs.environment_variables[VARIABLE] = lambda: value
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    for layer in (llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer, qwen3.Qwen3DecoderLayer):
        layer.__init__ = _with_config_of_layer(layer.__init__)
    base_loader.process_weights_after_loading = _fusing(base_loader.process_weights_after_loading, BACKENDS[value])


def _fusing(process: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Return vLLM's function that prepares loaded weights for kernels, preceded by `fuse_mlps`.

    Preceded, because on the CPU vLLM packs the weights.
    """

    @functools.wraps(process)
    def process_weights_after_loading(model, *arguments, **options):
        from gluprune.runtime.vllm_mlp import fuse_mlps

        fuse_mlps(model, backend, reason=_model_obstacle())
        return process(model, *arguments, **options)

    return process_weights_after_loading


def _model_obstacle() -> str | None:
    """Return why no MLP of the model that vLLM loads can be fused, or None."""
    from vllm import envs  # pyright: ignore[reportMissingImports]
    from vllm.config import get_current_vllm_config_or_none  # pyright: ignore[reportMissingImports]

    config = get_current_vllm_config_or_none()
    if config is not None and config.lora_config is not None:
        return "LoRA is enabled"  # vLLM replaces the projections later
    return "VLLM_BATCH_INVARIANT is set" if envs.VLLM_BATCH_INVARIANT else None


def _with_config_of_layer(construct: Callable[..., None]) -> Callable[..., None]:
    """Return the constructor of a decoder layer of vLLM, given the config of that layer if the layers differ."""
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def __init__(*arguments, **options):
        from vllm.model_executor.models.utils import extract_layer_index  # pyright: ignore[reportMissingImports]

        given = signature.bind(*arguments, **options).arguments
        config = given.get("config") or given["vllm_config"].model_config.hf_config
        if getattr(config, "is_heterogeneous", False):
            given["config"] = config.per_layer_config[extract_layer_index(given["prefix"])]
        construct(**given)

    return __init__
