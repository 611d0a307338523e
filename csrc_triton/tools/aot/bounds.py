"""The calls of the MLP whose predicted time is furthest above what the GPU allows: where time may be won."""

from __future__ import annotations

from typing import Any, NamedTuple

from csrc_triton.tools.aot.predict import BANDWIDTH, RATE


class Cell(NamedTuple):
    """One call of the MLP.

    Attributes:
        path: Name of the path.
        tokens: M.
        hidden: H.
        neurons: I.
        microseconds: The sum over its launches, without those of cuBLAS.
        bound: The least time in microseconds: each weight and each token is moved once, or its operations.
    """

    path: str
    tokens: int
    hidden: int
    neurons: int
    microseconds: float
    bound: float

    @property
    def is_fp8(self) -> bool:
        """Whether the weights are fp8."""
        return self.path.startswith("fp8")

    @property
    def ratio(self) -> float:
        """Predicted time over the bound."""
        return self.microseconds / self.bound


def worst(rows: list[dict[str, Any]], count: int = 3) -> list[Cell]:
    """Return the calls of the highest predicted time over the bound: of 16-bit weights, then of fp8 weights.

    Args:
        rows: Of one version of Triton and one dtype of two bytes; those without a prediction are left out.
        count: How many of each.
    """
    launches: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in rows:
        for (path, tokens, hidden, neurons, _), (*_, microseconds) in zip(
            row["plans"], row.get("predicted", ()), strict=False
        ):
            if row["kernel"].startswith(("gate_up", "down", "sum_partials", "dequantize")):
                launches.setdefault((path, tokens, hidden, neurons), {})[row["kernel"]] = microseconds
    cells = [_cell(*call, times) for call, times in launches.items() if any(map(_is_gate_up, times))]
    cells.sort(key=lambda cell: cell.ratio, reverse=True)
    fp8 = [cell for cell in cells if cell.is_fp8]
    return [cell for cell in cells if not cell.is_fp8][:count] + fp8[:count]


def _is_gate_up(kernel: str) -> bool:
    return kernel.startswith("gate_up")


def _cell(path: str, tokens: int, hidden: int, neurons: int, times: dict[str, float]) -> Cell:
    products = 3 if any(kernel.startswith("down") for kernel in times) else 2  # cuBLAS computes the rest
    weights = products * hidden * neurons
    cell = Cell(path, tokens, hidden, neurons, sum(times.values()), 0.0)
    moved = weights * (1 if cell.is_fp8 else 2) + 2 * tokens * hidden * 2
    return cell._replace(bound=1e6 * max(moved / BANDWIDTH, 2 * tokens * weights / RATE))
