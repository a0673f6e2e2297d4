"""Time of the nearest rows of some tokens, then and now.

    python tests/benchmarks/neighbors_speed.py [--rows 200000] [--width 4096] [--tokens 50] [--k 10] [--dtype bfloat16]

Both matrices are random; the second is the first with a little noise, so that they share most neighbours. Reading both
once is timed too: less than that is impossible.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch

from vocabguard.measure.neighbors import compare_neighbors
from vocabguard.rows.baselines import CopiedBaseline

_PART = 4096


def matrix(rows: int, width: int, dtype: torch.dtype, noise: float) -> CopiedBaseline:
    """Made in parts: a float32 copy of the whole would need twice the memory of the matrix itself."""
    whole = torch.empty(rows, width, dtype=dtype)
    for start in range(0, rows, _PART):
        part = whole[start : start + _PART]
        base = torch.randn(part.shape, generator=torch.Generator().manual_seed(start))
        part.copy_(base + noise * torch.randn(part.shape, generator=torch.Generator().manual_seed(start + 1)))
    return CopiedBaseline(whole)


def seconds(work: Callable[[], object], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    base, now = (matrix(given.rows, given.width, dtype, noise) for noise in (0.0, 0.3))
    ids = torch.randperm(given.rows, generator=torch.Generator().manual_seed(0))[: given.tokens]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = seconds(lambda: [one.tensor.view(torch.uint8).view(-1).view(torch.int64).sum() for one in (base, now)], 1)
    took = seconds(lambda: compare_neighbors(now, base, ids, given.k), given.rounds)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    print(f"{given.tokens} of {given.rows:,} x {given.width}, {given.dtype}, {torch.get_num_threads()} threads:")
    print(f"  both matrices read once {read:.2f} s; neighbours then and now {took:.2f} s; {more:.0f} MiB more memory")


if __name__ == "__main__":
    main()
