"""Rows appended to a batch of tensors: the data's part stays as it is, the echo rows' part is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding

from vocabguard.protect.batches import add_rows
from vocabguard.protect.collator import EchoError
from vocabguard.protect.rows import IGNORE, EchoRow

PAD = 9
FILLS = {"input_ids": PAD, "labels": IGNORE, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}


def row(size: int, first: int = 100) -> EchoRow:
    ids = tuple(range(first, first + size))
    return EchoRow(ids, (IGNORE,) * (size - size // 2) + ids[size - size // 2 :])


def padded(lines: list[list[int]], width: int, fill: int, left: bool) -> Tensor:
    return torch.tensor([[fill] * (width - len(x)) + x if left else x + [fill] * (width - len(x)) for x in lines])


def batch_of(lengths: list[int], *, left: bool = False, keys: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A padded batch with ids from 200 on; `keys` besides ids, labels and mask."""
    width = max(lengths)
    known = {
        "input_ids": [[200 + at for at in range(size)] for size in lengths],
        "labels": [[IGNORE] + [201 + at for at in range(size - 1)] for size in lengths],
        "attention_mask": [[1] * size for size in lengths],
        "token_type_ids": [[0] * size for size in lengths],
        "position_ids": [list(range(size)) for size in lengths],
    }
    wanted = ("input_ids", "labels", "attention_mask", *keys)
    return {key: padded(known[key], width, FILLS[key], left) for key in wanted}


def cloned(batch: Any) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    sizes=st.lists(st.integers(2, 25), max_size=4),
    left=st.booleans(),
    keys=st.sampled_from([(), ("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")]),
)
def test_both_parts_are_exact(lengths: list[int], sizes: list[int], left: bool, keys: tuple[str, ...]) -> None:
    batch = batch_of(lengths, left=left, keys=keys)
    plain, rows = cloned(batch), [row(size, 100 * place) for place, size in enumerate(sizes)]
    mask = add_rows(batch, rows, PAD)
    assert mask.tolist() == [False] * len(lengths) + [True] * len(rows)
    # A batch without padding does not say on which side it would be.
    left = left and min(lengths) < max(lengths)
    width = max([*lengths, *sizes])
    old = plain["input_ids"].shape[1]
    for key, before in plain.items():
        values = {
            "input_ids": [list(x.input_ids) for x in rows],
            "labels": [list(x.labels) for x in rows],
            "attention_mask": [[1] * size for size in sizes],
            "token_type_ids": [[0] * size for size in sizes],
            "position_ids": [list(range(size)) for size in sizes],
        }[key]
        data = slice(width - old, None) if left else slice(0, old)
        assert batch[key].shape == (len(lengths) + len(rows), width)
        assert torch.equal(batch[key][: len(lengths), data], before)
        spare = batch[key][: len(lengths)].clone()
        spare[:, data] = FILLS[key]
        assert (spare == FILLS[key]).all()
        if rows:
            assert torch.equal(batch[key][len(lengths) :], padded(values, width, FILLS[key], left))


def test_types_and_other_values_are_kept() -> None:
    batch = BatchEncoding({**batch_of([5, 7]), "note": "kept"})
    batch["attention_mask"] = batch["attention_mask"].bool()
    batch["labels"] = batch["labels"].int()
    add_rows(batch, [row(6)], PAD)
    assert (batch["attention_mask"].dtype, batch["labels"].dtype, batch["note"]) == (torch.bool, torch.int32, "kept")
    assert batch["attention_mask"].tolist()[2] == [True] * 6 + [False]


def test_a_batch_without_a_mask() -> None:
    batch = batch_of([5, 7])
    del batch["attention_mask"]
    add_rows(batch, [row(6)], PAD)
    assert batch["input_ids"][2].tolist() == [*range(100, 106), PAD]


def test_labels_of_an_encoder_decoder_have_a_width_of_their_own() -> None:
    batch = batch_of([12, 9])
    batch["labels"] = torch.tensor([[201, 202, 203], [201, IGNORE, IGNORE]])
    plain = cloned(batch)
    rows = [EchoRow(tuple(range(100, 110)), (103, 104, 105, 106)), EchoRow((107, 108), (107,))]
    add_rows(batch, rows, PAD)
    assert torch.equal(batch["input_ids"][:2], plain["input_ids"])
    assert batch["labels"].tolist() == [
        [201, 202, 203, IGNORE],
        [201, IGNORE, IGNORE, IGNORE],
        [103, 104, 105, 106],
        [107, IGNORE, IGNORE, IGNORE],
    ]


JOINED = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "input_ids": torch.ones(1, 5), "labels": torch.ones(1, 5)}
REFUSED: dict[str, tuple[Any, str]] = {
    "tuple": ((torch.ones(2, 3), torch.ones(2, 3)), "the batch is a tuple; allowed: a dict"),
    "no_labels": ({"input_ids": torch.ones(2, 3)}, r"holds \['input_ids'\]; .*'labels'"),
    "flat": ({"input_ids": torch.ones(3), "labels": torch.ones(3)}, r"of shape \(B, T\)"),
    "lists": ({"input_ids": [[1]], "labels": [[1]]}, r"of shape \(B, T\)"),
    "joined": (JOINED, "joins several rows into one"),
    "lengths": ({**batch_of([5]), "cu_seq_lens_q": torch.tensor([0, 5])}, "joins several rows into one"),
    "unknown": ({**batch_of([5, 7]), "reward": torch.ones(2, 7)}, r"'reward' of shape \(2, 7\)"),
    "pixels": ({**batch_of([5, 7]), "pixel_values": torch.ones(2, 3, 4, 4)}, "'pixel_values'"),
    "square_mask": ({**batch_of([5, 7]), "attention_mask": torch.ones(2, 1, 7, 7)}, "'attention_mask' of shape"),
    "scalar": ({**batch_of([5, 7]), "num": torch.tensor(3)}, r"'num' of shape \(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_batch_is_not_changed(case: str) -> None:
    batch, message = REFUSED[case]
    before = cloned(batch) if isinstance(batch, dict) else batch
    with pytest.raises(EchoError, match=message):
        add_rows(batch, [row(6)], PAD)
    if isinstance(batch, dict):
        assert set(batch) == set(before)
        for key, value in before.items():
            assert torch.equal(batch[key], value) if isinstance(value, Tensor) else batch[key] == value


def test_left_padded_positions_begin_anew_without_being_joined() -> None:
    batch = batch_of([4, 7], left=True, keys=("position_ids",))
    assert batch["position_ids"][0].tolist() == [0, 0, 0, 0, 1, 2, 3]
    add_rows(batch, [row(5)], PAD)
    assert batch["position_ids"][2].tolist() == [0, 0, 0, 1, 2, 3, 4]
