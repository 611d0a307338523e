"""Recordings launch what the plan would have launched, with other tensors; seen by a launcher that only takes notes."""

from tests.test_aot import run_without_interpreter

SCRIPT = '''
import itertools, sys
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
from csrc_triton import activations, down_decode, glu, glu_decode, launch

kernels = [glu_decode.gate_up_gemv_kernel, glu_decode.gate_up_swap_kernel, down_decode.down_gemv_kernel,
           down_decode.down_splitk_kernel, down_decode.sum_partials_kernel, activations.act_mul_kernel]
arguments = {kernel.fn.__name__: kernel.arg_names for kernel in kernels}


def inputs(M, biases):
    shapes = [(M, 64), (2, 256, 64), (64, 256), (200,), (200,), (64,)]
    tensors = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    return [*tensors[:3], *(tensors[3:] if biases else [None] * 3)]


def call(tensors, path):
    launched.clear()
    return glu.glu_mlp(*tensors[:3], 200, "silu", *tensors[3:], path), list(launched)


for (M, path), biases in itertools.product(((1, None), (1, "decode"), (7, None), (128, None)), (False, True)):
    first, second = inputs(M, biases), inputs(M, biases)
    _, planned = call(first, path)
    calls = len(glu._recordings)
    y, recorded = call(second, path)
    assert len(glu._recordings) == calls, "the second call was not recorded anew"
    assert [entry[:3] for entry in recorded] == [entry[:3] for entry in planned] and len(planned) >= 2
    role = {id(tensor): f"input {n}" for n, tensor in enumerate(second) if tensor is not None}
    expected = {id(tensor): f"input {n}" for n, tensor in enumerate(first) if tensor is not None}
    for (_, _, _, old), (_, _, _, new) in zip(planned, recorded):
        assert len(old) == len(new)
        for a, b in zip(old, new):
            if not isinstance(a, torch.Tensor):
                assert a == b and type(a) is type(b)
                continue
            expected.setdefault(id(a), f"temporary {len(expected)}")
            role.setdefault(id(b), f"temporary {len(role)}")
            assert expected[id(a)] == role[id(b)], "a tensor in another's place"
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    used = {id(value) for entry in recorded for value in entry[3] if isinstance(value, torch.Tensor)}
    assert {id(tensor) for tensor in second if tensor is not None} <= used, "an input that no kernel reads"
    assert any(value is y for value in recorded[-1][3]), "the last kernel writes what is returned"

# Whatever changes a compilation or a launch is told apart.
before = len(glu._recordings)
wide = torch.randn(7, 128).to(torch.bfloat16)[:, :64]
some = inputs(7, False)
call([wide, *some[1:]], None)
half = [None if tensor is None else tensor.half() for tensor in some]
call(half, None)
biased = inputs(7, True)
odd = torch.randn(201).to(torch.bfloat16)[1:]
call([*biased[:3], odd, *biased[4:]], None)
call(some, "small")
assert len(glu._recordings) == before + 4, (len(glu._recordings), before)
# More tokens, and what holds cuBLAS products, are planned anew each time.
call(inputs(129, False), "small")
call(some, "cublas")
assert len(glu._recordings) == before + 4
print("recordings:", len(glu._recordings))
'''


def test_recordings_launch_what_the_plan_launches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_without_interpreter(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recordings: 12" in done.stdout
