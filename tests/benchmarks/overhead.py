"""What watching costs a training run: guarded and bare steps of one model, in pairs, timed from outside.

``python tests/benchmarks/overhead.py`` takes a few minutes (1,000 pairs of steps of 0.05-0.1 s). Steps near 0.5 s:
``python tests/benchmarks/overhead.py --batch 20 --tokens 80 --pairs 200``. What the method finds where there is nothing
to find: ``--null``.

**What is timed.** One step is forward, backward, clipping, AdamW, zero_grad and, if guarded, `VocabGuard.step`; the
clock is read before and after the whole of it. The share is (guarded - bare) / bare of the summed times. Inside it are
the counts of each batch, the pull of each gradient, the push where it is sampled, and the checks and probes that the
guard's default settings (or ``--config``) really make, with their run log, TensorBoard events and console lines. The
guard plans for the steps of this very run, and its last step carries a check and a probe, as every run's does: in a
run of few pairs that one probe weighs much.

**What is not.** `attach` (baseline, table, first probe; printed apart), `finish`, preflight, state saved in
checkpoints, drawing the terminal (lines are rendered, then dropped), and half of what TensorBoard's writer thread does
later, since it falls into bare steps as often as into guarded ones. The same holds for caches that a check leaves cold.

**Against bias.** One model serves both sides: two copies differ by where they lie in memory, which can cost more than
the guard. Both steps of a pair take the same batch, in an order drawn by lot. In bare steps the guard's hooks are off
and it is not called, so its cadence counts guarded steps only; hooks are set and removed outside the clock. The guard
first sees as many uninterrupted steps as it settles on, so it times and chooses as in a real run. The same steps warm
up memory and optimizer. What exists by then is frozen for the garbage collector, which stays on and is paid by both.
The guard's key ``vocabguard/overhead`` is about half of the truth here: its clock also runs over the bare steps.

**The parts.** What the hooks cost is the difference between the steps of a pair, less what `VocabGuard.step` took
longer than usual because it made a check; the probe is what the guard reports of it, the rest of the check is the
check. The interval is a bootstrap over pairs within their kind (plain, push sampled, check, check with probe), since
the cadence, not chance, sets how many there are of each. The two figures for steps of 0.5 s are computed, not measured:
seconds of work by the guard's own clock, which a busy machine's noise can hide from the outer one, over 0.5 s.

The vocabulary is the example's for 8,192 rows, and a synthetic multilingual one of full size beyond: with padded rows
groups would be small and checks cheap. The weights are random, so the search for never-trained rows is off; no other
cost depends on them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from vocabulary_speed import byte_fallback

from vocabguard.guard import VocabGuard
from vocabguard.guard.cadence import Cadence

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
EXAMPLE_ROWS = 8192
LONG_STEP = 0.5
KINDS = ("plain", "push sampled", "check", "check and probe")
Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Pairs:
    """Seconds of every pair of steps, in order.

    Attributes:
        bare: (n,) the bare step.
        guarded: (n,) the guarded step.
        step_call: (n,) `VocabGuard.step` alone, from outside.
        probe: (n,) the probe in it, as the guard reports it; 0 where there was none.
        own: (n,) all of the guard's work in the step, by its own clock.
        kind: (n,) index into `KINDS`, as floats.
    """

    bare: Vector
    guarded: Vector
    step_call: Vector
    probe: Vector
    own: Vector
    kind: Vector

    @property
    def extra(self) -> Vector:
        """(n,) what `VocabGuard.step` took longer than usual because of a check; 0 without one."""
        checked = self.kind >= 2
        usual = float(np.median(self.step_call[~checked])) if (~checked).any() else 0.0
        return np.where(checked, self.step_call - usual, 0.0)

    def parts(self) -> dict[str, Vector]:
        """Seconds of the guard in every pair: hooks, checks, probes and their total, (n,) each."""
        total, extra = self.guarded - self.bare, self.extra
        return {"hooks": total - extra, "checks": extra - self.probe, "probes": self.probe, "total": total}


class Bench:
    """A model in training, whose steps can be guarded or bare.

    Args:
        rows: of the vocabulary.
        width: of a row.
        shape: (batch, tokens).
        seed: of weights, data and the order inside pairs.
    """

    def __init__(self, rows: int, width: int, shape: tuple[int, int], seed: int) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=rows, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=max(512, shape[1]), tie_word_embeddings=False, pad_token_id=0,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.rng = np.random.default_rng(seed)
        self._rows, self._shape = rows, shape
        self._order = self.rng.permutation(rows)

    def batch(self) -> Tensor:
        """(batch, tokens) int64 ids whose frequencies fall as one over their rank, as in text."""
        ranks = np.exp(self.rng.uniform(0.0, np.log(self._rows), self._shape)).astype(np.int64) - 1
        return torch.from_numpy(self._order[ranks])

    def train(self, ids: Tensor) -> None:
        """One optimizer step."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def bare_step(bench: Bench, ids: Tensor) -> float:
    """Seconds of a step without a guard."""
    began = time.perf_counter()
    bench.train(ids)
    return time.perf_counter() - began


def guarded_step(bench: Bench, guard: VocabGuard, ids: Tensor, step: int) -> tuple[float, ...]:
    """A step under guard: its seconds, and the further fields of `Pairs`."""
    assert guard._observer is not None and guard._checker is not None  # noqa: PT018
    guard._observer.hook_model(bench.model)
    guard._observer.hook_optimizers([bench.optimizer])
    own, samples = guard.timings.total, guard._observer.counter.push_samples
    began = time.perf_counter()
    bench.train(ids)
    trained = time.perf_counter()
    result = guard.step(step)
    ended = time.perf_counter()
    guard._observer.remove()
    probed = result is not None and result.probe is not None
    sampled = guard._observer.counter.push_samples > samples
    kind = 3 if probed else 2 if result is not None else int(sampled)
    probe = guard.timings.probe if probed else 0.0
    return ended - began, ended - trained, probe, guard.timings.total - own, float(kind)


def run_pairs(bench: Bench, guard: VocabGuard | None, pairs: int, first: int) -> Pairs:
    """Time pairs of steps; without a guard both steps of a pair are bare."""
    found = []
    for step in range(first, first + pairs):
        ids, seconds, rest = bench.batch(), [0.0, 0.0], (0.0, 0.0, 0.0, 0.0)
        for guarded in bench.rng.permutation(2).tolist():
            if guarded and guard is not None:
                seconds[1], *rest = guarded_step(bench, guard, ids, step)  # type: ignore[assignment]
            else:
                seconds[guarded] = bare_step(bench, ids)
        found.append([*seconds, *rest])
    return Pairs(*np.array(found).T)


def tokenizer_of(rows: int) -> Any:
    """The example's tokenizer, or a synthetic one that fills more rows."""
    return AutoTokenizer.from_pretrained(ASSETS) if rows == EXAMPLE_ROWS else byte_fallback(rows)


def attached(bench: Bench, arguments: argparse.Namespace, folder: Path) -> VocabGuard:
    """A guard that has settled: attached to the model, and through its first steps."""
    overrides = ("on_error=raise", "untrained.enabled=false")
    guard = VocabGuard(arguments.config, tokenizer=tokenizer_of(arguments.rows), overrides=overrides)
    settle = guard.config.cadence.settle_steps
    guard.attach(bench.model, bench.optimizer, total_steps=settle + arguments.pairs, run_dir=folder)
    for step in range(1, settle + 1):
        bench.train(bench.batch())
        guard.step(step)
    assert guard._observer is not None
    guard._observer.remove()
    return guard


def bootstrap(pairs: Pairs, rng: np.random.Generator, draws: int = 4000) -> dict[str, tuple[float, float]]:
    """95 % intervals of each part's share of a bare step, over pairs drawn anew within their kind."""
    strata = [np.flatnonzero(pairs.kind == kind) for kind in np.unique(pairs.kind)]
    parts, shares = pairs.parts(), []
    for _ in range(draws):
        chosen = np.concatenate([rng.choice(rows, len(rows)) for rows in strata])
        bare = pairs.bare[chosen].sum()
        shares.append([part[chosen].sum() / bare for part in parts.values()])
    low, high = np.quantile(shares, (0.025, 0.975), axis=0).tolist()
    return dict(zip(parts, zip(low, high, strict=True), strict=True))


def summarise(pairs: Pairs, rng: np.random.Generator) -> dict[str, Any]:
    """All figures: seconds, and shares of a bare step."""
    bare, parts = float(pairs.bare.sum()), pairs.parts()
    difference = pairs.guarded - pairs.bare
    intervals = bootstrap(pairs, rng)
    kinds = {}
    for index, name in enumerate(KINDS):
        if (chosen := pairs.kind == index).any():
            times = {"mean": difference[chosen].mean(), "median": np.median(difference[chosen])}
            times["own_clock"] = pairs.own[chosen].mean()
            kinds[name] = {"pairs": int(chosen.sum())} | {key: float(value) for key, value in times.items()}
    return {
        "pairs": len(pairs.bare),
        "bare_step": {"mean": float(pairs.bare.mean()), "median": float(np.median(pairs.bare))},
        "median_ratio": float(np.median(pairs.guarded / pairs.bare)) - 1,
        "own_clock_share": float(pairs.own.sum()) / bare,
        "parts": {
            name: {"seconds_a_step": float(part.mean()), "share": float(part.sum()) / bare, "interval": intervals[name]}
            for name, part in parts.items()
        },
        "kinds": kinds,
    }


def extrapolate(pairs: Pairs, guard: VocabGuard) -> dict[str, Any]:
    """Computed: shares of steps of 0.5 s, at this run's cadence and at the one chosen for such steps."""
    assert guard._checker is not None
    check = float(pairs.parts()["checks"][pairs.kind >= 2].mean())
    probe = float(pairs.probe[pairs.kind == 3].mean())
    slow = Cadence.of(guard.config, guard._cadence.total)
    slow.record(check=guard.timings.check, probe=guard.timings.probe)
    slow.choose(LONG_STEP)
    assert slow.every is not None and slow.probe_every is not None  # noqa: PT018
    hooks = float((pairs.own - pairs.extra).mean())
    return {
        "step": LONG_STEP,
        "same_cadence": float(pairs.own.mean()) / LONG_STEP,
        "own_cadence": (hooks + check / slow.every + probe / slow.probe_every) / LONG_STEP,
        "every": slow.every,
        "probe_every": slow.probe_every,
        "check_seconds": check,
        "probe_seconds": probe,
        "check_seconds_known_to_the_guard": guard.timings.check,
    }


@contextlib.contextmanager
def quiet_terminal() -> Iterator[None]:
    """Drop what is printed; it is rendered all the same."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the report."""
    bench = Bench(arguments.rows, arguments.width, (arguments.batch, arguments.tokens), arguments.seed)
    for _ in range(5):
        bench.train(bench.batch())
    with tempfile.TemporaryDirectory() as folder, quiet_terminal():
        began = time.perf_counter()
        guard = None if arguments.null else attached(bench, arguments, Path(folder) / "run")
        started = time.perf_counter() - began
        gc.collect()
        gc.freeze()
        pairs = run_pairs(bench, guard, arguments.pairs, 1 + (guard.steps if guard else 0))
        gc.unfreeze()
        report = {"settings": vars(arguments), "threads": torch.get_num_threads(), "torch": torch.__version__}
        report |= summarise(pairs, np.random.default_rng(arguments.seed))
        if guard is not None:
            report["attach_and_settle_seconds"] = started
            report["cadence"] = {"every": guard._cadence.every, "probe_every": guard._cadence.probe_every}
            report["extrapolated"] = extrapolate(pairs, guard)
            guard.finish(check=False)
    return report


def share_table(report: dict[str, Any]) -> Table:
    """Shares of a bare step, by part."""
    table = Table("part", "ms a step", "share", "95 % interval")
    cadence = report.get("cadence", {"every": "-", "probe_every": "-"})
    labels = {
        "hooks": "hooks, every step",
        "checks": f"checks, every {cadence['every']} steps",
        "probes": f"probes, every {cadence['probe_every']} steps",
        "total": f"total, {report['pairs']:,} pairs",
    }
    for name, part in report["parts"].items():
        low, high = part["interval"]
        row = (f"{part['seconds_a_step'] * 1e3:.3f}", f"{part['share']:.2%}", f"{low:.2%} to {high:.2%}")
        table.add_row(labels[name], *row)
    table.add_row("median of the pairs' ratios", "", f"{report['median_ratio']:.2%}", "")
    table.add_row("guard's own clock", "", f"{report['own_clock_share']:.2%}", "")
    if long := report.get("extrapolated"):
        table.add_row(f"computed for {long['step']} s steps, this cadence", "", f"{long['same_cadence']:.2%}", "")
        cadence_label = f"check {long['every']}, probe {long['probe_every']}"
        table.add_row(f"computed for {long['step']} s steps, {cadence_label}", "", f"{long['own_cadence']:.2%}", "")
    return table


def kind_table(report: dict[str, Any]) -> Table:
    """Differences inside pairs, by what the guard did."""
    table = Table("guarded - bare, ms", "pairs", "mean", "median", "guard's own clock")
    for name, kind in report["kinds"].items():
        times = (f"{kind[key] * 1e3:.3f}" for key in ("mean", "median", "own_clock"))
        table.add_row(name, f"{kind['pairs']:,}", *times)
    return table


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=EXAMPLE_ROWS, help=f"at least {EXAMPLE_ROWS}")
    for name, default in (("width", 128), ("batch", 4), ("tokens", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--config", help="a preset or YAML file of the guard's; default settings otherwise")
    parser.add_argument("--null", action="store_true", help="no guard at all: both steps of a pair are bare")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args(argv)
    for name, least in (("rows", EXAMPLE_ROWS), ("pairs", 1)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name} is {value}; allowed: at least {least}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    arguments = parse(argv)
    report = measure(arguments)
    console, step = Console(width=110, highlight=False), report["bare_step"]
    console.print(
        f"{arguments.rows:,} rows x {arguments.width}, {arguments.batch} x {arguments.tokens} tokens, "
        f"{report['threads']} threads: bare step {step['mean'] * 1e3:.1f} ms (median {step['median'] * 1e3:.1f})"
    )
    console.print(share_table(report), kind_table(report))
    if "attach_and_settle_seconds" in report:
        console.print(f"attach and settling, once, not in the share: {report['attach_and_settle_seconds']:.2f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
