"""How much of a fine-tune's end can be read from its first part at all: the frontier that a forecast is held against.

For each fine-tune a network of the forecast's kind is fitted on how one half of its own rows ended, and asked about the
other half, in turn. No forecast can know that much: it has to be made before the end, from other fine-tunes. What is
still missed then is not in the numbers that the guard has of a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from early_fit import Member, train
from early_replay import Recorded

from vocabguard.measure.forecast import Floats
from vocabguard.measure.forecast_networks import LEVELS
from vocabguard.results import DEGRADED

_EPOCHS = 60
_MEDIAN = LEVELS.index(0.5)


def own_ends(run: Recorded, check: int) -> Floats:
    """(V,) logarithm of the angle at the end, of each live row by a network fitted on the other half's ends.

    Args:
        run: a fine-tune.
        check: index of the check whose numbers are looked at.

    Returns:
        NaN for rows that are not live.
    """
    inputs, growths = run.pair(check, run.last, "complete", 0)
    base = np.log(np.maximum(run.angle[run.last], 1e-4)) - growths
    live = np.flatnonzero(run.live)
    halves = np.array_split(np.random.default_rng(0).permutation(live), 2)
    found = np.full(len(inputs), np.nan, dtype=np.float32)
    for seen, asked in (halves, halves[::-1]):
        mean, scale = inputs[seen].mean(0), np.maximum(inputs[seen].std(0), 0.05)
        x = np.clip((inputs - mean) / scale, -4, 4)
        net = train(x[seen], growths[seen], 0, epochs=_EPOCHS, batch=256)
        found[asked] = _median_of(net, x[asked]) + base[asked]
    return found


def _median_of(net: Member, inputs: Floats) -> Floats:
    with torch.inference_mode():
        found: Floats = net(torch.from_numpy(inputs).float())[:, _MEDIAN].numpy()
    return found


def break_even(score: Floats, run: Recorded) -> float:
    """Precision when as many live rows are called as end degraded: then it equals recall; NaN if none does."""
    live, ends = run.live, run.end < DEGRADED
    count = int(ends[live].sum())
    if not count:
        return math.nan
    called = np.argsort(-score[live], kind="stable")[:count]
    return float(ends[live][called].mean())


def near(run: Recorded, within: float = 0.01) -> float:
    """Share of the rows ending degraded whose cosine ends within so much of the limit."""
    ends = run.end[run.live & (run.end < DEGRADED)]
    return float((ends > DEGRADED - within).mean()) if len(ends) else math.nan


def frontier_figures(run: Recorded, moment: float, score: Floats) -> dict[str, float]:
    """What the run's own ends make of its first part, beside a forecast's ranking.

    Args:
        run: a fine-tune, some of whose rows end degraded.
        moment: share of the steps.
        score: (V,) by which a forecast ranks the rows.
    """
    own = own_ends(run, run.at(moment))
    called, ends = run.live & (own >= math.log(math.acos(DEGRADED))), run.live & (run.end < DEGRADED)
    right = float((called & ends).sum())
    return {
        "precision": right / max(called.sum(), 1),
        "recall": right / max(ends.sum(), 1),
        "precision = recall": break_even(own, run),
        "precision = recall: ours": break_even(score, run),
        "within 0.01": near(run),
    }
