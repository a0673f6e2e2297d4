"""Batch samplers that put several examples into a row, as lists of lists: preflight, echo's trial and echo itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from vocabguard import VocabGuard
from vocabguard.integrations.huggingface import VocabGuardCallback
from vocabguard.results import Preflight

ECHO = {"enabled": True, "dose": 0.5, "list_tokens": 4}
LONGEST = 48


class Rows(list[dict[str, list[int]]]):
    """A data set that gives several examples at once, nested as their indices are."""

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        return [self.__getitems__(one) if isinstance(one, list) else self[one] for one in indices]


class Multipack(BatchSampler):
    """Fills rows up to a length, in an order of its own: two packed rows a batch, the rest of an epoch is dropped."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(SequentialSampler(rows), 2, True)
        self._rows, self.random, self.begun = rows, Random(3), 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        order = list(range(len(self._rows)))
        self.random.shuffle(order)
        packs: list[list[int]] = [[]]
        for index in order:
            if sum(len(self._rows[one]["input_ids"]) for one in [*packs[-1], index]) > LONGEST:
                packs.append([])
            packs[-1].append(index)
        yield from (packs[start : start + 2] for start in range(0, len(packs) - 1, 2))

    def __len__(self) -> int:
        return 6


class Joins(DataCollatorForSeq2Seq):
    """Joins the examples of each pack, and refuses what is no pack."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        rows = []
        for pack in features:
            assert isinstance(pack, list)
            joined = {key: [one for example in pack for one in example[key]] for key in ("input_ids", "labels")}
            rows.append({**joined, "attention_mask": [n + 1 for n, one in enumerate(pack) for _ in one["input_ids"]]})
        batch = super().__call__(rows, return_tensors=return_tensors)
        batch["attention_mask"] = (batch["attention_mask"] > 0).long()
        return batch


class Packs(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        rows: Any = self.train_dataset
        self.sampler = Multipack(rows)
        loader = DataLoader(rows, batch_sampler=self.sampler, collate_fn=self.data_collator)
        found: DataLoader[Any] = self.accelerator.prepare(loader)
        return found


class Spy:
    """Counts the labels that reach the model, by a plain loop, and keeps the batches."""

    def __init__(self, model: Any) -> None:
        self.counts, self.batches = [0] * 8192, []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        self.batches.append(kwargs["input_ids"].clone())
        for row in kwargs["labels"].tolist():
            for label in row[1:]:
                if label != -100:
                    self.counts[label] += 1


def train(kit: Any, tokenizer: Any, folder: Path, **options: Any) -> tuple[Any, Spy, Packs]:
    rows = Rows(kit.random_rows(48))
    model = kit.tiny_model()
    callback = VocabGuardCallback(
        tokenizer=tokenizer, **{"probe": {"enabled": False}, "drift": {"every_n_steps": 2}} | kit.QUIET | options
    )
    arguments = TrainingArguments(
        str(folder), max_steps=4, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
        logging_steps=1, seed=1,
    )  # fmt: skip
    trainer = Packs(
        model=model, args=arguments, train_dataset=rows, data_collator=Joins(tokenizer),
        callbacks=[callback], processing_class=tokenizer,
    )  # fmt: skip
    spy = Spy(model)
    trainer.train()
    return callback.guard, spy, trainer


def test_echo_comes_into_packed_rows(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vocabguard"):
        guard, spy, _ = train(kit, tokenizer, tmp_path, echo=ECHO)
    assert not [record for record in caplog.records if "echo is off" in record.getMessage()]
    exposure = guard.last.exposure
    assert int(exposure.echo_target.sum()) > 10
    assert (exposure.data_target + exposure.echo_target).tolist() == spy.counts
    assert len(spy.batches) == 4
    assert all(len(batch) > 2 for batch in spy.batches[1:])  # two packed rows, and those of echo


def test_preflight_counts_the_samplers_own_batches(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guard, _, trainer = train(kit, tokenizer, tmp_path)
    flight = guard.watch.preflight
    assert isinstance(flight, Preflight)
    assert flight.complete
    own = list(Multipack(trainer.train_dataset))
    assert flight.batches == len(own)
    assert flight.rows == sum(len(pack) for batch in own for pack in batch)
    expected = [0] * kit.ROWS
    for batch in own:
        for pack in batch:
            labels = [label for index in pack for label in trainer.train_dataset[index]["labels"]]
            for label in labels[1:]:
                if label != -100:
                    expected[label] += 1
    assert flight.data_target.tolist() == expected


def test_the_runs_own_order_and_sampler_stay_untouched(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    guard, spy, trainer = train(kit, tokenizer, tmp_path)
    rows = trainer.train_dataset
    packs = [
        [torch.tensor([one for index in pack for one in rows[index]["input_ids"]]) for pack in batch]
        for batch in Multipack(rows)
    ]
    pad = {"batch_first": True, "padding_value": tokenizer.pad_token_id}
    expected = [torch.nn.utils.rnn.pad_sequence(batch, **pad) for batch in packs][:4]
    assert trainer.sampler.begun == 1
    assert all(torch.equal(one, other) for one, other in zip(spy.batches, expected, strict=True))
    assert guard.failure is None


def test_a_collator_that_refuses_echo_rows_is_found_out_before_step_1(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Picky(Joins):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            assert len(features) == 2, "two packs a batch"
            return super().__call__(features, return_tensors)

    rows = Rows(kit.random_rows(48))
    loader = DataLoader(rows, batch_sampler=Multipack(rows), collate_fn=Picky(tokenizer))
    model = kit.tiny_model()
    guard = VocabGuard(tokenizer=tokenizer, echo=ECHO, probe={"enabled": False}, **kit.QUIET)
    with pytest.raises(ValueError, match="two packs a batch"):
        guard.attach(model, torch.optim.SGD(model.parameters(), 0.1), dataloader=loader, inject="collate")


def test_a_sampler_that_cannot_be_copied_is_read_as_before(kit: Any, tokenizer: Any) -> None:
    class Stuck(Multipack):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copy")

        def __iter__(self) -> Iterator[Any]:
            yield from ([0, 1], [2, 3])

    rows = Rows(kit.random_rows(4))
    loader = DataLoader(rows, batch_sampler=Stuck(rows), collate_fn=DataCollatorForSeq2Seq(tokenizer))
    model = kit.tiny_model()
    guard = VocabGuard(tokenizer=tokenizer, probe={"enabled": False}, **kit.QUIET)
    watch = guard.attach(model, torch.optim.SGD(model.parameters(), 0.1), dataloader=loader, run_dir=None)
    guard.finish()
    assert watch.preflight.rows == 4
