"""The ahead-of-time check on real compilations, end to end."""

import json

import pytest

from tests.helpers.processes import run_without_interpreter

COMPILED = """
import dataclasses, json, sys, torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from csrc_triton.glu.forward import plan
from csrc_triton.glu.weights import GluWeights
from csrc_triton.launch.call import KernelCall
from csrc_triton.launch.chooser import heuristic, triton_path
from csrc_triton.scores.kernel import plan_neuron_scores
from csrc_triton.tools.aot import check as aot
from csrc_triton.tools.aot.compile import Compilation

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
def specialised_kernel(x, t, bias, one, sixteen, seven, large, M, BLOCK: tl.constexpr):
    if bias is not None:
        tl.store(x, seven)

def gemm(M, N, BLOCK_K, stages, scale=False, warps=4):
    K = 1024
    args = dict(x=meta(M, K), weight=meta(N, K), out=meta(M, N, dtype=torch.float32), K=K)
    return KernelCall(gemm_kernel, (1,), args, dict(M=M, N=N, BLOCK_K=BLOCK_K, SCALE=scale), num_warps=warps,
                      num_stages=stages)

def tile(block, stride, warps):
    args = dict(weight=meta(block, stride), out=meta(block, dtype=torch.float32), stride=stride)
    return KernelCall(sum_kernel, (1,), args, dict(BLOCK=block), num_warps=warps, num_stages=1)

def scores(I, H, pitch):
    return plan_neuron_scores(meta(I, H), meta(I, H), meta(H, pitch)[:, :I])[0]

result = {
    "padded": check(scores(5735, 2048, 5760), 90, 5735 * 2048),
    "unaligned pitch": check(scores(5735, 2048, 5735), 90, 5735 * 2048),
    "good gemm": [check(gemm(64, 64, 64, 3), sm, 64 * 1024) for sm in (80, 86, 89, 90, 100, 120)],
    "small gemm": check(gemm(16, 64, 64, 3), 90, 64 * 1024),
    "large gemm": check(gemm(128, 128, 128, 4, warps=8), 120, 128 * 1024),
    "scaled gemm": check(gemm(64, 64, 64, 3, scale=True), 90, 64 * 1024),
    "spilling": check(tile(256, 256, 1), 90, 256 * 256),
    "broken": check(KernelCall(broken_kernel, (1,), dict(weight=meta(8), out=meta(8)), {}, num_warps=4, num_stages=1),
                    90, 8),
}
x, t = meta(64, 64), TensorDescriptor.from_tensor(meta(64, 64), [16, 32])
args = dict(x=x, t=t, bias=None, one=1, sixteen=32, seven=7, large=2**40, M=1)
specialised = KernelCall(specialised_kernel, (1,), args, dict(BLOCK=8), num_warps=4, num_stages=1)
source = Compilation.of(specialised, 90).source
result["signature"] = source.signature
result["divisible"] = sorted(source.fn.arg_names[index] for (index, *_), attribute in source.attrs.items() if attribute)
call = scores(8192, 2048, 8192)
with_pdl = [dataclasses.replace(call, launch_pdl=pdl) for pdl in (False, True)]

def keys(gate_up, M, I=7373, IP=7424, H=2048):
    x, weights = meta(M, H), GluWeights(gate_up, meta(H, IP), I)
    problem = weights.problem(x, 90)
    calls = plan(x, weights, heuristic(triton_path(M), problem), problem).calls
    return [Compilation.of(call, 90).key for call in calls if isinstance(call, KernelCall)]

split, packed = meta(2, 7424, 2048), meta(7373 + 7424, 2048).as_strided((2, 7424, 2048), (7373 * 2048, 2048, 1))
result["split and packed"] = [[keys(gate_up, M) for M in (1, 16, 128, 2048)] for gate_up in (split, packed)]
result["pdl"] = [Compilation.of(each, 90).options.launch_pdl for each in with_pdl]
compilation = Compilation.of(call, 90)
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


@pytest.mark.slow
def test_an_unaligned_pitch_fails(compiled):
    assert compiled["padded"] == []
    (reason,) = compiled["unaligned pitch"]
    assert reason.startswith("narrow weight load") and reason.endswith("of 2 bytes from down")


@pytest.mark.slow
def test_real_compilations_fail_as_they_should(compiled):
    assert compiled["good gemm"] == [[]] * 6
    assert compiled["small gemm"] == ["a dot without HGMMA"]  # wgmma has at least 64 rows
    assert [reason.split(":")[0] for reason in compiled["large gemm"]] == ["shared memory"]
    assert [reason.split(":")[0] for reason in compiled["scaled gemm"]] == ["wgmma with A in registers"]
    assert "spill" in [reason.split(":")[0] for reason in compiled["spilling"]]
    (reason,) = compiled["broken"]
    assert reason.startswith("does not compile: ") and "undefined_name" in reason


@pytest.mark.slow
def test_specialisation_matches_a_launch(compiled):
    assert compiled["signature"] == {
        "x": "*bf16",
        "t": "tensordesc<bf16[16, 32]>",
        "bias": "constexpr",
        "one": "constexpr",
        "sixteen": "i32",
        "seven": "i32",
        "large": "i64",
        "M": "i32",
        "BLOCK": "constexpr",
    }
    assert compiled["divisible"] == ["large", "sixteen", "x"]
    assert compiled["pdl"] == [False, True]


@pytest.mark.slow
def test_packed_weights_of_an_unaligned_width_run_the_same_kernels(compiled):
    """Therefore the check of all shipped kernels covers them."""
    split, packed = compiled["split and packed"]
    assert split == packed and all(split)


@pytest.mark.slow
def test_running_maximum_of_the_statistics_keeps_nan(compiled):
    """The interpreter's maximum always keeps NaN, so this needs compiled code."""
    ptx = compiled["ptx"]
    assert ptx.count("max.NaN.f32") >= 80 and ptx.count("min.NaN.f32") >= 80  # one for each weight of the column loop


@pytest.mark.slow
def test_every_shipped_kernel_passes_the_check():
    run = run_without_interpreter("-m", "csrc_triton.tools.aot")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 failed" in run.stdout
