"""How a kernel is launched: one decided call, and the configurations that decide it.

A configuration comes from the table of the GPU at hand (`tuned/<gpu>.json`, written by `python -m csrc_triton.tune`) or
from the heuristics below. Nothing is tuned at run time, and no device is queried at import.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

PATHS = ("gemv", "decode", "small", "prefill", "cublas")
PAD = 128  # the intermediate size is padded to this multiple
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}

# Shared memory that one program may use, in bytes, and multiprocessors of the usual board, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
DEFAULT_SM = 90  # what tensors that are on no GPU are planned for
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TUNED_DIRECTORY = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class KernelCall:
    """One kernel launch, fully decided. The same object is run on a GPU and compiled ahead of time without one.

    `args` are the runtime arguments by parameter name (tensors, ints, `TensorDescriptor`s, None), `constants` the
    `tl.constexpr` parameters. What a kernel lists in `do_not_specialize` is never specialised on its value.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, object]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    launch_pdl: bool = False

    def run(self) -> None:
        """Launch on the current device and stream.

        Triton takes tens of microseconds to find what it has compiled for such arguments; a launch of that takes few.
        """
        if not isinstance(self.kernel, triton.JITFunction):  # the interpreter's
            self._launch()
            return
        key = self._key()
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = self._launch()
        else:
            compiled[self.grid_3d](*self.arguments())

    @property
    def grid_3d(self) -> tuple[int, ...]:
        return (*self.grid, 1, 1)[:3]

    def arguments(self) -> list[object]:
        """All arguments of the kernel, in its order."""
        values = self.args | self.constants
        return [values[name] for name in self.kernel.arg_names]

    def compiled(self) -> Any:
        """What `run` launches from the second time on: `compiled()[grid_3d](*arguments())`. None before the first."""
        return _compiled.get(self._key()) if isinstance(self.kernel, triton.JITFunction) else self.kernel

    def _launch(self) -> Any:
        options: dict[str, object] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.launch_pdl:
            options["launch_pdl"] = True
        return self.kernel[self.grid](**self.args, **self.constants, **options)

    def _key(self) -> tuple[object, ...]:
        """All that a compilation of one of these kernels depends on."""
        free = self.kernel.do_not_specialize
        kinds = [_kind(value) for name, value in self.args.items() if name not in free]
        return (self.kernel.fn, self.num_warps, self.num_stages, self.launch_pdl, *kinds, *self.constants.values())


# What `KernelCall.run` has compiled, by its key.
_compiled: dict[tuple[object, ...], Any] = {}


def _kind(value: object) -> object:
    """What a kernel may be specialised on: dtype, device and alignment of a tensor, shape of a tile, kind of a number."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, value.base.device, tuple(value.block_shape)
    return None if value is None else (value == 1, value % 16 == 0, value < 1 << 31)


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up. `triton.cdiv` does the same, but takes microseconds a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n >= 1`."""
    return 1 << (n - 1).bit_length()


class Plan(NamedTuple):
    """Calls in launch order and the tensor that they fill. Planning allocates and reads shapes; only `run` launches."""

    output: torch.Tensor
    calls: list[Any]

    def run(self) -> torch.Tensor:
        for call in self.calls:
            call.run()
        return self.output


# --- configurations: one class a kernel, the class is the choice of the kernel ---


@dataclass(frozen=True)
class GateUpGemv:
    block_n: int
    num_warps: int
    pdl: bool

    def shared_memory(self, sm: int, itemsize: int) -> int:
        return 0


@dataclass(frozen=True)
class GateUpSwap:
    """The weights are the long operand of the matrix unit, the tokens the short one."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    pdl: bool

    def shared_memory(self, sm: int, itemsize: int) -> int:
        return _buffers(self.num_stages, sm) * (self.block_m + 2 * self.block_n) * self.block_k * itemsize


@dataclass(frozen=True)
class GateUpTile:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_memory(self, sm: int, itemsize: int) -> int:
        return _buffers(self.num_stages, sm) * (self.block_m + 2 * self.block_n) * self.block_k * itemsize


@dataclass(frozen=True)
class GateUpTma:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_memory(self, sm: int, itemsize: int) -> int:
        tiles = _buffers(self.num_stages, sm) * (self.block_m + 2 * self.block_n) * self.block_k
        return (tiles + self.block_m * self.block_n) * itemsize  # the result leaves through shared memory as well


@dataclass(frozen=True)
class DownGemv:
    block_n: int
    block_k: int
    num_warps: int
    pdl: bool

    def shared_memory(self, sm: int, itemsize: int) -> int:
        return 0


@dataclass(frozen=True)
class DownSplitK:
    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    pdl: bool

    def shared_memory(self, sm: int, itemsize: int) -> int:
        return _buffers(self.num_stages, sm) * (self.block_m + self.block_n) * self.block_k * itemsize


GateUpConfig = GateUpGemv | GateUpSwap | GateUpTile | GateUpTma
DownConfig = DownGemv | DownSplitK
CONFIGS = {kind.__name__: kind for kind in (GateUpGemv, GateUpSwap, GateUpTile, GateUpTma, DownGemv, DownSplitK)}
# Which kernels a path is made of; None is cuBLAS.
NoneType = type(None)
PATH_KINDS = {
    "gemv": ((GateUpGemv,), DownGemv),
    "decode": ((GateUpSwap,), DownSplitK),
    "small": ((GateUpSwap,), DownSplitK),
    "prefill": ((GateUpTile, GateUpTma), NoneType),
    "cublas": ((NoneType,), NoneType),
}


@dataclass(frozen=True)
class Launch:
    """A path and the configurations of its two halves; None stands for cuBLAS."""

    path: str
    gate_up: GateUpConfig | None
    down: DownConfig | None


def _buffers(num_stages: int, sm: int) -> int:
    """Tiles that a pipelined loop keeps in shared memory: wgmma and tcgen05 hold one more while the next arrive."""
    return num_stages if 90 <= sm < 120 else max(num_stages - 1, 1)


def is_valid(config: GateUpConfig | DownConfig, sm: int, M: int, H: int, IP: int, dtype: torch.dtype) -> bool:
    """Whether `config` computes the right thing and fits into the shared memory of compute capability `sm`."""
    fields = dataclasses.asdict(config)
    sizes = [value for name, value in fields.items() if name.startswith("block_") or name == "num_warps"]
    if not all(value >= 1 and value & (value - 1) == 0 for value in sizes) or fields.get("num_stages", 1) < 1:
        return False
    if config.shared_memory(sm, dtype.itemsize) > SHARED_MEMORY.get(sm, min(SHARED_MEMORY.values())):
        return False
    if fields.get("pdl") and sm < 90:
        return False
    if isinstance(config, GateUpGemv):
        return M == 1 and PAD % config.block_n == 0
    if isinstance(config, DownGemv):
        return M == 1
    if min(config.block_m, config.block_k) < 16 or config.block_n < 16:
        return False
    if isinstance(config, DownSplitK):
        # K runs over IP without a mask.
        return PAD % config.block_k == 0 and 1 <= config.split_k <= IP // config.block_k
    if PAD % config.block_n:
        return False
    if isinstance(config, GateUpTma):
        return sm >= 90 and rows_aligned(H, dtype) and H % config.block_k == 0
    return True


def rows_aligned(columns: int, dtype: torch.dtype) -> bool:
    """Whether contiguous rows of `columns` elements start at 16-byte boundaries."""
    return columns * dtype.itemsize % 16 == 0


def first_up_row(gate_up: torch.Tensor) -> int:
    """Rows from the first gate row of a `[2, IP, H]` buffer to its first up row."""
    return gate_up.stride(0) // gate_up.shape[2]


# --- the chooser ---


def choose_path(M: int, H: int, IP: int, dtype: torch.dtype, sm: int) -> str:
    """The path for `M` tokens where no table knows better: on sm_90 as measured on an H200, by arithmetic elsewhere."""
    if sm < 80:
        return "cublas"  # the kernels use asynchronous copies and bfloat16 matrix instructions
    if M == 1:
        return "gemv"
    if dtype == torch.float32 or not rows_aligned(H, dtype):
        return "cublas"  # float32 has no fast exact dot in Triton; unaligned rows cannot be copied 16 bytes at a time
    if M <= 16:
        return "decode"  # one short side of the matrix unit holds all tokens
    if M <= 128:
        return "small"  # one row of tiles, and by arithmetic still bound by the weights (up to 263 tokens on H100)
    # Above it the GEMM's rate decides. On data-centre Blackwell cuBLAS pairs multiprocessors, which Triton does not; on
    # Hopper cuBLAS fills the chip better while there are few tiles.
    return "cublas" if 100 <= sm < 120 or (sm == 90 and M < 1024) else "prefill"


def triton_path(M: int) -> str:
    """The path of Triton kernels for `M` tokens, whether or not cuBLAS would be preferred."""
    return "gemv" if M == 1 else "decode" if M <= 16 else "small" if M <= 128 else "prefill"


@functools.lru_cache(maxsize=4096)
def heuristic(path: str, M: int, H: int, IP: int, dtype: torch.dtype, sm: int) -> Launch:
    """The configurations of `path` where no table has any."""
    if path == "cublas":
        return Launch(path, None, None)
    pdl = sm >= 90
    if path == "gemv":
        return Launch(path, _gate_up_gemv(H, dtype, pdl), DownGemv(1, 2048 // dtype.itemsize, num_warps=4, pdl=pdl))
    if path == "prefill":
        return Launch(path, _gate_up_prefill(M, H, IP, dtype, sm), None)
    # "decode" and "small": one row of tiles covers all tokens (up to 128), so every weight is read once.
    block_m = token_block(path, M)
    # Rows of 256 bytes while the tokens' side is short; then of 128, so that four stages of the tallest tile fit 99 KB.
    block_k = (256 if block_m == 16 else 128) // dtype.itemsize
    # 32 gate and 32 up rows fill the long side of the matrix unit (64 rows of wgmma). Twice as many were faster on an H200
    # up to 64 tokens, although there are then fewer programs than multiprocessors.
    gate_up = GateUpSwap(block_m, 64, block_k, num_warps=4 if block_m == 16 else 8, num_stages=4, pdl=pdl)
    if block_m == 128 or not is_valid(gate_up, sm, M, H, IP, dtype):
        gate_up = GateUpSwap(block_m, 32, block_k, num_warps=4, num_stages=4, pdl=pdl)
    # 64 rows of down. Splits for two programs on each multiprocessor; above eight the partial results weigh too much.
    tiles = cdiv(M, block_m) * cdiv(H, 64)
    split_k = max(1, min(8, 2 * MULTIPROCESSORS.get(sm, 132) // tiles, IP // block_k))
    down = DownSplitK(block_m, 64, block_k, split_k, num_warps=4, num_stages=4, pdl=pdl)
    return Launch(path, gate_up, down)


def token_block(path: str, M: int) -> int:
    """Tokens of a tile on the paths "decode" and "small"."""
    return 16 if path == "decode" else min(max(next_power_of_2(M), 32), 128)


def _gate_up_gemv(H: int, dtype: torch.dtype, pdl: bool) -> GateUpGemv:
    # Two neurons, gate and up, are four rows: with one warp per 2 KB of a row every thread has 256 bytes (16 loads) in
    # flight and keeps them in 64 registers.
    row_bytes = next_power_of_2(H) * dtype.itemsize
    return GateUpGemv(2, num_warps=min(max(row_bytes >> 11, 1), 16), pdl=pdl)


def _gate_up_prefill(M: int, H: int, IP: int, dtype: torch.dtype, sm: int) -> GateUpConfig:
    block_k = 128 // dtype.itemsize  # 128 bytes: the widest swizzle of a TMA tile
    # The large tile (128 gate and 128 up rows) reads least from the L2. With fewer tiles than multiprocessors much of
    # the chip would idle, so the halved tile is taken.
    fills = cdiv(M, 128) * (IP // 128) >= MULTIPROCESSORS.get(sm, 132)
    # Four stages were 3 % faster than three on an H200; for sm_100 Triton 3.9 spills with four.
    config = GateUpTma(128, 128 if fills else 64, block_k, num_warps=8, num_stages=4 if sm < 100 else 3)
    # sm_120 has the matrix unit of sm_89, and Triton 3.6 leaves stack stores in the TMA kernel there.
    if sm < 120 and is_valid(config, sm, M, H, IP, dtype):
        return config
    # 64-byte rows: three stages of the 128 x 256 tile take 48 KB.
    return GateUpTile(128, 128, 64 // dtype.itemsize, num_warps=8, num_stages=3)


def choose(
    M: int, H: int, IP: int, dtype: torch.dtype, sm: int, path: str | None = None, table: Table | None = None
) -> Launch:
    """The launch for `M >= 1` tokens: the table's entry if it has one (of the forced `path`), else the heuristic's."""
    if path is not None and path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)} or None, got {path!r}")
    if path == "gemv" and M != 1:
        raise ValueError(f"path 'gemv' takes exactly one token, got {M}")
    entry = table.get((sm, H, IP, m_bucket(M), dtype)) if table else None
    if entry is not None and (path is None or entry.path == path):
        return entry
    return heuristic(path or choose_path(M, H, IP, dtype, sm), M, H, IP, dtype, sm)


# --- what the device is ---


def compute_capability(device: torch.device) -> int:
    """Compute capability times ten of a CUDA device; `DEFAULT_SM` for any other device."""
    return _cuda_properties(device)[0] if device.type == "cuda" else DEFAULT_SM


def multiprocessors(device: torch.device, sm: int) -> int:
    """Multiprocessors of a CUDA device; of the usual board of capability `sm` for any other device."""
    return _cuda_properties(device)[1] if device.type == "cuda" else MULTIPROCESSORS.get(sm, 132)


@functools.lru_cache
def _cuda_properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def uses_pdl(config: GateUpConfig | DownConfig) -> bool:
    """Programmatic dependent launch, unless the kernels are interpreted."""
    return config.pdl and not triton.knobs.runtime.interpret


def input_precision(dtype: torch.dtype) -> str:
    """The float32 dot follows `torch.backends.cuda.matmul`, whether set by `allow_tf32` or `fp32_precision`."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


# --- tables ---

TableKey = tuple[int, int, int, int, torch.dtype]  # sm, H, IP, M bucket, dtype
Table = dict[TableKey, Launch]


def m_bucket(M: int) -> int:
    """The smallest bucket that holds `M`, or the last one."""
    return next((bucket for bucket in M_BUCKETS if M <= bucket), M_BUCKETS[-1])


def table_path(gpu: str) -> Path:
    """`tuned/<gpu>.json` for a GPU's name as the driver gives it."""
    return TUNED_DIRECTORY / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def device_table(device: torch.device) -> Table | None:
    """The table of a CUDA device's model, or None."""
    return _device_table(device) if device.type == "cuda" else None


@functools.lru_cache
def _device_table(device: torch.device) -> Table | None:
    path = table_path(torch.cuda.get_device_name(device))
    return load_table(path) if path.exists() else None


def entry_to_dict(key: TableKey, launch: Launch) -> dict[str, object]:
    sm, H, IP, bucket, dtype = key
    return {
        "sm": sm,
        "hidden": H,
        "padded": IP,
        "tokens": bucket,
        "dtype": str(dtype).removeprefix("torch."),
        "path": launch.path,
        "gate_up": _config_to_dict(launch.gate_up),
        "down": _config_to_dict(launch.down),
    }


def entry_from_dict(entry: dict[str, Any]) -> tuple[TableKey, Launch]:
    """The inverse of `entry_to_dict`. Raises KeyError, TypeError or ValueError on what it would never write."""
    dtype = DTYPES[entry["dtype"]]
    key = (int(entry["sm"]), int(entry["hidden"]), int(entry["padded"]), int(entry["tokens"]), dtype)
    sm, H, IP, bucket, _ = key
    if bucket not in M_BUCKETS:
        raise ValueError(f"tokens must be one of {M_BUCKETS}, got {bucket}")
    launch = Launch(entry["path"], _config_from_dict(entry["gate_up"]), _config_from_dict(entry["down"]))
    gate_up_kinds, down_kind = PATH_KINDS[launch.path]
    if type(launch.gate_up) not in gate_up_kinds or type(launch.down) is not down_kind:
        raise ValueError(f"path {launch.path!r} cannot be made of {launch.gate_up} and {launch.down}")
    for config in (launch.gate_up, launch.down):
        if config is not None and not is_valid(config, sm, bucket, H, IP, dtype):
            raise ValueError(f"{config} is not valid for sm_{sm}, H {H}, padded width {IP} and {dtype}")
    return key, launch


def load_table(path: Path) -> Table:
    """Read a table written by `python -m csrc_triton.tune`. Raises ValueError, naming the file, if it is malformed."""
    try:
        entries = [entry_from_dict(entry) for entry in json.loads(path.read_text())["entries"]]
        table = dict(entries)
        if len(table) < len(entries):
            raise ValueError("two entries for one shape")
        return table
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"malformed table {path}: {type(error).__name__}: {error}") from error


def _config_to_dict(config: GateUpConfig | DownConfig | None) -> dict[str, object] | None:
    return None if config is None else {"kind": type(config).__name__, **dataclasses.asdict(config)}


def _config_from_dict(fields: dict[str, Any] | None) -> GateUpConfig | DownConfig | None:
    if fields is None:
        return None
    return CONFIGS[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})
