"""What the guard costs where there is an accelerator: a check, a step under watch, a step that holds rows.

``python tests/benchmarks/accelerator.py --json found.json`` takes under 8 minutes on a CUDA device with 40 GiB. On a
machine without one it runs small, on the CPU, and says so: that shows that it works, and its figures mean nothing.
``--table found.json`` shows a file again.

**Checks.** Matrices of 131,072 x 4,096 and 262,144 x 2,304 in bfloat16, the baseline in pinned memory of the host, as
the guard keeps it. Beside the whole check, and the pass over the rows alone (by the fused kernel, and by torch's own
operations), stands what nothing can beat: reading both matrices once, the baseline by the bus.

**Steps.** A Llama of 1.5 billion parameters with 128,256 tokens, AdamW, bfloat16. Blocks of steps with the guard on and
off alternate in an order drawn by lot, on one model; the clock is read when the device is idle, before and
after a block. The figure is the mean of the ratios of pairs, with a 95 % bootstrap interval over them; what must be
small is its upper end. Blocks have no check: one is timed apart, by the guard's own clock.

**Waits.** `torch.cuda.set_sync_debug_mode` has torch warn wherever the host waits, and the profiler counts copies to
the host; both for a guarded block and for a bare one.

**Bit identity.** Two runs with deterministic algorithms, one of them watched: losses and weights are compared bit by
bit, as are those of two bare runs, without which the comparison would say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA begins, for the comparison bit by bit

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vocabguard import VocabGuard
from vocabguard.measure import fused
from vocabguard.measure.drift import measure_drift
from vocabguard.measure.kernels import row_sums
from vocabguard.rows.baselines import CopiedBaseline
from vocabguard.rows.streams import on_host

QUIET: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "on_error": "raise", "alerts": {}, "preflight": {"enabled": False},
    "probe": {"enabled": False, "every_n_steps": 10**6}, "drift": {"every_n_steps": 10**6},
    "untrained": {"enabled": False},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "watching": {},
    "hold, shared": {"hold": {"enabled": True, "mode": "shared"}},
    "hold, freeze": {"hold": {"enabled": True, "mode": "freeze"}},
    "hold, shared, anchor on the host": {"hold": {"enabled": True, "mode": "shared", "anchor": "host"}},
}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        matrices: (rows, width) of those that are checked.
        model: settings of the Llama.
        batch: (rows, tokens) of a step.
        block: steps between two looks at the clock.
        pairs: of blocks, for each kind of guard.
    """

    matrices: tuple[tuple[int, int], ...]
    model: dict[str, Any]
    batch: tuple[int, int]
    block: int
    pairs: int


FULL = Size(
    ((131_072, 4096), (262_144, 2304)),
    {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    (4, 1024), 4, 24,
)  # fmt: skip
SMALL = Size(
    ((4096, 64),),
    {
        "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    (2, 32), 2, 3,
)  # fmt: skip


class Machine:
    """The device and its clock."""

    def __init__(self, *, small: bool) -> None:
        self.there = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.there else torch.device("cpu")
        self.size = FULL if self.there and not small else SMALL

    def idle(self) -> None:
        """Wait until the device has nothing to do."""
        if self.there:
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], Any], times: int = 5) -> float:
        """Median of a few runs after one that is not counted."""
        found = []
        for _ in range(times + 1):
            self.idle()
            began = time.perf_counter()
            act()
            self.idle()
            found.append(time.perf_counter() - began)
        return float(np.median(found[1:]))

    def describe(self) -> dict[str, Any]:
        """For the report."""
        name = torch.cuda.get_device_name() if self.there else f"CPU ({platform.machine()})"
        return {"device": name, "torch": torch.__version__, "small": self.size is SMALL, "fused": self._fused()}

    def _fused(self) -> bool:
        return fused.fused_sums(self.device.type) is not None


# -- checks ------------------------------------------------------------------------------------------------------------


def checks(machine: Machine) -> list[dict[str, Any]]:
    """Times of a check of each matrix, beside those of reading both matrices once."""
    return [_check(machine, rows, width) for rows, width in machine.size.matrices]


@torch.no_grad()
def _check(machine: Machine, rows: int, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    before = torch.randn(rows, width, dtype=torch.bfloat16, device=machine.device) * 0.02
    baseline = CopiedBaseline(on_host(before))
    now = before + 0.001 * torch.randn_like(before)
    matrix, unexposed = CopiedBaseline(now), torch.rand(rows) < 0.9
    shift, there = torch.randn(width) * 1e-3, torch.empty_like(before)

    def read() -> None:
        there.copy_(baseline.tensor, non_blocking=True)
        for each in (now, there):
            torch.linalg.vector_norm(each)

    def on_device() -> None:
        for each in (now, before):
            torch.linalg.vector_norm(each)

    baseline.norms  # noqa: B018 (once a run)
    found = {
        "rows": rows, "width": width,
        "read_both": machine.seconds(read),
        "read_both_on_the_device": machine.seconds(on_device),
        "pass": machine.seconds(lambda: row_sums(matrix, baseline, shift, 1024)),
        "pass_on_the_device": machine.seconds(lambda: row_sums(matrix, CopiedBaseline(before), shift, 1024)),
        "check": machine.seconds(lambda: measure_drift(matrix, baseline, unexposed)),
    }  # fmt: skip
    with _without_kernel():
        found["pass_by_operations"] = machine.seconds(lambda: row_sums(matrix, baseline, shift, 1024))
    exact = torch.nn.functional.cosine_similarity(now[:512].double(), before[:512].double(), dim=1)
    cosine = measure_drift(matrix, baseline, unexposed).cosine[:512]
    found["largest_error_of_a_cosine"] = float((cosine.double() - exact.cpu()).abs().max())
    return found | {"check_against_read": found["check"] / found["read_both"]}


@contextmanager
def _without_kernel() -> Iterator[None]:
    known = fused.fused_sums
    fused.fused_sums = lambda _kind: None  # type: ignore[assignment]
    try:
        yield
    finally:
        fused.fused_sums = known


# -- steps -------------------------------------------------------------------------------------------------------------


class Training:
    """A model in training, whose steps can be guarded or bare."""

    def __init__(self, machine: Machine, *, dtype: torch.dtype, model: dict[str, Any] | None = None) -> None:
        torch.manual_seed(0)
        settings = model or machine.size.model
        config = LlamaConfig(
            **settings, max_position_embeddings=4096, tie_word_embeddings=False, use_cache=False, pad_token_id=0
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with machine.device:
            self.model: Any = LlamaForCausalLM(config).train()
        torch.set_default_dtype(before)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=machine.there)
        self._rng, self._rows = torch.Generator().manual_seed(1), int(settings["vocab_size"])
        self._machine = machine

    def batches(self, count: int) -> Tensor:
        """(count, rows, tokens) ids on the device, most of them from a small part of the vocabulary."""
        ids = torch.rand(count, *self._machine.size.batch, generator=self._rng).pow(4) * (self._rows - 1)
        return ids.long().to(self._machine.device)

    def step(self, ids: Tensor) -> Tensor:
        """One optimizer step; the loss, on the device."""
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Guarded:
    """A guard whose hooks are set for guarded blocks only."""

    def __init__(self, training: Training, options: dict[str, Any]) -> None:
        self.guard, self.training, self.steps = VocabGuard(**QUIET, **options), training, 0
        began = time.perf_counter()
        self.guard.attach(training.model, training.optimizer)
        self.attach_seconds = time.perf_counter() - began
        self.observer: Any = self.guard._observer
        self.observer.remove()

    @contextmanager
    def on(self) -> Iterator[None]:
        """With hooks."""
        self.observer.hook_model(self.training.model)
        self.observer.hook_optimizers([self.training.optimizer])
        try:
            yield
        finally:
            self.observer.remove()

    def block(self, batches: Tensor) -> None:
        """Some guarded steps."""
        for ids in batches:
            self.training.step(ids)
            self.steps += 1
            self.guard.step(self.steps)


def steps(machine: Machine, until: float) -> dict[str, Any]:
    """Guarded against bare blocks, for each kind of guard; kinds for which no time is left are left out."""
    training = Training(machine, dtype=torch.bfloat16 if machine.there else torch.float32)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    found: dict[str, Any] = {"parameters": parameters, "kinds": {}}
    for ids in training.batches(3):
        training.step(ids)
    for name, options in KINDS.items():
        if time.perf_counter() > until:
            break
        guarded = Guarded(training, options)
        found["kinds"][name] = _compared(machine, training, guarded) | {"attach_seconds": guarded.attach_seconds}
        if name == "watching":
            found["check_seconds"] = _check_seconds(guarded)
            found["waits"] = _waits(machine, training, guarded)
        guarded.guard.finish(check=False)
    return found


def _compared(machine: Machine, training: Training, guarded: Guarded) -> dict[str, Any]:
    rng, times = np.random.default_rng(0), []
    with guarded.on():
        guarded.block(training.batches(2))
    for _ in range(machine.size.pairs):
        batches, pair = training.batches(machine.size.block), [0.0, 0.0]
        for under_guard in rng.permutation(2).tolist():
            machine.idle()
            if under_guard:
                with guarded.on():
                    began = time.perf_counter()
                    guarded.block(batches)
                    machine.idle()
                    pair[1] = time.perf_counter() - began
                continue
            began = time.perf_counter()
            for ids in batches:
                training.step(ids)
            machine.idle()
            pair[0] = time.perf_counter() - began
        times.append(pair)
    bare, under = np.array(times).T
    ratios = under / bare
    draws = rng.choice(ratios, (4000, len(ratios))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return {
        "pairs": len(times), "bare_step": float(bare.mean()) / machine.size.block,
        "guarded_step": float(under.mean()) / machine.size.block,
        "ratio": float(ratios.mean()), "interval": [low, high], "median_ratio": float(np.median(ratios)),
    }  # fmt: skip


def _check_seconds(guarded: Guarded) -> float:
    """Of a check after the first, which has things to make that are made once."""
    for _ in range(2):
        with guarded.on():
            guarded.block(guarded.training.batches(1))
        guarded.guard.check()
    return guarded.guard.timings.check


def _waits(machine: Machine, training: Training, guarded: Guarded) -> dict[str, Any] | str:
    """Host waits and copies to the host in a guarded block, and in a bare one."""
    if not machine.there:
        return "not applicable: no accelerator"
    batches = training.batches(machine.size.block)

    def bare() -> None:
        for ids in batches:
            training.step(ids)

    def under() -> None:
        with guarded.on():
            guarded.block(batches)

    found = {}
    for name, act in (("bare", bare), ("guarded", under)):
        machine.idle()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                act()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(one.message) for one in told if "synchroniz" in str(one.message)]
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            act()
        events = {event.key: event.count for event in profile.key_averages()}
        found[name] = {
            "waits": len(waits),
            "stream_waits": sum(count for key, count in events.items() if key == "cudaStreamSynchronize"),
            "copies_to_host": sum(count for key, count in events.items() if "Memcpy DtoH" in key),
            "copies_from_host": sum(count for key, count in events.items() if "Memcpy HtoD" in key),
            "steps": machine.size.block,
        }
    return found


# -- bit identity ------------------------------------------------------------------------------------------------------


def identity(machine: Machine) -> dict[str, Any]:
    """Whether losses and weights are the same bit by bit: of two bare runs, and of a bare and a watched one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare, again, watched = (_run(machine, guarded=guarded) for guarded in (False, False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    return {"bare_runs_agree": _same(bare, again), "watched_run_agrees": _same(bare, watched)}


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def _run(machine: Machine, *, guarded: bool) -> list[Tensor]:
    """Losses and weights of eight steps."""
    training = Training(machine, dtype=torch.float32, model=SMALL.model)
    guard = None
    if guarded:
        guard = VocabGuard(**QUIET | {"drift": {"every_n_steps": 3}, "exposure": {"push_every_n_steps": 2}})
        guard.attach(training.model, training.optimizer)
    losses = []
    for step, ids in enumerate(training.batches(8), start=1):
        losses.append(training.step(ids))
        if guard is not None:
            guard.step(step)
    if guard is not None:
        guard.finish()
    return [torch.stack(losses).cpu(), *(value.detach().cpu() for value in training.model.parameters())]


# -- report ------------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, within the time."""
    machine, began = Machine(small=arguments.small), time.perf_counter()
    report: dict[str, Any] = {"machine": machine.describe()}
    report["identity"] = identity(machine)
    report["checks"] = checks(machine)
    if machine.there:
        torch.cuda.empty_cache()
    report["steps"] = steps(machine, began + arguments.minutes * 60 * 0.7)
    return report | {"seconds": time.perf_counter() - began}


def tables(report: dict[str, Any]) -> list[Table]:
    """The report, to be read."""
    machine = report["machine"]
    title = f"{machine['device']}, torch {machine['torch']}"
    if machine["small"]:
        title += " - small sizes: shows that the benchmark works, and nothing else"
    check = Table("matrix (bf16)", "read both once", "pass", "by operations", "check", "check / read", title=title)
    for one in report["checks"]:
        times = (f"{one[name] * 1e3:.2f} ms" for name in ("read_both", "pass", "pass_by_operations", "check"))
        check.add_row(f"{one['rows']:,} x {one['width']:,}", *times, f"{one['check_against_read']:.2f}")
    step = Table(f"{report['steps']['parameters'] / 1e9:.2f} B parameters", "bare step", "guarded", "ratio", "95 %")
    for name, kind in report["steps"]["kinds"].items():
        low, high = kind["interval"]
        times = (f"{kind[key] * 1e3:.2f} ms" for key in ("bare_step", "guarded_step"))
        step.add_row(name, *times, f"{kind['ratio']:.4f}", f"{low:.4f} to {high:.4f}")
    other = Table("", "", show_header=False)
    other.add_row("a check, by the guard's clock", f"{report['steps'].get('check_seconds', float('nan')) * 1e3:.1f} ms")
    other.add_row("host waits and copies in a block", json.dumps(report["steps"].get("waits")))
    other.add_row("bit identity", json.dumps(report["identity"]))
    return [check, step, other]


def main(argv: list[str] | None = None) -> None:
    """Run, or show what a run has found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was found there")
    parser.add_argument("--table", type=Path, metavar="JSON", help="show a file of --json and measure nothing")
    parser.add_argument("--small", action="store_true", help="small sizes on an accelerator too")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        report = json.loads(arguments.table.read_text(encoding="utf-8"))
    else:
        report = measure(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console = Console(width=140)
    for table in tables(report):
        console.print(table)
    if arguments.table is None and not torch.cuda.is_available():
        print("no accelerator here: this ran small, on the CPU, and its figures mean nothing", file=sys.stderr)


if __name__ == "__main__":
    main()
