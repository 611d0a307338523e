"""Compile kernel calls without a GPU, and collect the facts that the check uses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from csrc_triton.launch.call import KernelCall
from csrc_triton.tools.aot.ptx import (
    Access,
    has_matrix_dot,
    read_accesses,
    read_matrix_instructions,
    read_wgmma_a_in_registers,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What `failures` checks about one compiled kernel. Sizes in bytes."""

    kernel: str
    sm: int
    num_warps: int
    registers: int
    stack: int
    local_accesses: int
    shared: int
    uses_dot: bool  # has a tl.dot that matrix instructions can do
    matrix_instructions: dict[str, int]
    wgmma_a_in_registers: int
    accesses: tuple[Access, ...]


@dataclass(frozen=True)
class Compilation:
    """What Triton's JIT would compile at the launch of a call."""

    source: Any
    target: GPUTarget
    options: Any
    key: str
    arguments: list[str]  # pointer and descriptor arguments, in order

    @classmethod
    def of(cls, call: KernelCall, sm: int) -> Compilation:
        """Return the compilation of a call for compute capability `sm`."""
        kernel = call.kernel
        target = GPUTarget("cuda", sm, 32)
        backend = make_backend(target)
        arguments = {**call.args, **call.constants, **call.options}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, extra = binder(**arguments)
        parsed, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, extra)
        source = ASTSource(kernel, signature, constants, attributes)
        identity = (triton.__version__, kernel.cache_key, signature, constants, attributes, parsed.__dict__, sm)
        pointers = [name for name, kind in signature.items() if kind.startswith(("*", "tensordesc"))]
        return cls(source, target, parsed, hashlib.sha256(repr(identity).encode()).hexdigest(), pointers)

    def compile(self) -> KernelFacts:
        """Compile the kernel, disassemble it, and read what `failures` checks."""
        compiled = triton.compile(self.source, target=self.target, options=self.options.__dict__)
        ptx = compiled.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            sass = _tool("nvdisasm", "-c", cubin)
            usage = re.findall(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))[0]
        return KernelFacts(
            kernel=self.source.fn.__name__,
            sm=int(self.target.arch),
            num_warps=compiled.metadata.num_warps,
            registers=int(usage[0]),
            stack=int(usage[1]),
            local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            shared=compiled.metadata.shared,
            uses_dot=has_matrix_dot(compiled.asm["ttir"]),
            matrix_instructions=read_matrix_instructions(sass),
            wgmma_a_in_registers=read_wgmma_a_in_registers(ptx),
            accesses=read_accesses(ptx, self.arguments),
        )

    def cached(self) -> KernelFacts:
        """Return the facts from the cache on disk, or from compiling. Facts of an older reader are read again."""
        path = cache_folder() / f"aot-{_reader_digest()}" / f"{self.key}.json"
        if path.exists():
            facts = json.loads(path.read_text())
            facts["accesses"] = tuple(Access(*access) for access in facts["accesses"])
            return KernelFacts(**facts)
        compiled = self.compile()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(compiled)))
        partial.replace(path)
        return compiled


@functools.cache
def _reader_digest() -> str:
    """Return a hash of the sources that read compilations: this file and `ptx.py`."""
    sources = [Path(__file__), Path(__file__).with_name("ptx.py")]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder for cached facts and installed versions of Triton."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gluprune"


def require_tools() -> None:
    """Raise RuntimeError unless kernels can be compiled and disassembled here."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET is set: unset it")
    for name in ("nvdisasm", "cuobjdump"):
        if not (TOOLS / name).exists():
            raise RuntimeError(f"{name} is not in {TOOLS}: this check needs the tools of Triton's Linux wheels")


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout
