"""What estimating the recall of all tokens adds to a probe of a real model.

    python tests/benchmarks/recall_speed.py CACHE [--models smollm2 gemma3] [--rounds 5] [--json F]

CACHE is the folder of ``real_models.py``. Probes with and without it, in turn, by the process's own clock; then the
regression over all rows, which comes once a probe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from real.models import SOURCES, load_base
from real.probing import prober_of
from rich.console import Console

from vocabguard.measure.contexts import asked_in
from vocabguard.measure.probe import probe
from vocabguard.measure.recall import LogitMoments, estimate_recall, moment_features
from vocabguard.results import ProbeResult


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gives."""
    began = time.process_time()
    found = call()
    return time.process_time() - began, found


def measured(cache: Path, name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds and ratios of one model.

    Returns:
        ``ratio``: a probe that sums up logits over one that does not, each round and the median; ``regression``: CPU
        seconds of the regression over all rows, as a share of a plain probe too.
    """
    model, tokenizer = load_base(cache, name)
    prober = prober_of(model.eval(), tokenizer, tokens, seed=0)
    asks = asked_in(prober.pool[:2], 2)

    def ask(moments: LogitMoments | None) -> ProbeResult:
        return probe(model, prober.ids, asks, seed=0, batch_tokens=4096, moments=moments)

    base = ask(None)
    ratios, plain, regression = [], [], []
    for _ in range(rounds):
        without, _ = seconds(lambda: ask(None))
        moments = LogitMoments()
        with_it, now = seconds(lambda moments=moments: ask(moments))
        both = moment_features([moments]).repeat(1, 2)
        spent, _ = seconds(lambda both=both, now=now: estimate_recall(both, base, now))
        ratios.append(with_it / without)
        plain.append(without)
        regression.append(spent)
    return {
        "model": name, "rows": len(both), "tokens": len(prober.ids), "asks": len(asks),
        "probe": statistics.median(plain), "ratios": ratios, "ratio": statistics.median(ratios),
        "regression": statistics.median(regression),
        "regression_share": statistics.median(regression) / statistics.median(plain),
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--models", nargs="+", choices=sorted(SOURCES), default=["smollm2"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = [measured(asked.cache, name, asked.tokens, asked.rounds) for name in asked.models]
    Console(highlight=False).print(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
