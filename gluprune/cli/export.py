"""`gluprune export`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from gluprune.cli.options import Json, Model, NewFolder, Quiet, Verbose

EXAMPLES = (
    "gluprune export narrow --format nemotron-nas --out served\nvllm serve served --trust-remote-code",
    "gluprune export served --format hf --out narrow-again",
)


class Format(StrEnum):
    """The formats of `export`."""

    NEMOTRON_NAS = "nemotron-nas"
    HF = "hf"


def run(
    source: Model,
    *,
    format: Annotated[
        Format,
        typer.Option(
            metavar="NAME",
            help="nemotron-nas: the config that servers read when layers have different widths. hf: back to the"
            " format of transformers.",
            show_default=False,
        ),
    ],
    out: NewFolder,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in the format of servers.

    The weights stay the same, bit for bit; they are hard links where the file system allows it.
    """
    from gluprune.checkpoints.export import export

    export(source, out, format=format.value)
    print(json.dumps({"format": format.value, "folder": out}) if as_json else f"{out}: {format.value}")
