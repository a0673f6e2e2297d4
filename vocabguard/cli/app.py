"""The application: commands by name, bad input as one line and exit code 2."""

from __future__ import annotations

import codecs
import importlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from vocabguard.results import VocabGuardError

COMMANDS = {
    name: f"vocabguard.cli.{name}"
    for name in ("probe", "scan", "coverage", "echo", "replay", "explain", "repair", "report", "run")
}
"""Command -> the module whose function of the same name is the command.

Each raises `InputError` for input that cannot be used, which `main` prints, and ``typer.Exit(1)`` for findings.
"""

BAD_INPUT = 2

LAST_RESORT = "this is a fault of vocabguard"
"""Words of the line for what no command foresaw."""

_TRACEBACK = "VOCABGUARD_TRACEBACK"


class InputError(VocabGuardError, ValueError):
    """Input that cannot be used; the message names what came and what is allowed, in one line."""


def build(names: tuple[str, ...]) -> typer.Typer:
    """The application with the given commands, names of `COMMANDS`."""
    app = typer.Typer(
        help="See and prevent the forgetting of sparse tokens.", no_args_is_help=True, add_completion=False
    )
    for name in names:
        # What follows the program that `run` starts is the program's, options too.
        settings = {"allow_interspersed_args": name != "run"}
        app.command(name, context_settings=settings)(getattr(importlib.import_module(COMMANDS[name]), name))
    app.callback()(lambda: None)  # a single command stays a subcommand
    return app


def main() -> None:
    """Run the command line in ``sys.argv``; only the module of the command that is called is imported.

    Raises:
        SystemExit: with the command's exit code; 2 for bad input and wrong options.
    """
    asked = [argument for argument in sys.argv[1:2] if argument in COMMANDS]
    with _any_output():
        try:
            build(tuple(asked) or tuple(COMMANDS))()
        except InputError as error:
            _refuse(str(error))
        except Exception as error:  # a traceback says nothing to who runs a command
            if os.environ.get(_TRACEBACK):
                raise
            said = f"{type(error).__name__}: {error}"
            _refuse(f"{' '.join(asked)} failed ({said[:300]}); {LAST_RESORT}: {_TRACEBACK}=1 shows where")


def _refuse(why: str) -> NoReturn:
    """Print one line, whatever paths and file contents are quoted in it, and leave."""
    # Soft wrapping, since a terminal's width is no reason for a second line.
    line = " ".join(why.split())
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"vocabguard: {line}")
    raise SystemExit(BAD_INPUT) from None


@contextmanager
def _any_output() -> Iterator[None]:
    """Let standard output and error take any text: what their encoding lacks becomes an escape that JSON knows too."""
    codecs.register_error("vocabguard", _escaped)
    found = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    handlers = [stream.errors or "strict" for stream in found]
    for stream in found:
        stream.reconfigure(errors="vocabguard")
    try:
        yield
    finally:
        for stream, handler in zip(found, handlers, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=handler)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """``\\uXXXX`` for each UTF-16 unit of what cannot be encoded; see `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end
