"""Importance statistics of the neurons of one GLU MLP: one launch, one pass, every weight read from memory once.

A neuron is a row of the gate and up projections and a column of the down projection. The two need different treatment:
a row is contiguous and is reduced inside one program; columns run across all rows, so one program owns a block of
adjacent columns and iterates over all rows of the matrix. Programs write no partial results: nothing is combined
afterwards, there are no atomics, and every result is the same in every run. Only the requested statistics are
computed, and only the weights that they need are read.

Rows are bound by the issue of instructions, not by memory, if warps exchange partial results: one warp reduces a whole
row. Partial results stay in the lanes until the end of the row, so a row ends with one exchange between lanes per
statistic, and a program with one barrier. A row whose length is a multiple of LANES is loaded without masks: each
masked load waits for the one before (disassembled for sm_90), and the selects of its values are a third of the
instructions. Without masks a warp has up to five loads of 512 bytes in flight (peak-to-peak, Triton 3.7.1). With 48
registers a multiprocessor holds 40 such warps.

How the work is divided (I = 8192, H = 2048, bfloat16, 132 SMs as on an H100): 64 columns are 128 bytes, one cache line,
which gives 128 column programs that each read 256 KiB. They are the longest, so they come first in the grid; 2 x 1024
row programs of 8 rows (32 KiB) fill the GPU during and after them. A column program keeps 8 tiles of 32 x 64
(32 KiB) in flight, more than the 18 KiB that one SM needs to reach its share of 3 TB/s at a latency of 0.8 us, so that
even the 52 column programs of a model pruned to 3277 neurons should end before the row programs do. This is arithmetic,
not a measurement.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from csrc_triton.launch.call import KernelCall
from csrc_triton.layout import DTYPES, cdiv, next_power_of_2

BLOCK_COLUMNS = 64  # columns of down per program: one 128-byte line in 16 bit
BLOCK_COLUMN_ROWS = 32  # rows of down per step
NUM_WARPS = 8
BLOCK_ROWS = NUM_WARPS  # rows of gate or up per program
LANES = 256  # weights of a row that one warp loads at once: 16 bytes per lane in 16 bit
MAX_CHUNKS = 8  # such loads per step; a quarter for the variance, which needs the registers
_ROW_STATISTICS = ("ppm", "variance", "l1", "l2")


class NeuronStatistics(NamedTuple):
    """Per-neuron statistics of one GLU MLP, each a float32 tensor of shape [I] on the device of the weights, or None.

    None stands for a statistic that was not requested. `ppm` is the peak-to-peak magnitude max(w) + |min(w)| (arXiv
    2512.22671), over the rows of gate and up and the columns of down; it equals PyTorch's `w.float().amax() +
    w.float().amin().abs()` bit for bit, NaN included. `variance` is the unbiased variance of a row (`torch.var`; NaN
    for H = 1), `l1` the sum of its magnitudes and `l2` its Euclidean norm.
    """

    gate_ppm: torch.Tensor | None = None
    up_ppm: torch.Tensor | None = None
    down_ppm: torch.Tensor | None = None
    gate_variance: torch.Tensor | None = None
    up_variance: torch.Tensor | None = None
    gate_l1: torch.Tensor | None = None
    up_l1: torch.Tensor | None = None
    gate_l2: torch.Tensor | None = None
    up_l2: torch.Tensor | None = None


@triton.jit
def _peak_to_peak(maximum, minimum, magnitude):
    # tl.max and tl.min skip NaN. A sum of magnitudes is NaN only if a NaN is among them: infinities cannot cancel.
    return tl.where(magnitude == magnitude, maximum + tl.abs(minimum), magnitude)  # noqa: PLR0124


@triton.jit
def _load_chunk(pointers, valid, EVEN: tl.constexpr):
    """Load weights as float32, zero where they are not `valid`. With EVEN all are."""
    return (tl.load(pointers) if EVEN else tl.load(pointers, mask=valid, other=0.0)).to(tl.float32)


@triton.jit
def _row_statistics(
    weight, stride, block, statistics, I, H,
    PPM: tl.constexpr, VARIANCE: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_ROWS rows of a weight `[I, H]`; rows 0, 3, 5 and 7 of `statistics` are its results."""
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, LANES)[None, :]
    # Rows past the end repeat the last one: their results are not stored.
    pointers = weight + tl.minimum(rows, I - 1).to(tl.int64)[:, None] * stride + columns  # [BLOCK_ROWS, LANES]

    # The variance is taken about the mean of the first step. With c steps that point is never further from the row's
    # mean than sqrt(c - 1) standard deviations, so the subtraction at the end loses at most a factor c of float32's
    # accuracy, however large the mean is.
    first = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    if VARIANCE:
        for chunk in tl.static_range(CHUNKS):
            first += _load_chunk(pointers + chunk * LANES, columns < H - chunk * LANES, EVEN)
    shift = tl.sum(first, axis=1) / tl.minimum(H, CHUNKS * LANES)
    # One partial result per lane: [BLOCK_ROWS, LANES].
    maximum = tl.full((BLOCK_ROWS, LANES), float("-inf"), tl.float32)
    minimum = tl.full((BLOCK_ROWS, LANES), float("inf"), tl.float32)
    magnitude = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    deviation = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    deviation_squares = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    for step in range(0, H, CHUNKS * LANES):
        for chunk in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
            start = step + chunk * LANES
            valid = columns < H - start
            w = _load_chunk(pointers + start, valid, EVEN)
            if PPM:
                largest = w if EVEN else tl.where(valid, w, float("-inf"))
                smallest = w if EVEN else tl.where(valid, w, float("inf"))
                maximum = tl.maximum(maximum, largest, propagate_nan=tl.PropagateNan.ALL)
                minimum = tl.minimum(minimum, smallest, propagate_nan=tl.PropagateNan.ALL)
            if L1:
                magnitude += tl.abs(w)
            if L2:
                squares += w * w
            if VARIANCE:
                d = w - shift[:, None] if EVEN else tl.where(valid, w - shift[:, None], 0.0)
                deviation += d
                deviation_squares += d * d

    stored = rows < I
    if PPM:
        # NaN in one lane makes this sum NaN; infinities cannot cancel.
        magnitudes = tl.sum(tl.abs(maximum), axis=1)
        extremes = _peak_to_peak(tl.max(maximum, axis=1), tl.min(minimum, axis=1), magnitudes)
        tl.store(statistics + rows, extremes, mask=stored)
    if VARIANCE:
        deviations = tl.sum(deviation, axis=1)
        # Correctly rounded: where a constant row deviates from its rounded mean, the difference below is exactly 0.
        mean_deviation = tl.div_rn(deviations, tl.full((BLOCK_ROWS,), H, tl.float32))
        sum_of_squares = tl.sum(deviation_squares, axis=1) - deviations * mean_deviation
        tl.store(statistics + 3 * I + rows, sum_of_squares / (H - 1), mask=stored)
    if L1:
        tl.store(statistics + 5 * I + rows, tl.sum(magnitude, axis=1), mask=stored)
    if L2:
        tl.store(statistics + 7 * I + rows, tl.sqrt_rn(tl.sum(squares, axis=1)), mask=stored)


@triton.jit
def _column_statistics(
    weight, stride, block, ppm, I, H, readable, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Peak-to-peak magnitude of BLOCK_COLUMNS columns of a weight `[H, I]`."""
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    pointers = weight + columns[None, :]
    # Columns from I up to `readable` are padding: read, so that the mask keeps wide loads, but not stored.
    mask = columns[None, :] < readable
    maximum = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    minimum = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("inf"), tl.float32)
    for start in tl.range(0, H, BLOCK_ROWS, loop_unroll_factor=8):  # pyright: ignore[reportGeneralTypeIssues]
        rows = tl.minimum(start + tl.arange(0, BLOCK_ROWS), H - 1)  # a repeated row changes no maximum
        w = tl.load(pointers + rows.to(tl.int64)[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
        maximum = tl.maximum(maximum, w, propagate_nan=tl.PropagateNan.ALL)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        minimum = tl.minimum(minimum, w, propagate_nan=tl.PropagateNan.ALL)
    magnitude = tl.sum(tl.abs(maximum), axis=0)
    tl.store(
        ppm + columns, _peak_to_peak(tl.max(maximum, axis=0), tl.min(minimum, axis=0), magnitude), mask=columns < I
    )


@triton.jit
def neuron_scores_kernel(
    gate, up, down,  # [I, H], [I, H], [H, I]
    statistics,  # float32 [9, I], in the order of NeuronStatistics
    I, H, gate_stride, up_stride, down_stride, readable,
    PPM: tl.constexpr, DOWN_PPM: tl.constexpr, VARIANCE: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_COLUMN_ROWS: tl.constexpr,
):  # fmt: skip
    """Statistics of all neurons: the grid holds column blocks of down, row blocks of gate, row blocks of up."""
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(I, BLOCK_COLUMNS) if DOWN_PPM else 0
    row_blocks = tl.cdiv(I, BLOCK_ROWS)
    if pid < column_blocks:
        if DOWN_PPM:
            _column_statistics(
                down, down_stride, pid, statistics + 2 * I, I, H, readable, BLOCK_COLUMNS, BLOCK_COLUMN_ROWS
            )
    elif pid < column_blocks + row_blocks:
        _row_statistics(
            gate, gate_stride, pid - column_blocks, statistics, I, H,
            PPM, VARIANCE, L1, L2, BLOCK_ROWS, CHUNKS, LANES, EVEN,
        )  # fmt: skip
    else:
        _row_statistics(
            up, up_stride, pid - column_blocks - row_blocks, statistics + I, I, H,
            PPM, VARIANCE, L1, L2, BLOCK_ROWS, CHUNKS, LANES, EVEN,
        )  # fmt: skip


def _check(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    if gate.ndim != 2 or gate.numel() == 0:
        raise ValueError(f"gate must be a non-empty matrix [I, H], got shape {list(gate.shape)}")
    if up.shape != gate.shape:
        raise ValueError(f"up must have the shape of gate, {list(gate.shape)}, got {list(up.shape)}")
    if down.shape != gate.shape[::-1]:
        raise ValueError(f"down must have shape [H, I] = {list(gate.shape[::-1])}, got {list(down.shape)}")
    if gate.dtype not in DTYPES.values():
        raise TypeError(f"gate, up and down must be bfloat16, float16 or float32, got {gate.dtype}")
    for name, weight in (("up", up), ("down", down)):
        if weight.dtype != gate.dtype:
            raise TypeError(f"{name} must have the dtype of gate, {gate.dtype}, got {weight.dtype}")
        if weight.device != gate.device:
            raise ValueError(f"{name} must be on the device of gate, {gate.device}, got {weight.device}")


def _readable_columns(down: torch.Tensor) -> int:
    """Return the columns of `down` that may be read: I rounded up to 16 if the storage extends that far, else I."""
    height, width = down.shape
    rounded = cdiv(width, 16) * 16
    end = down.storage_offset() + (height - 1) * down.stride(0) + rounded
    return rounded if end * down.element_size() <= down.untyped_storage().nbytes() else width


def _chunks(H: int, most: int) -> int:
    """Return how many loads of LANES weights make a step, at most `most`; whole steps wherever loads are whole."""
    loads, rest = divmod(H, LANES)
    if rest:
        return min(next_power_of_2(loads + 1), most)
    return max(chunks for chunks in range(1, most + 1) if loads % chunks == 0)


def plan_neuron_scores(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, wanted: Collection[str] = NeuronStatistics._fields
) -> tuple[KernelCall, NeuronStatistics]:
    """Return the launch of `neuron_scores` and the tensors that it fills. Works on meta tensors: nothing is read."""
    _check(gate, up, down)
    if not wanted or not set(wanted) <= set(NeuronStatistics._fields):
        raise ValueError(f"wanted must name statistics of {', '.join(NeuronStatistics._fields)}; got {list(wanted)}")
    I, H = gate.shape
    for name, weight in (("gate", gate), ("up", up), ("down", down)):
        if weight.stride(1) != 1 and weight.shape[1] > 1:
            raise ValueError(f"{name} must have an inner stride of 1, got strides {weight.stride()}")

    wants_down = "down_ppm" in wanted
    computed = {kind.upper(): not {f"gate_{kind}", f"up_{kind}"}.isdisjoint(wanted) for kind in _ROW_STATISTICS}
    chunks = _chunks(H, MAX_CHUNKS // 4 if computed["VARIANCE"] else MAX_CHUNKS)
    statistics = torch.empty(len(NeuronStatistics._fields), I, dtype=torch.float32, device=gate.device)
    call = KernelCall(
        kernel=neuron_scores_kernel,
        grid=(cdiv(I, BLOCK_COLUMNS) * wants_down + 2 * cdiv(I, BLOCK_ROWS) * any(computed.values()),),
        args={
            "gate": gate, "up": up, "down": down if wants_down else None, "statistics": statistics,
            "I": I, "H": H, "gate_stride": gate.stride(0), "up_stride": up.stride(0), "down_stride": down.stride(0),
            "readable": _readable_columns(down),
        },
        constants={
            **computed, "DOWN_PPM": wants_down,
            "BLOCK_ROWS": BLOCK_ROWS, "CHUNKS": chunks, "LANES": LANES, "EVEN": H % (chunks * LANES) == 0,
            "BLOCK_COLUMNS": BLOCK_COLUMNS, "BLOCK_COLUMN_ROWS": BLOCK_COLUMN_ROWS,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
    )  # fmt: skip
    rows = zip(NeuronStatistics._fields, statistics, strict=True)
    return call, NeuronStatistics(**{name: row for name, row in rows if name in wanted})


def neuron_scores(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, wanted: Collection[str] = NeuronStatistics._fields
) -> NeuronStatistics:
    """Compute statistics of every neuron in one launch.

    Sums are float32 in a fixed order. Loads are 16 bytes wide where H and the row strides are multiples of 16.

    Args:
        gate: `[I, H]`, bfloat16, float16 or float32, on a CUDA device; any I, H and row stride, inner stride 1.
        up: like gate.
        down: `[H, I]`, of the same dtype and device. Not read unless `down_ppm` is wanted.
        wanted: Names of the statistics to compute; the others are None.

    Returns:
        float32 `[I]` tensors on the device of the weights.

    Raises:
        ValueError: wrong shapes, strides or devices, or an unknown statistic.
        TypeError: unsupported or different dtypes.
    """
    call, statistics = plan_neuron_scores(gate, up, down, wanted)
    with torch.cuda.device_of(gate):  # Triton launches on the current device, whichever the tensors are on
        call.run()
    return statistics
