"""The help pages.

Typer's own renderer imports most of Rich (0.15 s and more); this one needs four of its modules.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

HELP_FLAGS = ("-h", "--help")
_WIDEST = 100  # columns


def print_help(command, ctx, examples: Sequence[str] = ()) -> None:
    """Print usage, description, panels of arguments, options or commands, and examples.

    Args:
        command: A Typer command or group.
        ctx: Its context.
        examples: Command lines, printed without wrapping so that they can be copied.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    arguments = [p.metavar or p.name for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["[OPTIONS]", *(["COMMAND ..."] if hasattr(command, "commands") else arguments)])
    console.print()
    console.print(Text.assemble((" Usage: ", "bold"), f"{ctx.command_path} {usage}"))
    for paragraph in (command.help or "").split("\n\n"):
        console.print()
        for line in Text(" ".join(paragraph.split())).wrap(console, console.width - 2):
            console.print(Text(" ") + line)
    console.print()
    _print_panels(console, _parameter_rows(command.get_params(ctx)))
    _print_panels(console, _command_rows(getattr(command, "commands", {})))
    if examples:
        console.print()
        console.print(Text(" Example:" if len(examples) == 1 else " Examples:", "bold"))
        print(*(f"   {line}" for example in examples for line in example.splitlines()), "", sep="\n")


def _parameter_rows(parameters: Iterable) -> dict[str, list[tuple]]:
    """Panel -> (flags, metavar, help) of its parameters; positional arguments come first."""
    panels: dict[str, list[tuple]] = {"Arguments": [], "Options": []}
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            row = ((parameter.metavar or parameter.name, "cyan"), "", parameter.help or "")
            panels["Arguments"].append(row)
        elif not parameter.hidden:
            flags = ", ".join(sorted(parameter.opts, key=len, reverse=True))
            text = parameter.help or ""
            if parameter.required:
                text += " [required]"
            elif default := _default(parameter):
                text += f" [default: {default}]"
            row = ((flags, "cyan"), parameter.metavar or "", text)
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(row)
    return panels


def _default(parameter) -> str:
    """The default value as a user would type it; empty for flags and for options without one."""
    value = parameter.default
    values = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, bool) or not all(isinstance(item, (str, int, float, os.PathLike)) for item in values):
        return ""  # a flag, or click's marker for nothing
    return " ".join(map(str, values))


def _command_rows(commands: dict) -> dict[str, list[tuple]]:
    """Panel -> (name, nothing, first paragraph of the help) of its commands."""
    panels: dict[str, list[tuple]] = {}
    for name, command in commands.items():
        summary = (command.help or "").partition("\n\n")[0]
        panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(
            ((name, "cyan"), "", summary)
        )
    return panels


def _print_panels(console, panels: dict[str, list[tuple]]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    for title, rows in panels.items():
        if not rows:
            continue
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        has_metavars = any(metavar for _, metavar, _ in rows)
        if has_metavars:
            table.add_column(no_wrap=True)
        table.add_column()
        for (name, style), metavar, text in rows:
            cells = [Text(name, style)] + ([Text(metavar, "yellow")] if has_metavars else [])
            table.add_row(*cells, Text(" ".join(text.split())))
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))
