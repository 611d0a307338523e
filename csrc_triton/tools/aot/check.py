"""Which kernel calls are checked, and the conditions that a compiled kernel must meet."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.glu.backward import glu_gradient_call
from csrc_triton.glu.forward import meta_weights, shipped_plans
from csrc_triton.launch.call import KernelCall
from csrc_triton.launch.device import SHARED_MEMORY, SM_COUNT
from csrc_triton.layout import FP8, FP8_SM
from csrc_triton.norm import ROUNDINGS, plan_rms_norm
from csrc_triton.scores.kernel import plan_neuron_scores
from csrc_triton.tools.aot.compile import Compilation, KernelFacts, require_tools
from csrc_triton.tools.aot.predict import PREDICTED_SM, predict
from csrc_triton.tools.aot.ptx import MIN_WIDTH, UNKNOWN

# Threads and programs that one multiprocessor holds, by compute capability.
RESIDENT = {80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24)}
REGISTERS = 65536
# The statistics that gluprune's scores need: maw_gud, maw, vow, pon and l2.
SCORE_STATISTICS = (
    ("gate_ppm", "up_ppm", "down_ppm"),
    ("gate_ppm", "up_ppm"),
    ("gate_variance", "up_variance"),
    ("gate_l1", "up_l1"),
    ("gate_l2", "up_l2"),
)


def failures(compiled: KernelFacts, weights: Iterable[str], *, fp8: bool = False) -> list[str]:
    """Return why a compiled kernel must not be shipped; empty if it may be.

    Args:
        compiled: the facts.
        weights: names of the weight arguments.
        fp8: whether they are fp8, and thus converted in registers: then HMMA is right on sm_90, too.
    """
    reasons = []
    if compiled.stack or compiled.local_accesses:
        reasons.append(f"spill: {compiled.stack} bytes of stack, {compiled.local_accesses} local loads and stores")
    if compiled.shared > SHARED_MEMORY[compiled.sm]:
        reasons.append(f"shared memory: {compiled.shared} bytes of {SHARED_MEMORY[compiled.sm]}")
    names = set(weights)
    for access in compiled.accesses:
        if access.instruction != "st" and access.width < MIN_WIDTH and access.argument in names | {UNKNOWN}:
            loads = f"{access.count} x {access.instruction} of {access.width} bytes"
            reasons.append(f"narrow weight load: {loads} from {access.argument}")
    for weight in sorted(names - {access.argument for access in compiled.accesses}):
        reasons.append(f"no access to {weight} found")
    wanted = {90: ("HGMMA",), 100: ("UTCMMA", "HMMA"), 120: ("UTCMMA", "HMMA")}.get(compiled.sm, ("HMMA",))
    wanted = ("HMMA",) if fp8 else wanted
    if compiled.uses_dot and not any(compiled.matrix_instructions.get(name) for name in wanted):
        reasons.append(f"a dot without {' or '.join(wanted)}")
    if compiled.wgmma_a_in_registers:
        reasons.append(f"wgmma with A in registers: {compiled.wgmma_a_in_registers}")
    return reasons


def weight_arguments(call: KernelCall, elements: int) -> set[str]:
    """Return the arguments of at least `elements` elements: weights, and activations as large as a weight."""
    tensors = {name: value.base if isinstance(value, TensorDescriptor) else value for name, value in call.args.items()}
    return {name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.numel() >= elements}


def reads_fp8(call: KernelCall) -> bool:
    """Return whether an argument of a call is fp8."""
    return any(isinstance(value, torch.Tensor) and value.dtype == FP8 for value in call.args.values())


def resident_programs(compiled: KernelFacts) -> int:
    """Return how many programs of a kernel one multiprocessor holds at a time."""
    threads, programs = RESIDENT[compiled.sm]
    registers = compiled.num_warps * 32 * (math.ceil(compiled.registers / 8) * 8)
    limits = (
        programs,
        threads // (32 * compiled.num_warps),
        REGISTERS // registers,
        # One KB is reserved for every program, which the limit of a single program does not include.
        (SHARED_MEMORY[compiled.sm] + 1024) // (compiled.shared + 1024),
    )
    return max(1, min(limits))


class Shape(NamedTuple):
    """The case that a kernel call is planned for."""

    label: str
    M: int  # tokens; 0 for the statistics
    H: int
    I: int


def check(calls: Iterable[tuple[Shape, KernelCall]], sm: int, *, progress: bool = False) -> list[dict[str, Any]]:
    """Return one row for every distinct compilation of `calls`; its "failures" are why it must not be shipped.

    Args:
        calls: the kernel calls and what each is planned for.
        sm: compute capability times ten.
        progress: whether to show progress on stderr.

    Raises:
        RuntimeError: kernels cannot be compiled here.
    """
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
        except Exception as error:  # any error from the compiler is the result of the row
            row["failures"] = [f"does not compile: {type(error).__name__}: {str(error).strip()[:200]}"]
        else:
            at_once = resident_programs(compiled) * SM_COUNT[sm]
            row |= dataclasses.asdict(compiled)
            row["waves"] = [round(programs / at_once, 2) for *_, programs in row["plans"]]
            row["failures"] = failures(compiled, row["weights"], fp8=reads_fp8(call))
            if sm == PREDICTED_SM:
                row["predicted"] = [predict(used, compiled.accesses, shape.M) for shape, used in users]
        rows.append(row)
    if progress:
        print(file=sys.stderr)
    return rows


def shipped_calls(sm: int, dtype: torch.dtype, H: int, I: int) -> Iterator[tuple[Shape, KernelCall]]:
    """Yield every kernel call that the package launches on a chip for a model: MLPs, norms and statistics."""
    for label, M, call in shipped_plans(sm, dtype, H, I):
        yield Shape(label.split("/")[0], M, H, I), call
    for label, M, call in shipped_plans(sm, dtype, H, I, fp8=True) if sm >= FP8_SM else ():
        yield Shape(f"fp8 {label.split('/')[0]}", M, H, I), call
    weights = meta_weights(H, I, dtype)
    IP = weights.down.shape[1]
    for M, hidden in itertools.product((256, 2048), (True, False)):  # with and without the gradient of down
        h, a = (torch.empty((M, width), dtype=dtype, device="meta") for width in (2 * IP, IP))
        yield Shape("backward", M, H, I), glu_gradient_call(h, a, weights, hidden=hidden)
    # Padded storage, as after patching. A model as loaded with I a multiple of 16 compiles to the same.
    gate, up = weights.gate_up[:, :I]
    for wanted in SCORE_STATISTICS:
        yield Shape("scores", 0, H, I), plan_neuron_scores(gate, up, weights.down[:, :I], wanted)[0]
    for rounding, M in itertools.product(ROUNDINGS, (1, 2048)):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, H), (H,)))
        yield Shape(f"norm {rounding}", M, H, 1), plan_rms_norm(x, weight, 1e-6, rounding).calls[0]
