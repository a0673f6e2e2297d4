"""Two processes count by `ExposureCounter` itself, in every order of calls, against plain loops over all of it.

    counting.py FOLDER

Each rank writes what it found wrong, which is nothing, and what it sent, to ``rank-<rank>.pt``.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from messages import Sent

from vocabguard import collective
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.rows.sharding import Shard

ROWS, STEPS = 61, 40


class Naive:
    """What all processes count, by plain loops."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in ("data_target", "echo_target", "inputs")}
        self.last: dict[int, int] = {}
        self.now: set[int] = set()

    def observe(self, ids: list[int], echo: bool, times: int) -> None:
        for token in ids:
            self.counts["echo_target" if echo else "data_target"][token] += times
            self.now.add(token)
            if not echo:
                self.counts["inputs"][token] += times

    def end_step(self, step: int) -> None:
        self.last |= dict.fromkeys(self.now, step)
        self.now = set()

    def wrong(self, found: Any) -> list[str]:
        """What differs from this: in an `Exposure`, or in a state."""
        told = found if isinstance(found, dict) else vars(found)
        expected = {name: [count[token] for token in range(ROWS)] for name, count in self.counts.items()}
        expected["last_target"] = [self.last.get(token, -1) for token in range(ROWS)]
        return [f"{name}: {told[name].tolist()}, not {value}" for name, value in expected.items()
                if told[name].tolist() != value]  # fmt: skip


def observe(counter: ExposureCounter, ids: list[int], echo: bool, times: int) -> None:
    """One micro-batch that holds some ids, each of them so many times."""
    if times < 1000:
        batch = torch.tensor([ids], dtype=torch.int64).repeat(1, times)
        counter.observe(batch, batch, shift=False, echo_mask=torch.tensor([echo]))
        return
    # As if there had been so many.
    for row in (1,) if echo else (0, 2):
        for token in ids:
            counter._counts[row, token] += times


def run(seed: int, rank: int) -> tuple[list[str], list[Any]]:
    """A run of forty steps; what went wrong, and what the exchanges sent."""
    random, naive, wrong, sent = Random(seed), Naive(), [], []
    counter = made()
    echoes, jumps = random.random() < 0.5, random.random() < 0.5
    for step in range(1, STEPS + 1):
        # Sometimes there is no gradient, or more is counted after it, as in passes between the optimizer and the end.
        gradient, late = random.random() < 0.8, random.random() < 0.2
        for part in range(3):
            for process in range(2):
                ids = random.sample(range(ROWS), random.randrange(4))
                echo = echoes and random.random() < 0.3
                times = random.choice([1, 1, 7, 40_000 if jumps else 2, 2**33 if jumps and step > 20 else 3])
                if part == 2 and not late:
                    continue
                naive.observe(ids, echo, times)
                if process == rank:
                    observe(counter, ids, echo, times)
            if part == 1 and gradient:
                counter.observe_gradient(torch.ones(ROWS, 2), sample_push=step % 3 == 0)
        if random.random() < 0.1:
            counter.settle()  # before the step has its number
        counter.end_step(step)
        naive.end_step(step)
        act = random.random()
        if act < 0.3:
            seen = Sent()
            with seen.noting():
                found = counter.exposure()
            sent.append(seen.here)
            wrong += naive.wrong(found)
        elif act < 0.4:
            wrong += naive.wrong(state := counter.state_dict())
            counter = made()
            counter.load_state_dict(state)
    return wrong + naive.wrong(counter.exposure()), sent


def made(edges: dict[int, bool] | None = None) -> ExposureCounter:
    return ExposureCounter(ROWS, "cpu", tied=False, deferred=True, edges=edges)


def ordinary(rank: int) -> list[Any]:
    """What a second check sends, after a step that has a gradient."""
    counter, made_by = made(), torch.Generator().manual_seed(rank)
    for step in range(1, 3):
        ids = torch.randint(0, ROWS, (4, 8), generator=made_by)
        counter.observe(ids, ids, shift=True)
        counter.observe_gradient(torch.ones(ROWS, 2), sample_push=False)
        counter.end_step(step)
        seen = Sent()
        with seen.noting():
            counter.exposure()
    return seen.here


def in_parts(rank: int, cut: int) -> dict[str, Any]:
    """Gradients of which each process has a run of elements: what they find so, and where each has all of it."""
    width = 5
    spans = ((0, cut), (cut, ROWS * width))
    shard = Shard(ROWS, width, *spans[rank], spans=spans)
    alone, here = made(), made(shard.edges)
    made_by = torch.Generator().manual_seed(cut)
    for step in range(1, 9):
        gradient = torch.randn(ROWS, width, generator=made_by)
        ids = torch.randint(0, ROWS, (2, 20), generator=made_by)
        for counter in (alone, here):
            counter.observe(ids[rank : rank + 1], ids[rank : rank + 1], shift=False)
        alone.observe_gradient(gradient, sample_push=step % 3 == 0)
        here.observe_gradient(gradient.flatten()[slice(*spans[rank])], sample_push=step % 3 == 0, shard=shard)
        for counter in (alone, here):
            counter.end_step(step)
            if step == 4:
                counter.settle()
        if step == 6:  # cut off, and gone on
            state = here.state_dict(spread=True)
            here = made(shard.edges)
            here.load_state_dict(state)
    whole, part = alone.exposure(), here.exposure()
    (found,) = collective.together([here.with_gradients(part, shard)])
    return {"edges": shard.edges, "whole": vars(whole), "found": vars(found)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {"wrong": [], "sent": [], "ordinary": ordinary(rank)}
    found["in parts"] = [in_parts(rank, cut) for cut in (0, 100, 152, 304, ROWS * 5)]
    for seed in range(12):
        wrong, sent = run(seed, rank)
        found["wrong"] += [f"seed {seed}: {one}" for one in wrong]
        found["sent"] += sent
    torch.save(found, Path(sys.argv[1]) / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
