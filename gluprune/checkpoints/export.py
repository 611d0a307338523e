"""`export`: the same weights under the config of another format, or as a GGUF file.

Of a checkpoint, only the config, the code for transformers and the files that say where it comes from are written.
Weights are hard links where the file system allows it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from gluprune.checkpoints import gguf
from gluprune.checkpoints.card import History
from gluprune.checkpoints.load_save import read_config
from gluprune.checkpoints.source import SourceConfig, mlp_tensors, other_files, read_source_config
from gluprune.io.atomic import link_file, read_chunks, write_file
from gluprune.io.folder import check_destination, check_outside, complete_folder
from gluprune.io.hub import local_folder
from gluprune.io.shards import INDEX_FILE, StoredTensor, read_checkpoint, read_json_object
from gluprune.models import decilm, nemotron_nas
from gluprune.models.families import family_of_type

logger = logging.getLogger(__name__)

FORMATS = (nemotron_nas.MODEL_TYPE, "hf", "gguf")
_CODE = ("configuration_decilm.py", "modeling_decilm.py")


@dataclass(frozen=True)
class _Export:
    """What an export consists of.

    Attributes:
        documents: The files that are written, by name.
        linked: The files with weights.
        copied: Other files of the source.
    """

    documents: dict[str, bytes]
    linked: list[Path]
    copied: list[str]


def export(source: str | Path, destination: str | Path, *, format: str, converter: str | Path | None = None) -> Path:
    """Write a checkpoint in another format; the folder appears only when it is complete.

    Tensors keep their names and bytes. Files with weights are hard links to those of the source where the file system
    allows it, and copies elsewhere: do not change them in place.

    "nemotron-nas" is the config of NVIDIA's Nemotron-NAS models (DeciLM), in which every layer has its own width: vLLM
    reads it; SGLang and TensorRT-LLM read it if every width is a multiple of 256. transformers
    loads it with `trust_remote_code=True`, which runs two small files that the export carries. It holds llama, and
    mistral without sliding windows, both without biases.

    "hf" is the format of transformers, as `gluprune.save` writes it: it takes such an export back.

    "gguf" calls llama.cpp's own converter, which writes `model.gguf` into the folder. Layers of different widths need
    the package `gguf`, and a model that "nemotron-nas" holds.

    Args:
        source: A folder or a Hub id, which is downloaded first.
        destination: A folder that does not exist or is empty, outside the source.
        format: "nemotron-nas", "hf" or "gguf".
        converter: llama.cpp's `convert_hf_to_gguf.py`, for "gguf" only. None: the one on the PATH.

    Returns:
        The folder.

    Raises:
        ValueError: An unknown format, a model that the format does not hold, a corrupt checkpoint, or no converter.
            Nothing is written.
        RuntimeError: The converter failed. Nothing is written.
        OSError: A file cannot be read or written; the message names it.

    Example:
        >>> import gluprune
        >>> model = gluprune.load(model_path)
        >>> report = gluprune.prune(model, intermediate_size=256, layers=[0])
        >>> narrow = gluprune.save(model, folder / "narrow")
        >>> served = gluprune.export(narrow, folder / "served", format="nemotron-nas")
        >>> back = gluprune.export(served, folder / "back", format="hf")
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}")
    if converter is not None and format != "gguf":
        raise ValueError(f"converter would be ignored: format={format!r} needs none")
    check_destination(destination)
    folder = local_folder(source)
    check_outside(destination, folder)
    if format == "gguf":
        script = gguf.find_converter(converter)
        gguf.convertible_rows(folder)
        with complete_folder(destination) as output:
            gguf.write(folder, script, output / gguf.FILE)
        return Path(destination)
    planned = _plan(folder, format)
    with complete_folder(destination) as output:
        for name, content in planned.documents.items():
            write_file(output / name, [content])
        for file in planned.linked:
            link_file(file, output / file.name)
        for name in planned.copied:
            write_file(output / name, read_chunks(folder / name))
    return Path(destination)


def _plan(folder: Path, format: str) -> _Export:
    """Return what an export consists of, after checking that the format holds the checkpoint."""
    shards = read_checkpoint(folder)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    if format == "hf":
        entries, widths, code = *_to_hf(folder, tensors), {}
    else:
        entries, widths = _to_nemotron_nas(folder, tensors)
        here = Path(decilm.__path__[0])
        code = {name: (here / name).read_bytes() for name in _CODE}
    (architecture,) = entries["architectures"]
    documents = {
        **code,
        **History.of(folder).documents([], architecture, widths),
        "config.json": (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    linked = [shard.file for shard in shards]
    copied, _ = other_files(folder, {*documents, *_CODE, *(file.name for file in linked)})
    index = [INDEX_FILE] if (folder / INDEX_FILE).is_file() else []
    return _Export(documents, linked, copied + index)


def _to_nemotron_nas(folder: Path, tensors: list[StoredTensor]) -> tuple[dict, list[int]]:
    """Return the entries of the exported config, and the width of every layer."""
    config = read_source_config(folder, len(tensors))
    mlp_tensors(folder, tensors, config)
    loaded = read_config(folder)
    if reason := nemotron_nas.config_obstacle(loaded):
        held = " and ".join(nemotron_nas.FAMILIES)
        raise ValueError(
            f"{folder} does not fit the format nemotron-nas, which holds {held}: it is {config.model_type}; {reason}"
        )
    if len(set(config.widths)) == 1:
        logger.warning("all layers have one width: servers and transformers read the checkpoint as it was, too")
    if not nemotron_nas.fits_ffn_mult(config.widths):
        logger.warning("not every width is a multiple of 256: vLLM reads them, other servers do not")
    return nemotron_nas.to_nemotron_nas(config.raw, loaded), config.widths


def _to_hf(folder: Path, tensors: list[StoredTensor]) -> tuple[dict, list[int]]:
    """Return the entries of the config that was exported, and the width of every layer."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json")
    try:
        raw = read_json_object(file)
        entries, widths = nemotron_nas.from_nemotron_nas(raw), nemotron_nas.block_widths(raw)
        source = SourceConfig(
            raw=entries,
            model_type=entries["model_type"],
            family=family_of_type(entries["model_type"]),
            hidden_size=entries["hidden_size"],
            heads=entries["num_attention_heads"],
            widths=widths,
            tied=entries["tie_word_embeddings"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not as `gluprune export` wrote it: {error!r}") from error
    mlp_tensors(folder, tensors, source)
    return entries, widths
