"""`info`: widths, ratios, sizes and alignment of a model's MLPs, from its config."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gluprune.checkpoints.card import History, read_history
from gluprune.checkpoints.load_save import build_empty, read_config
from gluprune.io.hub import stored_folder
from gluprune.io.shards import DTYPES, read_checkpoint
from gluprune.models.consumers import CONSUMERS, Verdict, sizes_of, verdict
from gluprune.models.families import family_of
from gluprune.models.glu import count_parameters, model_glus
from gluprune.models.widths import layer_widths
from gluprune.runtime.fusion import fusion_prospect

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
TENSOR_PARALLEL_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a checkpoint, read from its config and, where they are on this disk, the headers of its files.

    Attributes:
        model_type: `config.model_type`, of the text part.
        layers: Number of decoder layers.
        hidden_size: H.
        widths: Intermediate size of every layer.
        parameters: Parameters of the whole model; tied ones count once.
        mlp_parameters: Parameters of the MLPs.
        bytes: Size of all weights; tied ones count once. None for quantized weights that are not on this disk.
        mlp_bytes: Size of the weights of the MLPs, or None.
        dtype: Dtype of most of the weights, or the method by which they are quantized.
        aligned_to: Largest power of two, at most 128, that divides every width. Below 8, rows of down_proj are not
            aligned to 16 bytes in bf16, and plain matrix libraries use slow kernels.
        tensor_parallel: Ranks -> whether the attention heads and every width divide among them.
        consumers: Where it can run: name -> what happens there; see `gluprune.models.consumers`. Only sizes are
            checked, not whether the program supports the family.
        fusible: Number of MLPs that `patch_llama` fuses on a GPU.
        not_fusible: Reason -> number of MLPs that it does not fuse.
        history: What `gluprune.json` says about the checkpoint: the dense model and what was done to it. None if there
            is no such file.
    """

    model_type: str
    layers: int
    hidden_size: int
    widths: list[int]
    parameters: int
    mlp_parameters: int
    bytes: int | None
    mlp_bytes: int | None
    dtype: str
    aligned_to: int
    tensor_parallel: dict[int, bool]
    consumers: dict[str, Verdict]
    fusible: int
    not_fusible: dict[str, int]
    history: History | None

    @property
    def expansion_ratios(self) -> list[float]:
        """Intermediate size divided by hidden size of every layer."""
        return [width / self.hidden_size for width in self.widths]

    def to_dict(self) -> dict:
        """Return everything as plain numbers, strings and lists, ready for JSON."""
        return {**asdict(self), "expansion_ratios": self.expansion_ratios}

    def __repr__(self) -> str:
        distinct = sorted(set(self.widths), reverse=True)
        if len(distinct) == 1:
            widths = f"{distinct[0]} neurons, expansion ratio {self.expansion_ratios[0]:.3f}"
        else:
            widths = f"{distinct[-1]} to {distinct[0]} neurons (layers differ: load with gluprune.load)"
        aligned = f"every width is a multiple of {self.aligned_to}"
        if self.aligned_to < 8:
            aligned += " (unaligned: slow without gluprune.patch_llama)"
        fused = f"{self.fusible} of {self.layers} MLPs by gluprune.patch_llama on a GPU"
        ranks = ", ".join(f"{count}: {'yes' if fits else 'no'}" for count, fits in self.tensor_parallel.items())
        column = max(map(len, self.consumers))
        runs = [f"{name:<{column}}  {found}" for name, found in self.consumers.items()]
        stored = "not known: the weights are not on this disk"
        if self.bytes is not None:
            stored = f"{self.bytes:,}, {self.mlp_bytes:,} of them in MLPs"
        for reason, count in self.not_fusible.items():
            fused += f"; {count} x {reason}"
        return "\n".join(
            [
                f"type             {self.model_type}, {self.layers} layers, hidden size {self.hidden_size}",
                f"width            {widths}",
                f"parameters       {self.parameters:,}, {self.mlp_parameters:,} of them in MLPs",
                f"bytes            {stored} ({self.dtype})",
                f"alignment        {aligned}",
                f"tensor parallel  {ranks}",
                f"fused            {fused}",
                *(f"{label:<17}{row}" for label, row in zip_longest(["runs in"], runs, fillvalue="")),
                *([f"made from        {self.history}"] if self.history else []),
            ]
        )


def info(path: str | Path) -> ModelInfo:
    """Describe a checkpoint from its config and the headers of its files; no weight is read.

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
    quantized = _quantization(config)
    fusible, not_fusible = 0, {f"quantized by {quantized}": len(glus)}
    if not quantized:
        prospect = fusion_prospect(model)
        fusible = sum(entry.fused for entry in prospect)
        not_fusible = dict(Counter(entry.reason for entry in prospect if not entry.fused))
    projections = [projection for glu in glus for projection in glu.projections.values()]
    mlp_parameters = sum(parameter.numel() for projection in projections for parameter in projection.parameters())
    parameters = count_parameters(model)
    sizes = _stored_sizes(path, config)
    if sizes is None and not quantized:
        item_size = model.dtype.itemsize
        sizes = _Sizes(parameters * item_size, mlp_parameters * item_size, str(model.dtype))
    text, hidden_size = config.get_text_config(), glus[0].hidden_size
    model_type, heads = text.model_type, text.num_attention_heads
    return ModelInfo(
        model_type=model_type,
        layers=len(glus),
        hidden_size=hidden_size,
        widths=widths,
        parameters=parameters,
        mlp_parameters=mlp_parameters,
        bytes=sizes and sizes.all,
        mlp_bytes=sizes and sizes.mlps,
        dtype=quantized or (sizes.dtype if sizes else str(model.dtype)).removeprefix("torch."),
        aligned_to=max(power for power in (1, 2, 4, 8, 16, 32, 64, 128) if all(w % power == 0 for w in widths)),
        tensor_parallel={ranks: all(size % ranks == 0 for size in (heads, *widths)) for ranks in TENSOR_PARALLEL_RANKS},
        consumers={name: verdict(entry, widths, **sizes_of(config)) for name, entry in CONSUMERS.items()},
        fusible=fusible,
        not_fusible=not_fusible,
        history=read_history(path),
    )


def _quantization(config: PreTrainedConfig) -> str:
    """Return the name of the method by which the weights are quantized; empty if they are not."""
    found: Any = getattr(config, "quantization_config", None) or {}
    entries = found if isinstance(found, dict) else found.to_dict()
    return str(entries.get("quant_method") or "an unknown method") if entries else ""


class _Sizes(NamedTuple):
    """Bytes of all weights and of those in MLPs, and the dtype of most of them."""

    all: int
    mlps: int
    dtype: str


def _stored_sizes(path: str | Path, config: PreTrainedConfig) -> _Sizes | None:
    """Return the sizes in the headers of the safetensors files; None if there are none on this disk."""
    folder = stored_folder(path)
    if folder is None:
        return None
    try:
        tensors = [tensor for shard in read_checkpoint(folder) for tensor in shard.tensors]
    except (OSError, ValueError):
        return None
    if getattr(config, "tie_word_embeddings", False):
        tensors = [tensor for tensor in tensors if not tensor.name.endswith("lm_head.weight")]
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        by_dtype[str(DTYPES[tensor.dtype])] += tensor.nbytes
    family = family_of(config)
    projections = "|".join({family.gate, family.up, family.down})
    in_mlp = re.compile(rf"(.*\.)?layers\.\d+\.mlp\.({projections})\..*")
    mlps = sum(tensor.nbytes for tensor in tensors if in_mlp.fullmatch(tensor.name))
    return _Sizes(by_dtype.total(), mlps, by_dtype.most_common(1)[0][0])
