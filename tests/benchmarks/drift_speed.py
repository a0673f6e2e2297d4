"""CPU time of one drift check, against the fastest kernels for one cosine a row and against ``F.cosine_similarity``.

    pip install simsimd numkong
    python tests/benchmarks/drift_speed.py [--rows 200064] [--width 640] [--rounds 15] [--threads 1] [--numpy]

The kernels are those of SimSIMD and NumKong that are installed: they take one cosine a row, and read each byte once.
The fastest of them, by the median, is what the others are compared with, round by round: all take turns in one process,
so that a busy machine hits them alike, and CPU seconds are compared, which other work on the machine changes little.
"read" sums both matrices as int64. "pass" is all sums of a check in one pass over the rows; a check is all of
`measure_drift`: a sample for the mean displacement, the pass, residual cosine, cosine, lengths, with the baseline's
norms cached as in a run. Half of the rows are unexposed. ``--numpy`` does without the compiled loops of the extra
``fast``. Also printed: the largest error of the check's cosine against float64, and that of each kernel.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vocabguard.measure.drift import mean_shift, measure_drift, summarise
from vocabguard.measure.kernels import row_sums
from vocabguard.rows.baselines import CopiedBaseline

KERNELS = (("simsimd", "cosine"), ("numkong", "angular"))
CHECKED = 8192


def matrices(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=generator)
    now = base + 0.1 * torch.randn(rows, width, generator=generator) + 0.05
    return base.to(dtype), now.to(dtype)


def alternate(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each work in each round; one round before is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    return {name: values[1:] for name, values in seconds.items()}


def row_kernels(base: Tensor, now: Tensor) -> dict[str, Callable[[int], Any]]:
    """Of each library that is installed, the call that takes the cosine distances of the first rows."""
    found: dict[str, Callable[[int], Any]] = {}
    bits = (lambda rows: rows.view(torch.int16).numpy().view(np.uint16)) if base.itemsize == 2 else Tensor.numpy
    one, other, kind = bits(base), bits(now), "bf16" if base.itemsize == 2 else "f32"
    for library, function in KERNELS:
        try:
            call = getattr(importlib.import_module(library), function)
        except ImportError:
            continue
        names = (kind, {"f32": "float32", "bf16": "bfloat16"}[kind])
        for name in names:
            try:
                call(one[:2], other[:2], name)
            except (TypeError, ValueError):
                continue
            found[f"{library}.{function}"] = lambda rows, call=call, name=name: call(one[:rows], other[:rows], name)
            break
    return found


def report(seconds: dict[str, list[float]], fastest: str) -> None:
    for name, values in seconds.items():
        ratios = [value / least for value, least in zip(values, seconds[fastest], strict=True)]
        print(
            f"  {name:24}  median {statistics.median(values):.4f} s   min {min(values):.4f} s   "
            f"x {fastest}: {statistics.median(ratios):6.2f} (of minima {min(values) / min(seconds[fastest]):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_064)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[1024])
    parser.add_argument("--numpy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.numpy:
        sys.modules["numba"] = None  # type: ignore[assignment]
    unexposed = torch.rand(args.rows, generator=torch.Generator().manual_seed(1)) < 0.5
    parts = {str(part): torch.arange(args.rows) % 17 == part for part in range(17)}
    for dtype in (torch.float32, torch.bfloat16):
        base, now = matrices(args.rows, args.width, dtype)
        baseline, matrix = CopiedBaseline(base), CopiedBaseline(now)
        drift = measure_drift(matrix, baseline, unexposed)
        shift = mean_shift(matrix, baseline, unexposed)
        kernels = row_kernels(base, now)
        works: dict[str, Callable[[], object]] = {
            "read": lambda base=base, now=now: (base.view(torch.int64).sum(), now.view(torch.int64).sum()),
            **{name: lambda call=call: call(args.rows) for name, call in kernels.items()},
            "pass": lambda m=matrix, b=baseline, s=shift: row_sums(m, b, s, 1024),
        }
        for size in args.chunk_rows:
            works[f"check, chunks of {size}"] = lambda m=matrix, b=baseline, n=size: measure_drift(m, b, unexposed, n)
        works["summary of 17 parts"] = lambda drift=drift: summarise(drift, unexposed, parts)
        works["F.cosine_similarity"] = lambda base=base, now=now: cosine_similarity(base, now)
        print(f"{dtype}, {args.rows} x {args.width}, {args.threads} threads, {args.rounds} rounds, CPU seconds")
        exact = cosine_similarity(base[:CHECKED].double(), now[:CHECKED].double())
        errors = {"check": (drift.cosine[:CHECKED].double() - exact).abs().max()}
        for name, call in kernels.items():
            errors[name] = (1 - torch.from_numpy(np.array(call(CHECKED)).ravel()).double() - exact).abs().max()
        print("  largest error of a cosine: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        seconds = alternate(works, args.rounds)
        report(seconds, min(kernels or ["read"], key=lambda name: statistics.median(seconds[name])))


if __name__ == "__main__":
    main()
