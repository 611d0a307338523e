"""Model folders, from the disk or the Hub."""

from __future__ import annotations

import re
from pathlib import Path

# What a Hub download includes: safetensors, JSON and tokenizer files, without the other formats in some repositories.
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "tokenizer*"]
_NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*"]


def local_folder(source: str | Path) -> Path:
    """Return a model folder; a Hub id is downloaded first. An interrupted download continues where it stopped.

    Raises:
        ValueError: `source` is neither a folder nor a reachable Hub id.
    """
    if Path(source).is_dir():
        return Path(source).absolute()
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise ValueError(f"{source} is neither a model folder nor a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as error:  # the Hub client passes on errors of many kinds
        raise ValueError(f"{source} is neither a model folder nor a reachable Hub id: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
