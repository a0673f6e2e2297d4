"""The application: commands by name, bad input as one line and exit code 2."""

from __future__ import annotations

import importlib
import sys

import typer
from rich.console import Console

from vocabguard.results import VocabGuardError

COMMANDS = {
    name: f"vocabguard.cli.{name}" for name in ("scan", "coverage", "echo", "replay", "explain", "repair", "report")
}
"""Command -> the module whose function of the same name is the command.

Each raises `InputError` for input that cannot be used, which `main` prints, and ``typer.Exit(1)`` for findings.
"""

BAD_INPUT = 2


class InputError(VocabGuardError, ValueError):
    """Input that cannot be used; the message names what came and what is allowed, in one line."""


def build(names: tuple[str, ...]) -> typer.Typer:
    """The application with the given commands, names of `COMMANDS`."""
    app = typer.Typer(
        help="See and prevent the forgetting of sparse tokens.", no_args_is_help=True, add_completion=False
    )
    for name in names:
        app.command(name)(getattr(importlib.import_module(COMMANDS[name]), name))
    app.callback()(lambda: None)  # a single command stays a subcommand
    return app


def main() -> None:
    """Run the command line in ``sys.argv``; only the module of the command that is called is imported.

    Raises:
        SystemExit: with the command's exit code; 2 for bad input and wrong options.
    """
    asked = [argument for argument in sys.argv[1:2] if argument in COMMANDS]
    try:
        build(tuple(asked) or tuple(COMMANDS))()
    except InputError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"vocabguard: {error}")
        raise SystemExit(BAD_INPUT) from None
