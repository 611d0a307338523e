"""`info`: widths, ratios, sizes and alignment of a model's MLPs, from its config."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from gluprune.checkpoints.load_save import build_empty, read_config
from gluprune.models.glu import count_parameters, model_glus
from gluprune.models.widths import layer_widths
from gluprune.runtime.fusion import fusion_prospect

TENSOR_PARALLEL_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a checkpoint, read from its config.

    Attributes:
        model_type: `config.model_type`, of the text part.
        layers: Number of decoder layers.
        hidden_size: H.
        widths: Intermediate size of every layer.
        parameters: Parameters of the whole model; tied ones count once.
        mlp_parameters: Parameters of the MLPs.
        bytes: Size of all weights.
        mlp_bytes: Size of the weights of the MLPs.
        dtype: Dtype of the weights.
        aligned_to: Largest power of two, at most 128, that divides every width. Below 8, rows of down_proj are not
            aligned to 16 bytes in bf16, and plain matrix libraries use slow kernels.
        tensor_parallel: Ranks -> whether every width divides over them.
        fusible: Number of MLPs that `patch_llama` fuses on a GPU.
        not_fusible: Reason -> number of MLPs that it does not fuse.
    """

    model_type: str
    layers: int
    hidden_size: int
    widths: list[int]
    parameters: int
    mlp_parameters: int
    bytes: int
    mlp_bytes: int
    dtype: str
    aligned_to: int
    tensor_parallel: dict[int, bool]
    fusible: int
    not_fusible: dict[str, int]

    @property
    def expansion_ratios(self) -> list[float]:
        """Intermediate size divided by hidden size of every layer."""
        return [width / self.hidden_size for width in self.widths]

    def to_dict(self) -> dict:
        """Return everything as plain numbers, strings and lists, ready for JSON."""
        return {**asdict(self), "expansion_ratios": self.expansion_ratios}

    def __str__(self) -> str:
        distinct = sorted(set(self.widths), reverse=True)
        if len(distinct) == 1:
            widths = f"{distinct[0]} neurons, expansion ratio {self.expansion_ratios[0]:.3f}"
        else:
            widths = f"{distinct[-1]} to {distinct[0]} neurons (layers differ: load with gluprune.load)"
        ranks = ", ".join(f"{count}: {'yes' if fits else 'no'}" for count, fits in self.tensor_parallel.items())
        aligned = f"every width is a multiple of {self.aligned_to}"
        if self.aligned_to < 8:
            aligned += " (unaligned: slow without gluprune.patch_llama)"
        fused = f"{self.fusible} of {self.layers} MLPs by gluprune.patch_llama on a GPU"
        for reason, count in self.not_fusible.items():
            fused += f"; {count} x {reason}"
        return "\n".join(
            [
                f"type             {self.model_type}, {self.layers} layers, hidden size {self.hidden_size}",
                f"width            {widths}",
                f"parameters       {self.parameters:,}, {self.mlp_parameters:,} of them in MLPs",
                f"bytes            {self.bytes:,}, {self.mlp_bytes:,} of them in MLPs ({self.dtype})",
                f"alignment        {aligned}",
                f"tensor parallel  {ranks}",
                f"fused            {fused}",
            ]
        )


def info(path: str | Path) -> ModelInfo:
    """Describe a checkpoint from its config; no weight is read.

    Args:
        path: A folder or a Hub id.

    Returns:
        A `ModelInfo`; `print` shows it as a table.

    Raises:
        ValueError: There is no model at `path`, or its family is not supported.

    Example:
        >>> import gluprune
        >>> description = gluprune.info(model_path)
        >>> description.widths, description.aligned_to
        ([512, 512], 128)
    """
    config = read_config(path)
    model = build_empty(config)
    glus = model_glus(model)
    widths = layer_widths(config)
    prospect = fusion_prospect(model)
    projections = [projection for glu in glus for projection in glu.projections.values()]
    mlp_parameters = sum(parameter.numel() for projection in projections for parameter in projection.parameters())
    parameters = count_parameters(model)
    item_size = model.dtype.itemsize
    return ModelInfo(
        model_type=config.get_text_config().model_type,
        layers=len(glus),
        hidden_size=glus[0].hidden_size,
        widths=widths,
        parameters=parameters,
        mlp_parameters=mlp_parameters,
        bytes=parameters * item_size,
        mlp_bytes=mlp_parameters * item_size,
        dtype=str(model.dtype).removeprefix("torch."),
        aligned_to=max(power for power in (1, 2, 4, 8, 16, 32, 64, 128) if all(w % power == 0 for w in widths)),
        tensor_parallel={ranks: all(width % ranks == 0 for width in widths) for ranks in TENSOR_PARALLEL_RANKS},
        fusible=sum(entry.fused for entry in prospect),
        not_fusible=dict(Counter(entry.reason for entry in prospect if not entry.fused)),
    )
