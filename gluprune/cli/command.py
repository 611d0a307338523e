"""`Command`: one command of the command line, with multi-value options, one-line errors and a custom help page."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence

import typer
from typer.core import TyperCommand, TyperGroup

from gluprune.cli.help import HELP_FLAGS, print_help

BAD_INPUT, INTERRUPTED = 2, 130
# Errors raised by bad input. Anything else is a bug, and its traceback is shown.
ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)


class Command(TyperCommand):
    """A Typer command that accepts several values after one flag and reports errors in one line.

    Attributes:
        examples: Command lines shown at the end of `--help`.
        may_be_empty: Multi-value options that may be given without a value; they then get one empty string.
        resuming: How to continue after an interruption; empty if a new run starts from the beginning.
    """

    examples: tuple[str, ...] = ()
    may_be_empty: tuple[str, ...] = ()
    resuming: str = ""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Parse the arguments after `expand`."""
        flags = {
            flag
            for parameter in self.params
            if parameter.param_type_name == "option" and getattr(parameter, "multiple", False)
            for flag in parameter.opts
        }
        return super().parse_args(ctx, expand(args, flags, self.may_be_empty))

    def invoke(self, ctx):
        """Run the command; bad input and Ctrl-C become one line and an exit code."""
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            print_interrupted(ctx.command_path, self.resuming)
            raise typer.Exit(INTERRUPTED) from None
        except ERRORS as error:
            print_error(ctx.command_path, in_flags(_message(error), self._flags()))
            raise typer.Exit(BAD_INPUT) from None

    def _flags(self) -> dict[str, str]:
        """Name of a parameter -> its flag, for all options."""
        options = (parameter for parameter in self.params if parameter.param_type_name == "option")
        return {str(option.name): max(option.opts, key=len) for option in options}


class Group(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx):
        """Run a command; Ctrl-C while its arguments are parsed becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_interrupted(ctx.command_path)
            raise typer.Exit(INTERRUPTED) from None

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Parse the arguments; print the help if it is asked for, or if there is no argument.

        The help is printed before any argument is parsed: newer releases of Typer import Pydantic for that.
        """
        if not args:
            print_help(self, ctx, ("gluprune COMMAND --help",))
            raise typer.Exit(BAD_INPUT)
        before_dashes = args[: args.index("--")] if "--" in args else args
        if any(flag in before_dashes for flag in HELP_FLAGS):
            command = self.commands.get(args[0])
            if isinstance(command, Command):
                print_help(command, typer.Context(command, parent=ctx, info_name=args[0]), command.examples)
            else:
                print_help(self, ctx, ("gluprune COMMAND --help",))
            raise typer.Exit
        return super().parse_args(ctx, args)


def command_class(examples: Sequence[str], may_be_empty: Sequence[str] = (), resuming: str = "") -> type[Command]:
    """Return a class of commands with these attributes; see `Command`."""
    attributes = {"examples": tuple(examples), "may_be_empty": tuple(may_be_empty), "resuming": resuming}
    return type("Command", (Command,), attributes)


def print_interrupted(command: str, resuming: str = "") -> None:
    """Print one line to stderr after Ctrl-C."""
    print(f"\r{command}: interrupted" + (f"; {resuming}" if resuming else ""), file=sys.stderr)


def print_error(command: str, error: Exception | str) -> None:
    """Print one line to stderr."""
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    message = message.replace("Value error, ", "")  # of Pydantic, which newer releases of Typer use
    print(f"{command}: error: {message}", file=sys.stderr)


def _message(error: Exception) -> str:
    """Return the message of an error; that of a failed file operation as "path: reason"."""
    if isinstance(error, OSError) and error.filename and error.strerror and not error.filename2:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return an error message of the library with its Python arguments written as the flags of a command.

    `score='hybrid'` becomes `--score hybrid`, `compensate=True` `--compensate`, `pruning_ratio` `--pruning-ratio`, and
    `calibrate(..., gram=True)` `gluprune calibrate --gram`.

    Args:
        message: The message.
        flags: Name of an argument -> flag.
    """
    message = re.sub(r"\bcalibrate\(\.\.\., (\w+)=True\)", r"gluprune calibrate --\1", message)
    # A name that is an English word counts only with a value after it. In a path, it is no argument.
    with_value = rf"(?<![\w/.-])({'|'.join(flags)})=('[^']*'|[\w.+-]*)"
    bare = rf"(?<![\w/.-])({'|'.join(name for name in flags if '_' in name)})(?![\w/.=-])"

    def flag_and_value(match: re.Match) -> str:
        value = match[2].strip("'")
        return flags[match[1]] if value in ("", "True") else f"{flags[match[1]]} {value}"

    return re.sub(bare, lambda match: flags[match[1]], re.sub(with_value, flag_and_value, message))


def expand(arguments: Sequence[str], flags: Collection[str], may_be_empty: Collection[str] = ()) -> list[str]:
    """Repeat the flag of a multi-value option before each of its values.

    `--text a b --json` becomes `--text a --text b --json`. Values end at the next option, so positional arguments come
    before such an option or after another one.

    Args:
        arguments: What follows the command's name.
        flags: The options that accept several values.
        may_be_empty: Those of them that may have no value; they then get one empty string.
    """
    expanded: list[str] = []
    flag, values = "", 0
    for position, argument in enumerate([*arguments, "--"]):
        if _is_option(argument):
            if flag and not values:
                expanded += [flag, ""] if flag in may_be_empty else [flag]
            if argument == "--":
                return [*expanded, *arguments[position:]]
            flag, values = (argument if argument in flags else ""), 0
            if not flag:
                expanded.append(argument)
        elif flag:
            expanded += [flag, argument]
            values += 1
        else:
            expanded.append(argument)
    return expanded


def _is_option(argument: str) -> bool:
    """Whether an argument is an option and not a value: `-` and negative numbers are values."""
    return argument.startswith("-") and argument != "-" and not argument[1:].replace(".", "", 1).isdigit()
