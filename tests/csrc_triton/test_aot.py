"""The ahead-of-time check: its decisions on made-up facts, its readers on PTX, and real compilations end to end."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc_triton import aot
from csrc_triton.aot import Access, CompiledKernel, failures, read_accesses
from csrc_triton.launch import KernelCall

ROOT = Path(__file__).parents[2]


def run_without_interpreter(*arguments, **environment):
    """A Python process in which Triton compiles. The parent runs its interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


# --- decisions ---

GOOD = CompiledKernel(
    kernel="gemm_kernel",
    sm=90,
    num_warps=4,
    registers=128,
    stack=0,
    local_accesses=0,
    shared=227 * 1024,
    uses_dot=True,
    matrix_instructions={"HGMMA": 4},
    wgmma_a_in_registers=0,
    accesses=(
        Access("bias", "ld", 2, 1),
        Access("down", "cp.async", 16, 8),
        Access("down", "tma", 16, 8),
        Access("y", "st", 2, 8),
    ),
)


def test_a_good_kernel_passes():
    assert failures(GOOD, {"down"}) == []


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"stack": 8}, "spill: 8 bytes of stack, 0 local"),
        ({"local_accesses": 1}, "spill: 0 bytes of stack, 1 local"),
        ({"shared": 227 * 1024 + 1}, "shared memory: 232449 bytes of 232448"),
        ({"accesses": (Access("down", "ld", 8, 3),)}, "narrow weight load: 3 x ld of 8 bytes from down"),
        ({"accesses": (Access("down", "cp.async", 4, 3),)}, "narrow weight load: 3 x cp.async of 4 bytes from down"),
        ({"accesses": (*GOOD.accesses, Access("down", "ld", 2, 1))}, "narrow weight load: 1 x ld of 2 bytes from down"),
        ({"accesses": (*GOOD.accesses, Access("?", "ld", 2, 1))}, r"narrow weight load: 1 x ld of 2 bytes from \?"),
        ({"accesses": (Access("bias", "ld", 2, 1),)}, "no access to down found"),
        ({"matrix_instructions": {}}, "a dot without HGMMA"),
        ({"matrix_instructions": {"HMMA": 32}}, "a dot without HGMMA"),
        ({"sm": 80, "shared": 163 * 1024}, "a dot without HMMA"),
        ({"sm": 100}, "a dot without UTCMMA or HMMA"),
        ({"sm": 120, "shared": 99 * 1024}, "a dot without UTCMMA or HMMA"),
        ({"wgmma_a_in_registers": 2}, "wgmma with A in registers: 2"),
    ],
)
def test_each_failure_is_found_alone(change, reason):
    (found,) = failures(dataclasses.replace(GOOD, **change), {"down"})
    assert re.match(reason, found)


@pytest.mark.parametrize("sm, kilobytes", [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_of_every_chip(sm, kilobytes):
    matrix = {"HMMA": 1, "HGMMA": 1}
    fits = dataclasses.replace(GOOD, sm=sm, shared=kilobytes * 1024, matrix_instructions=matrix)
    assert failures(fits, {"down"}) == []
    (reason,) = failures(dataclasses.replace(fits, shared=kilobytes * 1024 + 1), {"down"})
    assert reason.startswith("shared memory")


def test_what_is_no_weight_may_be_narrow():
    narrow = (Access("bias", "ld", 2, 1), Access("x", "ld", 4, 1), Access("down", "st", 2, 1), Access("?", "st", 2, 1))
    assert failures(dataclasses.replace(GOOD, accesses=narrow), {"down"}) == []
    assert len(failures(dataclasses.replace(GOOD, accesses=narrow), {"down", "x"})) == 1


def test_a_kernel_without_dot_needs_no_matrix_instruction():
    assert failures(dataclasses.replace(GOOD, uses_dot=False, matrix_instructions={}), {"down"}) == []


@pytest.mark.parametrize(
    "sm, name", [(100, "UTCMMA"), (100, "HMMA"), (120, "HMMA"), (80, "HMMA"), (86, "HMMA"), (89, "HMMA")]
)
def test_matrix_instructions_that_do(sm, name):
    assert failures(dataclasses.replace(GOOD, sm=sm, shared=0, matrix_instructions={name: 1}), {"down"}) == []


def test_weights_are_told_by_size():
    from triton.tools.tensor_descriptor import TensorDescriptor

    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    arguments = {
        "x": meta(7, 32),
        "w": meta(64, 32),
        "t": TensorDescriptor.from_tensor(meta(64, 32), [16, 16]),
        "n": 10**9,
    }
    call = KernelCall(None, (1,), {**arguments, "bias": None}, {}, num_warps=4, num_stages=1)
    assert aot.weight_arguments(call, 64 * 32) == {"w", "t"}


@pytest.mark.parametrize(
    "facts, programs",
    [
        ({"registers": 32, "shared": 0, "num_warps": 4}, 16),  # 65536 registers of 128 x 32
        ({"registers": 33, "shared": 0, "num_warps": 4}, 12),  # registers come by eights
        ({"registers": 16, "shared": 0, "num_warps": 8}, 8),  # 2048 threads
        ({"registers": 16, "shared": 0, "num_warps": 1}, 32),
        ({"registers": 16, "shared": 75 * 1024, "num_warps": 1}, 3),  # 228 KB, and one more for every program
        ({"registers": 16, "shared": 75 * 1024 + 512, "num_warps": 1}, 2),
        ({"registers": 255, "shared": 227 * 1024, "num_warps": 8}, 1),
    ],
)
def test_resident_programs(facts, programs):
    assert aot.resident_programs(dataclasses.replace(GOOD, **facts)) == programs


# --- readers ---

PTX = """
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0,
	.param .align 64 .b8 some_kernel_param_1[128],
	.param .u32 some_kernel_param_2,
	.param .u64 .ptr .global .align 1 some_kernel_param_3,
	.param .u64 .ptr .global .align 1 some_kernel_param_4
)
{
	.reg .b64 	%rd<82>;
	mov.b64 	%rd9, some_kernel_param_1;
	cvta.param.u64 	%rd10, %rd9;
	ld.param.b64 	%rd1, [some_kernel_param_0];
	ld.param.b32 	%r1, [some_kernel_param_2];
	ld.param.b64 	%rd2, [some_kernel_param_3];
	mad.wide.s32 	%rd3, %r1, 2, %rd1;
	// begin inline asm
	@%p1 ld.global.L1::evict_first.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd3 + 0 ];
	// end inline asm
	mov.b64 	%rd5, %rd4;
	add.s64 	%rd6, %rd5, 128;
	ld.global.nc.b16 	%rs1, [%rd6+2];
	add.s64 	%rd4, %rd2, 64;
	cp.async.cg.shared.global [ %r20 + 0 ], [ %rd3 + 0 ], 0x10, %r21;
	cp.async.ca.shared.global [ %r20 + 0 ], [ %rd3 + 0 ], 0x4, 0x4;
	@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r30], [%rd10, {%r31, %r32}], [%r33];
	@%p2 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd10, {%r31, %r32}], [%r30];
	cvt.u64.u32 	%rd20, %r10;
	ld.global.b32 	%r40, [%rd20];
	cvt.u32.u64 	%r20, %rd1;
	ld.shared.b64 	%rd21, [%r20];
	ld.global.b32 	%r41, [%rd21];
	@%p3 st.global.v2.b64 [ %rd3 + 0 ], { %rd7, %rd8 };
}
"""


def test_accesses_follow_the_addresses():
    assert set(read_accesses(PTX, ["gate", "up", "down"])) == {
        Access("gate", "ld", 16, 1),
        Access("gate", "cp.async", 16, 1),
        Access("gate", "cp.async", 4, 1),
        Access("gate", "st", 16, 1),
        Access("up", "tma", 16, 1),
        Access("up", "st", 16, 1),
        Access("down", "ld", 2, 1),  # through a register that is set further down, as around a loop
        Access("?", "ld", 4, 2),  # addresses that came out of memory
    }


def test_an_address_of_two_origins_counts_for_both():
    ptx = PTX.replace("add.s64 	%rd6, %rd5, 128;", "selp.b64 	%rd6, %rd5, %rd3, %p4;")
    assert {Access("gate", "ld", 2, 1), Access("down", "ld", 2, 1)} <= set(read_accesses(ptx, ["gate", "up", "down"]))


def test_matrix_instructions_are_counted():
    sass = """
        /*0000*/  HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/  @P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[UR9] ;
        /*0040*/  FFMA R1, R2, R3, R4 ;
    """
    assert aot.read_matrix_instructions(sass) == {"HGMMA": 1, "HMMA": 2, "UTCMMA": 1}
    assert aot.read_matrix_instructions("FFMA R1, R2, R3, R4 ;") == {}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("%d = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32> loc(#loc3)", False),
        (
            "%d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x8xf32> * tensor<8x16xf32> -> tensor<16x16xf32>",
            True,
        ),
        ("%d = tt.dot %a, %b, %c : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32> loc(#loc3)", True),
        ("%d = arith.addf %a, %b : tensor<16x16xf32>", False),
    ],
)
def test_which_dots_need_matrix_instructions(line, expected):
    assert aot.has_matrix_dot(line) is expected


def test_wgmma_operands():
    name = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    descriptors = f"{name} {{%r1,%r2}}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    registers = f"{name} {{%r1,%r2}}, {{%r3,%r4,%r5,%r6}}, %rd2, %p1, 1, 1, 0;"
    assert aot.read_wgmma_a_in_registers(descriptors) == 0
    assert aot.read_wgmma_a_in_registers(descriptors + registers + registers) == 2


ROW = {
    "triton": "3.7.1",
    "dtype": "bfloat16",
    "config": {"BLOCK_M": 64, "BLOCK_N": 32, "SPLIT_K": 4, "num_warps": 4, "num_stages": 3},
    "weights": ["down"],
    "plans": [["decode", 2, 2048, 8192, 256], ["decode", 2, 3072, 4096, 128]],
    "waves": [1.0, 0.5],
    "failures": [],
    **dataclasses.asdict(GOOD),
}
BROKEN = {name: ROW[name] for name in ("triton", "dtype", "config", "weights", "plans", "sm", "kernel")}
BROKEN["failures"] = ["does not compile: why"]


@pytest.mark.parametrize("rows, status", [([ROW], 0), ([ROW, BROKEN], 1), ([{**ROW, "failures": ["spill"]}], 1)])
def test_the_command_fails_with_a_row(rows, status, monkeypatch, capsys):
    monkeypatch.setattr(aot, "collect", lambda options: rows)
    assert aot.main([]) == status
    assert f"{len(rows)} distinct compilations, {status} failed" in capsys.readouterr().out


def test_records(tmp_path):
    rows = [ROW, BROKEN]
    aot.record(rows, tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(rows))
    text = (tmp_path / "rows.md").read_text()
    assert "Triton 3.7.1, bfloat16: 4 kernel calls, 2 distinct compilations, 1 failed" in text
    assert "| 90 | gemm_kernel | 64x32 split 4 w4 s3 | 2 | 2048-3072 | 128 | - | 227K | HGMMA 4 | " in text
    assert " | down 8 x cp.async 16, down 8 x tma 16 | 128-256 | 0.5-1 | ok |" in text
    assert "FAIL does not compile: why |" in text


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--sm", "90", "--hidden", "64", "--intermediate", "128"]) == 2
    assert capsys.readouterr().err == "error: kernels cannot be compiled while TRITON_INTERPRET is set: unset it\n"


def test_missing_tools_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(aot, "TOOLS", tmp_path)
    assert aot.main(["--sm", "90", "--hidden", "64", "--intermediate", "128"]) == 2
    assert capsys.readouterr().err.startswith(f"error: nvdisasm is not in {tmp_path}")


# --- real compilations ---

COMPILED = """
import dataclasses, json, sys, torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from csrc_triton import aot, launch
from csrc_triton.glu import plan_glu_mlp
from csrc_triton.launch import KernelCall
from csrc_triton.neuron_scores import plan_neuron_scores

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def check(call, sm, elements):
    (row,) = aot.check([(aot.Shape("test", 1, 1, elements), call)], sm)
    return row["failures"]

@triton.jit
def sum_kernel(weight, out, stride, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    tile = tl.load(weight + r[:, None] * stride + r[None, :])
    tl.store(out + r, tl.sum(tile.to(tl.float32) * tl.trans(tile).to(tl.float32), 1))

@triton.jit
def gemm_kernel(x, weight, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr):
    k = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x + tl.arange(0, M)[:, None] * K + k
    w_ptrs = weight + tl.arange(0, N)[:, None] * K + k
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        tile = tl.load(x_ptrs + start)
        if SCALE:
            tile = (tile.to(tl.float32) * 2.0).to(tile.dtype)
        acc = tl.dot(tile, tl.load(w_ptrs + start).T, acc)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], acc)

@triton.jit
def broken_kernel(weight, out):
    tl.store(out, undefined_name)

@triton.jit(do_not_specialize=["M"])
def specialised_kernel(x, t, bias, one, sixteen, odd, large, M, BLOCK: tl.constexpr):
    if bias is not None:
        tl.store(x, odd)

def gemm(M, N, BLOCK_K, stages, scale=False, warps=4):
    K = 1024
    args = dict(x=meta(M, K), weight=meta(N, K), out=meta(M, N, dtype=torch.float32), K=K)
    return KernelCall(gemm_kernel, (1,), args, dict(M=M, N=N, BLOCK_K=BLOCK_K, SCALE=scale), warps, stages)

def tile(block, stride, warps):
    args = dict(weight=meta(block, stride), out=meta(block, dtype=torch.float32), stride=stride)
    return KernelCall(sum_kernel, (1,), args, dict(BLOCK=block), warps, 1)

def scores(I, H, pitch):
    return plan_neuron_scores(meta(I, H), meta(I, H), meta(H, pitch)[:, :I])[0]

result = {
    "padded": check(scores(5735, 2048, 5760), 90, 5735 * 2048),
    "odd pitch": check(scores(5735, 2048, 5735), 90, 5735 * 2048),
    "good gemm": [check(gemm(64, 64, 64, 3), sm, 64 * 1024) for sm in (80, 86, 89, 90, 100, 120)],
    "small gemm": check(gemm(16, 64, 64, 3), 90, 64 * 1024),
    "large gemm": check(gemm(128, 128, 128, 4, warps=8), 120, 128 * 1024),
    "scaled gemm": check(gemm(64, 64, 64, 3, scale=True), 90, 64 * 1024),
    "spilling": check(tile(256, 256, 1), 90, 256 * 256),
    "broken": check(KernelCall(broken_kernel, (1,), dict(weight=meta(8), out=meta(8)), {}, 4, 1), 90, 8),
}
x, t = meta(64, 64), TensorDescriptor.from_tensor(meta(64, 64), [16, 32])
source = aot.Compilation.of(KernelCall(specialised_kernel, (1,), dict(
    x=x, t=t, bias=None, one=1, sixteen=32, odd=7, large=2**40, M=1), dict(BLOCK=8), 4, 1), 90).source
result["signature"] = source.signature
result["divisible"] = sorted(source.fn.arg_names[index] for (index, *_), attribute in source.attrs.items() if attribute)
call = scores(8192, 2048, 8192)
with_pdl = [dataclasses.replace(call, launch_pdl=pdl) for pdl in (False, True)]

def keys(gate_up, M, I=7373, IP=7424, H=2048):
    decision = launch.heuristic(launch.triton_path(M), M, H, IP, torch.bfloat16, 90)
    plan = plan_glu_mlp(meta(M, H), gate_up, meta(H, IP), I, "silu", None, None, None, decision, 90)
    return [aot.Compilation.of(call, 90).key for call in plan.calls if isinstance(call, KernelCall)]

split, packed = meta(2, 7424, 2048), meta(7373 + 7424, 2048).as_strided((2, 7424, 2048), (7373 * 2048, 2048, 1))
result["split and packed"] = [[keys(gate_up, M) for M in (1, 16, 128, 2048)] for gate_up in (split, packed)]
result["pdl"] = [aot.Compilation.of(each, 90).options.launch_pdl for each in with_pdl]
compilation = aot.Compilation.of(call, 90)
ptx = triton.compile(compilation.source, target=compilation.target, options=compilation.options.__dict__).asm["ptx"]
result["ptx"] = ptx
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    script = tmp_path_factory.mktemp("aot") / "compiled.py"
    script.write_text(COMPILED)
    run = run_without_interpreter(script)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_an_odd_pitch_fails(compiled):
    assert compiled["padded"] == []
    (reason,) = compiled["odd pitch"]
    assert reason.startswith("narrow weight load") and reason.endswith("of 2 bytes from down")


def test_real_compilations_fail_as_they_should(compiled):
    assert compiled["good gemm"] == [[]] * 6
    assert compiled["small gemm"] == ["a dot without HGMMA"]  # wgmma has at least 64 rows
    assert [reason.split(":")[0] for reason in compiled["large gemm"]] == ["shared memory"]
    assert [reason.split(":")[0] for reason in compiled["scaled gemm"]] == ["wgmma with A in registers"]
    assert "spill" in [reason.split(":")[0] for reason in compiled["spilling"]]
    (reason,) = compiled["broken"]
    assert reason.startswith("does not compile: ") and "undefined_name" in reason


def test_specialisation_is_that_of_a_launch(compiled):
    assert compiled["signature"] == {
        "x": "*bf16",
        "t": "tensordesc<bf16[16, 32]>",
        "bias": "constexpr",
        "one": "constexpr",
        "sixteen": "i32",
        "odd": "i32",
        "large": "i64",
        "M": "i32",
        "BLOCK": "constexpr",
    }
    assert compiled["divisible"] == ["large", "sixteen", "x"]
    assert compiled["pdl"] == [False, True]


def test_packed_weights_of_an_odd_width_run_the_same_kernels(compiled):
    """So what the check says of every shipped kernel holds for them too."""
    split, packed = compiled["split and packed"]
    assert split == packed and all(split)


def test_running_maximum_of_the_statistics_keeps_nan(compiled):
    """The interpreter's maximum keeps NaN anyway: only the compiled code tells."""
    ptx = compiled["ptx"]
    assert ptx.count("max.NaN.f32") >= 80 and ptx.count("min.NaN.f32") >= 80  # one for each weight of the column loop


def test_every_shipped_kernel_compiles_clean():
    run = run_without_interpreter("-m", "csrc_triton.aot")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 failed" in run.stdout
