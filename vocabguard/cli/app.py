"""The application: commands by name, bad input as one line and exit code 2."""

from __future__ import annotations

import codecs
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from vocabguard.installation import VERSION
from vocabguard.results import VocabGuardError

COMMANDS = {
    "probe": "Ask a model to repeat its tokens: which ones can it no longer say?",
    "scan": "Compare two checkpoints: which rows and layers drifted.",
    "coverage": "Count which tokens your training data has as targets.",
    "echo": "Write rows in which the assistant repeats tokens, to mix into your data.",
    "replay": "Choose the fewest rows of a corpus that have the missing tokens as targets.",
    "explain": "Show what happened to single tokens between two checkpoints.",
    "repair": "Write a copy of a checkpoint in which lost tokens are repeated again.",
    "report": "Write one HTML page about a run folder or a scan, or about several.",
    "show": "Show a run folder in the terminal, while it trains too.",
    "run": "Run a training program with a guard, without changing it.",
}
"""Command -> one line for the list of commands.

The function of the same name in ``vocabguard.cli.<command>`` is the command; it is imported when it is called, since
torch takes seconds. Each raises `InputError` for input that cannot be used, which `main` prints, and ``typer.Exit(1)``
for findings.
"""

_WITHOUT_TORCH = {"run"}

BAD_INPUT, INTERRUPTED = 2, 130

_ABOUT = "See and prevent the forgetting of rare tokens while language models are fine-tuned."
_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

LAST_RESORT = "this is a fault of vocabguard"
"""Words of the line for what no command foresaw."""

_TRACEBACK = "VOCABGUARD_TRACEBACK"


class InputError(VocabGuardError, ValueError):
    """Input that cannot be used; the message names what came and what is allowed, in one line."""


def build(names: tuple[str, ...]) -> typer.Typer:
    """The application with the given commands, names of `COMMANDS`."""
    app = _application()
    for name in names:
        # What follows the program that `run` starts is the program's, options too.
        settings = {"allow_interspersed_args": name != "run", **_HELP_OPTIONS}
        module = importlib.import_module(f"vocabguard.cli.{name}")
        function = getattr(module, name)
        app.command(name, context_settings=settings)(function if name in _WITHOUT_TORCH else _ready(function))
    return app


def _ready(function: Callable[..., None]) -> Callable[..., None]:
    """A command that says in a terminal that it is starting: importing torch takes seconds."""

    @functools.wraps(function)
    def ready(*arguments: Any, **options: Any) -> None:
        console = Console(stderr=True)
        if console.is_terminal:
            with console.status("loading torch"):
                importlib.import_module("torch")
        function(*arguments, **options)

    return ready


def build_list() -> typer.Typer:
    """The application for ``--help`` and completion of commands: names and their lines, without their modules."""
    app = _application()
    for name, line in COMMANDS.items():
        app.command(name, help=line)(_nothing)
    return app


def _application() -> typer.Typer:
    app = typer.Typer(
        epilog="Exit codes: 0 nothing found, 1 findings over a threshold, 2 bad input. `vocabguard COMMAND --help` "
        "lists a command's options.",
        no_args_is_help=True, context_settings=_HELP_OPTIONS,
    )  # fmt: skip
    app.callback(help=_ABOUT)(_global_options)  # a single command stays a subcommand
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vocabguard {VERSION}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options of the command line itself."""


def _nothing() -> None:
    """Stands for a command where its name alone is needed."""


def command_in(arguments: Sequence[str]) -> str | None:
    """The command that a line calls: its first word that is no option.

    >>> command_in(["scan", "base", "tuned"]), command_in(["--help"]), command_in(["scna"])
    ('scan', None, None)
    """
    first = next((one for one in arguments if not one.startswith("-")), None)
    return first if first in COMMANDS else None


def _completed() -> list[str] | None:
    """The whole words of the line that a shell wants completed; None where it is none."""
    if not any(name.endswith("_COMPLETE") and "VOCABGUARD" in name for name in os.environ):
        return None
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""
    whole = line.split()[1:]
    # The word at the cursor is being written.
    return whole if line[-1:].isspace() or "COMP_CWORD" in os.environ else whole[:-1]


def main() -> None:
    """Run the command line in ``sys.argv``; only the module of the command that is called is imported.

    Raises:
        SystemExit: with the command's exit code; 2 for bad input and wrong options, 130 after Ctrl-C.
    """
    line = _completed()
    asked = command_in(sys.argv[1:] if line is None else line)
    with _any_output():
        try:
            (build_list() if asked is None else build((asked,)))(prog_name="vocabguard")
        except KeyboardInterrupt:  # while modules are imported
            raise SystemExit(INTERRUPTED) from None
        except SystemExit as left:
            if _interrupted(left):
                raise SystemExit(INTERRUPTED) from None
            raise
        except InputError as error:
            _refuse(str(error))
        except Exception as error:  # a traceback says nothing to who runs a command
            if os.environ.get(_TRACEBACK):
                raise
            said = f"{type(error).__name__}: {error}"
            _refuse(f"{asked or 'vocabguard'} failed ({said[:300]}); {LAST_RESORT}: {_TRACEBACK}=1 shows where")


def _interrupted(left: BaseException) -> bool:
    """Whether the command line ends since somebody pressed Ctrl-C: code 1 would mean findings."""
    cause: BaseException | None = left
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


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
