"""What a checkpoint on disk consists of: config, MLP tensors and other files, checked before they are used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gluprune.io.hub import first_line
from gluprune.io.shards import StoredTensor, read_json_object
from gluprune.models.families import Family, family_of_type
from gluprune.models.widths import layer_widths

# Weights of other formats (some are pickles) would contradict the pruned ones, as would the width in params.json.
_OTHER_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".distcp", ".nemo", ".npy", ".npz"),
    *(".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".llamafile"),
}
_OTHER_DESCRIPTIONS = ("params.json", ".index.json")
# What training and other tools leave next to a checkpoint: folders, and files that describe something that is not
# copied (an adapter without its weights) or is not true of the output (the model card, a run).
_OTHER_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb", "__pycache__")
_OTHER_FILES = (
    *("adapter_config.json", "trainer_state.json", "*_results.json", "events.out.tfevents.*", "zero_to_fp32.py"),
    *("README.md", "gluprune.json", "shrink.png"),
)
_MODULES = "modules.json"
# Names that wrappers put before those of the model.
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel or DDP", "base_model.model.": "PEFT"}

# Entries of the configs of composite models.
_PARTS = ("text_config", "vision_config", "audio_config")

_PRUNABLE_DTYPES = ("BF16", "F16", "F32", "F64")
_MLP_TENSOR = re.compile(r"(?P<prefix>(?:.*?\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,5})\.mlp\.(?P<name>.+)", re.DOTALL)

# The JSON types of the entries that `SourceConfig` is built from.
_NUMBERS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
_CONFIG_ENTRIES = {"tie_word_embeddings": bool, **dict.fromkeys(_NUMBERS, int)}


@dataclass(frozen=True)
class SourceConfig:
    """The part of a model's config that pruning needs.

    Attributes:
        raw: The whole config, as in its JSON file.
        model_type: Its model type, or that of its text part.
        family: The table entry of the model type.
        hidden_size: H.
        heads: Number of attention heads.
        widths: Intermediate size of every layer.
        tied: Whether the head is the embedding.
        is_composite: Whether the model has other parts than text, such as vision.
    """

    raw: dict
    model_type: str
    family: Family
    hidden_size: int
    heads: int
    widths: list[int]
    tied: bool
    is_composite: bool = False

    @property
    def text_entries(self) -> dict:
        """The part of `raw` that describes the text part; older composite configs do not nest it."""
        return self.raw["text_config"] if isinstance(self.raw.get("text_config"), dict) else self.raw


def read_source_config(folder: Path, tensor_count: int) -> SourceConfig:
    """Read the config of a checkpoint with `tensor_count` tensors.

    Raises:
        ValueError: It is missing or unusable, or names more layers than there are tensors.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json")
    raw = read_json_object(file)
    # Before transformers reads the number: some configs build a list of that length.
    nested = raw.get("text_config")
    layers = (nested if isinstance(nested, dict) else raw).get("num_hidden_layers")
    if isinstance(layers, int) and not 0 < layers <= tensor_count:
        found = f"num_hidden_layers={str(layers)[:40]}"
        raise ValueError(f"{file} says {found}, but the checkpoint holds {tensor_count} tensors")
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} says architectures={str(names)[:40]}, which is not a list of class names")
    is_composite = any(key in raw for key in _PARTS)
    is_plain = not is_composite and all(type(raw.get(key)) is kind for key, kind in _CONFIG_ENTRIES.items())
    if isinstance(raw.get("model_type"), str) and is_plain and raw.get("per_layer_config") is None:
        return SourceConfig(
            raw=raw,
            model_type=raw["model_type"],
            family=_family(file, raw["model_type"]),
            hidden_size=raw["hidden_size"],
            heads=raw["num_attention_heads"],
            widths=[raw["intermediate_size"]] * raw["num_hidden_layers"],
            tied=raw["tie_word_embeddings"],
        )

    # The JSON leaves defaults to transformers, or layers differ. The import takes as long as that of torch.
    from gluprune.checkpoints.load_save import read_config

    try:
        config = read_config(folder)
        text = config.get_text_config()
        model_type = text.model_type
    except Exception as error:  # a corrupt config can make transformers raise anything
        raise ValueError(f"{file} is not a usable config: {first_line(error)}") from error
    return SourceConfig(
        raw=raw,
        model_type=model_type,
        family=_family(file, model_type),
        hidden_size=text.hidden_size,
        heads=text.num_attention_heads,
        widths=layer_widths(config),
        tied=getattr(config, "tie_word_embeddings", False),
        is_composite=is_composite,
    )


def _family(file: Path, model_type: str) -> Family:
    try:
        return family_of_type(model_type)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def mlp_tensors(folder: Path, tensors: Sequence[StoredTensor], config: SourceConfig) -> list[dict[str, StoredTensor]]:
    """Return the MLP tensors of every decoder layer, by their name inside the MLP, checked against the config.

    Raises:
        ValueError: A tensor is unknown, mis-shaped or of another dtype, or a layer is missing; the message names it.
    """
    mlps = _group_by_layer(folder, tensors, config)
    if len(mlps) != len(config.widths):
        raise ValueError(f"{folder} holds the MLPs of {len(mlps)} layers, its config says {len(config.widths)}")
    for index, mlp in enumerate(mlps):
        _check_mlp(folder, index, mlp, config)
    return mlps


def _group_by_layer(
    folder: Path, tensors: Sequence[StoredTensor], config: SourceConfig
) -> list[dict[str, StoredTensor]]:
    for tensor in tensors:
        for prefix, wrapper in _WRAPPERS.items():
            if tensor.name.startswith(prefix):
                raise ValueError(
                    f"{tensor.file}: tensor {tensor.name!r} was saved from {wrapper}, and no model loads it by this"
                    " name: save the model itself"
                )
    family = config.family
    projections = {family.gate, family.up, family.down}
    found = [(tensor, match) for tensor in tensors if (match := _MLP_TENSOR.fullmatch(tensor.name))]
    if config.is_composite:  # stacks of layers without such projections are those of other parts
        names = [(match["prefix"], match["name"].partition(".")[0]) for _, match in found]
        stacks = {prefix for prefix, name in names if name in projections}
        found = [(tensor, match) for tensor, match in found if match["prefix"] in stacks]
    layers: dict[int, dict[str, StoredTensor]] = {}
    prefixes: dict[str, StoredTensor] = {}
    for tensor, match in found:
        projection, _, kind = match["name"].partition(".")
        if projection not in projections or kind not in ("weight", "bias"):
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name!r} does not belong to a plain {family.mlp_class}:"
                " quantized or adapted projections cannot be pruned"
            )
        prefixes[match["prefix"]] = tensor
        layers.setdefault(int(match["layer"]), {})[match["name"]] = tensor
    if len(prefixes) > 1:
        examples = ", ".join(repr(tensor.name) for tensor in prefixes.values())
        raise ValueError(f"{folder} holds several stacks of layers: {examples}")
    for index in range(len(layers)):
        if index not in layers:
            raise ValueError(f"{folder}: layer {max(layers)} has MLP tensors, but layer {index} has none")
    return [layers[index] for index in range(len(layers))]


def _check_mlp(folder: Path, layer: int, tensors: dict[str, StoredTensor], config: SourceConfig) -> None:
    """Check that every projection is there, with the shape that the config gives."""
    family, hidden_size, width = config.family, config.hidden_size, config.widths[layer]
    rows = 2 * width if family.packed else width
    expected = {family.gate: (rows, hidden_size), family.up: (rows, hidden_size), family.down: (hidden_size, width)}
    for projection in expected:
        if f"{projection}.weight" not in tensors:
            raise ValueError(f"{folder}: layer {layer} has no tensor mlp.{projection}.weight")
    for name, tensor in tensors.items():
        projection, _, kind = name.partition(".")
        shape = expected[projection] if kind == "weight" else expected[projection][:1]
        label = f"{tensor.file}: tensor {tensor.name!r}"
        if tensor.shape != shape or not tensor.nbytes:
            raise ValueError(f"{label} has shape {list(tensor.shape)}, the config says {list(shape)}")
        if tensor.dtype not in _PRUNABLE_DTYPES:
            raise ValueError(f"{label} has dtype {tensor.dtype}; allowed: {', '.join(_PRUNABLE_DTYPES)}")


def other_files(folder: Path, written: set[str]) -> tuple[list[str], list[str]]:
    """Return the other files of a checkpoint that are copied, and those that are not; paths relative to the folder."""
    copied, skipped = [], []
    modules = _module_folders(folder)
    for root, folders, names in os.walk(folder):
        here = Path(root).relative_to(folder)
        links = {name for name in folders if (folder / here / name).is_symlink()}  # `os.walk` does not follow them
        left = sorted(n for n in folders if n in links or n.startswith(".") or _matches(n, _OTHER_FOLDERS))
        skipped += [f"{here / name}/" for name in left]
        folders[:] = sorted(set(folders) - set(left))
        for path in (here / name for name in sorted(names)):
            if str(path) not in written:
                (copied if path.parts[0] in modules or _belongs(folder, path) else skipped).append(str(path))
    return copied, skipped


def _module_folders(folder: Path) -> set[str]:
    """Return the folders that sentence-transformers loads besides the model: they are copied with their weights."""
    try:
        return {
            Path(module["path"]).parts[0] for module in json.loads((folder / _MODULES).read_bytes()) if module["path"]
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return set()


def _belongs(folder: Path, path: Path) -> bool:
    """Whether a file that is not written by pruning belongs to the output."""
    is_foreign = path.suffix.lower() in _OTHER_WEIGHTS or path.name.endswith(_OTHER_DESCRIPTIONS)
    is_left = path.name.startswith(".") or (path.parent == Path() and _matches(path.name, _OTHER_FILES))
    return not is_foreign and not is_left and (folder / path).is_file()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
