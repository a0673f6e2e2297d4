"""``vocabguard report RUN...``: one HTML page that says what was lost, of one run or scan or of several."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vocabguard.cli.app import InputError
from vocabguard.cli.common import check_most, check_new_file, show_next
from vocabguard.files import one_line
from vocabguard.report.commands import newest_run
from vocabguard.report.limits import Limits
from vocabguard.runlog import RunLog

if TYPE_CHECKING:
    from vocabguard.report.compare import Comparison
    from vocabguard.report.data import PageData, TextOf

_PAGE = Path("report.html")

Source = Annotated[
    Path,
    typer.Argument(help="Run folder, an output folder with one in it, or a file of `scan --out` or `probe --out`."),
]
Other = Annotated[Path | None, typer.Argument(help="A second one, to compare with token by token.")]
More = Annotated[list[Path] | None, typer.Argument(help="More of them: a table, for seeds and sweeps.")]
Out = Annotated[Path | None, typer.Option(help="The page to write; report.html if not given, and none with --json.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option(help="The model's tokenizer folder: texts of all tokens. A run folder names only the worst ones."),
]
Threshold = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of live rows below cosine 0.95 over which the exit code is 1.")
]
Forgotten = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of lost tokens above which the exit code is 1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print verdict and key numbers as JSON and nothing else.")]


def report(
    source: Source, other: Other = None, more: More = None, out: Out = None, tokenizer: Tokenizer = None,
    threshold: Threshold = Limits.degraded, threshold_forgotten: Forgotten = Limits.forgotten,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write one self-contained HTML page about a run folder or a scan, or about several side by side.

    Exit code 0: nothing over a threshold; 1: a share over one, in either source; 2: bad input.
    """
    from vocabguard.report.page import render
    from vocabguard.report.sentences import verdict_of

    check_most(("--threshold", threshold, 1), ("--threshold-forgotten", threshold_forgotten, 1))
    limits = Limits(threshold, threshold_forgotten)
    paths = [_source(path) for path in (source, *([] if other is None else [other]), *(more or ()))]
    page = out or (None if as_json else _PAGE)
    if page is not None:
        check_new_file("--out", page, paths)
    shown = [read(path, tokenizer) for path in paths]
    with refusing_damage(paths):
        over = any(verdict_of(data, limits).findings for data in shown)
        content = None if page is None else render(*shown, limits=limits)
        told = json.dumps(_as_json(shown, limits, page), indent=2, allow_nan=False) if as_json else ""
        lines = [] if as_json else _lines(shown, limits, page)
    if content is not None and page is not None:
        _write(content, page)
    if as_json:
        print(told)
    else:
        _show(lines)
        show_next([one for one in shown[0].commands if not one.command.startswith("vocabguard report")])
    if over:
        raise typer.Exit(1)


def _source(path: Path) -> Path:
    """A run folder or file; of an output folder, its newest run."""
    found = newest_run(path) if path.is_dir() else None
    if found is not None and found != path:
        print(f"{path}: the newest run in it is {found}", file=sys.stderr)
    return found or path


@contextmanager
def refusing_damage(paths: list[Path]) -> Iterator[None]:
    """Turn what a damaged source brings about, of which there is no end, into one line.

    Raises:
        InputError: with the source and what failed.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        names = " and ".join(map(str, paths))
        raise InputError(
            f"{names}: is damaged, its parts do not fit each other ({type(error).__name__}: {one_line(error)})"
        ) from error


def read(path: Path, tokenizer: Path | None = None) -> PageData:
    """Read a run folder or a scan's file.

    Args:
        tokenizer: a tokenizer's folder; used for run folders, as a scan brings its texts.

    Raises:
        InputError: if it is neither, cannot be read, or the tokenizer does not fit it.
    """
    from vocabguard.report.data import run_data

    try:
        if path.is_dir():
            log = RunLog.open(path)
            return run_data(log, None if tokenizer is None else _texts(log, tokenizer))
        if not path.exists():
            raise InputError(f"{path} does not exist; expected a run folder or a scan's .safetensors file")
        from vocabguard.report.data import scan_data

        return scan_data(path)
    except (OSError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from error
    except Exception as error:  # a damaged source may hold anything
        raise InputError(f"{path} is not a run folder or scan: {type(error).__name__}: {one_line(error)}") from error


def _texts(log: RunLog, folder: Path) -> TextOf:
    from vocabguard.compare.matching import folder_tokenizer, table_for

    found = folder_tokenizer(folder)
    if found is None:
        raise InputError(f"--tokenizer {folder}: no tokenizer in this folder")
    watched: dict[str, Any] = log.meta["watch"]
    rows = next((matrix["rows"] for name in ("head", "embedding") if "rows" in (matrix := watched[name])), len(found))
    return table_for(found, int(rows)).text


def _write(page: str, path: Path) -> None:
    from vocabguard.report.page import write_page

    try:
        write_page(page, path)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from error


def _as_json(shown: list[PageData], limits: Limits, page: Path | None) -> dict[str, Any]:
    from vocabguard.report.compare import compare
    from vocabguard.report.sentences import as_json

    found: dict[str, Any] = {
        "page": None if page is None else str(page),
        "threshold": limits.degraded,
        "threshold_forgotten": limits.forgotten,
        "sources": [as_json(data, limits) for data in shown],
    }
    if len(shown) == 2:
        found["comparison"] = _compared(compare(*shown))
    return found


def _compared(both: Comparison) -> dict[str, Any]:
    every = both.splits[0] if both.splits else None
    return {
        "verdict": both.sentence,
        "unmatched": both.unmatched or None,
        "below_0.95": None
        if every is None
        else {"only_first": every.only_first, "only_second": every.only_second, "both": every.both},
        "not_said_only_first": [token.id for token in both.unsaid[0]],
        "not_said_only_second": [token.id for token in both.unsaid[1]],
    }


def _lines(shown: list[PageData], limits: Limits, page: Path | None) -> list[str]:
    from vocabguard.report.compare import compare
    from vocabguard.report.many import unlike_sentence
    from vocabguard.report.sentences import verdict_of

    lines = []
    for data in shown:
        verdict = verdict_of(data, limits)
        lines += [f"{data.name}: {verdict.sentence}", *(f"  over the threshold: {one}" for one in verdict.findings)]
    if len(shown) == 2:
        both = compare(*shown)
        lines += [both.sentence, *([both.unmatched] if both.unmatched else [])]
    elif len(shown) > 2 and (unlike := unlike_sentence([data.name for data in shown], shown)):
        lines.append(unlike)
    return [*lines, f"page: {page}"]


def _show(lines: list[str]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in lines:
        console.print(line)
