"""Times what an MLP costs the host, on a CUDA driver that does nothing: `python -m benchmarks.lib.host`.

Triton's real launcher runs. Kernels are compiled for sm_90 and never run, CPU tensors stand in for CUDA tensors, and
results are garbage: only time counts. Products only allocate their result. What is left out, compared with a GPU: the
host work of cuBLAS (three products in the stock MLP, none to two in the patched one), CUDA's allocator in place of the
CPU's, and the driver's launch.

Prints one JSON object per case: kernels launched and seconds of thread CPU time per module. Products of cuBLAS do not
count as launches.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
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


class Case(NamedTuple):
    """What is called, and how many modules one call runs."""

    provider: str
    what: str
    call: Callable[[], object]
    modules: int = 1


def cases() -> Iterator[Case]:
    """Yield MLPs and norms of Llama, stock and patched, in bfloat16."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    from csrc_triton.launch import chooser
    from gluprune.runtime import patching

    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)

    def layer(backend: str | None) -> torch.nn.ModuleDict:
        modules = torch.nn.ModuleDict({"mlp": LlamaMLP(config), "norm": LlamaRMSNorm(HIDDEN)}).to(torch.bfloat16).eval()
        return modules if backend is None else patching.patch(modules, backend, norms=True)

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(1, count, HIDDEN).to(torch.bfloat16)

    x, nothing = tokens(1), torch.nn.Identity()
    stock, patched = layer(None), layer("auto")
    yield Case("torch", "a module that does nothing", lambda: nothing(x))
    yield Case("transformers", "MLP, 1 token", lambda: stock["mlp"](x))
    for count in (1, 8, 64):
        yield Case(
            "gluprune", f"MLP, {count} token{'s' * (count > 1)}", functools.partial(patched["mlp"], tokens(count))
        )
    # The paths of many tokens, here on two: the CPU's allocator is slow for large tensors.
    two, products, prefill = tokens(2), layer("cublas"), layer("triton")
    with mock.patch.object(chooser, "triton_path", lambda M: "prefill"):
        for _ in range(2):  # the second call keeps the launches
            prefill["mlp"](two)
    yield Case("gluprune", "MLP, many tokens, cuBLAS and one kernel", lambda: products["mlp"](two))
    yield Case("gluprune", "MLP, many tokens, tensor descriptors and cuBLAS", lambda: prefill["mlp"](two))
    yield Case("transformers", "RMSNorm, 1 token", lambda: stock["norm"](x))
    yield Case("gluprune", "RMSNorm, 1 token", lambda: patched["norm"](x))
    for provider, backend in (("transformers", None), ("gluprune", "auto")):
        layers = [layer(backend) for _ in range(16)]  # modules that are not in the processor's caches
        yield Case(
            provider, "MLP and RMSNorm of one layer of 16, 1 token", functools.partial(in_sequence, layers, x), 16
        )


def in_sequence(layers, x) -> None:
    """Call the norm and the MLP of every layer."""
    for modules in layers:
        modules["mlp"](modules["norm"](x))


def measure() -> list[dict]:
    """Return the figures of all cases, timed in turns."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        launches = use_driver(build_driver(Path(folder)))
        pretend_cuda()
        found = []
        for case in cases():
            for _ in range(3):  # compiles, records, replays
                case.call()
            before = launches()
            case.call()
            count = (launches() - before) / case.modules
            found.append({"what": case.what, "provider": case.provider, "launches": count, "seconds": [], "case": case})
        for _ in range(ROUNDS):
            for entry in found:
                case = entry["case"]
                start = time.thread_time_ns()
                for _ in range(CALLS // case.modules):
                    case.call()
                entry["seconds"].append((time.thread_time_ns() - start) / (CALLS // case.modules * case.modules) / 1e9)
    return [{name: value for name, value in entry.items() if name != "case"} for entry in found]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure))
