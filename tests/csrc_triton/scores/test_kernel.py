"""Neuron statistics compared with torch (bit for bit) and float64; unaligned shapes, NaN in the padding, infinity."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton.layout import PAD
from csrc_triton.scores.kernel import NeuronStatistics, neuron_scores, plan_neuron_scores
from csrc_triton.scores.reference import WeightStatistics

# NumPy, which the interpreter uses, warns about NaN and infinity, which are expected here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNWRITTEN = -7.0  # no statistic is negative, and unlike NaN it cannot come from the padding


def poisoned(rows, columns, pitch, dtype, generator, mean=0.0, std=1.0):
    """A random matrix [rows, columns] with the given row pitch, in a buffer of NaN with one more row."""
    buffer = torch.full((rows + 1, pitch), torch.nan, dtype=dtype)
    buffer[:rows, :columns] = (mean + std * torch.randn(rows, columns, generator=generator)).to(dtype)
    return buffer.to(DEVICE)[:rows, :columns]


def weights(I, H, dtype, seed, pitches=(0, 0, 0), mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(I, H), (I, H), (H, I)]
    return [
        poisoned(rows, columns, columns + extra, dtype, generator, mean, std)
        for (rows, columns), extra in zip(shapes, pitches, strict=True)
    ]


def peak_to_peak(weight, dim):
    weight = weight.float()
    return weight.amax(dim) + weight.amin(dim).abs()


def launch_poisoned(gate, up, down, wanted=NeuronStatistics._fields, grid=None):
    """Return statistics launched into poisoned outputs; checks that nothing past the end of an output was written."""
    call, statistics = plan_neuron_scores(gate, up, down, wanted)
    output = call.args["statistics"]
    buffer = torch.full((output.numel() + 8192,), UNWRITTEN, device=DEVICE)
    dataclasses.replace(call, args={**call.args, "statistics": buffer}, grid=grid or call.grid).run()
    output.copy_(buffer[: output.numel()].view(output.shape))
    assert (buffer[output.numel() :] == UNWRITTEN).all()
    for name, row in zip(NeuronStatistics._fields, output, strict=True):
        assert name in wanted or twin(name) in wanted or (row == UNWRITTEN).all(), name
    return statistics


def twin(name):
    """The statistic of the other of gate and up: both are computed if one is wanted."""
    return name.replace("gate", "up") if "gate" in name else name.replace("up", "gate")


def assert_matches(statistics, gate, up, down, rtol):
    for name, weight, dim in (("gate", gate, 1), ("up", up, 1), ("down", down, 0)):
        got = getattr(statistics, f"{name}_ppm")
        assert got.dtype == torch.float32 and got.shape == (gate.shape[0],)
        torch.testing.assert_close(got, peak_to_peak(weight, dim), rtol=0, atol=0, equal_nan=True)
    for name, weight in (("gate", gate), ("up", up)):
        exact = weight.double()
        variance = exact.var(1) if weight.shape[1] > 1 else torch.full_like(exact[:, 0], torch.nan)
        for what, expected in (
            ("variance", variance),
            ("l1", exact.abs().sum(1)),
            ("l2", exact.square().sum(1).sqrt()),
        ):
            got = getattr(statistics, f"{name}_{what}")
            assert got.dtype == torch.float32 and got.shape == (gate.shape[0],)
            torch.testing.assert_close(
                got.double(), expected, rtol=rtol, atol=1e-30, equal_nan=True, msg=f"{name}_{what}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "I, H, pitches",
    [
        (1, 1, (0, 0, 0)),
        (5, 1, (3, 0, 7)),
        (1, 37, (0, 0, 0)),
        (64, 64, (0, 0, 0)),
        (67, 65, (15, 31, 61)),  # down [H, 67] in rows of 128: the padding is read and must not be counted
        pytest.param(131, 1024, (0, 0, 125), marks=pytest.mark.slow),
        (37, 1025, (1, 2, 3)),
        (9, 2113, (0, 0, 0)),
        (3, 768, (5, 0, 1)),  # from here on without masks: one step, steps of one load, two steps
        (2, 11 * 256, (0, 9, 0)),
        (2, 2560, (0, 0, 0)),
    ],
)
def test_matches_torch(dtype, I, H, pitches):
    gate, up, down = weights(I, H, dtype, seed=I * 10007 + H, pitches=pitches)
    assert_matches(launch_poisoned(gate, up, down), gate, up, down, rtol=2e-6)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    I=st.integers(1, 200),
    H=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    pitches=st.tuples(*[st.integers(0, 40)] * 3),
    seed=st.integers(0, 2**31),
)
def test_matches_torch_on_random_shapes(I, H, dtype, pitches, seed):
    gate, up, down = weights(I, H, dtype, seed, pitches)
    assert_matches(launch_poisoned(gate, up, down), gate, up, down, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "wanted",
    [("gate_ppm", "up_ppm"), ("down_ppm",), ("gate_variance", "up_variance"), ("up_l1",), ("gate_l2", "up_l2")],
    ids=",".join,
)
def test_only_what_is_wanted_is_computed(wanted, dtype):
    gate, up, down = weights(67, 300, dtype, seed=4, pitches=(1, 0, 13))
    every, found = launch_poisoned(gate, up, down), launch_poisoned(gate, up, down, wanted)
    for name, values in found._asdict().items():
        assert values is None if name not in wanted else torch.equal(values, getattr(every, name)), name


@pytest.mark.parametrize("wanted", [(), ("gate_ppm", "mean")])
def test_unknown_statistics_are_named(wanted):
    gate, up, down = weights(3, 4, torch.float32, seed=0)
    with pytest.raises(ValueError, match="wanted must name statistics of gate_ppm, up_ppm, .*; got"):
        neuron_scores(gate, up, down, wanted)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_signed_weights(sign):
    """max + |min| if all values have the same sign: a masked lane read as zero would change the result."""
    gate, up, down = [(sign * (weight.abs() + 0.5)) for weight in weights(70, 45, torch.float32, seed=3)]
    assert_matches(launch_poisoned(gate, up, down), gate, up, down, rtol=2e-6)


@pytest.mark.parametrize("mean, std", [(1000.0, 1.0), (-3e4, 1.0), (1.0, 1e-4)])
@pytest.mark.parametrize("H", [700, 2500, 2560])
def test_variance_far_from_zero(mean, std, H):
    """|mean| up to 30000 standard deviations: a variance from raw sums would have no correct digit in float32."""
    gate, up, down = weights(6, H, torch.float32, seed=11, mean=mean, std=std)
    assert_matches(launch_poisoned(gate, up, down), gate, up, down, rtol=1e-5)


def test_variance_when_the_first_chunk_is_unlike_the_rest():
    gate, up, down = weights(3, 5000, torch.float32, seed=12)
    gate[:, :2048] = 0.0
    gate[:, 2048:] += 500.0
    up[:, :2048] -= 500.0
    assert_matches(launch_poisoned(gate, up, down), gate, up, down, rtol=1e-5)


@pytest.mark.slow
def test_variance_of_constant_rows_is_zero():
    """Also if the rounded mean of equal numbers differs from that number."""
    constants = torch.rand(200, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float32) + 0.5
    gate = constants.expand(200, 1030).contiguous().to(DEVICE)
    statistics = neuron_scores(gate, gate, gate.T.contiguous())
    assert (statistics.gate_variance == 0).all() and (statistics.up_variance == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1100, 1280])
def test_nan_and_infinity_as_in_torch(dtype, H):
    I = 70
    gate, up, down = weights(I, H, dtype, seed=5)
    for weight in (gate, up, down.T):
        weight[0, 3] = torch.nan
        weight[1, H - 1] = torch.nan
        weight[2, 64] = torch.inf
        weight[3, 0] = -torch.inf
        weight[4, 2], weight[4, 1030] = torch.inf, -torch.inf
        weight[5, 7], weight[5, 8] = torch.nan, -torch.inf
        weight[6, :] = torch.nan
        weight[I - 1, H - 1] = torch.nan
    statistics = launch_poisoned(gate, up, down)
    assert statistics.gate_ppm.isnan().nonzero().flatten().tolist() == [0, 1, 5, 6, I - 1]
    assert statistics.down_ppm.isnan().nonzero().flatten().tolist() == [0, 1, 5, 6, I - 1]
    assert statistics.up_ppm.isinf().nonzero().flatten().tolist() == [2, 3, 4]
    assert_matches(statistics, gate, up, down, rtol=2e-6)


def test_each_program_writes_only_its_own_part():
    """Without the last third of the grid, all of `up`, and nothing else, is left unwritten."""
    I, H = 67, 100
    gate, up, down = weights(I, H, torch.float32, seed=8)
    call, _ = plan_neuron_scores(gate, up, down)
    row_programs = (call.grid[0] - 2) // 2  # 67 columns of down are 2 blocks of 64
    statistics = launch_poisoned(gate, up, down, grid=(2 + row_programs,))
    for name, values in statistics._asdict().items():
        unwritten = values == UNWRITTEN
        assert unwritten.all() if name.startswith("up_") else not unwritten.any(), name


GUARDED = """
import ctypes, mmap, torch
from csrc_triton.scores.kernel import neuron_scores

def guarded(rows, columns, pitch):
    # The matrix ends where an unreadable page begins.
    size = ((rows - 1) * pitch + columns) * 4
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.float32, count=size // 4, offset=pages - size)
    return flat.normal_().as_strided((rows, columns), (pitch, 1))

for I, H, pitch in [(67, 65, 67), (67, 65, 128), (5, 1030, 5), (1, 1, 1)]:
    gate, up, down = guarded(I, H, H), guarded(I, H, H + 3), guarded(H, I, pitch)
    down_ppm = neuron_scores(gate, up, down).down_ppm
    assert torch.equal(down_ppm, down.amax(0) + down.amin(0).abs())

# A weight that the wanted statistics do not need is not read: all of down is unreadable.
gate, up = torch.randn(67, 65), torch.randn(67, 65)
memory = mmap.mmap(-1, 16 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
down = torch.frombuffer(memory, dtype=torch.float32, count=65 * 67).view(65, 67)
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), 16 * mmap.PAGESIZE, 0) == 0
gate_ppm = neuron_scores(gate, up, down, ("gate_ppm", "up_ppm")).gate_ppm
assert torch.equal(gate_ppm, gate.amax(1) + gate.amin(1).abs())
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="a page of host memory is protected")
def test_nothing_is_read_past_the_weights():
    run = subprocess.run(
        [sys.executable, "-c", GUARDED], check=False, env=dict(os.environ), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr or f"killed by signal {-run.returncode}"


def test_padding_is_read_only_where_it_exists():
    def readable(down):
        gate = torch.empty(down.shape[::-1], device="meta", dtype=down.dtype)
        return plan_neuron_scores(gate, gate, down)[0].args["readable"]

    def meta(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    assert readable(meta(24, 128)[:, :67]) == 80
    assert readable(meta(24, 67)) == 67
    assert readable(meta(24, 64)) == 64
    assert (
        readable(meta(24, 79)[:, :67]) == 67
    )  # the 80th column is the next row's first, which the last row does not have
    assert readable(meta(23 * 128 + 67).as_strided((24, 67), (128, 1))) == 67  # the last row has no padding
    assert readable(meta(23 * 128 + 80).as_strided((24, 67), (128, 1))) == 80
    assert readable(meta(24, 128)[:, 61:]) == 67  # an offset leaves none after the last row


def test_plan_divides_the_work_as_documented():
    def meta(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    call, statistics = plan_neuron_scores(meta(8192, 2048), meta(8192, 2048), meta(2048, 8192))
    assert call.grid == (128 + 2 * 1024,)
    assert all(values.shape == (8192,) for values in statistics)
    call, _ = plan_neuron_scores(meta(8192, 2048), meta(8192, 2048), meta(2048, 8192), ("gate_ppm", "up_ppm"))
    assert call.grid == (2 * 1024,)


@pytest.mark.parametrize(
    "H, chunks, variance_chunks, even",
    [
        (2048, 8, 2, True),
        (3072, 6, 2, True),
        (2560, 5, 2, True),
        (256, 1, 1, True),
        (11 * 256, 1, 1, True),
        (2047, 8, 2, False),
        (576, 4, 2, False),
        (1, 1, 1, False),
    ],
)
def test_rows_of_whole_loads_take_whole_steps(H, chunks, variance_chunks, even):
    gate, down = torch.empty(16, H, device="meta"), torch.empty(H, 16, device="meta")
    for wanted, expected in (("gate_ppm", chunks), ("gate_variance", variance_chunks)):
        constants = plan_neuron_scores(gate, gate, down, (wanted,))[0].constants
        assert (constants["CHUNKS"], constants["EVEN"]) == (expected, even)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_torch(dtype):
    for I, H in ((1, 1), (7, 1), (37, 53)):
        gate, up, down = weights(I, H, dtype, seed=21, pitches=(3, 0, 5))
        assert_matches(WeightStatistics(gate, up, down), gate, up, down, rtol=2e-6)


def test_bad_input_is_named():
    def matrix(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    gate, down = matrix(4, 6), matrix(6, 4)
    for bad, error, words in [
        ((matrix(0, 6), matrix(0, 6), matrix(6, 0)), ValueError, r"gate must be a non-empty matrix"),
        ((matrix(4), matrix(4), matrix(4)), ValueError, r"gate must be a non-empty matrix"),
        ((gate, matrix(5, 6), down), ValueError, r"up must have the shape of gate, \[4, 6\], got \[5, 6\]"),
        ((gate, gate, gate), ValueError, r"down must have shape \[H, I\] = \[6, 4\], got \[4, 6\]"),
        ((matrix(4, 6, dtype=torch.float64),) * 2 + (down,), TypeError, "float64"),
        ((gate, gate, down.half()), TypeError, "down must have the dtype of gate"),
        ((gate, gate, down.to("meta")), ValueError, "down must be on the device of gate"),
        ((gate, gate, matrix(4, 6).T), ValueError, r"down must have an inner stride of 1, got strides \(1, 6\)"),
        ((matrix(4, 12)[:, ::2], gate, down), ValueError, "gate must have an inner stride of 1"),
    ]:
        with pytest.raises(error, match=words):
            neuron_scores(*bad)
    neuron_scores(matrix(4, 2)[:, ::2], matrix(4, 1), matrix(1, 4))  # one column: its inner stride is irrelevant


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("I", [8192, 7373, 3277])
def test_real_shapes(dtype, I):
    for padding in (0, -I % PAD):
        gate, up, down = weights(I, 2048, dtype, seed=I, pitches=(0, 0, padding), std=0.02)
        assert_matches(launch_poisoned(gate, up, down), gate, up, down, rtol=2e-6)
