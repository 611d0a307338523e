"""The ahead-of-time check: its verdicts on synthetic facts, its PTX parsers, its table and its command."""

import dataclasses
import json
import re

import pytest
import torch

from csrc_triton.glu.backward import glu_gradient_call
from csrc_triton.glu.forward import meta_weights, plan
from csrc_triton.launch.call import KernelCall
from csrc_triton.launch.chooser import heuristic
from csrc_triton.scores.kernel import plan_neuron_scores
from csrc_triton.tools.aot import __main__ as command
from csrc_triton.tools.aot import check, compile, ptx, table
from csrc_triton.tools.aot.bounds import worst
from csrc_triton.tools.aot.check import failures
from csrc_triton.tools.aot.compile import KernelFacts
from csrc_triton.tools.aot.predict import predict
from csrc_triton.tools.aot.ptx import Access, read_accesses

GOOD = KernelFacts(
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
def test_each_failure_is_found(change, reason):
    (found,) = failures(dataclasses.replace(GOOD, **change), {"down"})
    assert re.match(reason, found)


@pytest.mark.parametrize("sm, kilobytes", [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_of_every_architecture(sm, kilobytes):
    matrix = {"HMMA": 1, "HGMMA": 1}
    fits = dataclasses.replace(GOOD, sm=sm, shared=kilobytes * 1024, matrix_instructions=matrix)
    assert failures(fits, {"down"}) == []
    (reason,) = failures(dataclasses.replace(fits, shared=kilobytes * 1024 + 1), {"down"})
    assert reason.startswith("shared memory")


def test_other_arguments_may_be_narrow():
    narrow = (Access("bias", "ld", 2, 1), Access("x", "ld", 4, 1), Access("down", "st", 2, 1), Access("?", "st", 2, 1))
    assert failures(dataclasses.replace(GOOD, accesses=narrow), {"down"}) == []
    assert len(failures(dataclasses.replace(GOOD, accesses=narrow), {"down", "x"})) == 1


def test_a_kernel_without_dot_needs_no_matrix_instruction():
    assert failures(dataclasses.replace(GOOD, uses_dot=False, matrix_instructions={}), {"down"}) == []


@pytest.mark.parametrize(
    "sm, name", [(100, "UTCMMA"), (100, "HMMA"), (120, "HMMA"), (80, "HMMA"), (86, "HMMA"), (89, "HMMA")]
)
def test_sufficient_matrix_instructions(sm, name):
    assert failures(dataclasses.replace(GOOD, sm=sm, shared=0, matrix_instructions={name: 1}), {"down"}) == []


def test_converted_weights_use_the_older_matrix_instructions():
    older = dataclasses.replace(GOOD, matrix_instructions={"HMMA": 8})
    assert failures(older, {"down"}, fp8=True) == []
    (reason,) = failures(dataclasses.replace(GOOD, matrix_instructions={}), {"down"}, fp8=True)
    assert reason == "a dot without HMMA"


def test_shipped_calls_hold_fp8_weights_where_the_gpu_converts_them():
    found = {sm: [call for _, call in check.shipped_calls(sm, torch.bfloat16, 256, 300)] for sm in (86, 89)}
    assert [any(map(check.reads_fp8, calls)) for calls in found.values()] == [False, True]


def test_weights_are_recognised_by_size():
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
    assert check.weight_arguments(call, 64 * 32) == {"w", "t"}


@pytest.mark.parametrize(
    "facts, programs",
    [
        ({"registers": 32, "shared": 0, "num_warps": 4}, 16),  # 65536 registers of 128 x 32
        ({"registers": 33, "shared": 0, "num_warps": 4}, 12),  # registers are allocated in multiples of eight
        ({"registers": 16, "shared": 0, "num_warps": 8}, 8),  # 2048 threads
        ({"registers": 16, "shared": 0, "num_warps": 1}, 32),
        ({"registers": 16, "shared": 75 * 1024, "num_warps": 1}, 3),  # 228 KB, plus 1 KB for every program
        ({"registers": 16, "shared": 75 * 1024 + 512, "num_warps": 1}, 2),
        ({"registers": 255, "shared": 227 * 1024, "num_warps": 8}, 1),
    ],
)
def test_resident_programs(facts, programs):
    assert check.resident_programs(dataclasses.replace(GOOD, **facts)) == programs


def planned(M, H, I, path):
    """The kernel calls of one path on sm_90."""
    weights = meta_weights(H, I, torch.bfloat16)
    x = torch.empty((M, H), dtype=torch.bfloat16, device="meta")
    problem = weights.problem(x, 90)
    return [call for call in plan(x, weights, heuristic(path, problem), problem).calls if isinstance(call, KernelCall)]


def touched(**directions):
    """Accesses by argument: "r", "w" or "rw"."""
    kinds = {"r": "ld", "w": "st"}
    return tuple(Access(name, kinds[letter], 16, 1) for name, letters in directions.items() for letter in letters)


def test_predicted_time_of_one_token():
    """Bound by memory: 3 TB/s and 2.2 µs per launch give 33.6 µs for the weights, as by hand, and the latencies."""
    gate_up, down = planned(1, 2048, 8192, "gemv")
    first = predict(gate_up, touched(x="r", gate_up="r", a="w"), 1)
    second = predict(down, touched(a="r", down="r", y="w"), 1)
    assert first.bytes == 2 * (2 * 8192 * 2048 + 2048 + 8192) and first.operations == 2 * 2 * 8192 * 2048
    assert second.bytes == 2 * (8192 * 2048 + 8192 + 2048) and second.operations == 2 * 8192 * 2048
    assert first.microseconds == pytest.approx(2.2 + first.bytes / 3e6)
    assert first.microseconds + second.microseconds - 4.4 == pytest.approx(33.6, abs=0.05)


@pytest.mark.parametrize("M, block_n, tiles", [(2048, 128, 928), (2000, 128, 928), (256, 64, 232)])
def test_predicted_time_of_a_prompt(M, block_n, tiles):
    """Bound by the products of whole tiles, in whole rounds of 132 multiprocessors: 928 tiles take 8, not 7.03."""
    (call,) = planned(M, 2048, 7373, "prefill")
    assert call.kernel.__name__ == "gate_up_tma_kernel" and call.grid == (132,)
    assert (call.constants["BLOCK_M"], call.constants["BLOCK_N"]) == (128, block_n)
    found = predict(call, touched(x="r", gate_up="r", a="w"), M)
    assert found.operations == 2 * (-(-M // 128) * 128) * 2 * 7424 * 2048
    rounds = -(-tiles // 132) * 132 / tiles
    memory, products = found.bytes / 3e6, found.operations / 790e6 * rounds
    assert found.microseconds == pytest.approx(2.2 + max(memory, products)) and products > memory


def test_calls_furthest_above_their_bound():
    """Sums over launches, as by hand. Left out: rows without a prediction, and calls that multiply only by cuBLAS."""

    def row(kernel, plans, *times):
        return {
            "kernel": kernel,
            "plans": [[*plan, 1] for plan in plans],
            "predicted": [[0, 0, time] for time in times],
        }

    small, wide, prompt = ("small", 64, 2048, 3000), ("small", 64, 2048, 6000), ("prefill", 4096, 2048, 4096)
    fp8 = [("fp8 small", 16, 2048, width) for width in (3000, 4000)]
    long, cublas = ("fp8 prefill", 4096, 2048, 4096), ("fp8 cublas", 200, 2048, 4096)
    rows = [
        row("gate_up_swap_kernel", [small, wide, *fp8], 11.0, 20.0, 9.0, 8.0),
        row("down_splitk_kernel", [small, wide, *fp8], 8.0, 11.0, 7.0, 7.0),
        row("sum_partials_kernel", [small, *fp8], 3.0, 2.0, 2.0),
        row("gate_up_tma_kernel", [prompt, long], 400.0, 100.0),
        row("dequantize_kernel", [long, cublas], 30.0, 30.0),
        row("neuron_scores_kernel", [("scores", 0, 2048, 3000)], 1e6),
        {"kernel": "gate_up_gemv_kernel", "plans": [["gemv", 1, 2048, 3000, 1]]},
    ]
    first, second, eight_bit = worst(rows, 2)[0], worst(rows, 2)[1], worst(rows, 1)[1]
    assert (first[:4], first.microseconds) == (prompt, 400.0)
    assert first.bound == pytest.approx(2 * 4096 * 2 * 2048 * 4096 / 790e6)
    assert (second[:4], second.microseconds) == (small, 22.0)
    assert second.bound == pytest.approx((3 * 2048 * 3000 * 2 + 2 * 64 * 2048 * 2) / 3e6)
    assert (eight_bit[:4], eight_bit.microseconds) == (fp8[0], 18.0)
    assert eight_bit.bound == pytest.approx((3 * 2048 * 3000 + 2 * 16 * 2048 * 2) / 3e6)
    assert [len(worst(rows, count)) for count in (1, 2, 9)] == [2, 4, 6]
    assert (worst(rows)[-1][:4], worst(rows)[-1].microseconds) == (long, 130.0)


def test_predicted_time_without_products():
    weights = meta_weights(2048, 4916, torch.bfloat16)
    h, a = (torch.empty(2048, width, dtype=torch.bfloat16, device="meta") for width in (2 * 4992, 4992))
    call = glu_gradient_call(h, a, weights, hidden=True)
    both = predict(call, (*touched(h="rw", a="rw"), Access("?", "ld", 2, 1)), 2048)
    assert both == (2 * 6 * 2048 * 4992, 0, pytest.approx(2.2 + 2 * 6 * 2048 * 4992 / 3e6))
    assert predict(call, touched(h="rw", a="r"), 2048).bytes == 2 * 5 * 2048 * 4992


def test_predicted_time_with_fp8_weights():
    """A weight of one byte; each access of an argument counts once."""
    weights = meta_weights(2048, 4916, torch.bfloat16, fp8=True)
    x = torch.empty((1, 2048), dtype=torch.bfloat16, device="meta")
    problem = weights.problem(x, 90)
    call, _ = plan(x, weights, heuristic("gemv", problem), problem).calls
    accesses = touched(x="r", gate_up="r", a="w")
    found = predict(call, (*accesses, Access("gate_up", "ld", 8, 1), Access("gate_up", "cp.async", 16, 1)), 1)
    assert found.bytes == 2 * 4992 * 2048 + 2 * (2048 + 4992) and found.operations == 2 * 2 * 4992 * 2048


def test_statistics_of_weights_have_no_products():
    weights = meta_weights(2048, 4992, torch.bfloat16)
    call = plan_neuron_scores(*weights.gate_up, weights.down, ("gate_ppm", "up_ppm", "down_ppm"))[0]
    found = predict(call, touched(gate="r", up="r", down="r"), 0)
    assert found == (2 * 3 * 2048 * 4992, 0, pytest.approx(2.2 + 2 * 3 * 2048 * 4992 / 3e6))


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
	@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes \
 [%r30], [%rd10, {%r31, %r32}], [%r33];
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
        Access("down", "ld", 2, 1),  # through a register that is set later, as in a loop
        Access("?", "ld", 4, 2),  # addresses loaded from memory
    }


def test_an_address_with_two_sources_counts_for_both():
    changed = PTX.replace("add.s64 	%rd6, %rd5, 128;", "selp.b64 	%rd6, %rd5, %rd3, %p4;")
    assert {Access("gate", "ld", 2, 1), Access("down", "ld", 2, 1)} <= set(
        read_accesses(changed, ["gate", "up", "down"])
    )


def test_matrix_instructions_are_counted():
    sass = """
        /*0000*/  HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/  @P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[UR9] ;
        /*0040*/  FFMA R1, R2, R3, R4 ;
    """
    assert ptx.read_matrix_instructions(sass) == {"HGMMA": 1, "HMMA": 2, "UTCMMA": 1}
    assert ptx.read_matrix_instructions("FFMA R1, R2, R3, R4 ;") == {}


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
    assert ptx.has_matrix_dot(line) is expected


def test_wgmma_operands():
    name = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    descriptors = f"{name} {{%r1,%r2}}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    registers = f"{name} {{%r1,%r2}}, {{%r3,%r4,%r5,%r6}}, %rd2, %p1, 1, 1, 0;"
    assert ptx.read_wgmma_a_in_registers(descriptors) == 0
    assert ptx.read_wgmma_a_in_registers(descriptors + registers + registers) == 2


ROW = {
    "triton": "3.7.1",
    "dtype": "bfloat16",
    "config": {"BLOCK_M": 64, "BLOCK_N": 32, "SPLIT_K": 4, "num_warps": 4, "num_stages": 3},
    "weights": ["down"],
    "plans": [["decode", 2, 2048, 8192, 256], ["decode", 2, 3072, 4096, 128]],
    "waves": [1.0, 0.5],
    "predicted": [[100, 0, 2.26], [200, 5, 7.0]],
    "failures": [],
    **dataclasses.asdict(GOOD),
}
BROKEN = {name: ROW[name] for name in ("triton", "dtype", "config", "weights", "plans", "sm", "kernel")}
BROKEN["failures"] = ["does not compile: why"]


@pytest.mark.parametrize("rows, status", [([ROW], 0), ([ROW, BROKEN], 1), ([{**ROW, "failures": ["spill"]}], 1)])
def test_the_command_fails_with_a_row(rows, status, monkeypatch, capsys):
    monkeypatch.setattr(command, "collect", lambda options: rows)
    assert command.main([]) == status
    assert f"{len(rows)} distinct compilations, {status} failed" in capsys.readouterr().out


def test_records(tmp_path):
    rows = [ROW, BROKEN]
    table.record(rows, tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(rows))
    text = (tmp_path / "rows.md").read_text()
    assert "Triton 3.7.1, bfloat16: 4 kernel calls, 2 distinct compilations, 1 failed" in text
    assert "| 90 | gemm_kernel | 64x32 split 4 w4 s3 | 2 | 2048-3072 | 128 | - | 227K | HGMMA 4 | " in text
    assert " | down 8 x cp.async 16, down 8 x tma 16 | 128-256 | 0.5-1 | 2.3-7 | ok |" in text
    assert "FAIL does not compile: why |" in text


def test_the_interpreter_is_rejected(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--sm", "90", "--hidden", "64", "--intermediate", "128"]) == 2
    assert capsys.readouterr().err == "error: kernels cannot be compiled while TRITON_INTERPRET is set: unset it\n"


def test_missing_tools_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(compile, "TOOLS", tmp_path)
    assert command.main(["--sm", "90", "--hidden", "64", "--intermediate", "128"]) == 2
    assert capsys.readouterr().err.startswith(f"error: nvdisasm is not in {tmp_path}")
