"""Replays launch the same kernels as the plan, with other tensors. The test's launcher only records its calls."""

import pytest

from tests.helpers.processes import run_without_interpreter

SCRIPT = '''
import itertools
import threading
import weakref
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
        return operator.run_kernels(x, row, (*operands, *[None] * 3), "silu", backend), list(launched)


new_empty = torch.Tensor.new_empty


def remember(made, tensor):
    made.append(weakref.ref(tensor))
    return tensor


def address(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def roles_of(entries, tensors, output):
    """The arguments by role: input 0, 1, ..., the output, and temporaries in the order of their first use.

    Inputs are known by their addresses: a weight stands for the buffer that begins with it.
    """
    known = {tensor.data_ptr(): f"input {n}" for n, tensor in enumerate(tensors) if tensor is not None}
    known[output.data_ptr()] = "output"
    del known[tensors[2].data_ptr()]  # up lies in the buffer of gate
    found = []
    for function, _, _, values in entries:
        for name, value in zip(arguments[function], values):
            if name in POINTERS and value is not None:
                found.append(known.setdefault(address(value), f"temporary {len(known)}"))
            else:
                found.append(value)
    assert {role for role in known.values() if role.startswith(("input", "output"))} <= set(map(str, found))
    return found


for M, biases in itertools.product((1, 7, 128), (False, True)):
    first, second = inputs(M, biases), inputs(M, biases)
    y, launches = call(first)
    third = len(launches) // 3
    planned, proof, replayed = launches[:third], launches[third : 2 * third], launches[2 * third :]
    for again in (proof, replayed):  # it is replayed once for comparison, and once for the caller
        assert [entry[:3] for entry in again] == [entry[:3] for entry in planned]
    replays = len(operator._replays)
    z, other = call(second)
    assert len(operator._replays) == replays, "the second call was replayed"
    assert [entry[:3] for entry in other] == [entry[:3] for entry in planned] and len(planned) >= 2
    assert roles_of(replayed, first, y) == roles_of(other, second, z)
    assert all(isinstance(value, int | str | None) for _, _, _, values in other for value in values), "addresses"
    # Bound to the weights of the second call, for other tokens.
    bound = list(operator._replays.values())[-1].bind(
        [None if t is None else t.data_ptr() for t in (second[1], *second[3:], None, None, None)], second[0].device
    )
    launched.clear()
    x = torch.randn(1, M, 64).to(torch.bfloat16)
    w = bound.run(x)
    assert w.shape == x.shape and [entry[:3] for entry in launched] == [entry[:3] for entry in planned]
    assert roles_of(launched, [x, *second[1:]], w) == roles_of(other, second, z)

    # Between runs, a replay keeps neither addresses nor tensors.
    replayed = list(operator._replays.values())[-1]
    made = []
    torch.Tensor.new_empty = lambda *args, **kwargs: remember(made, new_empty(*args, **kwargs))
    bound.run(x)
    temporaries = len(made)
    replayed.run(x, (second[1], *second[3:], *[None] * 3))
    torch.Tensor.new_empty = new_empty
    assert 0 < temporaries < len(made) and not any(reference() is not None for reference in made)
    assert all(fixed[place] is None for _, _, fixed, moving in bound._launches for place, _, _ in moving)
    assert all(step.arguments[place] is None for step in replayed.steps for place, _ in step.views)

    # Threads fill their own arguments.
    tokens = [torch.randn(1, M, 64).to(torch.bfloat16) for _ in range(4)]
    pairs = []

    def work(x):
        outputs = [bound.run(x) for _ in range(50)]
        pairs.append((x.data_ptr(), {y.data_ptr() for y in outputs}, outputs))

    launched.clear()
    threads = [threading.Thread(target=work, args=(x,)) for x in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x_address, outputs, _ in pairs:
        entries = [values for function, _, _, values in launched if x_address in values]
        assert len(entries) == 50, len(entries)
    written = [value for _, _, _, values in launched for value in values]
    assert all(len(outputs) == 50 and outputs <= set(written) for _, outputs, _ in pairs)


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
# Rows apart and rows off the boundary are planned at each call: the plan works on a copy.
wide, shifted = torch.randn(7, 128).to(torch.bfloat16), torch.randn(449).to(torch.bfloat16)
for x in (wide[:, :64], shifted[1:].view(7, 64)):
    call([x, *some[1:]])
assert count() == before + 3
# Plans with tensor descriptors and with products of cuBLAS are replayed, but not for fixed addresses.
for tensors, backend in ((inputs(129, False), "triton"), (some, "cublas"), (biased, "cublas")):
    y, planned = call(tensors, backend)
    z, replayed = call(tensors, backend)
    assert [entry[:3] for entry in replayed] == [entry[:3] for entry in planned[: len(planned) // 2]] != []
    replay_of_it = list(operator._replays.values())[-1]
    assert replay_of_it.bind((0, 0, *[None] * 6), y.device) is None
assert count() == before + 6
print("replays:", count())
'''


@pytest.mark.slow
def test_replays_launch_the_same_as_the_plan(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_without_interpreter(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replays: 12" in done.stdout
