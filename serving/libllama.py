"""llama.cpp's library, through the bindings of llama-cpp-python: quantize a GGUF file, score tokens, time decoding.

As a command, in a process of its own: `python -m serving.libllama` reads one JSON object and prints another.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from itertools import pairwise

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

FORMATS = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15}  # `llama_ftype` in llama.cpp's include/llama.h


def quantize(source: str, output: str, form: str, threads: int) -> None:
    """Do what llama-quantize does.

    Args:
        source: A GGUF file.
        output: The file that is written.
        form: A key of `FORMATS`.
        threads: Number of threads.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FORMATS[form], threads
    assert llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(options)) == 0


class Session:
    """A model with a context of 512 tokens on the CPU.

    Args:
        file: A GGUF file.
        threads: Number of threads.
    """

    def __init__(self, file: str, threads: int):
        model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        assert model, file
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, options)
        assert self._context, file
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def logits(self, ids: list[int], start: int = 0) -> np.ndarray:
        """Return the logits `[T, V]` of T tokens at the positions from `start` on; those before are in the cache."""
        if not start:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, start + index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert llama_cpp.llama_decode(self._context, batch) == 0
        found = llama_cpp.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(found, (len(ids), self._vocabulary)).copy()
        llama_cpp.llama_batch_free(batch)
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
    llama_cpp.llama_backend_init()
    if "form" in task:
        quantize(task["source"], task["output"], task["form"], task["threads"])
        print("\nnull")
    else:
        session = Session(task["file"], task["threads"])
        times = session.step_times(task["steps"])
        print("\n" + json.dumps({"nll": session.nll(task["windows"]), "times": times}))
