"""The command line."""

from gluprune.cli.app import main

__all__ = ["main"]
