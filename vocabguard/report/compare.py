"""Two runs side by side for the report page: their numbers, and the tokens that only one of them lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vocabguard.compare.evidence import unequal
from vocabguard.report.data import PageData, RowNumbers
from vocabguard.results import DEGRADED
from vocabguard.text import ReportRow, percent, visible
from vocabguard.vocabulary.labels import label_of

LISTED = 100
"""Tokens listed of each kind."""


@dataclass(frozen=True)
class PairRow:
    """One row of both closing tables; None where a run has no such row."""

    label: str
    kind: str
    first: ReportRow | None
    second: ReportRow | None


@dataclass(frozen=True)
class Split:
    """Live tokens of one group by which of the runs left them below cosine 0.95."""

    label: str
    only_first: int
    only_second: int
    both: int
    neither: int


@dataclass(frozen=True)
class OneSided:
    """One token that only one of the runs lost, with its cosines in run A and in run B, NaN if not measured."""

    id: int
    text: str
    group: str
    first: float
    second: float


@dataclass(frozen=True)
class Comparison:
    """What the page shows of two runs together.

    Attributes:
        sentence: the outcome.
        rows: both closing tables, in the first run's order.
        unmatched: why tokens cannot be compared one by one; empty where they can.
        splits: all live tokens, then groups that at least one run degraded.
        drifted: tokens below 0.95 only in A, and only in B; lowest cosine first.
        unsaid: tokens that the last probes of both asked for and only A, only B, no longer says.
        settings: dotted key and both values of each setting that differs.
    """

    sentence: str
    rows: tuple[PairRow, ...]
    unmatched: str
    splits: tuple[Split, ...]
    drifted: tuple[tuple[OneSided, ...], tuple[OneSided, ...]]
    unsaid: tuple[tuple[OneSided, ...], tuple[OneSided, ...]]
    settings: tuple[tuple[str, str, str], ...]


def compare(first: PageData, second: PageData) -> Comparison:
    """Compare two runs or scans; tokens are matched by id, which needs the same rows in the same groups."""
    unmatched = _unmatched(first, second)
    splits: tuple[Split, ...] = ()
    drifted: tuple[tuple[OneSided, ...], tuple[OneSided, ...]] = ((), ())
    unsaid = drifted
    if not unmatched:
        below_first, below_second, live = _below(first), _below(second), _rows(first).live & _rows(second).live
        splits = _splits(first, below_first, below_second, live)
        pairs = ((below_first & ~below_second, first), (below_second & ~below_first, second))
        only_first, only_second = (_lowest(mask & live, data) for mask, data in pairs)
        drifted = (_named(only_first, first, second), _named(only_second, first, second))
        unsaid = _unsaid(first, second)
    return Comparison(
        sentence=_sentence(first, second, splits), rows=_pair_rows(first, second), unmatched=unmatched,
        splits=splits, drifted=drifted, unsaid=unsaid, settings=_differing(first, second),
    )  # fmt: skip


def _unmatched(first: PageData, second: PageData) -> str:
    for name, data in (("A", first), ("B", second)):
        if data.rows is None or data.rows.cosine is None:
            return f"Run {name} kept no rows, so its tokens cannot be compared one by one."
    one, other = _rows(first), _rows(second)
    if first.names != second.names or not np.array_equal(one.group, other.group):
        sizes = f"{one.group.size:,} and {other.group.size:,} rows"
        return f"The two have other vocabularies ({sizes}), so tokens cannot be compared one by one."
    reasons = (unequal(first.evidence, second.evidence, what) for what in ("tokenizer", "base"))
    why = next(filter(None, reasons), "")
    return f"B was measured with {why} than A, so tokens cannot be compared one by one." if why else ""


def _rows(data: PageData) -> RowNumbers:
    assert data.rows is not None
    return data.rows


def _cosine(data: PageData) -> NDArray[np.float32]:
    cosine = _rows(data).cosine
    assert cosine is not None
    return cosine


def _below(data: PageData) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return np.asarray(_cosine(data) < DEGRADED)


def _splits(
    data: PageData, first: NDArray[np.bool_], second: NDArray[np.bool_], live: NDArray[np.bool_]
) -> tuple[Split, ...]:
    masks = {"all": live} | {name: live & (_rows(data).group == place) for place, name in enumerate(data.names)}

    def split(name: str, mask: NDArray[np.bool_]) -> Split:
        found = (first & ~second, second & ~first, first & second, ~first & ~second)
        return Split(label_of(name), *(int(np.count_nonzero(one & mask)) for one in found))

    every, *groups = (split(name, mask) for name, mask in masks.items())
    hit = [one for one in groups if one.only_first or one.only_second or one.both]
    return (every, *sorted(hit, key=lambda one: -(one.only_first + one.only_second)))


def _lowest(mask: NDArray[np.bool_], data: PageData) -> list[int]:
    cosine = np.where(mask, _cosine(data), np.inf)
    order = np.argsort(cosine, kind="stable")[:LISTED]
    return [int(token) for token in order[mask[order]]]


def _named(ids: list[int], first: PageData, second: PageData) -> tuple[OneSided, ...]:
    return tuple(
        OneSided(
            id=token,
            text=visible(_text(token, first, second)),
            group=label_of(first.names[int(_rows(first).group[token])]),
            first=float(_cosine(first)[token]),
            second=float(_cosine(second)[token]),
        )
        for token in ids
    )


def _text(token: int, first: PageData, second: PageData) -> str:
    """One log may name a token that the other does not."""
    text = first.text(token)
    return second.text(token) if text == f"<row {token}>" else text


def _unsaid(first: PageData, second: PageData) -> tuple[tuple[OneSided, ...], tuple[OneSided, ...]]:
    if first.probed is None or second.probed is None:
        return ((), ())
    shared = np.intersect1d(first.probed.ids, second.probed.ids)
    lost = [set(shared.tolist()) & set(probed.ids[probed.lost].tolist()) for probed in (first.probed, second.probed)]
    only = [sorted(lost[0] - lost[1])[:LISTED], sorted(lost[1] - lost[0])[:LISTED]]
    return _named(only[0], first, second), _named(only[1], first, second)


def _pair_rows(first: PageData, second: PageData) -> tuple[PairRow, ...]:
    others = {(row.kind, row.label): row for row in second.table}
    rows = [PairRow(row.label, row.kind, row, others.pop((row.kind, row.label), None)) for row in first.table]
    rows += [PairRow(label, kind, None, row) for (kind, label), row in others.items()]
    order = {"all": 0, "group": 1, "class": 2}
    return tuple(sorted(rows, key=lambda row: order[row.kind]))


def _differing(first: PageData, second: PageData) -> tuple[tuple[str, str, str], ...]:
    keys = sorted(first.settings.keys() | second.settings.keys())
    pairs = ((key, first.settings.get(key, "-"), second.settings.get(key, "-")) for key in keys)
    return tuple((key, one, other) for key, one, other in pairs if one != other)


def _sentence(first: PageData, second: PageData, splits: tuple[Split, ...]) -> str:
    parts = []
    one_row, other_row = first.whole, second.whole
    if one_row is not None and other_row is not None:
        for name, one, other in (
            ("retained", one_row.retained, other_row.retained),
            ("below cosine 0.95", one_row.below_95, other_row.below_95),
        ):
            if one is not None and other is not None:
                parts.append(f"{name}: {percent(one)} in A, {percent(other)} in B")
    if splits and (splits[0].only_first or splits[0].only_second or splits[0].both):
        every = splits[0]
        counts = f"{every.only_first:,} only in A, {every.only_second:,} only in B, {every.both:,} in both"
        parts.append(f"tokens below 0.95: {counts}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else "The two share no measurement."
