"""llama.cpp's library, as the wheel of `llama-cpp-py-sync` holds it: quantize a GGUF file, score tokens, time decoding.

As a command, in a process of its own: `python -m serving.libllama` reads one JSON object and prints another.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np

FORMATS = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15}  # `llama_ftype` in llama.cpp's include/llama.h


def _library() -> tuple[Any, Any]:
    from llama_cpp_py_sync import _cffi_bindings as bindings  # pyright: ignore[reportMissingImports]

    library = bindings.get_lib()
    library.llama_backend_init()
    return library, bindings.ffi


def quantize(source: str, output: str, form: str, threads: int) -> None:
    """Do what llama-quantize does.

    Args:
        source: A GGUF file.
        output: The file that is written.
        form: A key of `FORMATS`.
        threads: Number of threads.
    """
    library, ffi = _library()
    options = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    options.ftype, options.nthread = FORMATS[form], threads
    assert library.llama_model_quantize(source.encode(), output.encode(), options) == 0


class Session:
    """A model with a context of 512 tokens on the CPU.

    Args:
        file: A GGUF file.
        threads: Number of threads.
    """

    def __init__(self, file: str, threads: int):
        self._library, self._ffi = _library()
        self._model = self._library.llama_model_load_from_file(
            file.encode(), self._library.llama_model_default_params()
        )
        assert self._model != self._ffi.NULL, file
        options = self._library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self._context = self._library.llama_init_from_model(self._model, options)
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))

    def logits(self, ids: list[int], start: int = 0) -> np.ndarray:
        """Return the logits `[T, V]` of T tokens at the positions from `start` on; those before are in the cache."""
        if not start:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, start + index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert self._library.llama_decode(self._context, batch) == 0
        count = len(ids) * self._vocabulary
        found = self._ffi.buffer(self._library.llama_get_logits(self._context), 4 * count)
        logits = np.frombuffer(found, np.float32).reshape(len(ids), -1).copy()
        self._library.llama_batch_free(batch)
        return logits

    def nll(self, windows: list[list[int]]) -> float:
        """Return the mean negative log likelihood of every token but the first of each window, in nats."""
        losses = []
        for ids in windows:
            logits = self.logits(ids[:-1]).astype(np.float64)
            largest = logits.max(-1, keepdims=True)
            normalizer = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
            losses.append(normalizer - logits[np.arange(len(ids) - 1), ids[1:]])
        return float(np.concatenate(losses).mean())

    def step_times(self, tokens: int) -> list[float]:
        """Return the seconds of each of a number of decode steps, after 8 tokens and 4 steps that do not count."""
        self.logits(list(range(8)))
        times = [time.perf_counter()]
        for step in range(tokens + 4):
            self.logits([step], start=8 + step)
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)][4:]


if __name__ == "__main__":
    task = json.load(sys.stdin)
    if "form" in task:
        quantize(task["source"], task["output"], task["form"], task["threads"])
        print("\nnull")
    else:
        session = Session(task["file"], task["threads"])
        times = session.step_times(task["steps"])
        print("\n" + json.dumps({"nll": session.nll(task["windows"]), "times": times}))
