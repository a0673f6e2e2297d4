"""Batches with echo rows against the same batches without, through the collate functions that people use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from vocabguard.protect.collator import ECHO_KEY, EchoCollator, EchoError, RowMaker
from vocabguard.protect.feed import EchoFeed
from vocabguard.protect.plan import batch_ids
from vocabguard.protect.rows import IGNORE, EchoPrompt, EchoRow
from vocabguard.results import EchoPlan

PAD = 9
PROMPTS = (EchoPrompt((1, 2), (3,), (4,)), EchoPrompt((5,), (6, 7), (4,)))
PLAN = EchoPlan(0, 0, "uniform", 0.1, 12.0, 6, torch.arange(100, 180), cycle=0, offset=0, owed=0.0, seed=3)
Features = list[dict[str, Any]]


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Only its padding is used."""
    core = Tokenizer(WordLevel({f"w{n}": n for n in range(PAD)} | {"<pad>": PAD}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side=side)


def collator(inner: Callable[[Features], Any], *, seq2seq: bool = False, plan: EchoPlan = PLAN) -> EchoCollator:
    feed = EchoFeed(128)
    feed.publish(plan)
    return EchoCollator(inner, feed, RowMaker(PROMPTS, list_tokens=6, fill=1.0, seed=3, seq2seq=seq2seq))


def rows_of(wrapped: EchoCollator, length: int, number: int = 0, plan: EchoPlan = PLAN) -> list[EchoRow]:
    return wrapped.maker(batch_ids(plan, number), batch=number, rank=0, length=length)


def examples(lengths: list[int], keys: tuple[str, ...] = ("input_ids", "labels", "attention_mask")) -> Features:
    """Conversations of ids from 200 on: the first half asked, the second half answered."""
    rng, found = Random(len(lengths)), []
    for length in lengths:
        ids = [rng.randint(200, 999) for _ in range(length)]
        half = length // 2
        known: dict[str, Any] = {
            "input_ids": ids,
            "labels": [IGNORE] * half + ids[half:],
            "attention_mask": [1] * length,
            "token_type_ids": [0] * length,
            "position_ids": list(range(length)),
            "completion_mask": [0] * half + [1] * (length - half),
            "assistant_masks": [0] * half + [1] * (length - half),
            "special_tokens_mask": [0] * length,
            "seq_lengths": [half, length - half],
            "length": length,
        }
        found.append({key: known[key] for key in keys})
    return found


def trl_collator(**options: Any) -> Any:
    pytest.importorskip("trl")
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    return sft_trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, **options)


RAGGED, EVEN = [30, 24, 41], [35, 35, 35]
CAUSAL = ("input_ids", "attention_mask")
PADDED: dict[str, tuple[Callable[[], Any], list[int], tuple[str, ...]]] = {
    "seq2seq_right": (lambda: DataCollatorForSeq2Seq(tokenizer()), RAGGED, (*CAUSAL, "labels")),
    "seq2seq_left": (lambda: DataCollatorForSeq2Seq(tokenizer("left")), RAGGED, (*CAUSAL, "labels")),
    "seq2seq_multiple": (
        lambda: DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=16), RAGGED, (*CAUSAL, "labels")),
    "seq2seq_token_types": (
        lambda: DataCollatorForSeq2Seq(tokenizer()), RAGGED, (*CAUSAL, "labels", "token_type_ids")),
    "seq2seq_even_left_multiple": (
        lambda: DataCollatorForSeq2Seq(tokenizer("left"), pad_to_multiple_of=20), EVEN, (*CAUSAL, "labels")),
    "language_right": (lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False), RAGGED, CAUSAL),
    "language_left": (lambda: DataCollatorForLanguageModeling(tokenizer("left"), mlm=False), RAGGED, CAUSAL),
    "language_ids_only": (lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False), RAGGED, ("input_ids",)),
    "language_even": (lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False), EVEN, CAUSAL),
    "language_even_left": (lambda: DataCollatorForLanguageModeling(tokenizer("left"), mlm=False), EVEN, CAUSAL),
    "language_even_left_multiple": (
        lambda: DataCollatorForLanguageModeling(tokenizer("left"), mlm=False, pad_to_multiple_of=20), EVEN, CAUSAL),
    "default_even": (lambda: default_data_collator, EVEN, (*CAUSAL, "labels")),
    "default_positions": (lambda: default_data_collator, EVEN, (*CAUSAL, "labels", "position_ids")),
    "one_example": (lambda: DataCollatorForSeq2Seq(tokenizer()), [33], (*CAUSAL, "labels")),
    "trl": (trl_collator, RAGGED, ("input_ids", "labels")),
    "trl_completions": (trl_collator, RAGGED, ("input_ids", "completion_mask")),
    "trl_assistants": (trl_collator, RAGGED, ("input_ids", "assistant_masks")),
    "trl_multiple": (lambda: trl_collator(pad_to_multiple_of=16), RAGGED, ("input_ids", "labels")),
    "trl_positions": (lambda: trl_collator(return_position_ids=True), RAGGED, ("input_ids", "labels")),
    "trl_packed_even": (trl_collator, EVEN, ("input_ids", "labels", "seq_lengths")),
}  # fmt: skip


@pytest.mark.parametrize("case", PADDED)
def test_data_rows_come_out_as_without_echo_and_echo_rows_are_copies(case: str) -> None:
    make, lengths, keys = PADDED[case]
    inner, features = make(), examples(lengths, keys)
    wrapped, plain = collator(inner), inner(features)
    rows = rows_of(wrapped, max(lengths))
    batch = wrapped.with_echo(features, batch_ids(PLAN, 0), 0)
    assert features == examples(lengths, keys)
    assert set(batch) == {*plain, ECHO_KEY}
    for key, value in plain.items():
        # Padding does not grow: even the widths are the same.
        assert torch.equal(batch[key][: len(lengths)], value), key
        assert batch[key].dtype == value.dtype
    assert batch[ECHO_KEY].tolist() == [False] * len(lengths) + [True] * len(rows)
    width, left = plain["input_ids"].shape[1], "left" in case
    for place, row in enumerate(rows, start=len(lengths)):
        size = len(row.input_ids)
        ids, labels = batch["input_ids"][place].tolist(), batch["labels"][place].tolist()
        begin = next(at for at in range(width) if tuple(ids[at : at + size]) == row.input_ids)
        filled = size if lengths == RAGGED or case == "default_even" else max(lengths)
        assert begin == (width - filled if left else 0)
        assert labels == [IGNORE] * begin + list(row.labels) + [IGNORE] * (width - begin - size)
        if "attention_mask" in keys:
            mask = batch["attention_mask"][place].tolist()
            assert mask == [0] * begin + [1] * size + [0] * (width - begin - size)


JOINED: dict[str, tuple[Callable[[], Any], list[int], tuple[str, ...]]] = {
    "flattening": (DataCollatorWithFlattening, RAGGED, ("input_ids", "labels")),
    "flattening_ids_only": (DataCollatorWithFlattening, RAGGED, ("input_ids",)),
    "flattening_mask": (DataCollatorWithFlattening, RAGGED, ("input_ids", "labels", "attention_mask")),
    "flattening_lengths": (
        lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        RAGGED, ("input_ids", "labels")),
    "flattening_even": (DataCollatorWithFlattening, EVEN, ("input_ids", "labels")),
    "trl_free": (lambda: trl_collator(padding_free=True), RAGGED, ("input_ids", "labels")),
    "trl_free_multiple": (
        lambda: trl_collator(padding_free=True, pad_to_multiple_of=16), RAGGED, ("input_ids", "labels")),
    "trl_free_packed": (lambda: trl_collator(padding_free=True), RAGGED, ("input_ids", "labels", "seq_lengths")),
    "trl_free_packed_even": (lambda: trl_collator(padding_free=True), EVEN, ("input_ids", "labels", "seq_lengths")),
    "trl_free_one": (lambda: trl_collator(padding_free=True), [33], ("input_ids", "labels", "seq_lengths")),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINED)
def test_rows_joined_into_one(case: str) -> None:
    make, lengths, keys = JOINED[case]
    inner, features = make(), examples(lengths, keys)
    wrapped, plain = collator(inner), inner(features)
    rows = rows_of(wrapped, max(lengths))
    batch = wrapped.with_echo(features, batch_ids(PLAN, 0), 0)
    data = sum(lengths)
    for key in ("input_ids", "labels", "position_ids", "seq_idx"):
        if key in plain:
            assert torch.equal(batch[key][:, :data], plain[key][:, :data]), key
    mask, place = batch[ECHO_KEY], data
    assert mask.shape == batch["input_ids"].shape
    assert mask[0].tolist() == [False] * data + [True] * (mask.shape[1] - data)
    wanted = [IGNORE] * mask.shape[1]
    for row in rows:
        size = len(row.input_ids)
        assert tuple(batch["input_ids"][0, place : place + size].tolist()) == row.input_ids
        assert batch["position_ids"][0, place : place + size].tolist() == list(range(size))
        wanted[place : place + size] = row.labels
        place += size if lengths == RAGGED else max(lengths)
    assert batch["labels"][0, data:].tolist() == wanted[data:]
    if "cu_seq_lens_q" in plain:
        ends = batch["cu_seq_lens_q"].flatten().tolist()
        assert data in ends
        assert ends[-1] == mask.shape[1]


def as_tensors(value: list[int]) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("kind", [as_tensors, np.array], ids=["torch", "numpy"])
@pytest.mark.parametrize("inner", [default_data_collator, default_collate])
def test_examples_of_arrays(kind: Callable[[list[int]], Any], inner: Any) -> None:
    keys = ("input_ids", "labels", "attention_mask")
    features = [{key: kind(value) for key, value in example.items()} for example in examples(EVEN, keys)]
    if inner is default_collate and kind is not as_tensors:
        features = [{key: torch.from_numpy(value) for key, value in example.items()} for example in features]
    wrapped = collator(inner)
    batch, plain = wrapped.with_echo(features, batch_ids(PLAN, 0), 0), inner(features)
    for key in keys:
        assert torch.equal(batch[key][:3], plain[key])
    for place, row in enumerate(rows_of(wrapped, 35), start=3):
        size = len(row.input_ids)
        assert tuple(batch["input_ids"][place, :size].tolist()) == row.input_ids
        assert batch["labels"][place].tolist() == [*row.labels, *[IGNORE] * (35 - size)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 8]),
    rate=st.integers(1, 40),
)
def test_any_lengths_on_either_side(lengths: list[int], side: str, multiple: int | None, rate: int) -> None:
    inner = DataCollatorForSeq2Seq(tokenizer(side), pad_to_multiple_of=multiple)
    plan = replace(PLAN, rate=float(rate), list_tokens=1)
    wrapped, features = collator(inner, plan=plan), examples(lengths)
    asked = batch_ids(plan, 0)
    batch, plain = wrapped.with_echo(features, asked, 0), inner(features)
    echo, old = batch[ECHO_KEY], plain["input_ids"].shape[1]
    grown = batch["input_ids"].shape[1] - old
    # A list of 6, asked for and said, takes 16; only where that does not fit may rows be longer.
    assert grown == 0 or max(lengths) < 16
    data = slice(grown, None) if side == "left" else slice(None, old)
    for key, fill in (("input_ids", PAD), ("labels", IGNORE), ("attention_mask", 0)):
        assert torch.equal(batch[key][: len(lengths), data], plain[key])
        spare = batch[key][: len(lengths), :grown] if side == "left" else batch[key][: len(lengths), old:]
        assert (spare == fill).all()
    assert batch["labels"][echo][batch["labels"][echo] != IGNORE].tolist() == asked
    assert not torch.isin(batch["labels"][~echo], PLAN.ids).any()


# -- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_encoder_decoder_rows(side: str) -> None:
    inner, features = DataCollatorForSeq2Seq(tokenizer(side)), examples(RAGGED)
    for example in features:
        example["labels"] = example["input_ids"][:11]
    wrapped = collator(inner, seq2seq=True)
    rows = rows_of(wrapped, max(RAGGED))
    assert [row.targets for row in rows] == [tuple(row.labels) for row in rows]
    batch, plain = wrapped.with_echo(features, batch_ids(PLAN, 0), 0), inner(features)
    for key, value in plain.items():
        assert torch.equal(batch[key][:3], value), key
    assert batch[ECHO_KEY].tolist() == [False] * 3 + [True] * len(rows)
    for place, row in enumerate(rows, start=3):
        ids, labels = batch["input_ids"][place], batch["labels"][place]
        assert tuple(ids[ids != PAD].tolist()) == row.input_ids
        assert tuple(labels[labels != IGNORE].tolist()) == row.labels


# -- through dataloaders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_whole_epoch(workers: int, drop_last: bool) -> None:
    features = examples([20 + n % 7 for n in range(23)])
    inner = DataCollatorForSeq2Seq(tokenizer())
    context = {"multiprocessing_context": "fork"} if workers else {}
    options = {"batch_size": 4, "drop_last": drop_last, "num_workers": workers, **context}
    plain = list(DataLoader(features, collate_fn=inner, **options))  # type: ignore[arg-type]
    wrapped = collator(inner)
    batches = list(DataLoader(features, collate_fn=wrapped, **options))  # type: ignore[arg-type]
    assert len(batches) == len(plain) == 5 + (not drop_last)
    asked: list[int] = []
    for number, (batch, old) in enumerate(zip(batches, plain, strict=True)):
        count = len(old["input_ids"])
        for key, value in old.items():
            assert torch.equal(batch[key][:count], value)
        rows = rows_of(wrapped, old["input_ids"].shape[1], number)
        assert batch[ECHO_KEY].tolist() == [False] * count + [True] * len(rows)
        labels = batch["labels"][count:]
        assert labels[labels != IGNORE].tolist() == batch_ids(PLAN, number)
        asked += labels[labels != IGNORE].tolist()
    assert sorted(asked[:80]) == list(range(100, 180)) or len(asked) < 80


def test_a_batch_that_gets_no_rows_is_the_inner_collators_own() -> None:
    made: list[Any] = []

    def inner(features: Features) -> Any:
        made.append((features, {"anything": 1}))
        return made[-1][1]

    given = examples(RAGGED)
    batch = collator(inner, plan=replace(PLAN, rate=0.0))(given)
    assert batch is made[0][1]
    assert made[0][0] is given


# -- refusals --------------------------------------------------------------------------------------------------------


def without_labels(features: Features) -> Any:
    batch = DataCollatorForSeq2Seq(tokenizer())(features)
    return {key: value for key, value in batch.items() if key != "labels"}


def cutting(features: Features) -> Any:
    batch = DataCollatorForSeq2Seq(tokenizer())(features)
    return {key: value[:, :10] for key, value in batch.items()}


def popping(features: Features) -> Any:
    """Takes what it needs out of the examples, and needs them all to be alike."""
    labels = [example.pop("weights") for example in features]
    return {"weights": torch.tensor(labels), **DataCollatorForSeq2Seq(tokenizer())(features)}


def dropping(features: Features) -> Any:
    return DataCollatorForSeq2Seq(tokenizer())(features[:-1])


def weighted(features: Features) -> Features:
    return [{**example, "weights": 0.5} for example in features]


def preferred(features: Features) -> Features:
    return [{"prompt_ids": x["input_ids"], "chosen_ids": x["labels"], "rejected_ids": x["labels"]} for x in features]


def classified(features: Features) -> Features:
    return [{**example, "labels": 1} for example in features]


def with_keys(features: Features) -> Any:
    return {key: [example[key] for example in features] for key in features[0]}


REFUSED: dict[str, tuple[Any, Features, str]] = {
    "no_input_ids": (with_keys, [{"text": "a"}, {"text": "b"}], r"the keys \['text'\]; .*'input_ids'"),
    "no_mapping": (list, [(1, 2), (3, 4)], "holds tuple; .*'input_ids'"),
    "preferences": (with_keys, preferred(examples(RAGGED)), r"'chosen_ids', 'prompt_ids', 'rejected_ids'"),
    "no_labels": (without_labels, examples(RAGGED), "echo rows need 'labels'"),
    "classification": (DataCollatorWithPadding(tokenizer()), classified(examples(RAGGED)), "ValueError: "),
    "cut": (cutting, examples(RAGGED), "changed the ids of an echo row of .* tokens"),
    "dropped": (dropping, examples(RAGGED), r"made input_ids of shape \(3, 41\) of 3 \+ 1 examples"),
    "unknown_key": (popping, weighted(examples(RAGGED)), "KeyError: 'weights'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_cannot_take_rows_goes_on_without(case: str, caplog: pytest.LogCaptureFixture) -> None:
    inner, features, message = REFUSED[case]
    wrapped = collator(inner)
    expected = inner([copy(example) for example in features])
    with caplog.at_level(logging.WARNING, "vocabguard"):
        assert_same(wrapped(features), expected)
    assert len(caplog.records) == 1
    assert "echo is off from batch 0 on, training goes on" in caplog.text
    assert re.search(message, caplog.text), caplog.text
    assert wrapped.feed.failed
    assert wrapped.feed.ids(1) == []


def assert_same(batch: Any, expected: Any) -> None:
    assert type(batch) is type(expected)
    if isinstance(expected, list):
        assert batch == expected
        return
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert torch.equal(batch[key], value) if isinstance(value, Tensor) else batch[key] == value


def test_encoder_decoder_labels_that_were_changed_are_refused() -> None:
    def inner(features: Features) -> Any:
        batch = DataCollatorForSeq2Seq(tokenizer())(features)
        batch["labels"] = batch["labels"][:, 1:]
        return batch

    with pytest.raises(EchoError, match="changed the labels of echo rows"):
        collator(inner, seq2seq=True).with_echo(examples(RAGGED), batch_ids(PLAN, 0), 0)


def test_joined_rows_that_were_changed_are_refused() -> None:
    def inner(features: Features) -> Any:
        batch = DataCollatorWithFlattening()(features)
        batch["input_ids"] = batch["input_ids"].flip(1)
        return batch

    with pytest.raises(EchoError, match="changed the ids of echo rows"):
        collator(inner).with_echo(examples(RAGGED, ("input_ids", "labels")), batch_ids(PLAN, 0), 0)
