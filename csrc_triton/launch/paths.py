"""The paths: which kernels each path runs for the two halves of a GLU MLP."""

from __future__ import annotations

from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma

NoneType = type(None)
GATE_UP_CONFIGS = {kind.__name__: kind for kind in (GateUpGemv, GateUpSwap, GateUpTile, GateUpTma)}
DOWN_CONFIGS = {kind.__name__: kind for kind in (DownGemv, DownSplitK)}
# The configurations of gate and up, and the one of down, that a path may have; None is cuBLAS.
PATH_KINDS = {
    "gemv": ((GateUpGemv,), DownGemv),
    "decode": ((GateUpSwap,), DownSplitK),
    "small": ((GateUpSwap,), DownSplitK),
    "prefill": ((GateUpTile, GateUpTma), NoneType),
    "cublas": ((NoneType,), NoneType),
}
PATHS = tuple(PATH_KINDS)
FP8_PATHS = ("gemv", "decode", "small")  # whose kernels read fp8 weights; the other paths dequantize them first


def check_path(path: str | None) -> None:
    """Raise ValueError unless `path` is a path or None."""
    if path is not None and path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)} or None, got {path!r}")
