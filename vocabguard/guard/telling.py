"""Gives alerts that fire their stories: what of the run a person must know, and the worst of the tokens concerned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vocabguard.forecasts import Forecast
from vocabguard.guard import summary
from vocabguard.guard.probing import Prober
from vocabguard.guard.protection import Protection
from vocabguard.measure.probe import said
from vocabguard.results import CheckResult, Exposure, NotApplicable, RowDrift
from vocabguard.transitions import Transition
from vocabguard.views.scene import About, Scene, Switch, about_of
from vocabguard.views.story import story_of
from vocabguard.views.wording import visible
from vocabguard.vocabulary import VocabTable

WORST = 5
"""Tokens that a story names."""


@dataclass(frozen=True)
class Teller:
    """Tells the stories of one check's alerts.

    Attributes:
        found: the check, or the last one.
        table: groups and texts.
        groups: (V,) bool masks by script group.
        prober: of the run, if it is probed.
        protection: echo and hold, where they are part of the run.
        total: planned optimizer steps, if known.
    """

    found: CheckResult
    table: VocabTable
    groups: Mapping[str, Tensor]
    prober: Prober | None
    protection: Protection | None
    total: int | None

    def tell(self, changes: Iterable[Transition]) -> tuple[Transition, ...]:
        """The transitions, those that fire with their stories."""
        changes = tuple(changes)
        if not any(change.state == "firing" for change in changes):
            return changes
        scene = self._scene()
        return tuple(self._told(change, scene) if change.state == "firing" else change for change in changes)

    def _told(self, change: Transition, scene: Scene) -> Transition:
        ids = self._worst(about_of(change, scene))
        return replace(change, story=story_of(change, scene, [visible(self.table.text(token)) for token in ids]))

    def _scene(self) -> Scene:
        live, exposure = self.table.live, self.found.exposure
        masks = self._masks
        counted = isinstance(exposure, Exposure)
        unasked = live & (exposure.data_target == 0) if isinstance(exposure, Exposure) else live
        return Scene(
            scalars=self.found.scalars,
            live=int(live.sum()),
            rows={name: int((mask & live).sum()) for name, mask in masks.items()},
            unasked={name: int((mask & unasked).sum()) for name, mask in masks.items()} if counted else {},
            targets=int(exposure.data_target.sum()) if isinstance(exposure, Exposure) else 0,
            total=self.total,
            echo=self._switch("echo"),
            hold=self._switch("hold"),
        )

    @cached_property
    def _masks(self) -> dict[str, Tensor]:
        return {**self.groups, **summary.class_masks(self.found.classes)}

    def _switch(self, kind: str) -> Switch:
        part = None if self.protection is None else getattr(self.protection, "echo" if kind == "echo" else "holder")
        return "absent" if part is None else "on" if part.on else "armed"

    def _worst(self, about: About) -> list[int]:
        """Ids of the worst live tokens concerned, worst first."""
        found = self.found
        mask = self._concerned(about)
        if about.kind == "forgotten":
            return self._forgotten(mask, watched=about.last == "watch")
        drift = found.embedding if about.owner == "embedding" else found.head
        drift = found.embedding if isinstance(drift, NotApplicable) else drift
        if isinstance(drift, NotApplicable) or about.kind in ("targets", "confused", "other"):
            return []
        if about.kind == "broken":
            broken = drift.bad if about.last == "nonfinite_rows" else drift.zero
            return (mask & broken).nonzero().flatten()[:WORST].tolist()
        return summary.lowest(self._ranking(about, drift), mask, WORST).tolist()

    def _ranking(self, about: About, drift: RowDrift) -> Tensor:
        if about.owner == "forecast" and isinstance(self.found.forecast, Forecast):
            return self.found.forecast.cosine
        return drift.residual if about.last == "residual_p01" else drift.cosine

    def _concerned(self, about: About) -> Tensor:
        masks = self._masks
        names = (about.last,) if about.kind == "asked" else about.parts
        chosen = [masks[name] for name in names if name in masks]
        return self.table.live & torch.stack(chosen).any(0) if chosen else self.table.live

    def _forgotten(self, mask: Tensor, *, watched: bool) -> list[int]:
        """Of the tokens that the last probe no longer found, those of lowest probability."""
        prober = self.prober
        if prober is None or prober.base is None or prober.last is None:
            return []
        lost = said(prober.base) & ~said(prober.last)
        ids = prober.last.ids
        lost &= torch.isin(ids, prober.watched) if watched else mask[ids]
        return ids[summary.lowest(prober.last.probability.mean(1), lost, WORST)].tolist()
