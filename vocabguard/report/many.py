"""Runs side by side, three or more: seeds and sweeps as one table, with intervals over repeated runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vocabguard.compare.evidence import identity_of, unequal
from vocabguard.report.data import PageData
from vocabguard.report.first import badge_of, short_name
from vocabguard.report.limits import Limits
from vocabguard.report.sentences import Verdict, key_numbers, verdict_of
from vocabguard.text import number, percent
from vocabguard.vocabulary.labels import label_of

_REPEATED = ("seed", "run_dir", "run.name")
"""Settings in which repeated runs of one kind differ."""

# Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_TOLD = (
    "retained", "below cosine 0.95", "below 0.95, forecast", "never a target",
    "rare tokens' loss in natural text, nats", "optimizer steps",
)  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """A number that is compared: how it reads, and of which run data it comes."""

    name: str
    of: Callable[[PageData], float | None]
    label: Callable[[float | None], str]


def _row(name: str) -> Callable[[PageData], float | None]:
    def of(data: PageData) -> float | None:
        found: float | None = None if data.whole is None else getattr(data.whole, name)
        return found

    return of


MEASURES = (
    Measure("retained", _row("retained"), percent),
    Measure("below 0.95", _row("below_95"), percent),
    Measure("mean cosine", _row("mean"), number),
    Measure("rare tokens' loss, nats", lambda data: data.scalars.get("reference/rare_rise"), number),
    Measure("training loss on data", lambda data: data.scalars.get("loss/data"), number),
)


@dataclass(frozen=True)
class OneRun:
    """One run of several, with its verdict and the key numbers that differ between runs."""

    name: str
    data: PageData
    verdict: Verdict
    badge: str
    numbers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Repeated:
    """Runs that differ in their seed alone.

    Attributes:
        names: of the runs.
        means: measure, mean with its 95 % interval in words, and the number of runs that it is over.
    """

    names: tuple[str, ...]
    means: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Many:
    """What a page of several runs shows.

    Attributes:
        columns: of the table of runs.
        cells: of each run, one text a column.
        settings: of each setting that differs, its value in each run.
        groups: of each group or exposure class, what each run retains, or its share below 0.95.
        of_groups: which of the two.
        unlike: that runs were measured with other tokenizers or bases, in words; else empty.
    """

    runs: tuple[OneRun, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    repeated: tuple[Repeated, ...]
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    groups: tuple[tuple[str, str, tuple[float | None, ...]], ...]
    of_groups: str
    unlike: str = ""


def side_by_side(shown: Sequence[PageData], limits: Limits) -> Many:
    """Compare several runs or scans."""
    names = distinct_names([data.name for data in shown])
    runs = []
    for name, data in zip(names, shown, strict=True):
        verdict, known = verdict_of(data, limits), dict(key_numbers(data))
        numbers = tuple((key, known[key]) for key in _TOLD if key in known)
        runs.append(OneRun(name, data, verdict, badge_of(data, verdict), numbers))
    columns = tuple(key for key in _TOLD if any(key in dict(run.numbers) for run in runs))
    cells = tuple(tuple(dict(run.numbers).get(key, "-") for key in columns) for run in runs)
    kept = any(row.retained is not None for data in shown for row in data.table)
    return Many(
        runs=tuple(runs), columns=columns, cells=cells, repeated=_repeated(runs), settings=_settings(shown),
        groups=_groups(shown, kept=kept), of_groups="retained" if kept else "below cosine 0.95",
        unlike=unlike_sentence(names, shown),
    )  # fmt: skip


def unlike_sentence(names: Sequence[str], shown: Sequence[PageData]) -> str:
    """Which run was measured with another tokenizer or base than the first, whose numbers are of other tokens then."""
    first, *others = zip(names, shown, strict=True)
    found = [
        f"{name} was measured with {why} than {first[0]}"
        for what in ("tokenizer", "base")
        for name, data in others
        if (why := unequal(first[1].evidence, data.evidence, what))
    ]
    return f"{'; '.join(found)}: their shares are not of the same rows." if found else ""


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Short names of runs, longer where two would be alike.

    >>> distinct_names(["a/seed-1/vocabguard", "b/seed-1/vocabguard", "c/seed-2/vocabguard"])
    ['a/seed-1/vocabguard', 'b/seed-1/vocabguard', 'seed-2']
    """
    short = [short_name(path) for path in paths]
    return [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of repeated runs and half the width of its 95 % interval, by Student's t; at least two values.

    >>> mean, half = interval([0.9, 0.92, 0.94])
    >>> round(mean, 3), round(half, 3)
    (0.92, 0.05)
    """
    free = len(values) - 1
    quantile = _T[free - 1] if free <= len(_T) else 1.96 + 2.4 / free
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def _repeated(runs: Sequence[OneRun]) -> tuple[Repeated, ...]:
    kinds: dict[Any, list[OneRun]] = {}
    for run in runs:
        kind = tuple(sorted((key, value) for key, value in run.data.settings.items() if key not in _REPEATED))
        # The trainer's own settings are not the guard's: other commands or models are other kinds of runs.
        alike = (
            kind,
            run.data.origin.get("model"),
            *(identity_of(run.data.evidence, what) for what in ("tokenizer", "base")),
        )
        kinds.setdefault(alike, []).append(run)
    return tuple(Repeated(tuple(run.name for run in alike), _means(alike)) for alike in kinds.values() if alike[1:])


def _means(runs: Sequence[OneRun]) -> tuple[tuple[str, str, int], ...]:
    found = []
    for measure in MEASURES:
        values = [value for run in runs if (value := measure.of(run.data)) is not None and math.isfinite(value)]
        if len(values) > 1:
            mean, half = interval(values)
            found.append((measure.name, f"{measure.label(mean)} ± {measure.label(half)}", len(values)))
    return tuple(found)


def _settings(shown: Sequence[PageData]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    every = [{**data.settings, **{name: value for name, value in data.origin.items() if name in ("model", "data")}}
             for data in shown]  # fmt: skip
    keys = sorted({key for settings in every for key in settings})
    rows = ((key, tuple(settings.get(key, "-") for settings in every)) for key in keys)
    return tuple((key, values) for key, values in rows if len(set(values)) > 1)


def _groups(shown: Sequence[PageData], *, kept: bool) -> tuple[tuple[str, str, tuple[float | None, ...]], ...]:
    tables = [{(row.kind, row.label): row for row in data.table} for data in shown]
    order = {"all": 0, "group": 1, "class": 2}
    keys = sorted(dict.fromkeys(key for table in tables for key in table), key=lambda key: order[key[0]])
    found = []
    for kind, label in keys:
        rows = [table.get((kind, label)) for table in tables]
        values = tuple(None if row is None else row.retained if kept else row.below_95 for row in rows)
        if any(value is not None for value in values):
            found.append((kind, label_of(label), values))
    return tuple(found)
