"""Recall of all tokens, estimated at each probe: what of the base is kept for it, and the latest estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocabguard.measure.recall import LogitMoments, estimate_recall, moment_features
from vocabguard.results import ProbeResult, Recall


@dataclass
class RecallEstimator:
    """Estimates from the logits of a probe and of a reading of the reference text.

    Attributes:
        base: (V, f) float32, features at the first probe; None before it.
        last: the latest estimate; None where none could be made.
    """

    base: Tensor | None = None
    last: Recall | None = None

    def measure(self, kinds: Sequence[LogitMoments], base: ProbeResult, now: ProbeResult, rows: int) -> Recall | None:
        """Estimate after a probe. The first call of a run sets the base.

        Args:
            kinds: logits at the probe's asks, and at the reference text's places if it is read.
            base: the probe at the base.
            now: the latest probe.
            rows: of the vocabulary that is watched.
        """
        features = _of_length(moment_features(kinds), rows)
        if self.base is None or self.base.shape[1] != features.shape[1]:
            self.base = features
        self.last = estimate_recall(torch.cat([_of_length(self.base, rows), features], dim=1), base, now)
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """The base's features and the latest estimate; empty before the first probe."""
        if self.base is None:
            return {}
        last = {} if self.last is None else {"last": dict(vars(self.last))}
        return {"base": self.base, **last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Without one, as in states of earlier versions, the next probe is the base."""
        if state:
            self.base = state["base"]
            self.last = Recall(**state["last"]) if "last" in state else None


def _of_length(features: Tensor, rows: int) -> Tensor:
    """(rows, f) float32: padded logits are cut off, and rows without a logit are unknown."""
    found = torch.full((rows, features.shape[1]), torch.nan)
    count = min(rows, len(features))
    found[:count] = features[:count]
    return found
