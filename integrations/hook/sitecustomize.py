"""Run by Python itself at the start of every process below ``vocabguard run``: trainers get a guard as they train.

Why this way: an environment variable and a folder on ``PYTHONPATH`` reach whatever the program starts (``torchrun``,
``accelerate launch``, spawned workers), leave the program's files and its environment's packages alone, and are gone
when it ends. A ``.pth`` file in site-packages would run in every Python of that environment for good, and a
``usercustomize`` is not run in virtual environments. ``python -I``, ``-E`` and ``-S`` ignore it.

Only the standard library is imported here, and nothing until a trainer's module is: starting Python stays as quick as
it was, and a program still sets its environment before torch is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TRAINERS = {
    "transformers.trainer": ("Trainer", "train", "guard_trainer"),
    "lightning.pytorch.trainer.trainer": ("Trainer", "fit", "guard_lightning"),
}
"""Module -> its class, the method that begins training, and the function of ours that is called first."""

REPORT = "VOCABGUARD_REPORT"
"""Environment variable: a file of the outermost process, to which each guarded trainer adds a line."""

_ABSENT = (
    "vocabguard run: this program's Python, {python}, cannot import vocabguard ({error}); install it there, or run the "
    "program without `vocabguard run`"
)
_NOTHING = (
    "vocabguard run: nothing was watched: neither a transformers.Trainer nor a lightning.Trainer began to train. A "
    "loop of your own takes three lines: guard.attach(...), guard.observe_batch(batch), guard.step(n)"
)


class AfterImport:
    """A finder that calls something once a module has been imported; it finds no module itself.

    Args:
        waits: module name -> what is called with the module.
    """

    def __init__(self, waits: dict[str, Callable[[ModuleType], None]]) -> None:
        self._waits, self._busy = waits, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the others find, its loader changed for this module alone; None for all other modules."""
        if name not in self._waits or self._busy:
            return None
        # Other tools wait for modules in the same way, and ask the other finders as this one does.
        self._busy = True
        try:
            asked = (finder.find_spec(name, path, target) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((one for one in asked if one is not None), None)
        finally:
            self._busy = False
        if spec is None or spec.loader is None:
            return None
        execute, act = spec.loader.exec_module, self._waits[name]

        def then(module: ModuleType) -> None:
            execute(module)
            act(module)

        setattr(spec.loader, "exec_module", then)  # noqa: B010 (a method of this one loader)
        return spec


def guarded(module: ModuleType) -> None:
    """Let the trainer of a module call our function first when it begins to train; see `TRAINERS`."""
    owner, method, guard = TRAINERS[module.__name__]
    kind = getattr(module, owner)
    original = getattr(kind, method)

    @functools.wraps(original)
    def begin(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            from vocabguard.integrations import launched
        except ImportError as error:
            raise ImportError(_ABSENT.format(python=sys.executable, error=error)) from error
        # A configuration that cannot be used ends the program here, before step 1.
        if getattr(launched, guard)(self) and REPORT in os.environ:
            with contextlib.suppress(OSError), open(os.environ[REPORT], "a", encoding="utf-8") as report:
                report.write(f"{type(self).__name__}\n")
        return original(self, *arguments, **options)

    setattr(kind, method, begin)


def report_at_exit() -> None:
    """In the outermost process, say at its end where no trainer was met in it or below it."""
    import tempfile

    try:
        handle, path = tempfile.mkstemp(prefix="vocabguard-", suffix=".txt")
    except OSError:  # a full or read-only disk is no matter of the program's
        return
    os.close(handle)
    os.environ[REPORT] = path
    mine = os.getpid()

    def tell() -> None:
        if os.getpid() != mine:  # a fork's end is not the program's
            return
        with contextlib.suppress(OSError):
            nothing = os.path.getsize(path) == 0
            os.unlink(path)
            if nothing:
                print(_NOTHING, file=sys.stderr)

    atexit.register(tell)


def hand_over() -> None:
    """Run the ``sitecustomize`` that this one hides, if there is one, in its place."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        hidden = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = hidden
        spec.loader.exec_module(hidden)


def begin() -> None:
    """Wait for the trainers' modules, where a guard is asked for."""
    if os.environ.get("VOCABGUARD"):
        sys.meta_path.insert(0, AfterImport(dict.fromkeys(TRAINERS, guarded)))
        if REPORT not in os.environ:
            report_at_exit()
    hand_over()


if __name__ == "sitecustomize":
    begin()
