"""The recorded fine-tunes of ``early_runs.py``, as the guard saw them at a check."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from early_runs import HELD_OUT_DATA, HELD_OUT_OPTIMIZER, Setup

from vocabguard.measure.forecast import (
    SMALLEST_ANGLE,
    Asked,
    Floats,
    Past,
    RowFacts,
    keep,
    past_of,
    running_features,
    starting_features,
    track,
)
from vocabguard.results import RowDrift, Schedule

Prior = Literal["complete", "sample", "none"]
PRIORS: tuple[Prior, ...] = ("complete", "sample", "none")
MEMORY = {"adamw": 1000.0, "adamw95": 20.0, "adamw0": 1000.0, "rmsprop": 100.0, "sgd": 0.0}


@dataclass(frozen=True)
class Recorded:
    """One fine-tune.

    Attributes:
        setup: its configuration.
        found: what the file holds.
    """

    setup: Setup
    found: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Read a file of ``early_runs.run``."""
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        fields = {name.removeprefix("setup/"): found[name].item() for name in found if name.startswith("setup/")}
        return cls(Setup(**fields), found)

    @property
    def held_out(self) -> bool:
        """Whether fitting must not see it."""
        return self.setup.data == HELD_OUT_DATA or self.setup.optimizer == HELD_OUT_OPTIMIZER

    @property
    def last(self) -> int:
        """Index of the last check."""
        return len(self.found["step"]) - 1

    @property
    def live(self) -> np.ndarray:
        """(V,) bool."""
        live: np.ndarray = self.found["live"]
        return live

    @cached_property
    def end(self) -> Floats:
        """(V,) cosine at the end."""
        end: Floats = self.found["cosine"][-1]
        return end

    @cached_property
    def rows(self) -> RowFacts:
        """What does not change."""
        found = self.found
        norm, group, live = (torch.from_numpy(found[name]) for name in ("base_norm", "group", "live"))
        return RowFacts(norm, group, live, int(found["width"]), self.setup.tied)

    @cached_property
    def places(self) -> list[Past]:
        """Where the rows were at each check."""
        steps, sums = self.found["step"].tolist(), self._sums[0]
        norm = self.rows.norm
        pushes, samples = self.found["push"], self.found["push_samples"].tolist()
        return [
            past_of(step, float(sums[step]), self._drift(at), norm, torch.from_numpy(pushes[at]), samples[at])
            for at, step in enumerate(steps)
        ]

    @property
    def angle(self) -> list[Floats]:
        """The angle of every row at each check."""
        return [place.angle for place in self.places]

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        rates = self.found["rates"]
        return tuple(np.concatenate([[0.0], np.cumsum(one)]) for one in (rates, rates**2))  # type: ignore[return-value]

    def at(self, share: float) -> int:
        """The check nearest to a share of the steps."""
        steps = self.found["step"]
        return int(np.argmin(np.abs(steps - share * steps[-1])))

    def schedule(self, check: int, end: int | None = None) -> Schedule:
        """Rates at a check, for a run that ends at another."""
        step, total = (int(self.found["step"][one]) for one in (check, self.last if end is None else end))
        sums, squares = self._sums
        optimizer = "sgd" if self.setup.optimizer == "sgd" else "adam"
        # Adafactor's second moment takes in 1 / t^0.8 of the newest step.
        memory = MEMORY.get(self.setup.optimizer, (step or total) ** 0.8)
        left = float(sums[total] - sums[step]), float(squares[total] - squares[step])
        return Schedule(step, total, float(sums[step]), float(squares[step]), *left, optimizer, memory)

    def asked(self, check: int, prior: Prior = "complete", seed: int = 0) -> Asked:
        """Targets, inputs and gradients at a check."""
        found = self.found
        vectors = {name: torch.from_numpy(found[name][check].astype(kind)) for name, kind in _KINDS.items()}
        step = int(found["step"][check])
        counted = found["prior"]
        if prior == "sample":
            share = np.random.default_rng(seed).uniform(0.1, 0.6)
            counted = np.random.default_rng(seed).binomial(counted, share)
        per_step = found["data_target"][check].sum() / step if step else found["prior"].sum() / found["step"][-1]
        return Asked(
            targets=vectors.pop("data_target"),
            **vectors,
            push_samples=int(found["push_samples"][check]),
            prior=None if prior == "none" else torch.from_numpy(counted),
            complete=prior == "complete",
            per_step=float(per_step),
        )

    @property
    def gradients(self) -> bool:
        """Whether pull and push were read."""
        return bool(self.found["push_samples"][-1] > 0)

    def pasts(self, check: int, seen: Collection[int] | None = None) -> tuple[Past, ...]:
        """What the guard would have kept up to a check, had it looked at all checks, or at those `seen` only."""
        pasts: tuple[Past, ...] = ()
        for index, place in enumerate(self.places[: check + 1]):
            if place.rate_sum > 0 and (seen is None or index in seen or index == check):
                pasts = keep(pasts, place)
        return pasts

    def running(
        self, check: int, end: int | None = None, prior: Prior = "complete", seed: int = 0, *,
        seen: Collection[int] | None = None, blind: bool = False,
    ) -> Any:  # fmt: skip
        """What `forecast_networks.forecast_running` takes; None where nothing is known from before.

        Args:
            check: at which it is made.
            end: the check that stands for the end of the run.
            prior: what was counted beforehand.
            seed: of a sample counted beforehand.
            seen: checks that the guard made; None for all.
            blind: leave out what gradients tell.
        """
        pasts, schedule = self.pasts(check, seen), self.schedule(check, end)
        known, asked = track(pasts[:-1], pasts[-1]) if pasts else None, self.asked(check, prior, seed)
        if known is None:
            return None
        if blind:
            none = torch.zeros_like(asked.push)
            asked = replace(asked, pull=none, push=none, input_only=none, push_samples=0)
            known = tuple(replace(past, push=none.numpy(), push_samples=0) for past in known)
        return self.rows, known, asked, schedule, self.found["norm_ratio"][check]

    def starting(self, end: int | None = None, prior: Prior = "complete", seed: int = 0) -> Any:
        """What `forecast_networks.forecast_starting` takes."""
        asked = self.asked(0, prior, seed)
        if end is not None and prior == "complete":
            # Of a run that ends earlier, the data is what it came to see.
            asked = replace(asked, prior=torch.from_numpy(self.found["data_target"][end].astype(np.int64)))
        return self.rows, asked, self.schedule(0, end)

    def pair(
        self, check: int, end: int, prior: Prior, seed: int, *, seen: Collection[int] | None = None,
        blind: bool = False,
    ) -> tuple[Floats, Floats] | None:  # fmt: skip
        """Numbers of every row at a check, and the logarithm of how its angle grew up to another; see `running`."""
        if not check:
            inputs, base = starting_features(*self.starting(end, prior, seed))
        else:
            known = self.running(check, end, prior, seed, seen=seen, blind=blind)
            if known is None:
                return None
            inputs, base = running_features(*known)
        return inputs, np.log(np.maximum(self.angle[end], SMALLEST_ANGLE)) - base

    def _drift(self, check: int) -> RowDrift:
        names = ("cosine", "residual", "l2", "norm_ratio")
        vectors = {name: torch.from_numpy(self.found[name][check]) for name in names}
        none = torch.zeros(len(self.live), dtype=torch.bool)
        return RowDrift(**vectors, bad=none, zero=none)


_KINDS = {
    "data_target": np.int64,
    "inputs": np.int64,
    "last_target": np.int64,
    "pull": np.float32,
    "push": np.float32,
    "input_only": np.float32,
}
