"""The weights of one GLU MLP in the padded layout of `csrc_triton.layout`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from csrc_triton.launch.configs import Problem
from csrc_triton.launch.device import compute_capability
from csrc_triton.layout import ACTIVATIONS, DTYPES, FP8, FP8_SM, padded_width


@dataclass(frozen=True, eq=False)
class GluWeights:
    """The weights, biases and activation of one GLU MLP; IP is the intermediate size I rounded up to 128.

    Attributes:
        gate_up: `[2, IP, H]` with contiguous rows and the up half at least I rows after the gate half: the halves
            overlap in a packed weight, whose up rows follow the gate rows directly. The values of rows I..IP do not
            matter. If `up` is given: the gate weight alone, `[1, I, H]`.
        down: `[H, IP]`, contiguous, with columns I..IP zero.
        intermediate_size: I, any integer of at least 1.
        activation: "silu" or "gelu_tanh".
        gate_bias: `[I]` or None.
        up_bias: `[I]` or None.
        down_bias: `[H]` or None.
        gate_scale: `[I]`, factors of the rows of gate, of the dtype of the tokens; None unless gate_up and down are
            float8_e4m3fn, which needs all three scales.
        up_scale: `[I]` or None.
        down_scale: `[H]` or None.
        up: `[I, H]`, where gate and up are not in one buffer: such weights take the path "cublas" only.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    intermediate_size: int
    activation: str = "silu"
    _: KW_ONLY
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_scale: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    up: torch.Tensor | None = None

    @property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, `[IP, H]` each, or `[I, H]` where they are not in one buffer."""
        return self.gate_up[0], self.gate_up[1] if self.up is None else self.up

    @property
    def is_fp8(self) -> bool:
        """Whether the weights are float8_e4m3fn with scales."""
        return self.down_scale is not None

    @property
    def up_row(self) -> int:
        """Rows of the buffer from the first gate row to the first up row: IP, or I in a packed weight."""
        return self.gate_up.stride(0) // self.gate_up.shape[2]

    def problem(self, x: torch.Tensor, sm: int | None = None) -> Problem:
        """Return the problem of running these weights on `x` `[M, H]`, by default on the device of `x`."""
        M, H = x.shape
        sm = compute_capability(x.device) if sm is None else sm
        return Problem(M, H, self.down.shape[1], x.dtype, sm, self.is_fp8)

    def check(self, x: torch.Tensor) -> None:
        """Check that these weights can run on `x`.

        Raises:
            ValueError: wrong shapes or strides, an unknown activation, an intermediate size below 1, some scales
                without the others, or fp8 weights that are not in one buffer or on a GPU that is too old.
            TypeError: an unsupported dtype, or tensors of different dtypes or devices.
        """
        if x.dim() != 2 or x.shape[1] < 1:
            raise ValueError(f"x must be [M, H] with H >= 1, got {list(x.shape)}")
        if self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, got {self.intermediate_size}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if x.dtype not in DTYPES.values():
            raise TypeError(f"x must be one of {', '.join(DTYPES)}, got {x.dtype}")
        if len({scale is None for scale in (self.gate_scale, self.up_scale, self.down_scale)}) > 1:
            raise ValueError("gate_scale, up_scale and down_scale must be given together")
        if self.is_fp8 and self.up is not None:
            raise ValueError("fp8 weights of gate and up must be in one buffer")
        if self.is_fp8 and compute_capability(x.device) < FP8_SM:
            capability = compute_capability(x.device)
            raise ValueError(f"fp8 weights need compute capability {FP8_SM / 10}, {x.device} has {capability / 10}")
        I, H, IP = self.intermediate_size, x.shape[1], padded_width(self.intermediate_size)
        shapes = {
            "gate_up": (2, IP, H) if self.up is None else (1, I, H),
            "up": (I, H),
            "down": (H, IP),
            "gate_bias": (I,),
            "up_bias": (I,),
            "down_bias": (H,),
            "gate_scale": (I,),
            "up_scale": (I,),
            "down_scale": (H,),
        }
        for name, shape in shapes.items():
            tensor: torch.Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                sizes = f"H {H}, intermediate size {I}"
                raise ValueError(f"{name} must be {list(shape)} ({sizes}), got {list(tensor.shape)}")
            dtype, like = (FP8, "") if self.is_fp8 and name in ("gate_up", "down") else (x.dtype, " like x")
            if tensor.dtype != dtype or tensor.device != x.device:
                raise TypeError(f"{name} must be {dtype} on {x.device}{like}, got {tensor.dtype} on {tensor.device}")
            halved = name == "gate_up" and self.up is None
            plain = self._has_halves() if halved else tensor.is_contiguous()
            if not plain or (name in ("gate_up", "up", "down") and tensor.data_ptr() % 16):
                raise ValueError(f"{name} must be contiguous from a 16-byte boundary, got strides {tensor.stride()}")

    def _has_halves(self) -> bool:
        """Return whether both halves are contiguous and whole rows apart, with room for the gate rows in between."""
        H, distance = self.gate_up.shape[2], self.gate_up.stride(0)
        return self.gate_up[0].is_contiguous() and distance % H == 0 and distance >= self.intermediate_size * H
