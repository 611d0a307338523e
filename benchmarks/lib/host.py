"""Times what an MLP costs the host, on a CUDA driver that does nothing: `python -m benchmarks.lib.host`.

Triton's real launcher runs. Kernels are compiled for sm_90 and never run, CPU tensors stand in for CUDA tensors, and
results are garbage: only time counts. Products only allocate their result. What is left out, compared with a GPU: the
host work of cuBLAS (three products in the stock MLP, none to two in the patched one), CUDA's allocator in place of the
CPU's, and the driver's launch.

Prints one JSON object per case: its name, the launches per call, and microseconds of thread CPU time.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

HIDDEN, INTERMEDIATE = 64, 128  # small, since the CPU computes what no kernel does
ROUNDS, CALLS = 25, 200


def build_driver(folder: Path) -> Path:
    """Compile `idle_driver.c` into `folder` and return the library."""
    import triton

    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source = Path(__file__).with_name("idle_driver.c")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def use_driver(library: Path) -> Callable[[], int]:
    """Make Triton launch through `library`; return a function that counts launches. Call before Triton launches."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    idle = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver:
        launcher_cls = nvidia.CudaLauncher
        get_current_stream = staticmethod(int.bit_count)  # a C function that returns 0 for device 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    driver.utils = nvidia.CudaUtils()
    launches = ctypes.c_ulong.in_dll(idle, "launches")
    return lambda: launches.value


def pretend_cuda() -> None:
    """Let CPU tensors take the paths of CUDA tensors, any two results be equal, and products only allocate."""
    import torch

    from csrc_triton.launch import replay
    from gluprune.runtime import operator

    torch.nn.functional.linear = lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0]))
    operator.check_backend = lambda backend: None
    operator.uses_kernels = lambda backend, device: backend != "torch"
    replay._same_bits = lambda a, b: True


def cases():
    """Yield (name, function of no arguments) of every case: stock, patched, and what every call of a module costs."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from csrc_triton.launch import chooser
    from gluprune.runtime import patching

    def mlp(backend: str | None):
        config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
        module = LlamaMLP(config).to(torch.bfloat16).eval()
        return module if backend is None else patching.patch(module, backend)

    def tokens(count: int):
        return torch.randn(1, count, HIDDEN).to(torch.bfloat16)

    x, nothing = tokens(1), torch.nn.Identity()
    stock, patched = mlp(None), mlp("auto")
    yield "a module that does nothing", lambda: nothing(x)
    yield "stock", lambda: stock(x)
    for count in (1, 8, 64):
        yield f"patched, {count} tokens", functools.partial(patched, tokens(count))
    # The paths of many tokens, here on two: the CPU's allocator is slow for large tensors.
    two, products, prefill = tokens(2), mlp("cublas"), mlp("triton")
    with mock.patch.object(chooser, "triton_path", lambda M: "prefill"):
        prefill(two)
        prefill(two)  # the second call keeps the launches
    yield "patched, cuBLAS and one kernel", lambda: products(two)
    yield "patched, tensor descriptors and cuBLAS", lambda: prefill(two)


def measure() -> list[dict]:
    """Return the figures of all cases, timed in turns."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        launches = use_driver(build_driver(Path(folder)))
        pretend_cuda()
        functions = dict(cases())
        counts, times = {}, {name: [] for name in functions}
        for name, function in functions.items():
            for _ in range(3):  # compiles, records, replays
                function()
            before = launches()
            function()
            counts[name] = launches() - before
        for _ in range(ROUNDS):
            for name, function in functions.items():
                start = time.thread_time_ns()
                for _ in range(CALLS):
                    function()
                times[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
    return [{"name": name, "launches": counts[name], "microseconds": times[name]} for name in functions]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure))
