"""The forecast inside a guarded run: what it is told, when it says nothing, and how it goes on."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from transformers import Adafactor

from vocabguard import VocabGuard
from vocabguard.guard.forecast import nature_of
from vocabguard.results import Forecast, NotApplicable, RowDrift

STEPS = 12


def guarded(kit: Any, tokenizer: Any, **attach: Any) -> tuple[VocabGuard, Any, Any]:
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    guard = VocabGuard(
        tokenizer=tokenizer,
        **kit.QUIET,
        drift={"every_n_steps": 2},
        exposure={"push_every_n_steps": 2},
        probe={"enabled": False},
    )
    known: dict[str, Any] = {"total_steps": STEPS, "schedule": np.full(STEPS, 1e-2)}
    guard.attach(model, optimizer, **(known | attach))
    return guard, model, optimizer


def reason(guard: VocabGuard) -> str:
    assert guard.last is not None
    assert isinstance(guard.last.forecast, NotApplicable)
    assert not any("forecast" in key for key in guard.last.scalars)
    return guard.last.forecast.reason


def test_each_check_has_a_forecast_of_every_row(kit: Any, tokenizer: Any) -> None:
    loader = torch.utils.data.DataLoader(kit.batches(STEPS, kit.TOKENIZER_ROWS), batch_size=None)
    guard, model, optimizer = guarded(kit, tokenizer, dataloader=loader)
    assert guard.last is not None
    assert isinstance(guard.last.forecast, Forecast)
    assert guard.last.scalars["vocabguard/forecast/rows"] > 0
    kit.loop(guard, model, optimizer, kit.batches(STEPS, kit.TOKENIZER_ROWS))
    last = guard.last
    assert isinstance(last.forecast, Forecast)
    assert isinstance(last.head, RowDrift)
    # At the end there is nothing left to say but what is.
    torch.testing.assert_close(last.forecast.cosine, last.head.cosine, atol=1e-4, rtol=0, equal_nan=True)
    below = last.scalars["vocabguard/forecast/below_0.95"]
    assert below == pytest.approx(last.scalars["vocabguard/head/below_0.95"], abs=2e-3)
    assert {"vocabguard/forecast/never/below_0.95", "vocabguard/forecast/latin/rows"} <= last.scalars.keys()


def test_rates_and_pasts_are_those_of_the_run(kit: Any, tokenizer: Any) -> None:
    rates = np.linspace(1e-2, 2e-3, STEPS)
    guard, model, optimizer = guarded(kit, tokenizer, schedule=rates)
    base = model.lm_head.weight.detach().double()
    seen = {}
    for step, batch in enumerate(kit.batches(STEPS, kit.TOKENIZER_ROWS)[:8], start=1):
        optimizer.param_groups[0]["lr"] = rates[step - 1]
        kit.loop(guard, model, optimizer, [batch], first=step)
        seen[step] = torch.nn.functional.cosine_similarity(base, model.lm_head.weight.detach().double()).arccos()
    forecaster = guard._checker.forecaster  # type: ignore[union-attr]
    assert forecaster is not None
    assert forecaster.meter is not None
    assert forecaster.meter.sum == pytest.approx(rates[:8].sum())
    assert forecaster.meter.left(8, STEPS) == pytest.approx((rates[8:].sum(), (rates[8:] ** 2).sum()))
    assert [past.step for past in forecaster.pasts] == [2, 4, 6, 8]
    for past in forecaster.pasts:
        assert past.rate_sum == pytest.approx(rates[: past.step].sum())
        np.testing.assert_allclose(past.angle, seen[past.step].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("attach", "words"),
    [({"schedule": None}, "learning rates to come"), ({"total_steps": None}, "planned number of optimizer steps")],
)
def test_what_is_not_known_is_said(kit: Any, tokenizer: Any, attach: dict[str, Any], words: str) -> None:
    guard, model, optimizer = guarded(kit, tokenizer, **attach)
    kit.loop(guard, model, optimizer, kit.batches(4, kit.TOKENIZER_ROWS))
    assert words in reason(guard)
    assert guard.failure is None


def test_on_wider_models_than_it_was_fitted_on_nothing_is_said(kit: Any, tokenizer: Any) -> None:
    """Where nothing is forecast, `at_risk` cannot fire, and the preset `early` waits for what was measured."""
    from vocabguard.config import load_config

    model = kit.llama(kit.TOKENIZER_ROWS, width=264)
    guard = VocabGuard(tokenizer=tokenizer, drift={"every_n_steps": 1}, probe={"enabled": False}, **kit.QUIET)
    data = torch.utils.data.DataLoader([{"labels": torch.full((8,), 1000)}])
    guard.attach(model, kit.sgd(model), total_steps=4, schedule=[0.1] * 4, dataloader=data)
    assert isinstance(guard.last.forecast, NotApplicable)
    assert "rows of width 264 are wider than 256" in guard.last.forecast.reason
    assert not [key for key in guard.last.scalars if "/forecast/" in key]
    assert "at_risk" not in guard.last.firing
    actions = {name: rule.actions for name, rule in load_config("early").alerts.items()}
    assert actions["at_risk"] == actions["tokens_forgotten"] == ["log", "echo", "hold"]


def test_an_earlier_forecast_is_judged_by_where_rows_are_now(kit: Any, tokenizer: Any) -> None:
    guard, model, optimizer = guarded(kit, tokenizer)
    kit.loop(guard, model, optimizer, kit.batches(8, kit.TOKENIZER_ROWS))
    forecaster = guard._checker.forecaster  # type: ignore[union-attr]
    assert forecaster is not None
    assert [one.schedule.step for one in forecaster.moments] == [4, 6, 8]
    sides = forecaster._judged(forecaster.moments[-1])
    assert all(1 <= side <= 5 for side in sides)
    far = forecaster.moments[-1]
    beyond = tuple(replace(past, angle=past.angle * 4) for past in far.track)
    assert forecaster._judged(replace(far, track=beyond))[1] == 5.0


def test_rates_set_by_hand_end_the_forecast(kit: Any, tokenizer: Any) -> None:
    guard, model, optimizer = guarded(kit, tokenizer)
    data = kit.batches(STEPS, kit.TOKENIZER_ROWS)
    kit.loop(guard, model, optimizer, data[:4])
    assert isinstance(guard.last.forecast, Forecast)  # type: ignore[union-attr]
    optimizer.param_groups[0]["lr"] = 1e-3
    kit.loop(guard, model, optimizer, data[4:8], first=5)
    assert "it was left" in reason(guard)


def test_a_frozen_head_and_uncounted_targets_have_none(kit: Any, tokenizer: Any) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    model.lm_head.requires_grad_(False)
    guard = VocabGuard(tokenizer=tokenizer, **kit.QUIET, drift={"every_n_steps": 2}, probe={"enabled": False})
    guard.attach(model, AdamW(model.parameters()), total_steps=4, schedule=[1e-3] * 4)
    kit.loop(guard, model, AdamW(model.parameters()), kit.batches(2, kit.TOKENIZER_ROWS))
    reason(guard)
    guard, model, optimizer = guarded(kit, tokenizer)
    guard = VocabGuard(tokenizer=tokenizer, **kit.QUIET, exposure={"enabled": False}, probe={"enabled": False})
    guard.attach(model, optimizer, total_steps=4, schedule=[1e-3] * 4)
    assert "counts" in reason(guard)


def test_a_resumed_run_forecasts_what_an_uninterrupted_one_does(kit: Any, tokenizer: Any) -> None:
    data, rates = kit.batches(STEPS, kit.TOKENIZER_ROWS), np.full(STEPS, 1e-2)
    whole, model, optimizer = guarded(kit, tokenizer)
    kit.loop(whole, model, optimizer, data[:10])
    wanted = whole.last
    half, model, optimizer = guarded(kit, tokenizer)
    kit.loop(half, model, optimizer, data[:5])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    half.finish(check=False)
    again = VocabGuard(
        tokenizer=tokenizer,
        **kit.QUIET,
        drift={"every_n_steps": 2},
        exposure={"push_every_n_steps": 2},
        probe={"enabled": False},
    )
    again.attach(
        model, optimizer, total_steps=STEPS, schedule=rates[5:], steps_done=5,
        resumed=torch.load(file, weights_only=True),
    )  # fmt: skip
    kit.loop(again, model, optimizer, data[5:10], first=6)
    for name in ("cosine", "low", "high", "chance"):
        one, other = getattr(again.last.forecast, name), getattr(wanted.forecast, name)  # type: ignore[union-attr]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)


def test_a_resized_matrix_goes_on_with_the_rows_it_had(kit: Any, tokenizer: Any) -> None:
    guard, model, optimizer = guarded(kit, tokenizer)
    data = kit.batches(STEPS, kit.TOKENIZER_ROWS)
    kit.loop(guard, model, optimizer, data[:4])
    forecaster = guard._checker.forecaster  # type: ignore[union-attr]
    assert forecaster is not None
    before = forecaster.pasts[-1].angle
    forecaster.watched.resize(kit.TOKENIZER_ROWS + 8)
    forecaster.resize()
    after = forecaster.pasts[-1].angle
    np.testing.assert_array_equal(after[:-8], before)
    assert np.isnan(after[-8:]).all()


def test_natures_of_optimizers() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    adam = nature_of(AdamW(weights, betas=(0.9, 0.95)), 0)
    assert adam is not None
    assert (adam.kind, adam.memory(7)) == ("adam", pytest.approx(20))
    for factored in (
        Adafactor(weights, lr=1e-3, relative_step=False, scale_parameter=False),
        torch.optim.Adafactor(weights),
    ):
        found = nature_of(factored, 0)
        assert found is not None
        assert (found.kind, found.memory(32)) == ("adam", pytest.approx(16))
    rms = nature_of(RMSprop(weights, alpha=0.9), 0)
    assert rms is not None
    assert rms.memory(1) == pytest.approx(10)
    descent = nature_of(SGD(weights, lr=1), 0)
    assert descent is not None
    assert (descent.kind, descent.memory(5)) == ("sgd", 0)
    assert nature_of(Adagrad(weights), 0) is None
