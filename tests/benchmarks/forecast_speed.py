"""What a forecast costs beside the check that it belongs to.

    python tests/benchmarks/forecast_speed.py [--rows 200064] [--width 640] [--rounds 7]

One matrix of float32 rows; each round measures the drift of all rows, then forecasts them, by the process's own clock,
and the ratio is the median over rounds. ``OMP_NUM_THREADS=1``: numpy's threads wait for each other at the clock's cost.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn

from vocabguard.measure.drift import measure_drift
from vocabguard.measure.forecast import Asked, Moment, Past, RowFacts, past_of
from vocabguard.measure.forecast_networks import forecast_running
from vocabguard.results import Schedule
from vocabguard.rows.baselines import copy_baseline
from vocabguard.rows.matrices import VocabMatrix, find_matrices


class Pair(nn.Module):
    """An embedding and a head."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(4, width)
        self.out = nn.Linear(width, rows, bias=False)


def earlier(now: Past, times: int) -> Past:
    """Where rows were that went so many times as far since."""
    vectors = (vector / np.float32(times) for vector in (now.angle, now.own_angle, now.push))
    return Past(now.step // times, now.rate_sum / times, *vectors, now.push_samples // times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_064)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    count = arguments.rows
    model = Pair(count, arguments.width)
    matrix = find_matrices(model, "out", "words")["head"]
    assert isinstance(matrix, VocabMatrix)
    baseline = copy_baseline(matrix)
    with torch.no_grad():
        model.out.weight.add_(1e-3 * torch.randn_like(model.out.weight))
    targets = (torch.rand(count) < 0.1).long() * 7
    push = torch.rand(count)
    asked = Asked(targets, targets, targets - 1, push, push, push * 0, 5, targets * 9, True, float(targets.sum()) / 20)
    rows = RowFacts(
        baseline.norms, torch.arange(count).remainder(12).to(torch.uint8), push > 0.01, arguments.width, False
    )
    schedule = Schedule(20, 200, 0.2, 0.002, 1.8, 0.018, "adam", 1000.0)
    spent: dict[str, list[float]] = {"drift": [], "forecast": []}
    for _ in range(arguments.rounds):
        began = time.process_time()
        drift = measure_drift(matrix, baseline, targets == 0)
        measured = time.process_time()
        now = past_of(20, 0.2, drift, rows.norm, asked.push, asked.push_samples)
        before = tuple(earlier(now, k) for k in (2, 4))
        forecast_running(Moment(rows, (now, *before), asked, schedule, drift.norm_ratio.numpy()))
        spent["drift"].append(measured - began)
        spent["forecast"].append(time.process_time() - measured)
    ratios = [one / other for one, other in zip(spent["forecast"], spent["drift"], strict=True)]
    for name, seconds in spent.items():
        print(f"{name:10s} {min(seconds):.3f} {statistics.median(seconds):.3f} {max(seconds):.3f} s (min, median, max)")
    print(f"a forecast costs {statistics.median(ratios):.2f}x of a drift check of {count:,} rows x {arguments.width}")


if __name__ == "__main__":
    main()
