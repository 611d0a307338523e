"""Compile every kernel call of the package ahead of time, without a GPU, and refuse what would be slow or wrong.

`python -m csrc_triton.aot` plans the forward pass and the neuron statistics on meta tensors, for every chip, hidden
size, intermediate size and number of tokens that is shipped, compiles each distinct kernel with the Triton at hand (its
own binder decides signature and specialisation, as at a launch), reads the PTX and the disassembly, prints a table and
exits with 1 if a row fails. Rows fail on

* a spill: stack memory, or a load or store of local memory;
* more shared memory than a program may use on the chip;
* a weight load under 16 bytes. A weight is an argument of at least H * I elements, whatever its name. Which argument a
  load belongs to is followed through the PTX, from the kernel's parameters along the address arithmetic. A narrow load
  whose origin cannot be told counts as a weight load, and a weight that nothing touches was missed by this reader: both
  fail;
* a `tl.dot` without matrix instructions (float32 in full precision has none, and is let pass): HGMMA on sm_90, tcgen05
  or HMMA on sm_100 and sm_120, HMMA below;
* wgmma with its A operand in registers, which ptxas 12 is known to corrupt.

What was read from a compilation is cached on disk, so a second run costs only the planning.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from .glu import shipped_plans
from .launch import DTYPES, MULTIPROCESSORS, PAD, SHARED_MEMORY, KernelCall
from .neuron_scores import plan_neuron_scores

HIDDEN_SIZES = (2048, 3072)  # Llama-3.2-1B and 3B
INTERMEDIATE_SIZES = (8192, 7373, 6554, 5735, 4916, 4096, 3277)  # 0, 10 ... 60 % pruned
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Threads and programs that one multiprocessor holds, by compute capability.
RESIDENT = {80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24)}
REGISTERS = 65536
MIN_WIDTH = 16  # bytes of a weight load
UNKNOWN = "?"  # an access whose argument cannot be told


# --- what is read from a compilation ---


class Access(NamedTuple):
    """`count` instructions that touch global memory through `argument`, `width` bytes a thread."""

    argument: str
    instruction: str  # "ld", "cp.async", "tma" (moves boxes of at least 16 bytes a row) or "st"
    width: int
    count: int


@dataclass(frozen=True)
class CompiledKernel:
    """The facts about one compilation that `failures` judges. Sizes in bytes."""

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


def failures(compiled: CompiledKernel, weights: Iterable[str]) -> list[str]:
    """Why a compilation must not be shipped; empty if it may. `weights` are the names of the weight arguments."""
    reasons = []
    if compiled.stack or compiled.local_accesses:
        reasons.append(f"spill: {compiled.stack} bytes of stack, {compiled.local_accesses} local loads and stores")
    if compiled.shared > SHARED_MEMORY[compiled.sm]:
        reasons.append(f"shared memory: {compiled.shared} bytes of {SHARED_MEMORY[compiled.sm]}")
    weights = set(weights)
    for access in compiled.accesses:
        if access.instruction != "st" and access.width < MIN_WIDTH and access.argument in weights | {UNKNOWN}:
            loads = f"{access.count} x {access.instruction} of {access.width} bytes"
            reasons.append(f"narrow weight load: {loads} from {access.argument}")
    for weight in sorted(weights - {access.argument for access in compiled.accesses}):
        reasons.append(f"no access to {weight} found")
    wanted = {90: ("HGMMA",), 100: ("UTCMMA", "HMMA"), 120: ("UTCMMA", "HMMA")}.get(compiled.sm, ("HMMA",))
    if compiled.uses_dot and not any(compiled.matrix_instructions.get(name) for name in wanted):
        reasons.append(f"a dot without {' or '.join(wanted)}")
    if compiled.wgmma_a_in_registers:
        reasons.append(f"wgmma with A in registers: {compiled.wgmma_a_in_registers}")
    return reasons


def read_accesses(ptx: str, arguments: list[str]) -> tuple[Access, ...]:
    """The global memory accesses of a kernel's PTX. `arguments` names its pointer and descriptor arguments in order.

    Every register computed from a pointer parameter is marked with that parameter, until nothing changes; an access
    belongs to the parameters that its address register is marked with. What is loaded from memory carries no mark.
    """
    parameters = re.findall(r"\.param\s+(?:\.\w+\s+\d+\s+)?(?:\.u64\s+\.ptr\b[^\n]*?|\.b8\s+)(\w+_param_\d+)\b", ptx)
    origin = {parameter: frozenset([name]) for parameter, name in zip(parameters, arguments)}
    flows: list[tuple[list[str], list[str]]] = []
    found: list[tuple[str, int, list[str]]] = []
    for line in ptx.splitlines():
        statement = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);", line)
        if statement is None:
            continue
        opcode, operands = statement.groups()
        kind = opcode.split(".")
        addresses = re.findall(r"\[([^\]]*)\]", operands)
        if opcode.startswith("cp.async.bulk.tensor"):
            is_load = re.search(r"shared::\w+\.global", opcode) is not None
            instruction = "tma" if is_load else "st"
            found.append((instruction, MIN_WIDTH, _names(addresses[1 if is_load else 0])))
        elif re.match(r"cp\.async\.c[ag]\.", opcode):
            width = re.search(r"\]\s*,\s*(0x[0-9a-f]+|\d+)", operands[operands.rindex("[") :])
            found.append(("cp.async", int(width[1], 0), _names(addresses[1])))
        elif kind[0] in ("ld", "st", "atom", "red") and "global" in kind:
            found.append(("ld" if kind[0] == "ld" else "st", _width(kind), _names(addresses[0])))
        elif kind[0] == "ld" and "param" not in kind:
            continue
        else:
            destinations, sources = _split_operands(operands)
            flows.append((destinations, sources))
    changed = True
    while changed:
        changed = False
        for destinations, sources in flows:
            marks = frozenset().union(*(origin.get(source, frozenset()) for source in sources))
            for destination in destinations:
                if not marks <= origin.get(destination, frozenset()):
                    origin[destination] = origin.get(destination, frozenset()) | marks
                    changed = True
    counts: Counter[tuple[str, str, int]] = Counter()
    for instruction, width, address in found:
        marks = frozenset().union(*(origin.get(name, frozenset()) for name in address))
        for argument in marks or {UNKNOWN}:
            counts[argument, instruction, width] += 1
    return tuple(Access(*key, count) for key, count in sorted(counts.items()))


def _names(text: str) -> list[str]:
    """Registers and parameters in an operand; predicates carry no address."""
    return [name for name in re.findall(r"%[a-z]+\d+|\w+_param_\d+", text) if not re.match(r"%p\d", name)]


def _split_operands(operands: str) -> tuple[list[str], list[str]]:
    destination = re.match(r"\s*(\{[^}]*\}|[^,]*)", operands)[0]
    return _names(destination), _names(operands[len(destination) :])


def _width(opcode: list[str]) -> int:
    bits = next(int(part[1:]) for part in reversed(opcode) if re.fullmatch(r"[bfsu]\d+", part))
    vector = next((int(part[1:]) for part in opcode if re.fullmatch(r"v\d", part)), 1)
    return bits * vector // 8


def read_matrix_instructions(sass: str) -> dict[str, int]:
    found = Counter(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", sass))
    blackwell = sum(count for name, count in found.items() if name.startswith("UTC"))
    kept = {name: count for name, count in found.items() if not name.startswith("UTC")}
    return {**kept, "UTCMMA": blackwell} if blackwell else kept


def has_matrix_dot(ttir: str) -> bool:
    """Whether matrix instructions can do a `tt.dot` of Triton's first intermediate form: all but exact float32."""
    dots = re.findall(r"\btt\.dot\b(.*?) : tensor<[\dx]*x(\w+)>", ttir)
    return any(operand != "f32" or "tf32" in attributes for attributes, operand in dots)


def read_wgmma_a_in_registers(ptx: str) -> int:
    """wgmma lists its accumulators in braces, then A: a descriptor in one register, or registers in braces."""
    return len(re.findall(r"\bwgmma\.mma_async\S*\s+\{[^}]*\}\s*,\s*\{", ptx))


# --- compiling ---


@dataclass(frozen=True)
class Compilation:
    """One distinct compilation: what Triton's JIT would compile at the launch of a call."""

    source: Any
    target: GPUTarget
    options: Any
    key: str
    arguments: list[str]  # pointer and descriptor arguments, in order

    @classmethod
    def of(cls, call: KernelCall, sm: int) -> Compilation:
        kernel = call.kernel
        target = GPUTarget("cuda", sm, 32)
        backend = make_backend(target)
        options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
        if call.launch_pdl:
            options["launch_pdl"] = True
        arguments = {**call.args, **call.constants, **options}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, extra = binder(**arguments)
        parsed, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, extra)
        source = ASTSource(kernel, signature, constants, attributes)
        identity = (triton.__version__, kernel.cache_key, signature, constants, attributes, parsed.__dict__, sm)
        pointers = [name for name, kind in signature.items() if kind.startswith(("*", "tensordesc"))]
        return cls(source, target, parsed, hashlib.sha256(repr(identity).encode()).hexdigest(), pointers)

    def compile(self) -> CompiledKernel:
        compiled = triton.compile(self.source, target=self.target, options=self.options.__dict__)
        ptx = compiled.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            sass = _tool("nvdisasm", "-c", cubin)
            usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
        return CompiledKernel(
            kernel=self.source.fn.__name__,
            sm=self.target.arch,
            num_warps=compiled.metadata.num_warps,
            registers=int(usage[1]),
            stack=int(usage[2]),
            local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            shared=compiled.metadata.shared,
            uses_dot=has_matrix_dot(compiled.asm["ttir"]),
            matrix_instructions=read_matrix_instructions(sass),
            wgmma_a_in_registers=read_wgmma_a_in_registers(ptx),
            accesses=read_accesses(ptx, self.arguments),
        )

    def cached(self) -> CompiledKernel:
        """The facts from the cache on disk, or from compiling. A changed reader (this file) forgets what was read."""
        reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
        path = cache_folder() / f"aot-{reader}" / f"{self.key}.json"
        if path.exists():
            facts = json.loads(path.read_text())
            facts["accesses"] = tuple(Access(*access) for access in facts["accesses"])
            return CompiledKernel(**facts)
        compiled = self.compile()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(compiled)))
        partial.replace(path)
        return compiled


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gluprune"


def require_tools() -> None:
    """Raises RuntimeError unless kernels can be compiled and disassembled here."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET is set: unset it")
    for name in ("nvdisasm", "cuobjdump"):
        if not (TOOLS / name).exists():
            raise RuntimeError(f"{name} is not in {TOOLS}: this check needs the tools of Triton's Linux wheels")


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


# --- plans and rows ---


def weight_arguments(call: KernelCall, elements: int) -> set[str]:
    """Arguments of at least `elements` elements: weights, and activations as large as a weight."""
    tensors = {name: value.base if isinstance(value, TensorDescriptor) else value for name, value in call.args.items()}
    return {name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.numel() >= elements}


def resident_programs(compiled: CompiledKernel) -> int:
    """Programs of a kernel that one multiprocessor holds at a time."""
    threads, programs = RESIDENT[compiled.sm]
    registers = compiled.num_warps * 32 * (math.ceil(compiled.registers / 8) * 8)
    limits = (
        programs,
        threads // (32 * compiled.num_warps),
        REGISTERS // registers,
        # One KB is reserved for every program, which the limit of a single program leaves out.
        (SHARED_MEMORY[compiled.sm] + 1024) // (compiled.shared + 1024),
    )
    return max(1, min(limits))


class Shape(NamedTuple):
    label: str
    M: int  # tokens; 0 for the statistics
    H: int
    I: int


def check(calls: Iterable[tuple[Shape, KernelCall]], sm: int, progress: bool = False) -> list[dict[str, Any]]:
    """One row for every distinct compilation of `calls` on a chip; its "failures" say why it must not be shipped."""
    require_tools()
    distinct: dict[str, tuple[Compilation, list[tuple[Shape, KernelCall]]]] = {}
    for shape, call in calls:
        compilation = Compilation.of(call, sm)
        distinct.setdefault(compilation.key, (compilation, []))[1].append((shape, call))
    rows = []
    for done, (compilation, users) in enumerate(distinct.values(), 1):
        _, call = users[0]
        if progress:
            print(f"\rsm_{sm}: {done} of {len(distinct)} kernels", end="", file=sys.stderr, flush=True)
        row: dict[str, Any] = {
            "triton": triton.__version__,
            "sm": sm,
            "kernel": call.kernel.__name__,
            "config": {**call.constants, "num_warps": call.num_warps, "num_stages": call.num_stages},
            "weights": sorted(set().union(*(weight_arguments(used, shape.H * shape.I) for shape, used in users))),
            "plans": [[*shape, math.prod(used.grid)] for shape, used in users],
        }
        try:
            compiled = compilation.cached()
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the row's result
            row["failures"] = [f"does not compile: {type(error).__name__}: {str(error).strip()[:200]}"]
        else:
            at_once = resident_programs(compiled) * MULTIPROCESSORS[sm]
            row |= dataclasses.asdict(compiled)
            row["waves"] = [round(programs / at_once, 2) for *_, programs in row["plans"]]
            row["failures"] = failures(compiled, row["weights"])
        rows.append(row)
    if progress:
        print(file=sys.stderr)
    return rows


def shipped_calls(sm: int, dtype: torch.dtype, H: int, I: int) -> Iterator[tuple[Shape, KernelCall]]:
    """Every kernel call that the package launches on a chip for this model: the forward pass and the statistics."""
    for label, M, call in shipped_plans(sm, dtype, H, I):
        yield Shape(label.split("/")[0], M, H, I), call
    # Padded storage, as after patching. A model as loaded with I a multiple of 16 compiles to the same.
    IP = triton.cdiv(I, PAD) * PAD
    gate_up = torch.empty(2, IP, H, dtype=dtype, device="meta")
    down = torch.empty(H, IP, dtype=dtype, device="meta")
    yield Shape("scores", 0, H, I), plan_neuron_scores(gate_up[0, :I], gate_up[1, :I], down[:, :I])[0]


# --- the table ---

COLUMNS = (
    "sm", "kernel", "configuration", "tokens", "hidden", "regs", "spill", "shared", "matrix", "weight loads",
    "programs", "waves", "verdict",
)  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text. Waves are programs over what all multiprocessors of the chip's usual board hold at a time."""
    config = row["config"]
    blocks = "x".join(str(value) for name, value in config.items() if name.startswith("BLOCK_"))
    split = f" split {config['SPLIT_K']}" if "SPLIT_K" in config else ""
    plans = [Shape(*shape) for *shape, _ in row["plans"]]
    head = (
        str(row["sm"]),
        row["kernel"],
        f"{blocks}{split} w{config['num_warps']} s{config['num_stages']}",
        span(shape.M for shape in plans),
        span(shape.H for shape in plans),
    )
    programs = span(programs for *_, programs in row["plans"])
    verdict = f"FAIL {'; '.join(row['failures'])}" if row["failures"] else "ok"
    if "registers" not in row:
        return *head, "", "", "", "", "", programs, "", verdict
    spills = f"{row['stack']}B+{row['local_accesses']}" if row["stack"] or row["local_accesses"] else "-"
    matrix = " ".join(f"{name} {count}" for name, count in row["matrix_instructions"].items()) or "-"
    accesses = [Access(*access) for access in row["accesses"]]
    loads = [access for access in accesses if access.instruction != "st" and access.argument in row["weights"]]
    widths = ", ".join(f"{load.argument} {load.count} x {load.instruction} {load.width}" for load in loads) or "-"
    shared = f"{row['shared'] / 1024:.0f}K"
    return *head, str(row["registers"]), spills, shared, matrix, widths, programs, span(row["waves"]), verdict


def span(values: Iterable[float]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def table(rows: list[dict[str, Any]], markdown: bool) -> str:
    body = [cells(row) for row in rows]
    if markdown:
        lines = [COLUMNS, tuple("---" for _ in COLUMNS), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in [COLUMNS, *body]) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [COLUMNS, *body]
    )


def summary(rows: list[dict[str, Any]]) -> str:
    plans = sum(len(row["plans"]) for row in rows)
    failed = sum(bool(row["failures"]) for row in rows)
    head = f"Triton {rows[0]['triton']}, {rows[0]['dtype']}"
    return f"{head}: {plans} kernel calls, {len(rows)} distinct compilations, {failed} failed"


def record(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `rows` as JSON lines to `path` and as a Markdown table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ["# Kernels compiled ahead of time", ""]
    for version in dict.fromkeys(row["triton"] for row in rows):
        of_version = [row for row in rows if row["triton"] == version]
        text += [f"## {summary(of_version)}", "", table(of_version, markdown=True), ""]
    path.with_suffix(".md").write_text("\n".join(text))


# --- the command ---


def triton_folder(version: str) -> Path:
    """A folder with that version of Triton, installed on first use."""
    folder = cache_folder() / f"triton-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{partial}/triton"]
            if subprocess.run([*command, f"triton=={version}"], check=False).returncode:
                raise RuntimeError(f"pip could not install triton=={version}")
            shutil.move(f"{partial}/triton", folder)
    return folder


def rows_under(version: str, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of this command under another version of Triton, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        paths = [str(triton_folder(version)), str(Path(__file__).parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "csrc_triton.aot", *arguments, "--record", str(output)]
        subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL)
        if not output.exists():
            raise RuntimeError(f"the check under Triton {version} did not finish")
        return [json.loads(line) for line in output.read_text().splitlines()]


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    if options.triton:
        arguments = ["--dtype", options.dtype]
        for name in ("sm", "hidden", "intermediate"):
            arguments += [f"--{name}", *map(str, getattr(options, name))]
        for version in options.triton:
            rows += rows_under(version, arguments)
    else:
        for sm in options.sm:
            sizes = [(H, I) for H in options.hidden for I in options.intermediate]
            calls = [call for H, I in sizes for call in shipped_calls(sm, DTYPES[options.dtype], H, I)]
            rows += [{"dtype": options.dtype, **row} for row in check(calls, sm, progress=True)]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m csrc_triton.aot", description="Compile every kernel without a GPU."
    )
    parser.add_argument("--sm", type=int, nargs="+", default=sorted(SHARED_MEMORY), choices=sorted(SHARED_MEMORY))
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN_SIZES, metavar="H")
    parser.add_argument("--intermediate", type=int, nargs="+", default=INTERMEDIATE_SIZES, metavar="I")
    parser.add_argument(
        "--triton", nargs="+", metavar="VERSION", help="check under these versions, not the installed one"
    )
    parser.add_argument(
        "--record", type=Path, metavar="PATH", help="write the rows as JSON lines, and a .md table beside"
    )
    options = parser.parse_args(argv)
    try:
        rows = collect(options)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows, markdown=False))
    for version in dict.fromkeys(row["triton"] for row in rows):
        print(summary([row for row in rows if row["triton"] == version]))
    if options.record:
        record(rows, options.record)
    return 1 if any(row["failures"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
