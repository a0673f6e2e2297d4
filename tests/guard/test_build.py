"""What is refused before step 1, and how far ahead a plan has to look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from vocabguard import VocabGuard, collective
from vocabguard.config import ConfigError
from vocabguard.guard import build as arming

OPTIONS: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "on_error": "raise", "probe": {"enabled": False},
    "preflight": {"enabled": False}, "untrained": {"enabled": False},
}  # fmt: skip


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def loader(**options: Any) -> Any:
    rows = [{"input_ids": [300 + place] * 30, "labels": [300 + place] * 30} for place in range(12)]
    return DataLoader(rows, collate_fn=collate, **({"batch_size": 4} | options))  # type: ignore[arg-type]


def attach(kit: Any, tokenizer: Any, dataloader: Any, **options: Any) -> VocabGuard:
    guard = VocabGuard(tokenizer=tokenizer, **(OPTIONS | {"echo": {"enabled": True}} | options.pop("settings", {})))
    model = kit.llama(kit.TOKENIZER_ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(model, optimizer, dataloader=dataloader, **({"inject": "collate", "total_steps": 6} | options))
    return guard


class DataLoaderDispatcher:
    """Stands for accelerate's: the main process collates for all."""

    def __init__(self, inner: Any) -> None:
        self.base_dataloader = inner


def test_dispatched_batches_are_refused_on_many_processes(
    kit: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = loader()
    attach(kit, tokenizer, DataLoaderDispatcher(inner)).finish(check=False)
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    run = SimpleNamespace(dataloader=DataLoaderDispatcher(inner), loader=inner, route="collate")
    with pytest.raises(ConfigError, match="dispatch_batches"):
        arming._require_route(run)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dataloader", "options", "said"),
    [
        (loader, {"inject": None}, r"collate_fn=guard\.collator"),
        (lambda: [1, 2], {}, "a list; allowed: a torch DataLoader"),
        (lambda: None, {}, "a NoneType; allowed: a torch DataLoader"),
        (lambda: loader(batch_size=None), {}, "makes batches by itself"),
        (
            loader,
            {"total_steps": None, "settings": {"echo": {"enabled": True, "targets_per_live_token": 2.0}}},
            "targets_per_live_token needs the number of planned steps",
        ),
        (loader, {"settings": {"echo": {"enabled": True, "exclude": [99999]}}}, "99999 is out of range"),
        (
            loader,
            {"settings": {"echo": {"enabled": True, "mode": "watch"}, "probe": {"enabled": False, "watch": [0]}}},
            "none of probe.watch may be echoed",
        ),
    ],
)
def test_refused(kit: Any, tokenizer: Any, dataloader: Any, options: dict[str, Any], said: str) -> None:
    given = dataloader()
    with pytest.raises(ConfigError, match=said):
        attach(kit, tokenizer, given, **options)
    if isinstance(given, DataLoader):
        assert given.collate_fn is collate


def test_the_collate_function_is_given_back(kit: Any, tokenizer: Any) -> None:
    given = loader()
    guard = attach(kit, tokenizer, given)
    assert given.collate_fn is not collate
    guard.finish(check=False)
    assert given.collate_fn is collate


@pytest.mark.parametrize(
    ("options", "per_step", "lag"),
    [({}, 1, 3), ({}, 4, 6), ({"num_workers": 2}, 1, 7), ({"num_workers": 2, "prefetch_factor": 4}, 2, 12)],
)
def test_plans_look_beyond_what_is_made_already(
    kit: Any, tokenizer: Any, options: dict[str, Any], per_step: int, lag: int
) -> None:
    guard = attach(kit, tokenizer, loader(**options), batches_per_step=per_step)
    assert guard._protection is not None
    assert guard._protection.echo is not None
    assert guard._protection.echo.pace.lag == lag
    guard.finish(check=False)


def test_what_is_said_before_step_one(kit: Any, tokenizer: Any) -> None:
    rule = {"metric": "head/below_0.95", "threshold": 0.5, "actions": ["hold"]}
    guard = attach(kit, tokenizer, loader(), settings={"alerts": {"moved": rule}})
    assert guard.watch is not None
    echo, hold = guard.watch.notes
    assert "Echo" in echo
    assert "is on" in echo
    assert "0.1 for each data target" in echo
    assert "waits for moved" in hold
    guard.finish(check=False)


def test_a_kind_that_is_not_armed_cannot_be_switched_on(kit: Any, tokenizer: Any) -> None:
    guard = attach(kit, tokenizer, loader())
    with pytest.raises(ConfigError, match=r"hold\.armed: true"):
        guard.switch("hold", True)
    guard.switch("echo", False)
    assert guard._protection is not None
    assert guard._protection.echo is not None
    assert not guard._protection.echo.on
    guard.finish(check=False)


def test_cadence_does_not_follow_the_clock(kit: Any, tokenizer: Any) -> None:
    guard = attach(kit, tokenizer, loader(), total_steps=300)
    assert (guard._cadence.every, guard._cadence.probe_every) == (20, 100)
    guard.finish(check=False)
