"""Decoding steps of stock `generate` as CUDA graphs, with no compiler to wait for.

`generate` asks the model for the function of its decode steps, `get_compiled_call`, if it decodes over a static cache.
`graph_decoding` answers with one that captures a step on its first use and replays it from then on. Prefill, sampling,
logits processors, stopping criteria and streaming stay those of transformers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache
from transformers.cache_utils import StaticLayer

logger = logging.getLogger(__name__)

# The argument of a model's forward that is the cache: from transformers 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")
MOST_GRAPHS = 4  # kept per model, each with the cache that it writes; the oldest goes first


def graph_decoding(model: nn.Module) -> GraphDecoding:
    """Let `model.generate` replay a CUDA graph for each token after the first, until `close` or the end of `with`.

    While it is on, `generate` uses a static cache unless another is asked for. The first decode step for a batch size
    and a cache length is captured, which takes the time of a few steps. Each of the kept graphs (at most 4) holds one
    static cache. What cannot be captured runs as usual, and one line in the log gives the reason: a model on the CPU,
    on several devices or in training mode, a cache with sliding windows. A model that was pruned, patched or moved is
    captured again at the next `generate`.

    Args:
        model: A causal LM of transformers.

    Returns:
        The active decoding; a context manager.

    Raises:
        TypeError: The model has no `generate`.
        ValueError: Graph decoding is on for this model.

    Example:
        >>> import gluprune, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        >>> model = gluprune.patch_llama(LlamaForCausalLM(config).eval())
        >>> with gluprune.graph_decoding(model):
        ...     ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        >>> ids.shape
        torch.Size([1, 7])
    """
    if not hasattr(model, "get_compiled_call") or not hasattr(model, "generation_config"):
        raise TypeError(f"{type(model).__name__} has no `generate` that graph decoding can serve")
    if "get_compiled_call" in vars(model):
        raise ValueError("get_compiled_call of this model was replaced: is graph decoding on already?")
    return GraphDecoding(model)


class GraphDecoding:
    """Graph decoding of one model, on until `close`. Create it with `graph_decoding`."""

    def __init__(self, model: Any):
        self._model = model
        self._steps: dict[object, _Step | None] = {}  # None where a step cannot be captured
        self._fingerprint: object = None
        self._cache_implementation = model.generation_config.cache_implementation
        if model.device.type not in DEVICE_TYPES:
            logger.warning("graph decoding has no effect on %s", model.device)
        elif self._cache_implementation is None:
            model.generation_config.cache_implementation = "static"
        model.get_compiled_call = self._call_for

    def __enter__(self) -> GraphDecoding:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Turn it off and free the graphs. Without effect if it is off."""
        if vars(self._model).get("get_compiled_call") == self._call_for:
            del self._model.get_compiled_call
            self._model.generation_config.cache_implementation = self._cache_implementation
        self._steps.clear()

    def _call_for(self, compile_config: object) -> Callable:
        """Return the function of the decode steps of one `generate`, which calls this once."""
        fingerprint = _fingerprint(self._model)
        if fingerprint != self._fingerprint:
            self._steps.clear()
            self._fingerprint = fingerprint
        return self._step

    @torch.no_grad()
    def _step(self, **inputs: Any) -> Any:
        """Run the model on the inputs of one call of `generate`, by a graph where that is possible."""
        name = next((name for name in CACHE_NAMES if name in inputs), CACHE_NAMES[0])
        cache = inputs.get(name)
        others = {key: value for key, value in inputs.items() if key != name}
        if _query_length(inputs) != 1:
            return self._model(**inputs)  # a part of a prompt
        values, structure = tree_flatten(others, is_leaf=_is_cache)
        key = (structure, *map(_kind, values), *_cache_kind(cache))
        if key not in self._steps:
            while len(self._steps) >= MOST_GRAPHS:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = self._capture(values, structure, name, cache)
        step = self._steps[key]
        if step is None or not step.adopt(cache):
            return self._model(**inputs)
        return step.run(values, cache)

    def _capture(self, values: list, structure: Any, name: str, cache: Any) -> _Step | None:
        reason = _obstacle(self._model, values, cache)
        if reason is None:
            lengths = [layer.cumulative_length.clone() for layer in cache.layers]

            def reset() -> None:
                for layer, length in zip(cache.layers, lengths, strict=True):
                    layer.cumulative_length.copy_(length)

            try:
                return _Step(self._model, values, structure, name=name, cache=cache, reset=reset)
            except RuntimeError as error:  # an operation that waits for the GPU, or too little memory
                reason = str(error).partition("\n")[0]
            finally:
                reset()
        logger.warning("decoding without a CUDA graph: %s", reason)
        return None


class _Step:
    """One captured decode step with the tensors that it reads and writes.

    Args:
        model: The model.
        values: The inputs except the cache, flattened.
        structure: Their structure.
        name: The name of the cache among the inputs.
        cache: A static cache, whose tensors the graph will read and write.
        reset: Takes back what a step counts in the cache.
    """

    def __init__(self, model: Any, values: list, structure: Any, *, name: str, cache: Any, reset: Callable[[], None]):
        self._inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
        self._layers = [(layer.keys, layer.values, layer.cumulative_length) for layer in cache.layers]
        self._owner = weakref.ref(cache)

        def run() -> Any:
            return model(**tree_unflatten(self._inputs, structure), **{name: cache})

        self._replay, outputs = capture(run, reset, model.device)
        outputs, self._structure = tree_flatten(outputs, is_leaf=_is_cache)
        self._outputs = [_THE_CACHE if _is_cache(value) else value for value in outputs]

    def adopt(self, cache: Any) -> bool:
        """Let a cache use this graph's tensors, with its own contents; False while an earlier cache still uses them."""
        owner = self._owner()
        if owner is cache:
            return True
        if owner is not None:
            return False
        for layer, (keys, values, length) in zip(cache.layers, self._layers, strict=True):
            layer.keys = keys.copy_(layer.keys)
            layer.values = values.copy_(layer.values)
            layer.cumulative_length = length.copy_(layer.cumulative_length)
        self._owner = weakref.ref(cache)
        return True

    def run(self, values: list, cache: Any) -> Any:
        """Return the model's output for other inputs of the captured kinds, in new tensors."""
        for buffer, value in zip(self._inputs, values, strict=True):
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(value)
        self._replay()
        outputs = [
            cache if value is _THE_CACHE else value.clone() if isinstance(value, torch.Tensor) else value
            for value in self._outputs
        ]
        return tree_unflatten(outputs, self._structure)


def capture(run: Callable[[], Any], reset: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture a function as a CUDA graph; return the function that replays it, and what it returned.

    Args:
        run: What to capture. It runs twice before, since the first calls load kernels and look for launches.
        reset: Called after each run.
        device: Where it runs.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
                reset()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # its default is a stream of the device that captured first
            outputs = run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, outputs


_THE_CACHE = object()  # stands for the cache in what a captured step returned
DEVICE_TYPES = ("cuda",)  # that `capture` works on


def _is_cache(value: object) -> bool:
    return isinstance(value, Cache)


def _query_length(inputs: dict[str, Any]) -> int | None:
    """Return the number of new tokens per sequence."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), torch.Tensor):
            return inputs[name].shape[1]
    return None


def _kind(value: Any) -> object:
    """Return what a graph depends on: kind and shape of a tensor, and any other value."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    return value if isinstance(value, bool | int | float | str | None) else type(value)


def _cache_kind(cache: Any) -> tuple[object, ...]:
    layers = getattr(cache, "layers", ())
    return type(cache), *(
        (type(layer), _kind(getattr(layer, "keys", None)), _kind(getattr(layer, "values", None))) for layer in layers
    )


def _obstacle(model: Any, values: list, cache: Any) -> str | None:
    """Return why a decode step cannot be captured, or None."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices: {', '.join(sorted(map(str, devices)))}"
    if model.device.type not in DEVICE_TYPES:
        return f"the model is on {model.device}"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    strange = next(
        (value for value in values if not isinstance(value, torch.Tensor | bool | int | float | str | None)), None
    )
    return _cache_obstacle(cache) if strange is None else f"an input is a {type(strange).__name__}"


def _cache_obstacle(cache: Any) -> str | None:
    if not isinstance(cache, Cache):
        return f"the cache is a {type(cache).__name__}, not a static cache of transformers"
    for layer in cache.layers:
        if type(layer) is not StaticLayer:
            return f"the cache has a {type(layer).__name__}"
        if not isinstance(layer.cumulative_length, torch.Tensor):
            return "this version of transformers counts the tokens of a static cache outside of its tensors"
    return None


def _fingerprint(model: Any) -> list[object]:
    """Return what captured graphs of a model depend on: its modules, their tensors and their hooks."""
    found: list[object] = [model.config._attn_implementation]
    for module in model.modules():
        tensors = [
            tensor.data_ptr()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), id(vars(module).get("forward"))
        found.append((id(module), type(module), module.training, *hooks, *tensors))
    return found
