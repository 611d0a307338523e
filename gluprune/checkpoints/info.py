"""What a model's MLPs look like: widths, ratios, sizes, and what hardware and servers will make of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from gluprune.checkpoints.load_save import build_empty, layer_widths, read_config
from gluprune.models.families import model_glus
from gluprune.pruning.prune import count_parameters
from gluprune.runtime.patching import fusion_prospect

TENSOR_PARALLEL_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a checkpoint, read from its config alone.

    widths: intermediate size of every layer.
    aligned_to: the largest power of two, up to 128, that divides every width. Below 8 rows of down_proj start off the
        16-byte boundary in bf16 and plain matrix libraries fall to slow kernels.
    tensor_parallel: ranks -> whether every width divides over them.
    fusible: MLPs that `patch_llama` fuses on a GPU; not_fusible: reason -> number of those that it leaves.
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
        return [width / self.hidden_size for width in self.widths]

    def to_dict(self) -> dict:
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
                f"parameters       {self.parameters:,}, of these {self.mlp_parameters:,} in MLPs",
                f"bytes            {self.bytes:,}, of these {self.mlp_bytes:,} in MLPs ({self.dtype})",
                f"alignment        {aligned}",
                f"tensor parallel  {ranks}",
                f"fused            {fused}",
            ]
        )


def info(path: str | Path) -> ModelInfo:
    """Describe a checkpoint (a folder or a Hub id) from its config; no weight is read.

    Raises:
        ValueError: the path is no model, or the family is not supported.
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
