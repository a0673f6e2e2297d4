"""Hold in real training runs: rows that the data never asked for keep still, exactly, and others move."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
SMALL: dict[str, Any] = {"probe": {"enabled": False}, "preflight": {"enabled": False}, "drift": {"every_n_steps": 2}}


def rows_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows that ask for few ids, and read others that they never ask for."""
    rng = Random(seed)
    rows = []
    for _ in range(count):
        read, asked = ([rng.randint(*ids) for _ in range(20)] for ids in ((1000, 1100), (300, 700)))
        rows.append({"input_ids": read + asked, "labels": [-100] * 20 + asked})
    return rows


def asked_by(rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """(8192,) bool: the ids that are a target, by a plain loop."""
    mask = torch.zeros(8192, dtype=torch.bool)
    for row in rows:
        for label in row["labels"][1:]:
            if label != -100:
                mask[label] = True
    return mask


def guard_for(kit: Any, trainer: str, tokenizer: Any, **options: Any) -> Any:
    return kit.CALLBACKS[trainer](tokenizer=tokenizer, **(SMALL | kit.QUIET | options))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_frozen_rows_are_the_base_bit_by_bit(
    kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # AdamW of the kit with a weight decay that would move every row.
    made = kit.RecordingAdamW.__init__

    def with_decay(self: Any, model: Any) -> None:
        made(self, model)
        self.param_groups[0]["weight_decay"] = 0.1

    monkeypatch.setattr(kit.RecordingAdamW, "__init__", with_decay)
    data = rows_of(6 * kit.BATCH * accumulation)
    guarded = guard_for(kit, trainer_name, tokenizer, hold={"enabled": True, "mode": "freeze"})
    run = kit.RUNS[trainer_name](
        kit.tiny_model(), data, tokenizer, tmp_path, accumulation=accumulation, callbacks=(guarded,)
    )
    asked, head = asked_by(data), run.model.state_dict()[HEAD]
    assert torch.equal(head[~asked], run.base[HEAD][~asked])
    assert bool((head[asked] != run.base[HEAD][asked]).any(dim=1).all())
    # The input embedding is not held: weight decay moves all of it.
    assert not torch.equal(run.model.state_dict()[EMBEDDING], run.base[EMBEDDING])
    for name in ("exp_avg", "exp_avg_sq"):
        moment = run.optimizer.state[run.model.lm_head.weight][name]
        assert not moment[~asked].any()
        assert bool(moment[asked].any(dim=1).all())
    live = guarded.guard.table.live
    held = guarded.guard.last.scalars["vocabguard/hold/share"]
    assert held == pytest.approx(float((~asked)[live].float().mean()), abs=1e-6)


def test_shared_rows_move_as_one(kit: Any, tokenizer: Any, tmp_path: Path, trainer_name: str) -> None:
    data = rows_of(6 * kit.BATCH)
    guarded = guard_for(kit, trainer_name, tokenizer, hold={"enabled": True, "mode": "shared"})
    run = kit.RUNS[trainer_name](kit.tiny_model(), data, tokenizer, tmp_path, callbacks=(guarded,))
    moved = run.model.state_dict()[HEAD] - run.base[HEAD]
    never = ~asked_by(data)
    shift = moved[never].mean(dim=0)
    assert shift.norm() > 1e-4
    torch.testing.assert_close(moved[never], shift.expand_as(moved[never]), atol=1e-6, rtol=0)
    # The shift that all share is taken off by the residual cosine: nothing is left of their drift.
    residual = guarded.guard.last.head.residual[never & (run.base[HEAD].norm(dim=1) > 0)]
    assert float(residual.min()) > 1 - 1e-5


def test_tied_rows_keep_their_input_gradient(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = rows_of(6 * kit.BATCH)
    guarded = guard_for(kit, "hf", tokenizer, hold={"enabled": True, "mode": "freeze"})
    run = kit.run_hf(kit.tiny_model(tied=True), data, tokenizer, tmp_path, callbacks=(guarded,))
    before, now = run.base[EMBEDDING], run.model.state_dict()[EMBEDDING]
    read = torch.zeros(8192, dtype=torch.bool)
    read[[token for row in data for token in row["input_ids"]]] = True
    assert torch.equal(now[~read], before[~read])
    assert bool((now[read] != before[read]).any(dim=1).all())


def test_a_window_holds_rows_that_were_asked_for_long_ago(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    first, then = rows_of(2 * kit.BATCH), rows_of(6 * kit.BATCH, seed=1)
    for row in then:
        row["input_ids"] = [token + 500 if token < 1000 else token for token in row["input_ids"]]
        row["labels"] = [label + 500 if label != -100 else label for label in row["labels"]]
    kept: dict[int, torch.Tensor] = {}
    guarded = guard_for(kit, "hf", tokenizer, hold={"enabled": True, "mode": "freeze", "window_steps": 3})
    step = guarded.guard.step

    def keep(number: int, *optimizers: Any) -> Any:
        kept[number] = guarded.guard._checker.model.lm_head.weight.detach().clone()
        return step(number, *optimizers)

    guarded.guard.step = keep
    kit.run_hf(kit.tiny_model(), first + then, tokenizer, tmp_path, steps=8, callbacks=(guarded,))
    early = asked_by(first[-kit.BATCH :]) & ~asked_by(then)
    # Last a target in step 2: free in steps 3 and 4, held from step 5 on.
    assert bool((kept[3][early] != kept[2][early]).any())
    assert bool((kept[4][early] != kept[3][early]).any())
    assert torch.equal(kept[5][early], kept[4][early])
    assert torch.equal(kept[8][early], kept[4][early])


def test_echo_targets_are_let_go_for_their_step(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = rows_of(6 * kit.BATCH)
    guarded = guard_for(
        kit, "hf", tokenizer, hold={"enabled": True, "mode": "freeze"},
        echo={"enabled": True, "dose": 0.5, "list_tokens": 4}, preflight={"enabled": True},
    )  # fmt: skip
    run = kit.run_hf(kit.tiny_model(), data, tokenizer, tmp_path, callbacks=(guarded,))
    asked, head = asked_by(data), run.model.state_dict()[HEAD]
    echoed = guarded.guard.last.exposure.echo_target > 0
    assert bool((echoed & ~asked).any())
    moved = (head != run.base[HEAD]).any(dim=1)
    assert torch.equal(moved, asked | echoed)


def test_switched_by_the_user_and_off_again(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = rows_of(9 * kit.BATCH)
    guarded = guard_for(kit, "hf", tokenizer, hold={"armed": True, "mode": "freeze"})
    never, kept = ~asked_by(data), {}
    step = guarded.guard.step

    def at(number: int, *optimizers: Any) -> Any:
        kept[number] = guarded.guard._checker.model.lm_head.weight.detach().clone()[never]
        if number in (3, 6):
            guarded.guard.switch("hold", number == 3)
        return step(number, *optimizers)

    guarded.guard.step = at
    kit.run_hf(kit.tiny_model(), data, tokenizer, tmp_path, steps=9, callbacks=(guarded,))
    moves = [not torch.equal(kept[number], kept[number - 1]) for number in range(2, 10)]
    assert moves == [True, True, False, False, False, True, True, True]


def test_mixed_precision(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = rows_of(6 * kit.BATCH)
    guarded = guard_for(kit, "hf", tokenizer, hold={"enabled": True, "mode": "freeze"})
    run = kit.run_hf(kit.tiny_model(), data, tokenizer, tmp_path, callbacks=(guarded,), bf16=True)
    asked, head = asked_by(data), run.model.state_dict()[HEAD]
    assert torch.equal(head[~asked], run.base[HEAD][~asked])
    assert bool((head[asked] != run.base[HEAD][asked]).any(dim=1).all())


@pytest.mark.parametrize("mode", ["freeze", "shared"])
def test_bf16_weights(kit: Any, tokenizer: Any, tmp_path: Path, mode: str) -> None:
    data = rows_of(6 * kit.BATCH)
    guarded = guard_for(kit, "hf", tokenizer, hold={"enabled": True, "mode": mode})
    model = kit.tiny_model().to(torch.bfloat16)
    run = kit.run_hf(model, data, tokenizer, tmp_path, callbacks=(guarded,))
    never = ~asked_by(data)
    before, now = run.base[HEAD][never], run.model.state_dict()[HEAD][never]
    assert now.dtype == torch.bfloat16
    assert torch.equal(now, before) == (mode == "freeze")
    assert guarded.guard.last.scalars["vocabguard/hold/share"] > 0.5
