"""A training step under guard: on an accelerator the host waits for nothing and nothing comes to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stalls import KIND, Accelerator, accelerator, moved
from torch.testing import assert_close

from vocabguard import VocabGuard
from vocabguard.measure.learning_rates import RateMeter
from vocabguard.protect import hold

STEPS = 6


def moments(weight: Any, state: Any) -> Iterator[Any]:
    """Of the optimizer's state, what has a row for each of the weight's.

    The package lets tensors of a class of their own alone, as quantised moments are; the accelerator's are such here.
    """
    yield from (value for value in state.values() if getattr(value, "shape", None) == weight.shape)


@pytest.fixture
def device(kit: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """An accelerator, in use."""
    monkeypatch.setattr(hold, "_moments", moments)
    with accelerator() as mode:
        try:
            moved(kit.llama())(**{name: value.to(KIND) for name, value in kit.batches(1)[0].items()})
        except RuntimeError as error:
            pytest.skip(f"this transformers does not run there: {error}")
        yield mode


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    # Moments a row, and no division by gradients that are next to nothing.
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def guarded(kit: Any, device: Accelerator | None, *, tied: bool, **options: Any) -> tuple[VocabGuard, Any, list[Any]]:
    """Six steps on a device; what each did, which has no check but the last, and the guard with its model."""
    model, data = kit.llama(tied=tied), kit.batches(STEPS)
    model.config.use_cache = False
    model = model if device is None else moved(model)
    optimizer = optimizer_of(model)
    guard = VocabGuard(
        drift={"every_n_steps": STEPS}, exposure={"push_every_n_steps": 2}, probe={"enabled": False}, **options,
        **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, optimizer, total_steps=STEPS)
    model.train()
    steps = []
    for step, batch in enumerate(data, start=1):
        here = batch if device is None else {name: value.to(KIND) for name, value in batch.items()}
        if device is not None:
            device.clear()
        model(**here).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(step)
        if device is not None:
            steps.append(
                SimpleNamespace(
                    waits=device.waits, moved=device.moved, launches=device.launches,
                    down=device.bytes("down"), up=device.bytes("up"),
                )
            )  # fmt: skip
    return guard, model, steps


@pytest.mark.parametrize("tied", [False, True])
def test_watching_has_no_wait_and_no_transfer(kit: Any, tied: bool, device: Accelerator) -> None:
    guard, model, steps = guarded(kit, device, tied=tied)
    for seen in steps[:-1]:
        assert seen.launches > 10, "the guard's work is seen"
        assert not seen.waits
        assert not seen.moved
    assert steps[-1].down > 0, "a check does read"
    alone, trained, _ = guarded(kit, None, tied=tied)
    for name in ("data_target", "inputs", "last_target", "pull", "push", "input_only"):
        one, other = (getattr(run.last.exposure, name).cpu() for run in (guard, alone))
        assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert guard.last.exposure.push_share == pytest.approx(alone.last.exposure.push_share, rel=1e-4)
    assert_close(model.lm_head.weight.detach().cpu(), trained.lm_head.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["freeze", "shared"])
def test_hold_on_the_device_has_no_wait_and_no_transfer(kit: Any, tied: bool, mode: str, device: Accelerator) -> None:
    options = {"enabled": True, "mode": mode}
    guard, model, steps = guarded(kit, device, tied=tied, hold=options)
    for seen in steps[:-1]:
        assert not seen.waits
        assert not seen.moved
    alone, trained, _ = guarded(kit, None, tied=tied, hold=options)
    held = guard._protection.holder.held.cpu()
    assert 0 < int(held.sum()) < kit.ROWS
    assert torch.equal(held, alone._protection.holder.held)
    now, then = (one.lm_head.weight.detach().cpu() for one in (model, trained))
    assert_close(now, then, rtol=1e-4, atol=1e-5)
    if mode == "freeze":
        never = guard.last.exposure.data_target + guard.last.exposure.inputs == 0
        base = kit.llama(tied=tied).lm_head.weight.detach()
        still = (now == base).all(dim=1)
        assert bool(still[held & never].all())


@pytest.mark.parametrize("mode", ["freeze", "shared"])
def test_hold_on_the_host_moves_the_matrix_once_each_way(kit: Any, mode: str, device: Accelerator) -> None:
    options = {"enabled": True, "mode": mode, "anchor": "host"}
    _, model, steps = guarded(kit, device, tied=False, hold=options)
    size = model.lm_head.weight.numel() * 4
    for seen in steps[:-1]:
        assert not seen.waits
        assert (seen.down, seen.up) == (size, size)


def test_a_guard_that_was_attached_before_the_model_moved_follows_it(kit: Any, device: Accelerator) -> None:
    model, data = kit.llama(), kit.batches(4)
    model.config.use_cache = False
    guard = VocabGuard(drift={"every_n_steps": 4}, exposure={"push_every_n_steps": 2}, **kit.QUIET)
    guard.attach(model, None, total_steps=4)
    moved(model)
    for step, batch in enumerate(data, start=1):
        device.clear()
        model.train()(**{name: value.to(KIND) for name, value in batch.items()}).loss.backward()
        guard.step(step)
        assert step in (1, 4) or not (device.waits or device.moved), step
    assert guard.last.exposure.data_target.tolist() == kit.naive_counts(data)["data_target"]


def test_rates_on_the_device_are_read_when_they_are_asked_for() -> None:
    with accelerator(ours=lambda file: file.endswith("learning_rates.py")) as seen:
        rates = [0.5, 0.25, 0.125]
        meter, plain = RateMeter(), RateMeter()
        for rate in rates:
            meter.add(SimpleNamespace(param_groups=[{"lr": torch.tensor(rate).to(KIND)}]))
            plain.add(SimpleNamespace(param_groups=[{"lr": rate}]))
        assert not seen.waits
        assert not seen.moved
        assert meter.state_dict() == plain.state_dict() == {"steps": 3, "sum": 0.875, "square": 0.328125}
        assert seen.moved


def test_what_waits_is_seen() -> None:
    """The recorder itself: each kind of wait and of transfer, on a line that counts as ours."""
    with accelerator(ours=lambda file: file == __file__) as device:
        vector = torch.tensor([1.0, 0.0, 2.0]).to(KIND)
        ways: dict[str, Any] = {
            "item": vector.sum().item,
            "bool": lambda: bool(vector[0] > 0),
            "nonzero": vector.nonzero,
            "mask": lambda: vector[vector > 0],
            "put": lambda: vector.__setitem__(vector > 5, torch.ones(1).to(KIND)),
            "equal": lambda: torch.equal(vector, vector + 1),
            "unique": vector.unique,
            "down": vector.cpu,
            "up": lambda: torch.ones(2).to(KIND),
            "made": lambda: torch.tensor([1.0, 2.0], device=KIND),
            "into": lambda: vector.copy_(torch.zeros(3)),
            "out of": lambda: torch.zeros(3).copy_(vector),
        }
        for name, act in ways.items():
            device.clear()
            act()
            assert device.waits or device.moved, name
        device.clear()
        torch.where(vector > 0, vector, 0.0).sum() + torch.zeros(3, device=KIND).masked_fill(vector > 0, 1.0)
        vector[1:] = 3.0
        assert device.launches > 0
        assert (device.waits, device.moved) == (Counter(), Counter())
        assert vector.cpu().tolist()[1:] == [3.0, 3.0]
