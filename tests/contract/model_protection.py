"""What protects a run, and going on with it, for every model and adapter: further columns of the contract."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_cases import PICTURES, ROWS, SEQ2SEQ, Batch, Case, frozen
from model_contract import CHECKS, OPTIONS, STEPS, YES, Found, checked, loss_of, run, text_batches
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from vocabguard import VocabGuard
from vocabguard.config import ConfigError
from vocabguard.protect.collator import ECHO_KEY
from vocabguard.results import NotApplicable, WatchedMatrix
from vocabguard.rows.models import core_of

QUIET: dict[str, Any] = OPTIONS | {"probe": {"enabled": False}, "alerts": {}}


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def steps(model: Any, optimizer: torch.optim.Optimizer, guard: VocabGuard, data: list[Batch], first: int = 1) -> None:
    """A hand-written loop."""
    model.train()
    for step, batch in enumerate(data, start=first):
        torch.manual_seed(step)
        loss_of(model, batch).backward()
        optimizer.step()
        guard.step(step)
        optimizer.zero_grad()


def echo(case: Case, tokenizer: Any) -> str:
    """Echo rows join examples on their way into the batch; counted apart, and taken by the model."""
    model = frozen(case.build())
    examples = []
    for batch in map(case.batch, text_batches(STEPS)):
        mask = batch["attention_mask"].bool()
        for row, keep in enumerate(mask):
            ids = batch["input_ids"][row][keep].tolist()
            example: dict[str, Any] = {"input_ids": ids}
            if "labels" in batch:
                labels = batch["labels"][row]
                example["labels"] = labels[keep].tolist() if labels.ndim else int(labels)
            if case in PICTURES:
                example["pixel_values"] = torch.zeros(3, 8, 8)
            examples.append(example)
    collate = _collate(tokenizer, pictures=case in PICTURES)
    loader: Any = DataLoader(examples, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    guard = VocabGuard(tokenizer=tokenizer, **QUIET, echo={"enabled": True, "dose": 1.0, "list_tokens": 4})
    optimizer = optimizer_of(model)
    try:
        guard.attach(model, optimizer, total_steps=STEPS, dataloader=loader, inject="collate")
    except ConfigError as error:
        return f"not applicable: {error}"
    echoed = torch.zeros(ROWS, dtype=torch.int64)
    data = []
    for batch in loader:
        kept = batch["labels"][batch[ECHO_KEY]]
        echoed += torch.bincount(kept[kept != -100], minlength=ROWS)
        data.append(dict(batch))
    steps(model, optimizer, guard, data)
    guard.finish()
    assert guard.last is not None
    found: Any = guard.last.exposure
    assert int(echoed.sum()) > 4
    assert found.echo_target.tolist() == echoed.tolist()
    first = int(bool(case.shift))
    expected = torch.zeros(ROWS, dtype=torch.int64)
    for example in examples:
        for label in example["labels"][first:]:
            expected[label] += label != -100
    assert torch.equal(found.data_target, expected)
    return YES


def _collate(tokenizer: Any, *, pictures: bool) -> Callable[[list[Any]], Any]:
    def collate(rows: list[Any]) -> Any:
        seen = torch.stack([row["pixel_values"] for row in rows]) if pictures else None
        rows = [{name: value for name, value in row.items() if name != "pixel_values"} for row in rows]
        padded = DataCollatorForSeq2Seq(tokenizer)(rows)
        batch = {name: value for name, value in padded.items() if value is not None}
        return batch if seen is None else {**batch, "pixel_values": seen}

    return collate


def hold(case: Case, tokenizer: Any) -> str:
    """Rows that the data never asks for are the base's, bit by bit."""
    model = frozen(case.build())
    optimizer, data = optimizer_of(model), [case.batch(batch) for batch in text_batches(STEPS)]
    guard = VocabGuard(tokenizer=tokenizer, **QUIET, hold={"enabled": True, "mode": "freeze"})
    before = case.rows_of(model, "head")
    try:
        watch = guard.attach(model, optimizer, total_steps=STEPS)
    except ConfigError as error:
        return f"not applicable: {error}"
    assert watch is not None
    if isinstance(watch.head, NotApplicable):
        return f"not applicable: {watch.head.reason}"
    steps(model, optimizer, guard, data)
    now = case.rows_of(model, "head")
    assert before is not None
    assert now is not None
    assert guard.last is not None
    guard.finish()
    found: Any = guard.last.exposure
    free = found.data_target > 0
    free |= (found.inputs > 0) if case.tied else False
    assert torch.equal(before[~free], now[~free])
    assert not torch.equal(before[free], now[free])
    return YES


def resume(case: Case, tokenizer: Any, whole: Found) -> str:
    """A run in two parts finds what the whole one found."""
    data = [case.batch(batch) for batch in text_batches(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        model = frozen(case.build())
        optimizer, guard = optimizer_of(model), VocabGuard(tokenizer=tokenizer, **OPTIONS)
        guard.attach(model, optimizer, total_steps=STEPS, run_dir=Path(folder) / "run")
        steps(model, optimizer, guard, data[:2])
        saved = guard.state_dict(), optimizer.state_dict(), _trained(model)
        guard.finish(check=False)
        model = frozen(case.build())
        optimizer, guard = optimizer_of(model), VocabGuard(tokenizer=tokenizer, **OPTIONS)
        optimizer.load_state_dict(saved[1])
        with torch.no_grad():
            for name, value in saved[2].items():
                dict(model.named_parameters())[name].copy_(value)
        guard.attach(
            model, optimizer, total_steps=STEPS, run_dir=Path(folder) / "run", resumed=saved[0], steps_done=2
        )  # fmt: skip
        with torch.no_grad():
            # From a first evaluation on bitsandbytes computes a little otherwise on a CPU; the whole run had its probe.
            loss_of(model.eval(), data[2])
        steps(model, optimizer, guard, data[2:], first=3)
        guard.finish()
    assert guard.last is not None
    one, other = guard.last, whole.last
    for name in ("data_target", "inputs", "last_target", "pull", "push", "input_only"):
        if not isinstance(other.exposure, NotApplicable):
            here, there = getattr(one.exposure, name), getattr(other.exposure, name)
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)
    for name, watched in (("head", whole.watch.head), ("embedding", whole.watch.embedding)):
        if isinstance(watched, WatchedMatrix):
            here, there = getattr(one, name).cosine, getattr(other, name).cosine
            torch.testing.assert_close(here, there, rtol=0, atol=2e-6, equal_nan=True)
    return YES


def _trained(model: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


ALL_COLUMNS = (*CHECKS, "echo", "hold", "resume")


def all_outcomes(case: Case, tokenizer: Any) -> dict[str, str]:
    """Run a case and check every column of `ALL_COLUMNS`; see `model_contract.outcomes`."""
    whole = run(case, tokenizer)
    said = {"echo": echo(case, tokenizer), "hold": hold(case, tokenizer), "resume": resume(case, tokenizer, whole)}
    own_name = type(core_of(whole.model)).__name__
    return checked(whole) | {name: value.replace(own_name, "the model") for name, value in said.items()}


def expected_protection(case: Case) -> set[str]:
    """Further columns that must be ``yes``."""
    echoes = (case.shift or case in SEQ2SEQ) and case not in PICTURES
    holds = case.pulled and "head" in case.moves
    return {"resume"} | ({"echo"} if echoes else set()) | ({"hold"} if holds else set())
