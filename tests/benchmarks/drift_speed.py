"""Time of one drift check, against reading both matrices once and against ``F.cosine_similarity``.

    python tests/benchmarks/drift_speed.py [--rows 200064] [--width 640] [--rounds 15] [--threads 2]

All are timed in one process, alternating, so that a busy machine hits them alike; medians and minima are printed, and
the median over rounds of each round's ratio to the read before it. "read" sums both matrices as int64: every byte is
loaded once and next to nothing is computed, so it is limited by memory alone (a sum in bfloat16 is never faster).
A check is all of `measure_drift`: products, residual cosine, cosine, lengths, with the baseline's norms cached as in a
run. Half of the rows are unexposed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vocabguard.measure.drift import measure_drift, summarise
from vocabguard.rows.baselines import CopiedBaseline


def matrices(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=generator)
    now = base + 0.1 * torch.randn(rows, width, generator=generator) + 0.05
    return base.to(dtype), now.to(dtype)


def alternate(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round; one round before is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def report(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        ratios = [value / read for value, read in zip(values, seconds["read"], strict=True)]
        print(
            f"  {name:24}  median {statistics.median(values):.4f} s   min {min(values):.4f} s   "
            f"x read: {statistics.median(ratios):6.2f} (of minima {min(values) / min(seconds['read']):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_064)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[512, 1024, 2048])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    unexposed = torch.rand(args.rows, generator=torch.Generator().manual_seed(1)) < 0.5
    parts = {str(part): torch.arange(args.rows) % 17 == part for part in range(17)}
    for dtype in (torch.float32, torch.bfloat16):
        base, now = matrices(args.rows, args.width, dtype)
        baseline, matrix = CopiedBaseline(base), CopiedBaseline(now)
        drift = measure_drift(matrix, baseline, unexposed)
        works: dict[str, Callable[[], object]] = {
            "read": lambda base=base, now=now: (base.view(torch.int64).sum(), now.view(torch.int64).sum()),
            "sum in its own dtype": lambda base=base, now=now: (base.sum(), now.sum()),
        }
        for size in args.chunk_rows:
            works[f"check, chunks of {size}"] = lambda m=matrix, b=baseline, n=size: measure_drift(m, b, unexposed, n)
        works["summary of 17 parts"] = lambda drift=drift: summarise(drift, unexposed, parts)
        works["F.cosine_similarity"] = lambda base=base, now=now: cosine_similarity(base, now)
        print(f"{dtype}, {args.rows} x {args.width}, {args.threads} threads, {args.rounds} rounds")
        report(alternate(works, args.rounds))


if __name__ == "__main__":
    main()
