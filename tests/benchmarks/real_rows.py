"""Which measure of rows names the tokens that a real model has lost?

    python tests/benchmarks/real_rows.py CACHE WORK --choose constant/control-0 --report constant/control-2

CACHE is the folder of ``real_models.py``, whose runs must be judged; WORK keeps hidden states, and costs a minute or
two of asking for each run and moment. ``NAME@50`` takes the weights at half of the run, against the losses at its end.
The score is the AUROC of lost against kept tokens among those that the base repeats, with a bootstrap interval.
Measures are chosen on some runs and read on others; combinations are fitted on the chosen ones alone. ``ceiling`` is
what four more direct asks of the very same weights reach: of what the judge's neighbours decide nothing can be known.
``real/rows.json`` is of ``--choose constant/control-0 constant/control-1 --report constant/hold+echo0.10-0
tied/control-1``; with ``--again`` a run's ceiling is asked for once and kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import torch
from real.rowmeasures import Scores, candidates
from real.rowscores import Logistic, auroc, interval, ranks, together, top_share
from real.rowstates import Replays
from rich.console import Console
from rich.table import Table
from torch import Tensor

TEXT, COPY, RECALL = "text, frequent targets: log p now", "copying: log p now", "recall: 128 probed"
PAIRS = {"ranks: text + copying": (TEXT, COPY), "ranks: recall + copying": (RECALL, COPY)}
FITTED = {
    "logistic: text, copying, fall of copying": (TEXT, COPY, "copying: fall"),
    "logistic: those, recall, margin, best places": (
        TEXT, COPY, "copying: fall", RECALL, "neighbour: margin at asks", "text, a token's best places: fall",
    ),
}  # fmt: skip
CEILING = "ceiling: four more asks"


@dataclass(frozen=True)
class Scored:
    """A run at a moment: scores of the tokens that its base repeats.

    Attributes:
        never: (n,) bool, no data targets in the whole run.
        nats: (n,) float32, mean log-probability in the judge's asks at the end.
    """

    name: str
    percent: int
    scores: Scores
    lost: Tensor
    never: Tensor
    nats: Tensor

    def told(self, score: Tensor) -> dict[str, float]:
        """AUROC with its interval, among the never class too; lost of the worst tenth; rank correlation with nats."""
        low, high = interval(score, self.lost)
        both = torch.stack([ranks(-score), ranks(self.nats)])
        numbers = {
            "auroc": auroc(score, self.lost), "low": low, "high": high,
            "auroc_never": auroc(score[self.never], self.lost[self.never]),
            "lost_of_worst_tenth": top_share(score, self.lost), "spearman": float(torch.corrcoef(both)[0, 1]),
        }  # fmt: skip
        return {key: round(value, 4) for key, value in numbers.items()}


def scored(replays: Replays, name: str, again: bool) -> Scored:
    """Every candidate's score of a run, ``recipe/arm-seed`` or ``recipe/arm-seed@percent``."""
    run, _, percent = name.partition("@")
    found = replays.at(run, int(percent or 100), again=again)
    known = found.known
    scores = {key: value[known] for key, value in candidates(found).items()}
    scores |= {key: together(scores, pair) for key, pair in PAIRS.items()}
    if found.again is not None:
        scores[CEILING] = -found.again[known]
    never = (found.target[found.ids] == 0)[known]
    return Scored(run, int(percent or 100), scores, found.lost[known], never, found.nats[known])


def entries(runs: list[Scored], chosen: list[str]) -> list[dict[str, Any]]:
    """What the JSON holds, a run each."""
    ends = [(one.scores, one.lost) for one in runs if one.name in chosen and one.percent == 100]
    models = {key: Logistic(ends, names) for key, names in FITTED.items()}
    told = []
    for one in runs:
        scores = {**one.scores, **{key: model(one.scores) for key, model in models.items()}}
        told.append({
            "run": one.name, "percent": one.percent, "part": "chosen on" if one.name in chosen else "reported",
            "known": len(one.lost), "lost": int(one.lost.sum()),
            "measures": {key: one.told(score) for key, score in scores.items()},
        })  # fmt: skip
    return told


def show(told: list[dict[str, Any]], console: Console) -> None:
    """A line a measure, a column a run."""
    heads = [f"{one['run']}@{one['percent']}\n{one['part']}\n{one['lost']} of {one['known']}" for one in told]
    table = Table("AUROC (95 %), Spearman with nats", *heads)
    names = dict.fromkeys(name for one in told for name in one["measures"])
    for name in names:
        cells = []
        for one in told:
            found = one["measures"].get(name)
            cells.append("-" if found is None else "{auroc:.2f} ({low:.2f}-{high:.2f}) {spearman:.2f}".format(**found))
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--choose", nargs="+", default=["constant/control-0"])
    parser.add_argument("--report", nargs="*", default=[])
    parser.add_argument("--again", action="store_true", help="ask each run's end four times more, for the ceiling")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    replays = Replays(asked.cache, asked.work)
    runs = [scored(replays, name, asked.again) for name in [*asked.choose, *asked.report]]
    told = entries(runs, [name.partition("@")[0] for name in asked.choose])
    show(told, Console(width=60 + 28 * len(told), highlight=False))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
