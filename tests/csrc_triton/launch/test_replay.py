"""Replays launch the same kernels as the plan, with other tensors. The test's launcher only records its calls."""

import pytest

from tests.helpers.processes import run_without_interpreter

SCRIPT = '''
import itertools
import torch
import triton
from triton.backends.compiler import GPUTarget

launched = []


class Tools:
    def load_binary(self, name, kernel, shared, device):
        return 1, name, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}


class Launcher:
    def __init__(self, src, metadata):
        self.pdl = metadata.launch_pdl

    def __call__(self, *args):
        grid, (stream, function), rest = args[:3], args[3:5], args[5:]
        launched.append((function, grid, self.pdl, rest[-len(arguments[function]):]))


class Driver:
    utils, launcher_cls = Tools(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
from csrc_triton import layout
from csrc_triton.glu import act_mul, down_decode, gate_up_decode, gate_up_prefill
from csrc_triton.launch import replay
from gluprune.runtime import aligned, operator

replay._same_bits = lambda a, b: True  # nothing is computed here

kernels = [gate_up_decode.gate_up_gemv_kernel, gate_up_decode.gate_up_swap_kernel, down_decode.down_gemv_kernel,
           down_decode.down_splitk_kernel, down_decode.sum_partials_kernel, act_mul.act_mul_kernel,
           gate_up_prefill.gate_up_tma_kernel]
arguments = {kernel.fn.__name__: kernel.arg_names for kernel in kernels}
POINTERS = {"x", "gate_up", "a", "down", "partials", "y", "gate_bias", "up_bias", "bias"}


def inputs(M, biases, dtype=torch.bfloat16):
    """x, then the aligned weights and biases of an MLP of 200 neurons."""
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((200, 64), (200, 64), (64, 200))]
    aligned.align(*weights)
    given = [torch.randn(size).to(dtype) for size in (200, 200, 64)] if biases else [None] * 3
    return [torch.randn(1, M, 64).to(dtype), *weights, *given]


def call(tensors, backend="triton"):
    launched.clear()
    x, *operands = tensors
    row = layout.first_up_row(*operands[:3])
    with torch.no_grad():
        return operator.run_kernels(x, row, tuple(operands), "silu", backend), list(launched)


def address(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


for M, biases in itertools.product((1, 7, 128), (False, True)):
    first, second = inputs(M, biases), inputs(M, biases)
    y, launches = call(first)
    planned, proof = launches[: len(launches) // 2], launches[len(launches) // 2 :]
    assert [entry[:3] for entry in proof] == [entry[:3] for entry in planned], "it is replayed once for comparison"
    calls = len(operator._replays)
    z, replayed = call(second)
    assert len(operator._replays) == calls, "the second call was replayed"
    assert [entry[:3] for entry in replayed] == [entry[:3] for entry in planned] and len(planned) >= 2
    # The same roles at the same places: input 0, 1, ..., the output, and temporaries in the order of their first use.
    # Inputs are known by their addresses: a weight stands for the buffer that begins with it.
    roles = []
    for tensors, output, entries in ((first, y, planned), (second, z, replayed)):
        known = {tensor.data_ptr(): f"input {n}" for n, tensor in enumerate(tensors) if tensor is not None}
        known[output.data_ptr()] = "output"
        del known[tensors[2].data_ptr()]  # up is in the buffer of gate
        seen = []
        for function, _, _, values in entries:
            for name, value in zip(arguments[function], values):
                if name in POINTERS and value is not None:
                    seen.append(known.setdefault(address(value), f"temporary {len(known)}"))
                else:
                    seen.append(value)
        assert {role for role in known.values() if role.startswith(("input", "output"))} <= set(map(str, seen))
        roles.append(seen)
    assert roles[0] == roles[1]
    assert all(isinstance(value, int | str | None) for _, _, _, values in replayed for value in values), "addresses"


def count():
    return sum(found is not None for found in operator._replays.values())


# Anything that changes a compilation or a launch gets a separate replay.
before, some = count(), inputs(7, False)
call(inputs(7, False, torch.float16))
biased = inputs(7, True)
unaligned = torch.randn(201).to(torch.bfloat16)[1:]
call([*biased[:4], unaligned, *biased[5:]])
call(some, "auto")
assert count() == before + 3, (count(), before)
# More tokens, rows apart, rows off the boundary, and plans with cuBLAS products are planned at each call.
call(inputs(129, False))
wide, shifted = torch.randn(7, 128).to(torch.bfloat16), torch.randn(449).to(torch.bfloat16)
for x in (wide[:, :64], shifted[1:].view(7, 64)):
    call([x, *some[1:]])
call(some, "cublas")
assert count() == before + 3
print("replays:", count())
'''


@pytest.mark.slow
def test_replays_launch_the_same_as_the_plan(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_without_interpreter(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replays: 9" in done.stdout
