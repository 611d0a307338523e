"""`gluprune export`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from gluprune.cli.options import Json, Model, NewFolder, Quiet, Verbose

EXAMPLES = (
    "gluprune export narrow --format nemotron-nas --out served",
    "gluprune export served --format hf --out narrow-again",
    "gluprune export narrow --format gguf --out narrow-gguf \\\n   --converter llama.cpp/convert_hf_to_gguf.py",
)


class Format(StrEnum):
    """The formats of `export`."""

    NEMOTRON_NAS = "nemotron-nas"
    HF = "hf"
    GGUF = "gguf"


def run(
    source: Model,
    *,
    format: Annotated[
        Format,
        typer.Option(
            metavar="NAME",
            help="nemotron-nas: the config that servers read when layers have different widths. hf: back to the"
            " format of transformers. gguf: model.gguf for llama.cpp and Ollama, by llama.cpp's converter.",
            show_default=False,
        ),
    ],
    out: NewFolder,
    converter: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With gguf: llama.cpp's convert_hf_to_gguf.py. By default the one on the PATH.",
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in the format of servers.

    The weights stay the same, bit for bit; they are hard links where the file system allows it. A GGUF file is what
    llama.cpp's converter writes; the quantizations that its rows fit are printed.
    """
    from gluprune.checkpoints import gguf
    from gluprune.checkpoints.export import export
    from gluprune.io.hub import local_folder

    export(source, out, format=format.value, converter=converter)
    result: dict = {"format": format.value, "folder": out}
    lines = [f"{out}: {format.value}"]
    if format is Format.GGUF:
        widths, hidden_size = gguf.convertible_rows(local_folder(source))
        result["quantizations"] = {
            "down_proj": gguf.quantizations(widths),
            "other projections": gguf.quantizations([hidden_size]),
        }
        lines += [f"fits {name}: {', '.join(found)}" for name, found in result["quantizations"].items()]
    print(json.dumps(result) if as_json else "\n".join(lines))
