"""The application: every command under its name, and the entry point `main`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gluprune import __version__
from gluprune.cli import (
    bench,
    calibrate,
    command,
    demo,
    export,
    heal,
    info,
    perplexity,
    prune,
    reconstruct,
    report,
    sample,
    shrink,
    study,
)
from gluprune.cli import eval as evaluate
from gluprune.cli.help import HELP_FLAGS

PANELS = {
    "Prune a model": {
        "shrink": shrink,
        "prune": prune,
        "calibrate": calibrate,
        "sample": sample,
        "reconstruct": reconstruct,
        "heal": heal,
        "export": export,
        "info": info,
    },
    "Measure and compare": {
        "perplexity": perplexity,
        "bench": bench,
        "eval": evaluate,
        "study": study,
        "report": report,
    },
    "Try it": {"demo": demo},
}
# The base of the errors in arguments; newer releases of Typer do not export it.
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="gluprune",
    cls=command.Group,
    help="Width pruning for the GLU MLPs of Llama-type models.",
    context_settings={"help_option_names": list(HELP_FLAGS)},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gluprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


for _panel, _modules in PANELS.items():
    for _name, _module in _modules.items():
        _class = command.command_class(
            _module.EXAMPLES, getattr(_module, "MAY_BE_EMPTY", ()), getattr(_module, "RESUMING", "")
        )
        app.command(_name, cls=_class, rich_help_panel=_panel)(_module.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name. None: that of the process.

    Returns:
        The exit code: 0; 1 for `report --compare` with regressions; 2 after one line on stderr for bad input; 130 after
        Ctrl-C.
    """
    if not sys.stderr.isatty():  # redrawn bars fill logs; those of gluprune are lines there
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    group = typer.main.get_command(app)
    arguments = None if arguments is None else list(arguments)
    try:
        return group.main(arguments, prog_name="gluprune", standalone_mode=False) or 0
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command.print_error(context.command_path if context else "gluprune", error.format_message())
        return command.BAD_INPUT
