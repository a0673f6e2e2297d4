"""What watching costs a real model's run of an hour: parts measured in its first steps, by the process's own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real.train import QUIET, short_run
from transformers import TrainerCallback

from vocabguard.config import load_config
from vocabguard.guard.cadence import Cadence
from vocabguard.integrations.huggingface import VocabGuardCallback


class Timed(VocabGuardCallback):
    """The guard, with the CPU seconds that its start, each of its step ends and its end take, and its cadence."""

    start = end = 0.0
    every = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ends: list[float] = []

    def on_train_begin(self, *arguments: Any, **rest: Any) -> Any:
        began = time.process_time()
        found = super().on_train_begin(*arguments, **rest)
        self.start = time.process_time() - began
        return found

    def on_step_end(self, *arguments: Any, **rest: Any) -> Any:
        began = time.process_time()
        found = super().on_step_end(*arguments, **rest)
        self.ends.append(time.process_time() - began)
        return found

    def on_train_end(self, *arguments: Any, **rest: Any) -> Any:
        began = time.process_time()
        found = super().on_train_end(*arguments, **rest)
        self.end = time.process_time() - began
        self.every = int(self.guard.state_dict()["cadence"]["every"])
        return found


class StopEarly(TrainerCallback):
    """Times whole steps, and ends the run after some of them."""

    def __init__(self, steps: int) -> None:
        self._steps, self._began = steps, 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)
        control.should_training_stop = state.global_step >= self._steps


def price(cache: Path, name: str, overrides: Sequence[str], *, planned: int, steps: int = 40) -> dict[str, Any]:
    """The guard's share of the CPU time of a run.

    The guard plans for `planned` steps and is watched for the first `steps`: its start with the base's probe, its
    checks, its counting; the last of them carries a probe as the run's end does. How often it would probe in between
    is worked out as the guard does it.

    Args:
        cache: the bench's folder.
        name: of a recipe.
        overrides: settings of the guard.
        planned: optimizer steps of the run that is planned for.
        steps: that are made; a multiple of the steps between checks, for the last to carry one.

    Returns:
        CPU ``seconds`` of the parts, the cadence that was chosen, and the ``share`` of the planned run that is the
        guard's. Counting inside the forward pass is not in it: `overhead.py` times that.
    """
    probed = [*overrides, f"probe.every_n_steps={steps}"]
    guarded, stop = Timed("watch", overrides=probed, **QUIET), StopEarly(steps)
    short_run(cache, name, [guarded, stop], steps=steps, planned=planned)
    every, plain = guarded.every, statistics.median(guarded.ends)
    check = max(guarded.ends[:-1])
    probe = guarded.ends[-1] - check
    step = statistics.fmean(stop.seconds) - statistics.fmean(guarded.ends)
    cadence = Cadence.of(load_config("watch", list(overrides)), planned)
    cadence.record(check=check, probe=probe)
    cadence.choose(step)
    assert cadence.probe_every is not None
    probes = -(-planned // cadence.probe_every)
    work = guarded.start + guarded.end + planned * plain + planned // every * check + probes * probe
    return {
        "recipe": name, "planned": planned, "made": steps, "every": every, "probe_every": cadence.probe_every,
        "seconds": {
            "start": guarded.start, "check": check, "probe": probe, "each_step": plain, "step": step, "guard": work
        },
        "known": guarded.guard.latest.get("vocabguard/probe/known"),
        "share": work / (work + planned * step),
    }  # fmt: skip
