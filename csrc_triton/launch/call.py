"""One fully specified kernel launch, and sequences of launches."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class KernelCall:
    """One fully specified kernel launch. The same object is run on a GPU and compiled ahead of time without one.

    `args` are the runtime arguments by parameter name (tensors, ints, `TensorDescriptor`s, None), `constants` the
    `tl.constexpr` parameters. Parameters in the kernel's `do_not_specialize` are never specialised on their value.
    Without `fp_fusion` a product and a sum are rounded separately.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, object]
    _: KW_ONLY
    num_warps: int
    num_stages: int
    launch_pdl: bool = False
    fp_fusion: bool = True

    def run(self) -> None:
        """Launch on the current device and stream.

        Triton takes tens of microseconds to look up the kernel that it compiled for such arguments; launching the
        compiled kernel directly takes a few.
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
        """The grid with all three dimensions."""
        return (*self.grid, 1, 1)[:3]

    def arguments(self) -> list[object]:
        """Return all arguments of the kernel, in the order of its parameters."""
        values = self.args | self.constants
        return [values[name] for name in self.kernel.arg_names]

    def compiled(self) -> Any:
        """Return the compiled kernel, launched by `compiled()[grid_3d](*arguments())`; None before the first run."""
        return _compiled.get(self._key()) if isinstance(self.kernel, triton.JITFunction) else self.kernel

    @property
    def options(self) -> dict[str, object]:
        """Triton's options for the compilation."""
        options: dict[str, object] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.launch_pdl:
            options["launch_pdl"] = True
        if not self.fp_fusion:
            options["enable_fp_fusion"] = False
        return options

    def _launch(self) -> Any:
        return self.kernel[self.grid](**self.args, **self.constants, **self.options)

    def _key(self) -> tuple[object, ...]:
        """Return everything that a compilation of one of these kernels depends on."""
        free = self.kernel.do_not_specialize
        kinds = [_kind(value) for name, value in self.args.items() if name not in free]
        return (
            self.kernel.fn,
            self.num_warps,
            self.num_stages,
            self.launch_pdl,
            self.fp_fusion,
            *kinds,
            *self.constants.values(),
        )


# The kernels that `KernelCall.run` has compiled, by their key.
_compiled: dict[tuple[object, ...], Any] = {}


def _kind(value: Any) -> object:
    """Return what a kernel may be specialised on: dtype, device and alignment of a tensor, kind of a number, ..."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, value.base.device, tuple(value.block_shape)
    return None if value is None else (value == 1, value % 16 == 0, value < 1 << 31)


@dataclass(frozen=True)
class MatmulCall:
    """out = x @ weight.T (+ bias) by cuBLAS."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor

    @torch.no_grad()
    def run(self) -> None:
        """Launch on the current stream."""
        if self.bias is None:
            torch.mm(self.x, self.weight.t(), out=self.out)
        else:
            torch.addmm(self.bias, self.x, self.weight.t(), out=self.out)


class Plan(NamedTuple):
    """Calls in launch order and the tensor that they fill. Planning allocates and reads shapes; only `run` launches."""

    output: torch.Tensor
    calls: list[Any]

    def run(self) -> torch.Tensor:
        """Launch all calls, on the current device and stream, and return the output."""
        for call in self.calls:
            call.run()
        return self.output

    def then(self, following: Plan) -> Plan:
        """Return the plan that runs this one and then `following`, which reads this one's output."""
        return Plan(following.output, self.calls + following.calls)
