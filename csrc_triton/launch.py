"""How a kernel is launched: one decided call, and the configurations that decide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelCall:
    """One kernel launch, fully decided. The same object is run on a GPU and compiled ahead of time without one.

    `args` are the runtime arguments by parameter name (tensors, ints, `TensorDescriptor`s, None), `constants` the
    `tl.constexpr` parameters. Parameters that a kernel lists in `do_not_specialize` are never specialised on their value.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, object]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    launch_pdl: bool = False

    def run(self) -> None:
        options: dict[str, object] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.launch_pdl:
            options["launch_pdl"] = True
        self.kernel[self.grid](**self.args, **self.constants, **options)
