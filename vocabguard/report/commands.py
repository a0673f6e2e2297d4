"""The next commands of a run, a scan or a probe, with their arguments filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocabguard.files import require_regular

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Next:
    """A command to copy, and what it is for."""

    why: str
    command: str

    @property
    def line(self) -> str:
        """Both in one line of a terminal."""
        return f"{self.why}: {self.command}"


def command(*words: object) -> str:
    """A command line with its words quoted as a shell needs them.

    >>> command("vocabguard", "report", Path("my runs/a"))
    "vocabguard report 'my runs/a'"
    """
    return " ".join(shlex.quote(str(word)) for word in words)


def latest_checkpoint(folder: Path) -> Path | None:
    """The model of an output folder: the folder itself, else its ``checkpoint-N`` of highest N; None without one."""
    if any((folder / name).is_file() for name in _WEIGHTS):
        return folder
    numbered = [(int(found[1]), path) for path in _entries(folder) if (found := _CHECKPOINT.fullmatch(path.name))]
    usable = [(step, path) for step, path in numbered if any((path / name).is_file() for name in _WEIGHTS)]
    return max(usable)[1] if usable else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder; other tools write a ``run.json`` too."""
    try:
        return b'"schema"' in require_regular(folder / "run.json").read_bytes()
    except OSError:
        return False


def newest_run(folder: Path) -> Path | None:
    """The run folder that is newest in an output folder: ``vocabguard``, ``vocabguard-2``, ...; None without one."""
    if is_run(folder):
        return folder
    runs = [path for path in _entries(folder) if path.name.startswith("vocabguard") and is_run(path)]
    # Lightning's loggers put `version_N` in between.
    for version in sorted(_entries(folder), key=_modified):
        if is_run(version / "vocabguard"):
            runs += [path for path in _entries(version) if is_run(path)]
    return max(runs, key=lambda path: (_modified(path / "run.json"), path.name)) if runs else None


def after_run(folder: Path, origin: Mapping[str, Any] | None = None, *, lost: bool = False) -> tuple[Next, ...]:
    """What to do with a run folder, the most useful first.

    Args:
        folder: of the run.
        origin: of ``run.json``; its ``model`` is the base.
        lost: whether tokens were lost.
    """
    found = [Next("Look at the run in a terminal", command("vocabguard", "show", folder))]
    page = folder / "report.html"
    if not page.is_file():
        found.append(Next("Write its page", command("vocabguard", "report", folder)))
    if any(folder.glob("events.out.tfevents.*")):
        found.append(Next("Follow the curves", command("tensorboard", "--logdir", folder)))
    base, tokenizer = ((origin or {}).get(name) for name in ("model", "tokenizer"))
    model = latest_checkpoint(folder.parent)
    if model is not None and base and str(base) != str(model):
        found.append(Next("Ask the saved model for its tokens", command("vocabguard", "probe", model, base)))
    if lost and tokenizer:
        rows = folder / "echo.jsonl"
        found.append(Next("Write rows that repeat tokens", command("vocabguard", "echo", tokenizer, "--ids", rows)))
    return tuple(found)


def after_scan(base: object, tuned: object, out: object | None, *, tokens: Iterable[object] = ()) -> tuple[Next, ...]:
    """What to do after `vocabguard scan`.

    Args:
        out: the file that was written.
        tokens: texts or ids of tokens that drifted most.
    """
    worst = list(tokens)[:3]
    found = [Next("Ask both models for their tokens", command("vocabguard", "probe", tuned, base))]
    if worst:
        found.append(Next("Look at single tokens", command("vocabguard", "explain", base, tuned, *worst)))
    if out is not None:
        found.append(Next("Write a page", command("vocabguard", "report", out)))
    return tuple(found)


def after_probe(
    model: object, base: object | None, out: object | None, *, tokens: Iterable[object] = (), lost: bool = False
) -> tuple[Next, ...]:
    """What to do after `vocabguard probe`.

    Args:
        out: the file that was written.
        tokens: of those that are lost.
        lost: whether there are any.
    """
    found: list[Next] = []
    shown = list(tokens)[:3]
    if lost and base is not None:
        if shown:
            found.append(Next("Why these were lost", command("vocabguard", "explain", base, model, *shown)))
        found.append(Next("Put lost rows right", command("vocabguard", "repair", base, model, "--out", "repaired")))
        if out is not None:
            rows = command("vocabguard", "echo", model, "--needs", out, "--ids", "echo.jsonl")
            found.append(Next("Write rows to train on that repeat the lost tokens", rows))
    if out is not None:
        found.append(Next("Write a page", command("vocabguard", "report", out)))
    elif base is not None:
        written = command("vocabguard", "probe", model, base, "--out", "probe.safetensors")
        found.append(Next("Keep the answers for report, echo and replay", written))
    else:
        found.append(Next("Compare with the model before training", f"{command('vocabguard', 'probe', model)} BASE"))
    return tuple(found)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
