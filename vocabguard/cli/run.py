"""``vocabguard run``: a training program as it is, with a guard at every trainer that it makes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from vocabguard.cli.app import InputError
from vocabguard.config import ConfigError, load_config

Program = Annotated[
    list[str],
    typer.Argument(help="A Python script, a module after -m, or a program, and its own arguments.", show_default=False),
]
Module = Annotated[bool, typer.Option("-m", help="The program is the name of a Python module.")]
Config = Annotated[str | None, typer.Option(help="A preset (watch, protect, ...) or a YAML file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting, as key=value; may be repeated.")]

HOOK = Path(__file__).parents[1] / "integrations" / "hook"
"""The folder whose ``sitecustomize`` Python runs at the start of each process."""


def run(program: Program, config: Config = None, settings: Settings = None, module: Module = False) -> None:
    """Run a training program with a guard at each transformers.Trainer and lightning.Trainer that it trains with.

    For programs that take no callbacks: vocabguard run --config protect -- trl sft --config sft.yaml. Processes that
    the program starts (torchrun, accelerate launch) are guarded too. Signals, exit code and output are the program's
    own; where nothing was trained, one line on standard error says so at the end. A trainer with a guard of its own is
    left as it is.
    """
    chosen = tuple(settings or ())
    try:
        load_config(config, chosen)
    except ConfigError as error:
        raise InputError(str(error)) from error
    command = command_of(["-m", *program] if module else program)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # In the place of this process: there is nothing in between that could swallow a signal or an exit code.
        os.execve(command[0], command, environment(os.environ, config, chosen))
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run ({error.strerror})") from error


def command_of(program: Sequence[str]) -> list[str]:
    """The command line that a program's words stand for, its file first.

    Scripts and modules are run by this Python. Programs are looked for beside it before ``PATH``, where the same
    environment's lie.

    Raises:
        InputError: for a program that is not there.
    """
    first = program[0]
    if first == "-m" or first.endswith(".py"):
        if first != "-m" and not Path(first).is_file():
            raise InputError(f"{first}: there is no such script")
        return [sys.executable, *program]
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which(first, path=beside)
    if found is None:
        raise InputError(f"{first}: there is no such program; allowed: script.py, -m module, or a program on PATH")
    return [found, *program[1:]]


def environment(inherited: Mapping[str, str], config: str | None, settings: Sequence[str]) -> dict[str, str]:
    """The program's environment, by which it and all below it are guarded."""
    # A path would mean another file where the program changes its folder.
    named = None if config is None else str(Path(config).resolve()) if Path(config).is_file() else config
    paths = [str(HOOK), *filter(None, [inherited.get("PYTHONPATH")])]
    chosen = {
        "VOCABGUARD": named or "1",
        "VOCABGUARD_SET": shlex.join(settings),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    # Of a launcher that this one runs in.
    return {key: value for key, value in inherited.items() if key != "VOCABGUARD_REPORT"} | chosen
