"""Model folders, from the disk or the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# What a Hub download includes: safetensors, JSON, tokenizer files, remote code, licences and the model card, without
# the other formats in some repositories and what training left.
_DOWNLOADED = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "tokenizer*", "vocab*", "*.spm", "*.py"),
    *("*.md", "LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*"),
]
_NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*", "checkpoint-*/*", "runs/*", "adapter_*"]
_HUB_ID = r"\w[\w.-]*/[\w.-]+"
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)")


@dataclass(frozen=True)
class HubModel:
    """A model of the Hub in a certain state.

    Attributes:
        name: `owner/name`.
        commit: The commit, 40 hexadecimal digits.
    """

    name: str
    commit: str


def is_hub_id(source: str | Path) -> bool:
    """Whether this is `owner/name`, and not a folder."""
    return re.fullmatch(_HUB_ID, str(source)) is not None and not Path(source).exists()


def check_source(source: str | Path) -> None:
    """Check that this can be a model, before anything slow: transformers asks the Hub for every name, again and again.

    Raises:
        ValueError: It is neither a folder nor `owner/name`.
    """
    if not Path(source).is_dir() and not is_hub_id(source):
        raise ValueError(f"{source} is neither a model folder nor a Hub id (owner/name)")


def check_hub_id(name: str) -> None:
    """Check that this can be the name of a model on the Hub.

    Raises:
        ValueError: It is not `owner/name`.
    """
    if not re.fullmatch(_HUB_ID, name):
        raise ValueError(f"{name!r} is not a name on the Hub: give owner/name")


def stored_folder(source: str | Path) -> Path | None:
    """Return the folder of a model, or of a Hub id in the cache; None if the model is not on this disk."""
    if Path(source).is_dir() and str(source):
        return Path(source)
    if not is_hub_id(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(str(source), "config.json")
    return Path(config).parent if isinstance(config, str) else None


def hub_model(source: str | Path) -> HubModel | None:
    """Return the Hub's model and commit of a Hub id or of a path in the Hub's cache; None if neither is cached.

    transformers no longer reports the commit that it loaded; the path in the cache contains it.
    """
    found = _SNAPSHOT.search((stored_folder(source) or Path(source)).absolute().as_posix())
    return HubModel(found["repo"].replace("--", "/"), found["commit"]) if found else None


def model_name(source: str | Path) -> str:
    """Return the name of a model: the last part of its Hub id, also for a folder of the cache, or of its folder."""
    model = hub_model(source)
    if model is not None:
        return model.name.rpartition("/")[2]
    name = Path(source).name
    return Path(source).resolve().name if name in ("", "..") else name


def local_folder(source: str | Path) -> Path:
    """Return a model folder; a Hub id is downloaded first. An interrupted download continues where it stopped.

    Raises:
        ValueError: `source` is neither a folder nor a reachable Hub id.
    """
    if Path(source).is_dir():
        return Path(source).absolute()
    check_source(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as error:  # the Hub client passes on errors of many kinds
        raise ValueError(f"{source} is neither a model folder nor a reachable Hub id: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
