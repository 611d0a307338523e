"""How the output of a down projection reaches the residual stream, and which least-squares problem follows.

Most families add the output y `[T, H]` of a layer's down projection to the residual stream, times a constant s. In
gemma2, gemma3_text, olmo2 and glm4 a norm comes between; they add

    w * y / r,    r = rms(y) = sqrt(mean(y^2) + eps) per token,    w `[H]` per channel.

Let E `[T, H]` be the error of the residual stream after the layer, and X `[T, width]` the inputs of the projection.
Without a norm, the change D of the weight is fitted to E / s. With a norm, and with r held at its present value, D
changes the stream by w * (X / r) D. So it is

    D = argmin ||E / w - (X / r) D||^2 + lambda ||D||^2,

in which every token counts as it does after the norm. Each channel is a problem of its own. One whose w is far below
the others' would need large outputs, which change r for all of them; so E is not divided by w but multiplied by

    w / (w^2 + 0.01 mean(w^2)),

which leaves such channels almost unchanged. What holding r constant neglects is parallel to y, so that the norm removes
it, or of second order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gluprune.models.glu import GLU
from gluprune.runtime.fusion import epsilon

_GUARD = 0.01


@dataclass(frozen=True)
class Scaled:
    """The output is added to the residual stream times a constant.

    Attributes:
        scale: The constant. Granite scales the outputs of its MLPs.
    """

    scale: float

    @property
    def squares(self) -> float:
        """By what the squared errors of the problem's channels are weighted, to be those of the residual stream."""
        return 1.0

    def problem(self, x: torch.Tensor, y: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and target of the least-squares problem: `[..., width]` and float32 `[..., H]`.

        Args:
            x: Inputs of the down projection, `[..., width]`.
            y: Its outputs, `[..., H]`.
            error: float32 `[..., H]`, E.
        """
        return x, error / self.scale

    def added(self, y: torch.Tensor) -> torch.Tensor:
        """Return what outputs y, float32 `[..., H]`, add to the residual stream."""
        return self.scale * y


@dataclass(frozen=True)
class Normalized:
    """The output is normalised before it is added to the residual stream.

    Attributes:
        weight: float32 `[H]`, w.
        eps: What the norm adds to the mean square.
    """

    weight: torch.Tensor
    eps: float

    @property
    def squares(self) -> torch.Tensor:
        """As for `Scaled`: float32 `[H]`."""
        return self.weight.square()

    def problem(self, x: torch.Tensor, y: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As for `Scaled`."""
        inverse = self.weight / (self.squares + _GUARD * self.squares.mean())
        return x.float() / self._rms(y.float()), error * inverse

    def added(self, y: torch.Tensor) -> torch.Tensor:
        """As for `Scaled`."""
        return self.weight * y / self._rms(y)

    def _rms(self, y: torch.Tensor) -> torch.Tensor:
        return (y.square().mean(-1, keepdim=True) + self.eps).sqrt()


def path_of(layer: nn.Module, glu: GLU) -> Scaled | Normalized:
    """Return how the output of a decoder layer's down projection reaches the residual stream."""
    if not glu.family.output_norm:
        return Scaled(getattr(layer, "residual_multiplier", 1.0))
    norm: Any = getattr(layer, glu.family.output_norm)
    weight = norm.weight.detach().float()
    return Normalized(1 + weight if glu.family.rounding == "offset" else weight, epsilon(norm))
