"""Options that several commands share, and their implementation."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gluprune.io.folder import check_destination
from gluprune.io.hub import check_source
from gluprune.io.text import is_named

OUTPUT, RUNNING, RECIPE, TEXT = "Output", "How models run", "Recipe", "Text"


class DtypeName(StrEnum):
    """The dtypes of weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _set_verbose(verbose: bool) -> None:
    if verbose:
        _configure_logging(logging.INFO)


def _set_quiet(quiet: bool) -> None:
    if quiet:
        _configure_logging(logging.ERROR)
        # Read when tqdm and transformers are imported, which no command does before its options are parsed.
        os.environ["TQDM_DISABLE"] = "1"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def _configure_logging(level: int) -> None:
    """Send the messages of gluprune to stderr, from this level up."""
    logger = logging.getLogger("gluprune")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def check_model(source: str) -> str:
    """Return the argument of a command if it can be a model.

    Raises:
        typer.BadParameter: It is neither a folder nor a Hub id.
    """
    try:
        check_source(source)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return source


def check_models(sources: list[str]) -> list[str]:
    """Return the arguments of a command if all can be models; see `check_model`."""
    return [check_model(source) for source in sources]


def parse_layers(text: str) -> list[int]:
    """'0,2,5-7' -> [0, 2, 5, 6, 7].

    Raises:
        ValueError: The text is not a list of layers.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers {text!r} is not a list of layers such as 0,2,5-7")
        layers.extend(range(int(first), int(last or first) + 1))
    return layers


def require(extra: str, *modules: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Raises:
        ImportError: One is missing; the message names the extra.
    """
    for module in modules:
        # None in sys.modules: its import is blocked.
        if sys.modules.get(module, module) is None or importlib.util.find_spec(module) is None:
            raise ImportError(f"{module.replace('_', '-')} is not installed: pip install 'gluprune[{extra}]'")


def new_file(path: Path) -> Path:
    """Return the path of a file to write.

    Raises:
        ValueError: It exists already, or its folder does not or is not writable.
    """
    folder = path.absolute().parent
    if path.exists() or not folder.is_dir():
        raise ValueError(f"{path} must be a new file in an existing folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {folder} is not writable")
    return path


def new_folder(path: str) -> str:
    """Return the path of a folder if it can be written; see `check_destination`.

    Raises:
        typer.BadParameter: It cannot.
    """
    try:
        check_destination(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from error
    return path


def check_texts(sources: list[str] | None) -> list[str] | None:
    """Return the texts of a command if their files exist; other sources are not looked up.

    Raises:
        typer.BadParameter: A file does not exist.
    """
    for source in sources or ():
        if not is_named(source) and not Path(source).exists():
            raise typer.BadParameter(f"{source} does not exist")
    return sources


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=OUTPUT)]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Log progress messages to stderr.",
        callback=_set_verbose,
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Log errors only, and show no progress bars.",
        callback=_set_quiet,
        rich_help_panel=OUTPUT,
    ),
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model folder or Hub id.", show_default=False, callback=check_model),
]
PrunedModel = Annotated[
    str,
    typer.Argument(metavar="PRUNED", help="Pruned model: folder or Hub id.", show_default=False, callback=check_model),
]
DenseModel = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="The model before pruning: folder or Hub id.", show_default=False, callback=check_model
    ),
]
NewFolder = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Output folder; must be new or empty.",
        show_default=False,
        callback=new_folder,
    ),
]
NewFile = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="Output file; must not exist.", show_default=False)
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--text",
        metavar="FILE...",
        help="Texts to calibrate on: UTF-8 files, JSON Lines (.jsonl, see --field), hf:ID[:CONFIG]:SPLIT:COLUMN for a"
        " data set of the Hub, or wikipedia for the articles that come with gluprune.",
        show_default=False,
    ),
]
Fields = Annotated[
    list[str], typer.Option("--field", metavar="NAME...", help="Fields that hold the text in JSON files.")
]
TestTexts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE...",
        help="Texts to measure perplexity on. By default the last tenth of each text, which is held apart.",
        rich_help_panel=TEXT,
        callback=check_texts,
    ),
]
Length = Annotated[int, typer.Option(metavar="N", help="Tokens per window.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:0, ...; auto is cuda if available, otherwise cpu.",
        rich_help_panel=RUNNING,
    ),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        metavar="NAME",
        help="Dtype of the weights in memory: float32, bfloat16, float16; auto is that of the checkpoint.",
        rich_help_panel=RUNNING,
    ),
]
Allocation = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="uniform: every layer has the same width. sensitivity: layers to which the loss is sensitive are wider.",
        rich_help_panel=RECIPE,
    ),
]
MultipleOf = Annotated[
    int,
    typer.Option(metavar="N", help="Round widths to the nearest multiple of N.", rich_help_panel=RECIPE),
]
Deploy = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where the model will run: transformers, vllm, tp2, tp4, tp8, fp8, awq, gptq, llama.cpp. Widths become"
        " multiples of what it needs as well.",
        rich_help_panel=RECIPE,
    ),
]
