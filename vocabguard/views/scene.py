"""What an alert is about, taken apart: the ground that its story and its advice stand on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vocabguard.alerts.keys import PREFIX, part_of, short_key, values_by_part
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.transitions import Transition
from vocabguard.views.wording import LARGE_GROUP, percent

Switch = Literal["on", "armed", "absent"]
Kind = Literal["degraded", "at risk", "turned", "broken", "asked", "targets", "forgotten", "confused", "other"]

NAMED = 4
"""Parts that a sentence names; more are counted."""

COSINES = {
    "cosine_mean": "on average at cosine {} to the base model's",
    "cosine_min": "down to cosine {} to the base model's",
    "cosine_p01": "in their worst hundredth at cosine {} to the base model's or below",
    "residual_p01": "beyond the shift that all rows share, in their worst hundredth at cosine {} to the base model's",
}


@dataclass(frozen=True)
class Scene:
    """What is known of the run when an alert has news.

    Attributes:
        scalars: logged keys and values of the check, or of the last one.
        live: live rows.
        rows: live rows of each script group and exposure class.
        unasked: of those, rows that have not been a target of the data so far; empty where nothing is counted.
        targets: targets of the data so far; 0 where nothing is counted.
        total: planned optimizer steps, if known.
        echo: whether echo is on, could be switched on, or is no part of the run.
        hold: the same of hold.
    """

    scalars: Mapping[str, float]
    live: int
    rows: Mapping[str, int] = field(default_factory=dict)
    unasked: Mapping[str, int] = field(default_factory=dict)
    targets: int = 0
    total: int | None = None
    echo: Switch = "absent"
    hold: Switch = "absent"

    def scalar(self, key: str) -> float:
        """A logged value by its key without ``vocabguard/``; NaN where it is missing."""
        return self.scalars.get(PREFIX + key, math.nan)

    def worst(self, key: str, *, lowest: bool = False) -> dict[str, float]:
        """Values of groups under a key with ``*``, the three worst of those that are large enough to be named."""
        found = values_by_part(key, {short_key(name): value for name, value in self.scalars.items()})
        large = [(name, value) for name, value in found.items() if self.rows.get(name, 0) >= LARGE_GROUP]
        large.sort(key=lambda item: (item[1] if lowest else -item[1], item[0]))
        return dict(large[:3])

    def listed(self, shares: Mapping[str, float]) -> str:
        """Parts with their shares of rows, and how many those are."""
        shown = []
        for name, share in list(shares.items())[:NAMED]:
            size = self.rows.get(name)
            of = f" {count(share, size):,} of {size:,} rows" if size else ""
            shown.append(f"{name}{of} ({percent(share)})")
        return joined(shown, len(shares))

    @property
    def end(self) -> str:
        """The end of the run, in parentheses, where it is known."""
        return f" (step {self.total:,})" if self.total else ""


@dataclass(frozen=True)
class About:
    """What a transition is about.

    Attributes:
        change: the transition.
        scene: what is known of the run.
        kind: what sort of trouble it is.
        owner: first piece of the key.
        last: its last piece.
        values: of the groups, classes or languages concerned, worst first; empty where it is about the whole.
        lost: rows concerned; None where it is not about rows.
        of_rows: live rows that the rule looks at.
    """

    change: Transition
    scene: Scene
    kind: Kind
    owner: str
    last: str
    values: Mapping[str, float]
    lost: int | None
    of_rows: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts concerned."""
        return tuple(self.values)

    @property
    def inside(self) -> str:
        """The parts concerned, as what follows a noun."""
        return f" in {joined(self.parts)}" if self.parts else ""

    @property
    def share(self) -> float | None:
        """Rows concerned over the rows that the rule looks at, in [0, 1]."""
        known = self.lost is not None and self.of_rows and self.kind != "broken"
        return self.lost / self.of_rows if self.lost is not None and known else None


def about_of(change: Transition, scene: Scene) -> About:
    """A transition, taken apart.

    Args:
        change: the transition.
        scene: what is known of the run.
    """
    key = short_key(change.metric)
    owner, last, part = key.split("/")[0], key.split("/")[-1], part_of(key)
    values = dict(change.parts) or ({} if part is None else {part: change.value})
    kind = _kind(owner, last)
    of_rows = sum(scene.rows.get(name, 0) for name in values) if values else scene.live
    lost = None
    if kind in ("degraded", "at risk"):
        lost = sum(count(value, scene.rows.get(name, 0)) for name, value in values.items())
        lost = lost if values else count(change.value, scene.live)
    elif kind == "asked":
        lost = count(change.value, scene.live)
    elif kind == "broken":
        lost = count(sum(values.values()) if values else change.value, 1)
    return About(change, scene, kind, owner, last, values, lost, of_rows)


def count(share: float, rows: int) -> int:
    """So many of the rows; 0 where the share is not known."""
    return round(share * rows) if math.isfinite(share) else 0


def joined(names: Sequence[str], total: int | None = None) -> str:
    """The first names, and how many more there are."""
    more = (len(names) if total is None else total) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _kind(owner: str, last: str) -> Kind:
    kinds: tuple[tuple[Kind, bool], ...] = (
        ("confused", owner == "confusion"),
        ("forgotten", owner == "probe" and last in ("retained", "watch")),
        ("asked", owner == "exposure" and last in EXPOSURE_CLASSES),
        ("targets", owner == "exposure" and last == "targets"),
        ("broken", last in ("nonfinite_rows", "zero_rows")),
        ("turned", last in COSINES),
        ("at risk", owner == "forecast" and last.startswith("below_")),
        ("degraded", last.startswith("below_")),
    )
    return next((kind for kind, here in kinds if here), "other")
