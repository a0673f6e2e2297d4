"""Which tokens may be echoed: the live ones, without those that the user excludes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard.protect.plan import allowed_ids, ids_in
from vocabguard.vocabulary.table import VocabTable, build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="module")
def table(tokenizer: Any) -> VocabTable:
    return build_table(tokenizer, 8192)


def test_no_control_padded_unreachable_or_untrained_row(table: VocabTable, tokenizer: Any) -> None:
    trained = torch.rand(8192, generator=torch.Generator().manual_seed(0)) < 0.9
    table = table.with_trained(trained)
    wanted = [
        row for row in range(8192)
        if table.reachable[row] and trained[row] and not table.control[row] and not table.padded[row]
    ]  # fmt: skip
    found = allowed_ids(table, tokenizer)
    assert found.dtype == torch.int64
    assert found.tolist() == wanted
    assert len(wanted) < int(trained.sum())
    assert not set(tokenizer.all_special_ids) & set(wanted)


def test_exclusions_by_id_text_and_pattern(table: VocabTable, tokenizer: Any) -> None:
    every = allowed_ids(table, tokenizer).tolist()
    word = tokenizer.convert_tokens_to_ids("▁computer")
    kana = [row for row in range(8192) if any("\u3041" <= sign <= "\u309f" for sign in table.text(row))]
    assert word in every
    assert set(kana) & set(every)
    found = allowed_ids(table, tokenizer, [every[3], " computer", r"re:[\u3041-\u309f]"]).tolist()
    assert found == [row for row in every if row not in {every[3], word, *kana}]


def test_what_is_not_live_may_be_excluded_too(table: VocabTable, tokenizer: Any) -> None:
    eos = tokenizer.convert_tokens_to_ids("<|end|>")
    assert torch.equal(allowed_ids(table, tokenizer, [eos, 8191]), allowed_ids(table, tokenizer))


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ([True], "echo.exclude holds True; allowed: token ids"),
        ([1.5], "echo.exclude holds 1.5; allowed: token ids"),
        ([None], "echo.exclude holds None"),
        (["re:(a"], r"echo.exclude holds 're:\(a', which is no regular expression"),
        (["two words of text"], "echo.exclude: 'two words of text' is not one token"),
        ([8192], "echo.exclude: token id 8192 is out of range; allowed: 0 to 8191"),
        ([-1], "echo.exclude: token id -1 is out of range"),
        (["re:"], r"echo.exclude is \['re:'\]; it leaves no token to echo"),
    ],
)
def test_refused(table: VocabTable, tokenizer: Any, exclude: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allowed_ids(table, tokenizer, exclude)


def test_without_a_tokenizer_ids_and_patterns_are_allowed(table: VocabTable) -> None:
    every = allowed_ids(table, None).tolist()
    assert allowed_ids(table, None, [every[0], "re:^zzzz$"]).tolist() == every[1:]
    with pytest.raises(ValueError, match="holds the text 'a'; without a tokenizer only ids"):
        allowed_ids(table, None, ["a"])


def test_ids_in_keeps_the_order() -> None:
    assert ids_in(torch.tensor([5, 9, 1, 5]), torch.tensor([1, 2, 5])).tolist() == [5, 1, 5]
    assert ids_in(torch.empty(0, dtype=torch.int64), torch.tensor([1])).tolist() == []
