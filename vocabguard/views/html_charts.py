"""The report page's figures of the rows: cosines by group, drift against exposure, lengths of the displacements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vocabguard.forecasts import DEGRADED
from vocabguard.views.html_data import PageData
from vocabguard.views.html_figures import Figure, Mark, Plot, Word, ticks
from vocabguard.views.html_findings import label_of
from vocabguard.views.wording import number, percent

# Left edges of the bins of data targets, and their labels.
_TARGETS = (0, 1, 2, 5, 10, 20, 50, 100, 1000)
_TARGET_LABELS = ("0", "1", "2-4", "5-9", "10-19", "20-49", "50-99", "100-999", "1000+")
_WIDE, _HIGH = 380.0, 220.0


def histograms(first: PageData, second: PageData | None = None) -> tuple[Figure, ...]:
    """Histograms of the cosines: of all live rows, then of each group, in the table's order; one scale for all.

    Args:
        first: drawn as bars.
        second: a second run, drawn as an outline.
    """
    shown = [data for data in (first, second) if data is not None and _cosines(data).size]
    if not shown or shown[0] is not first:
        return ()
    low = min(_lowest_shown(_cosines(data)) for data in shown)
    edges = _edges(low)
    labels = [row.label for row in first.table if row.kind != "class" and first.sizes.get(row.label)]
    return tuple(_histogram(label, shown, edges) for label in labels)


def exposure_figure(first: PageData, second: PageData | None = None) -> Figure | None:
    """Cosine against the data targets so far: the middle half, the median and the lowest 1 % of each bin.

    Args:
        first: a run.
        second: a second run, drawn beside it.

    Returns:
        None where the first run did not count targets or did not measure rows.
    """
    shown = [data for data in (first, second) if data is not None and _by_targets(data)]
    if not shown or shown[0] is not first:
        return None
    boxes = [_by_targets(data) for data in shown]
    low = min(min(box.p01 for box in of_one.values()) for of_one in boxes)
    plot = Plot(2 * _WIDE, _HIGH + 24, (-0.5, len(_TARGETS) - 0.5), (_floor(low), 1.0), bottom=52.0)
    marks, words = plot.grid(ticks(*plot.y), lambda value: f"{value:g}")
    words += plot.x_labels(range(len(_TARGETS)), lambda place: _TARGET_LABELS[round(place)])
    words.append(Word(plot.left + (plot.width - plot.left) / 2, plot.height - 2, "data targets so far (tokens below)"))
    for place, of_one in enumerate(boxes):
        shift, wide = (0.0, 0.28) if len(boxes) == 1 else ((-0.2, 0.2)[place], 0.17)
        for bin_, box in of_one.items():
            marks += _box(plot, bin_ + shift, wide, box, f"b{place}", _name(place, len(boxes)))
    counts = boxes[0]
    words += [Word(plot.at_x(b), plot.base + 31, f"{box.count:,}", style="tick quiet") for b, box in counts.items()]
    marks.append(_bar_95(plot))
    legend = tuple((f"k{place}", f"run {'AB'[place]}") for place in range(2)) if len(boxes) == 2 else ()
    text = "; ".join(f"{_TARGET_LABELS[b]} targets: median cosine {number(box.p50)}" for b, box in counts.items())
    note = "Box: the middle half of the tokens; line across: median; whisker: down to the lowest 1 %."
    return Figure("Drift against exposure", text, plot.width, plot.height, tuple(marks), tuple(words), legend, note)


def length_figure(first: PageData, second: PageData | None = None) -> Figure | None:
    """Histogram of the lengths of the live rows' displacements, from 0 to the longest.

    Args:
        first: drawn as bars.
        second: a second one, drawn as an outline on the same scale.

    Returns:
        None where the first has no lengths.
    """
    shown = [lengths for data in (first, second) if data is not None and (lengths := _lengths(data)).size]
    if not shown or not _lengths(first).size:
        return None
    longest = max(float(lengths.max()) for lengths in shown) or 1.0
    edges = np.linspace(0.0, longest, 61)
    counted = [_shares(lengths, edges) for lengths in shown]
    top = max(float(shares.max()) for shares in counted)
    plot = Plot(2 * _WIDE, _HIGH, (0.0, longest), (0.0, math.sqrt(top)), left=10.0, right=10.0, bottom=36.0)
    marks = _bars(plot, counted[0], edges, shown[0].size, degraded=-math.inf)
    if len(counted) == 2:
        marks.append(Mark("path", "outline", d=_outline(plot, counted[1], edges)))
    marks.append(Mark("line", "axis", plot.left, plot.base, plot.width - plot.right, plot.base))
    words = plot.x_labels(ticks(0.0, longest, 8), lambda value: f"{value:g}")
    words.append(Word(plot.width / 2, plot.height - 2, "L2 of row now minus base row"))
    middle, last = (float(value) for value in np.quantile(shown[0], (0.5, 0.99)))
    note = (
        f"Half of the rows moved less than {middle:.3g}, 99 % less than {last:.3g}, the farthest {shown[0].max():.3g}."
    )
    title = f"L2, {shown[0].size:,} live rows"
    return Figure(title, f"{title}: {note}", plot.width, plot.height, tuple(marks), tuple(words), note=note)


def _lengths(data: PageData) -> NDArray[np.float32]:
    """Finite lengths of the live rows' displacements."""
    rows = data.rows
    if rows is None or rows.l2 is None:
        return np.empty(0, np.float32)
    found: NDArray[np.float32] = rows.l2[rows.live & np.isfinite(rows.l2)]
    return found


def _cosines(data: PageData, label: str = "all") -> NDArray[np.float32]:
    """Finite cosines of the live rows, of all or of one group."""
    rows = data.rows
    if rows is None or rows.cosine is None:
        return np.empty(0, np.float32)
    chosen = rows.live & np.isfinite(rows.cosine)
    if label != "all":
        chosen &= rows.group == (data.names.index(label) if label in data.names else 255)
    found: NDArray[np.float32] = rows.cosine[chosen]
    return found


def _lowest_shown(cosines: NDArray[np.float32]) -> float:
    """Left end of the histograms: under all but the lowest 0.2 %, and always far enough to show the bar at 0.95."""
    return _floor(min(float(np.quantile(cosines, 0.002)), 0.94))


def _edges(low: float, most: int = 50) -> NDArray[np.float64]:
    """Edges of at most about `most` bins from `low` or a little lower up to 1, one of them exactly at 0.95."""
    width = next((width for width in (0.001, 0.0025, 0.005, 0.01, 0.025) if (1 - low) / width <= most), 0.05)
    bins = math.ceil(round((1 - low) / width, 6))
    return np.round(1.0 - width * np.arange(bins, -1, -1), 6)


def _floor(cosine: float) -> float:
    return max(-1.0, math.floor(cosine * 50) / 50)


def _histogram(label: str, shown: Sequence[PageData], edges: NDArray[np.float64]) -> Figure:
    counted = [_shares(_cosines(data, label), edges) for data in shown]
    top = max(float(shares.max()) for shares in counted) or 1.0
    # Heights by the square root: most rows have hardly moved, and the few that have are what one looks for.
    plot = Plot(
        260.0, 120.0, (float(edges[0]), 1.0), (0.0, math.sqrt(top)), left=10.0, right=10.0, top=8.0, bottom=22.0
    )
    marks = _bars(plot, counted[0], edges, _cosines(shown[0], label).size)
    if len(counted) == 2:
        marks.append(Mark("path", "outline", d=_outline(plot, counted[1], edges)))
    marks.append(Mark("line", "axis", plot.left, plot.base, plot.width - plot.right, plot.base))
    marks.append(Mark("line", "bar95", plot.at_x(DEGRADED), plot.top - 4, plot.at_x(DEGRADED), plot.base))
    words = [Word(plot.at_x(v), plot.base + 15, f"{v:g}") for v in ticks(float(edges[0]), 1.0, 4) if v != 1.0]
    words.append(Word(plot.width - 4, plot.base + 15, "1", "end"))
    lost = [f"{percent(_below(_cosines(data, label)))} below 0.95" for data in shown]
    note = lost[0] if len(lost) == 1 else f"A {lost[0]}, B {lost[1]}"
    size = _cosines(shown[0], label).size
    title = f"{label_of(label)}, {size:,}"
    return Figure(title, f"{size:,} tokens: {note}", plot.width, plot.height, tuple(marks), tuple(words), note=note)


def _shares(cosines: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the rows in each bin; what lies left of the first edge counts in the first bin."""
    counts, _ = np.histogram(np.clip(cosines, edges[0], edges[-1]), edges)
    return counts / max(1, cosines.size)


def _below(cosines: NDArray[np.float32]) -> float | None:
    return float(np.mean(cosines < DEGRADED)) if cosines.size else None


def _bars(
    plot: Plot, shares: NDArray[np.float64], edges: NDArray[np.float64], rows: int, degraded: float = DEGRADED
) -> list[Mark]:
    marks = []
    for share, left, right in zip(shares.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if share > 0:
            x, high = plot.at_x(left), max(1.0, plot.base - plot.at_y(math.sqrt(share)))
            style = "bar low" if (left + right) / 2 < degraded else "bar"
            title = f"{left:.3f} to {right:.3f}: {round(share * rows):,} tokens"
            wide = round(plot.at_x(right) - x - 0.5, 1)
            marks.append(Mark("rect", style, x, round(plot.base - high, 1), wide, round(high, 1), title=title))
    return marks


def _outline(plot: Plot, shares: NDArray[np.float64], edges: NDArray[np.float64]) -> str:
    parts = [f"M{plot.at_x(edges[0])} {plot.base}"]
    for share, right in zip(shares.tolist(), edges[1:].tolist(), strict=True):
        parts.append(f"V{plot.at_y(math.sqrt(share))}H{plot.at_x(right)}")
    return "".join([*parts, f"V{plot.base}"])


@dataclass(frozen=True)
class _Box:
    """Quantiles of the cosines in one bin."""

    count: int
    p01: float
    p25: float
    p50: float
    p75: float


def _by_targets(data: PageData) -> dict[int, _Box]:
    rows = data.rows
    if rows is None or rows.cosine is None or rows.targets is None:
        return {}
    chosen = rows.live & np.isfinite(rows.cosine)
    bins = np.searchsorted(_TARGETS, rows.targets[chosen], side="right") - 1
    cosine = rows.cosine[chosen]
    found = {}
    for place in np.unique(bins).tolist():
        within = cosine[bins == place]
        found[int(place)] = _Box(int(within.size), *np.quantile(within, (0.01, 0.25, 0.5, 0.75)).tolist())
    return found


def _box(plot: Plot, x: float, half: float, box: _Box, style: str, name: str) -> list[Mark]:
    left, right, middle = plot.at_x(x - half), plot.at_x(x + half), plot.at_x(x)
    top, bottom = plot.at_y(box.p75), plot.at_y(box.p25)
    title = f"{name}{box.count:,} tokens: median {number(box.p50)}, middle half {number(box.p25)} to {number(box.p75)}"
    title = f"{title}, lowest 1 % under {number(box.p01)}"
    return [
        Mark("line", f"whisker {style}", middle, bottom, middle, plot.at_y(box.p01)),
        Mark("rect", f"box {style}", left, top, round(right - left, 1), max(1.0, round(bottom - top, 1)), title=title),
        Mark("line", f"median {style}", left, plot.at_y(box.p50), right, plot.at_y(box.p50)),
    ]


def _bar_95(plot: Plot) -> Mark:
    y = plot.at_y(DEGRADED)
    return Mark("line", "bar95" if plot.y[0] <= DEGRADED else "hidden", plot.left, y, plot.width - plot.right, y)


def _name(place: int, runs: int) -> str:
    return f"run {'AB'[place]}, " if runs == 2 else ""
