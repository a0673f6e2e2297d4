"""A fault of the guard is told once, the guard disables itself, and training goes on as if it were not there."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from vocabguard import ConfigError, VocabGuard

STEPS = 4


class OwnFaultError(Exception):
    """Raised by the tests' own objects."""


def broken(*_args: Any, **_kwargs: Any) -> Any:
    raise OwnFaultError("broken on purpose")


class BrokenWriter:
    """A TensorBoard writer whose disk is full from step `since` on."""

    def __init__(self, since: int = 0) -> None:
        self.since = since

    def add_scalar(self, tag: str, value: float, global_step: int = 0) -> None:
        if global_step >= self.since:
            broken()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def guard_of(kit: Any, on_error: str, **options: Any) -> VocabGuard:
    log = {"console": False, "tensorboard": "writer" in options}
    options.pop("writer", None)
    return VocabGuard(drift={"every_n_steps": 2}, log=log, on_error=on_error, **options)


def run_bare(kit: Any) -> tuple[list[float], dict[str, Any]]:
    model = kit.llama()
    return kit.loop(None, model, kit.sgd(model), kit.batches(STEPS)), model.state_dict()


def in_attach(kit: Any, on_error: str, folder: Path) -> tuple[VocabGuard, dict[str, Any], dict[str, Any]]:
    rows = [{"labels": torch.tensor([1, 2])}]
    return guard_of(kit, on_error), {"dataloader": DataLoader(rows, collate_fn=broken)}, {}


def at_the_first_check(kit: Any, on_error: str, folder: Path) -> Any:
    return guard_of(kit, on_error, writer=True), {"writer": BrokenWriter(), "run_dir": folder}, {}


def in_step(kit: Any, on_error: str, folder: Path) -> Any:
    return guard_of(kit, on_error, writer=True), {"writer": BrokenWriter(since=2)}, {}


def in_the_forward_hook(kit: Any, on_error: str, folder: Path) -> Any:
    return guard_of(kit, on_error, targets=broken), {}, {}


class BrokenTokenizer:
    """Fails whatever is asked of it but its length."""

    def __len__(self) -> int:
        return 64

    def __getattr__(self, name: str) -> Any:
        return broken


def in_the_tokenizer(kit: Any, on_error: str, folder: Path) -> Any:
    return guard_of(kit, on_error, tokenizer=BrokenTokenizer()), {}, {}


def in_observe(kit: Any, on_error: str, folder: Path) -> Any:
    return guard_of(kit, on_error), {}, {1: lambda guard: guard.observe(None, torch.zeros(()))}


def in_observe_batch(kit: Any, on_error: str, folder: Path) -> Any:
    options = {"hook_model": False}
    return guard_of(kit, on_error, targets=broken), options, {1: lambda guard: guard.observe_batch({})}


def in_check(kit: Any, on_error: str, folder: Path) -> Any:
    return guard_of(kit, on_error, writer=True), {"writer": BrokenWriter(since=1)}, {1: lambda guard: guard.check()}


def in_state_dict(kit: Any, on_error: str, folder: Path) -> Any:
    def lose_folder(guard: VocabGuard) -> None:
        (folder / "run").rename(folder / "gone")
        (folder / "run").write_text("")
        assert guard.state_dict() == {}

    return guard_of(kit, on_error), {"run_dir": folder / "run"}, {1: lose_folder}


CASES = [
    in_attach, in_the_tokenizer, at_the_first_check, in_step, in_the_forward_hook, in_observe,
    in_observe_batch, in_check, in_state_dict,
]  # fmt: skip


ATTACHING = (in_attach, in_the_tokenizer, at_the_first_check)


def run(kit: Any, guard: VocabGuard, attach: dict[str, Any], between: dict[int, Any]) -> Any:
    """The hand-written loop, with calls to the guard between some steps."""
    model, losses = kit.llama(), []
    optimizer = kit.sgd(model)
    watch = guard.attach(model, optimizer, total_steps=STEPS, **attach)
    assert (watch is None) == (guard.failure is not None)
    assert watch is not None or kit.hooks_on(model, optimizer) == 0
    for step, batch in enumerate(kit.batches(STEPS), start=1):
        losses += kit.loop(guard, model, optimizer, [batch], first=step)
        if step in between:
            between[step](guard)
    return model, optimizer, losses, watch


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_fault_is_told_once_and_training_goes_on(kit: Any, tmp_path: Path, caplog: Any, case: Any) -> None:
    guard, attach, between = case(kit, "warn", tmp_path)
    with caplog.at_level(logging.WARNING, logger="vocabguard"):
        model, optimizer, losses, watch = run(kit, guard, attach, between)
        assert guard.failure is not None
        assert kit.hooks_on(model, optimizer) == 0
        assert guard.step(STEPS + 1) is None
        guard.observe(None, torch.zeros(()))
        guard.check()
        assert guard.state_dict() == {}
        guard.finish()
    # A run folder that is gone is told too, by itself: that alone costs the log only.
    about_log = "nothing more is written"
    told = [one for one in caplog.records if one.name == "vocabguard" and about_log not in one.getMessage()]
    assert len(told) == 1
    assert "disabled itself; training continues" in told[0].getMessage()
    assert told[0].exc_info is not None
    bare_losses, bare_weights = run_bare(kit)
    assert losses == bare_losses
    assert all(torch.equal(value, bare_weights[name]) for name, value in model.state_dict().items())
    assert (watch is None) == (case in ATTACHING)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_fault_is_raised_if_asked(kit: Any, tmp_path: Path, case: Any) -> None:
    guard, attach, between = case(kit, "raise", tmp_path)
    with pytest.raises((OwnFaultError, ExceptionGroup, OSError, IndexError, SafetensorError)):
        run(kit, guard, attach, between)
    assert guard.failure is None


def test_a_broken_action_is_told_and_the_guard_goes_on(kit: Any, caplog: Any) -> None:
    seen: list[Any] = []
    rule = {"metric": "head/cosine_min", "op": "<", "threshold": 0.999999, "actions": ["tell", "note"]}
    guard = guard_of(kit, "warn", alerts={"moved": rule}, actions={"tell": broken, "note": seen.append})
    losses = run(kit, guard, {}, {})[2]
    [said] = [record.getMessage() for record in caplog.records if record.name == "vocabguard"]
    assert "OwnFaultError: broken on purpose, raised by an action of alert rule 'moved' at step 2" in said
    assert guard.failure is None
    assert [change.rule for change in seen] == ["moved"]
    assert guard.last.step == STEPS
    assert losses == run_bare(kit)[0]


def test_the_other_actions_run_and_the_rule_is_named(kit: Any, caplog: Any) -> None:
    seen: list[Any] = []
    rule = {"metric": "head/cosine_min", "op": "<", "threshold": 1.0, "actions": ["tell", "note", "log"]}
    guard = guard_of(kit, "raise", alerts={"moved": rule}, actions={"tell": broken, "note": seen.append})
    with pytest.raises(ExceptionGroup) as raised:
        run(kit, guard, {}, {})
    assert len(seen) == 1
    assert isinstance(raised.value.exceptions[0], OwnFaultError)
    assert "'moved'" in raised.value.exceptions[0].__notes__[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(kit: Any, tmp_path: Path, caplog: Any) -> None:
    tmp_path.chmod(0o500)
    guard = guard_of(kit, "warn")
    run(kit, guard, {"run_dir": tmp_path / "run"}, {})
    assert guard.failure is None
    assert guard.run_dir is None
    assert "Permission" in caplog.text
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_config_errors_always_pass_and_leave_nothing_behind(
    kit: Any, tokenizer: Any, tmp_path: Path, on_error: str
) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = kit.sgd(model)
    guard = VocabGuard(tokenizer=tokenizer, probe={"watch": [""]}, on_error=on_error)
    with pytest.raises(ConfigError, match=r"probe.watch holds ''; allowed: token ids"):
        guard.attach(model, optimizer, run_dir=tmp_path / "run")
    assert kit.hooks_on(model, optimizer) == 0
    assert not (tmp_path / "run").exists()
    assert guard.watch is None
    assert guard.step(1) is None


def test_a_guard_that_stood_down_may_be_attached_again(kit: Any) -> None:
    guard, attach, _ = in_step(kit, "warn", Path())
    run(kit, guard, attach, {})
    assert guard.failure is not None
    guard.finish()
    run(kit, guard, {}, {})
    assert guard.failure is None
    assert guard.last.step == STEPS


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_rows_are_counted_and_alert(kit: Any, tmp_path: Path, value: float) -> None:
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard = VocabGuard(drift={"every_n_steps": 1}, **kit.QUIET)
    guard.attach(model, optimizer, total_steps=2, run_dir=tmp_path)
    kit.loop(guard, model, optimizer, kit.batches(1))
    assert guard.last.scalars["vocabguard/head/nonfinite_rows"] == 0
    with torch.no_grad():
        model.lm_head.weight[[5, 9]] = value
    guard.step(2)
    log = guard.finish()
    found = guard.last
    assert found.scalars["vocabguard/head/nonfinite_rows"] == 2
    assert found.head.bad.nonzero().flatten().tolist() == [5, 9]
    assert "broken_rows" in found.firing
    assert [(alert.rule, alert.step, alert.level) for alert in log.alerts() if alert.rule == "broken_rows"] == [
        ("broken_rows", 2, "critical")
    ]
    assert 0.5 < found.scalars["vocabguard/head/cosine_mean"] < 1, "the other rows are measured"


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_run_goes_on_without_a_folder_for_its_log(kit: Any, tmp_path: Path, caplog: Any, where: str) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    guard = guard_of(kit, "raise")
    losses = run(kit, guard, {"run_dir": tmp_path / where}, {})[2]
    (said,) = [record.getMessage() for record in caplog.records if "no run log" in record.getMessage()]
    assert said.startswith("vocabguard: no run log is kept, the console alone reports: [Errno")
    assert str(tmp_path / "file") in said
    assert (guard.failure, guard.run_dir, guard.last.step) == (None, None, STEPS)
    assert isinstance(guard.state_dict()["baselines"]["head"], torch.Tensor), "the rows go along: no folder has them"
    assert losses == run_bare(kit)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
