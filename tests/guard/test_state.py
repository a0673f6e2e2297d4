"""Stop and resume gives what an uninterrupted run gives; another attach is another run."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vocabguard import ConfigError, RunLog, VocabGuard
from vocabguard.results import CheckResult

HALF, STEPS = 5, 10
RULE = {"metric": "head/cosine_min", "op": "<", "threshold": 0.99, "for_checks": 3}
PROBE = {"sample": 8, "every_n_steps": 4, "contexts": {"list": {"k": 4}}}


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def guard_of(kit: Any, tokenizer: Any, **options: Any) -> VocabGuard:
    defaults: dict[str, Any] = {
        "drift": {"every_n_steps": 2},
        "exposure": {"push_every_n_steps": 3},
        "probe": PROBE,
        "alerts": {"moved": RULE},
    }
    return VocabGuard(tokenizer=tokenizer, **kit.QUIET | defaults | options)


class Run:
    """A model in training; `cut` gives what a checkpoint holds."""

    def __init__(self, kit: Any, tokenizer: Any, **options: Any) -> None:
        self.kit, self.tokenizer, self.options = kit, tokenizer, options
        self.model = kit.llama(kit.TOKENIZER_ROWS)
        self.base = kit.copy_of(self.model)
        self.data = kit.batches(STEPS, kit.TOKENIZER_ROWS)
        self.guard: Any = None
        self.begin(None)

    def begin(self, state: dict[str, Any] | None, **attach: Any) -> None:
        """A new process: a new optimizer, a new guard; the one before is gone without a word."""
        if self.guard is not None:
            self.guard._observer.remove()
        self.optimizer = self.kit.sgd(self.model)
        self.guard = guard_of(self.kit, self.tokenizer, **self.options)
        self.guard.attach(self.model, self.optimizer, total_steps=STEPS, resumed=state, **attach)

    def steps(self, first: int, last: int) -> None:
        self.kit.loop(self.guard, self.model, self.optimizer, self.data[first - 1 : last], first=first)


def same_rows(one: CheckResult, other: CheckResult) -> None:
    for name in ("head", "embedding"):
        for field in ("cosine", "residual", "l2"):
            first, second = getattr(getattr(one, name), field), getattr(getattr(other, name), field)
            torch.testing.assert_close(first, second, atol=0, rtol=0, equal_nan=True)
    for field in ("data_target", "inputs", "last_target", "pull", "push", "input_only"):
        assert torch.equal(getattr(one.exposure, field), getattr(other.exposure, field)), field
    assert one.exposure.push_samples == other.exposure.push_samples > 0


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(kit: Any, tokenizer: Any, tmp_path: Path, with_folder: bool) -> None:
    whole = Run(kit, tokenizer)
    whole.steps(1, STEPS)
    parts = Run(kit, tokenizer)
    parts.begin(None, run_dir=tmp_path / "run" if with_folder else None)
    parts.steps(1, HALF)
    state = through_a_file(parts.guard.state_dict())
    # What the process does after its last checkpoint is lost with it.
    lost = copy.deepcopy(parts.model)
    parts.steps(HALF + 1, HALF + 2)
    parts.model = lost
    parts.begin(state, run_dir=tmp_path / "other")
    assert parts.guard.latest == state["latest"]
    assert "vocabguard/probe/probability_mean" in parts.guard.latest, "a probe's keys stay until the next probe"
    parts.steps(HALF + 1, STEPS)

    one, other = whole.guard.last, parts.guard.last
    assert one.step == other.step == STEPS
    same_rows(one, other)
    cosine = cosine_similarity(whole.base["lm_head.weight"], parts.model.lm_head.weight.detach(), dim=1)
    torch.testing.assert_close(other.head.cosine, cosine, atol=1e-6, rtol=0)
    assert cosine.min() < 0.99
    first, second = dict(one.scalars), dict(other.scalars)
    assert first.pop("vocabguard/overhead") >= 0
    assert second.pop("vocabguard/overhead") >= 0
    assert first == second
    assert "moved" in one.firing
    assert one.firing == other.firing
    assert torch.equal(one.probe.probability, other.probe.probability)
    for field in ("ids", "emitted", "probability"):
        known = [getattr(run.guard._checker.prober.base, field) for run in (whole, parts)]
        assert torch.equal(*known), field
    assert whole.guard._cadence == parts.guard._cadence
    assert [report.steps_since_target for report in one.worst] == [report.steps_since_target for report in other.worst]


def test_the_run_folder_goes_on(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    parts = Run(kit, tokenizer)
    parts.begin(None, run_dir=tmp_path / "run")
    parts.steps(1, HALF)
    state = through_a_file(parts.guard.state_dict())
    parts.steps(HALF + 1, HALF + 3)
    parts.begin(state, run_dir=tmp_path / "elsewhere")
    parts.steps(HALF + 1, STEPS)
    log = parts.guard.finish()
    assert log.folder == tmp_path / "run"
    assert not (tmp_path / "elsewhere").exists()
    # The alert needs three checks in a row: 2 and 4 before the stop, 6 after it.
    assert [(check["attempt"], check["step"]) for check in log.checks()] == [
        (0, 0), (0, 2), (0, 4), (1, 6), (1, 8), (1, 10)
    ]  # fmt: skip
    assert [alert.step for alert in log.alerts() if alert.rule == "moved"] == [6]
    assert [check["step"] for check in log.checks() if check["probed"]] == [0, 4, 8, 10]


def test_the_state_is_small_where_the_baseline_is_on_disk(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(kit, tokenizer)
    run.begin(None, run_dir=tmp_path)
    state = run.guard.state_dict()
    assert set(state["baselines"]) == {"head", "embedding"}
    assert all(Path(reference["path"]).is_file() for reference in state["baselines"].values())
    written = (tmp_path / "baseline-head.safetensors").stat().st_mtime_ns
    run.guard.state_dict()
    assert (tmp_path / "baseline-head.safetensors").stat().st_mtime_ns == written, "written once"


def test_a_baseline_that_is_gone_is_told(kit: Any, tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    run = Run(kit, tokenizer)
    run.begin(None, run_dir=tmp_path)
    run.steps(1, HALF)
    state = through_a_file(run.guard.state_dict())
    (tmp_path / "baseline-head.safetensors").unlink()
    run.begin(state, steps_done=HALF)
    said = [record.getMessage() for record in caplog.records if "baseline" in record.getMessage()]
    assert said == [
        f"vocabguard: the baseline of the head is lost ({tmp_path}/baseline-head.safetensors: not found): its drift "
        f"restarts from this checkpoint (step {HALF}), counts go on"
    ]
    found = run.guard.check()
    assert found.head.cosine.min() > 0.9999
    assert found.embedding.cosine.min() < 0.99
    assert found.exposure.steps == HALF


def test_tied_rows_are_kept_once(kit: Any) -> None:
    model = kit.llama(tied=True)
    optimizer = kit.sgd(model)
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model, optimizer)
    base = kit.copy_of(model)
    kit.loop(guard, model, optimizer, kit.batches(2))
    state = through_a_file(guard.state_dict())
    assert set(state["baselines"]) == {"head"}
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model, kit.sgd(model), resumed=state)
    found = guard.check()
    cosine = cosine_similarity(base["lm_head.weight"], model.lm_head.weight.detach(), dim=1)
    torch.testing.assert_close(found.embedding.cosine, cosine, atol=1e-6, rtol=0)


def test_before_the_cadence_is_chosen(kit: Any, tokenizer: Any) -> None:
    """Costs are measured at step 0, which a resumed run does not repeat."""
    run = Run(kit, tokenizer, drift={"every_n_steps": None}, probe={"sample": 4})
    run.steps(1, 3)
    costs = run.guard.timings.check, run.guard.timings.probe
    assert min(costs) > 0
    run.begin(through_a_file(run.guard.state_dict()))
    assert (run.guard.timings.check, run.guard.timings.probe) == costs
    assert run.guard._cadence.every is None


def test_a_chosen_cadence_is_kept(kit: Any, tokenizer: Any) -> None:
    run = Run(kit, tokenizer, drift={"every_n_steps": None}, probe={"sample": 4}, cadence={"settle_steps": 2})
    run.steps(1, 3)
    run.guard._cadence.every, run.guard._cadence.probe_every = 37, 74
    run.begin(through_a_file(run.guard.state_dict()))
    assert (run.guard._cadence.every, run.guard._cadence.probe_every) == (37, 74)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_newer_state_is_refused(kit: Any, on_error: str) -> None:
    model = kit.llama()
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model)
    state = guard.state_dict() | {"version": 99}
    optimizer = kit.sgd(model)
    other = VocabGuard(**kit.QUIET | {"on_error": on_error})
    guard.finish()
    with pytest.raises(ConfigError, match=r"state: version is 99.*reads up to 1"):
        other.attach(model, optimizer, resumed=state)
    assert kit.hooks_on(model, optimizer) == 0


def test_other_contexts_than_the_run_began_with_are_refused(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(kit, tokenizer)
    run.begin(None, run_dir=tmp_path / "run")
    state = run.guard.state_dict()
    run.guard.finish()
    before = (tmp_path / "run" / "run.json").read_bytes()
    run.options = {"probe": PROBE | {"contexts": {"mine": {"text": "Again: {tokens}"}}}}
    with pytest.raises(ConfigError, match=r"probe.contexts are .*'mine'.*began with"):
        run.begin(state)
    assert kit.hooks_on(run.model, run.optimizer) == 0
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_load_state_dict_is_taken_by_the_next_attach_alone(kit: Any) -> None:
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model, optimizer)
    kit.loop(guard, model, optimizer, kit.batches(3))
    state = guard.state_dict()
    guard.finish()
    other = VocabGuard(**kit.QUIET)
    other.load_state_dict(state)
    other.attach(model, optimizer)
    assert other.steps == 3
    assert other.check().head.cosine.min() < 0.9999
    other.attach(model, optimizer)
    assert other.steps == 0
    torch.testing.assert_close(other.last.head.cosine, torch.ones(kit.ROWS))


def test_nothing_to_save_before_attach(kit: Any) -> None:
    assert VocabGuard().state_dict() == {}


@pytest.mark.parametrize("finished", [True, False])
def test_a_second_run_of_the_same_guard(kit: Any, tmp_path: Path, finished: bool) -> None:
    model, data = kit.llama(), kit.batches(4)
    optimizer = kit.sgd(model)
    guard = VocabGuard(drift={"every_n_steps": 2}, alerts={"moved": RULE | {"for_checks": 1}}, **kit.QUIET)
    guard.attach(model, optimizer, total_steps=4, run_dir=tmp_path / "run")
    kit.loop(guard, model, optimizer, data)
    assert guard.last.firing
    if finished:
        guard.finish()
    second = kit.copy_of(model)
    watch = guard.attach(model, optimizer, total_steps=2, run_dir=tmp_path / "run")
    assert kit.hooks_on(model, optimizer) == 2
    assert watch.run_dir == str(tmp_path / "run-2")
    assert (guard.last.step, guard.last.firing, guard.last.exposure.steps) == (0, (), 0)
    torch.testing.assert_close(guard.last.head.cosine, torch.ones(kit.ROWS))
    kit.loop(guard, model, optimizer, data[:2])
    log = guard.finish()
    assert kit.hooks_on(model, optimizer) == 0
    assert guard.last.exposure.data_target.tolist() == kit.naive_counts(data[:2])["data_target"]
    cosine = cosine_similarity(second["lm_head.weight"], model.lm_head.weight.detach(), dim=1)
    torch.testing.assert_close(guard.last.head.cosine, cosine, atol=1e-6, rtol=0)
    assert [check["step"] for check in log.checks()] == [0, 2]
    assert [check["step"] for check in RunLog.open(tmp_path / "run").checks()] == [0, 2, 4]


def test_calls_after_finish_do_nothing(kit: Any, caplog: Any) -> None:
    model, data = kit.llama(), kit.batches(3)
    optimizer = kit.sgd(model)
    guard = VocabGuard(drift={"every_n_steps": 1}, **kit.QUIET)
    guard.attach(model, optimizer)
    kit.loop(guard, model, optimizer, data[:2])
    guard.finish()
    last = guard.last
    kit.loop(guard, model, optimizer, data[2:], first=3)
    assert guard.check() is last
    assert guard.finish() is None
    assert not [record for record in caplog.records if record.name == "vocabguard"]


def test_finish_without_a_check_keeps_the_last_one(kit: Any) -> None:
    """As after best weights were loaded back."""
    model = kit.llama()
    guard = VocabGuard(drift={"every_n_steps": 2}, **kit.QUIET)
    guard.attach(model)
    for step in range(1, 4):
        guard.step(step)
    guard.finish(check=False)
    assert guard.last.step == 2


def test_a_guard_that_begins_late_counts_its_steps_right(kit: Any, caplog: Any) -> None:
    model, data = kit.llama(), kit.batches(2)
    optimizer = kit.sgd(model)
    guard = VocabGuard(log={"console": False, "tensorboard": False, "top_k": kit.ROWS}, on_error="raise")
    guard.attach(model, optimizer, steps_done=100)
    assert "restart from this checkpoint (step 100)" in caplog.records[0].getMessage()
    assert guard.last.step == 100
    kit.loop(guard, model, optimizer, data, first=101)
    last = kit.naive_counts(data)["last_target"]
    for report in guard.check().worst:
        assert report.steps_since_target == (None if last[report.id] < 0 else 2 - last[report.id])
