"""Tokens that matter by name: ends, additions and watched words that the data never asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from vocabguard.data.named import (
    EndTokens,
    added_tokens,
    end_of_turn,
    end_tokens,
    named_sentences,
    shared_padding,
)

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
PAD, END, SYSTEM, USER = 0, 1, 2, 3


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS)


def counts(**times: int) -> torch.Tensor:
    found = torch.full((8192,), 5)
    for token, number in times.items():
        found[int(token[1:])] = number
    return found


def test_all_end_tokens_are_found(tokenizer: Any) -> None:
    assert end_of_turn(tokenizer) == END
    assert end_tokens(tokenizer, [SYSTEM, END]) == EndTokens((SYSTEM, END), END, PAD)
    assert end_tokens(tokenizer, USER).every == (END, USER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|fim|>\n{% endfor %}"
    assert end_tokens(tokenizer) == EndTokens((END,), 7, PAD)
    for template in (None, "{{ raise_exception('no') }}", "{{ messages | length }}", "{{ messages[-1].content }}."):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


def test_nothing_is_said_where_all_are_targets(tokenizer: Any) -> None:
    assert named_sentences(counts(), tokenizer, end_tokens(tokenizer), "the data", words={"a": (500,)}) == ()


def test_padding_that_is_the_end(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    ends = end_tokens(tokenizer)
    assert named_sentences(counts(_1=0), tokenizer, ends, "all 3 batches") == (
        "End tokens: <|end|> is never a target in all 3 batches: the model does not learn to stop. <|end|> is the "
        "padding too, which DataCollatorForLanguageModeling and others take out of the labels. Give padding a token of "
        "its own: tokenizer.pad_token = '<|pad|>'.",
    )
    assert shared_padding(tokenizer, ends).startswith("<|end|> is the padding too")
    tokenizer.pad_token = "<|pad|>"
    assert shared_padding(tokenizer, end_tokens(tokenizer)) == ""


def test_an_end_that_the_examples_lack(tokenizer: Any) -> None:
    [said] = named_sentences(counts(_1=0), tokenizer, end_tokens(tokenizer), "the data")
    assert said.startswith("End tokens: <|end|> is never a target in the data: the model does not learn to stop.")
    assert "End each example with <|end|>, inside the part that has labels" in said


def test_one_of_several_ends(tokenizer: Any) -> None:
    [said] = named_sentences(counts(_2=0), tokenizer, end_tokens(tokenizer, [SYSTEM]), "the data")
    assert said == (
        "End tokens: <|system|> is never a target in the data; answers end with <|end|> (5 times), and generation "
        "stops there. Nothing to do for such answers."
    )


def test_an_end_at_which_generation_goes_on(tokenizer: Any) -> None:
    """The template ends answers with another token than generation stops at: trained well, it never stops."""
    [said] = named_sentences(counts(_2=0), tokenizer, EndTokens((SYSTEM,), END, PAD), "the data")
    assert "answers end with <|end|> (5 times), at which generation does not stop" in said
    assert "model.generation_config.eos_token_id = [1, 2]" in said


def test_tokens_added_since_the_base(tokenizer: Any) -> None:
    assert added_tokens(tokenizer, 8160) == frozenset()
    tokenizer.add_tokens(["<call>", "plainword"])
    assert added_tokens(tokenizer) == added_tokens(tokenizer, 8192) == {8160, 8161}
    [said] = named_sentences(
        counts(_8160=0), tokenizer, end_tokens(tokenizer), "the data", added=added_tokens(tokenizer)
    )
    assert said.startswith("Added tokens: 1 of 2 is never a target in the data: <call>. If the model is to write")


def test_added_tokens_of_a_saved_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert added_tokens(saved, 8160) == {8160}
    # Without the base's size: all that were ever added, but not the padding.
    assert added_tokens(saved) == {*range(1, 8), 8160}


@pytest.mark.parametrize(("protected", "remedy"), [(False, "VocabGuardCallback"), (True, "echo repeats them")])
def test_watched_words(tokenizer: Any, protected: bool, remedy: str) -> None:
    words = {"known": (500, 501), "half known": (500, 600), "gone": (601,)}
    [said] = named_sentences(
        counts(_600=0, _601=0), tokenizer, EndTokens(), "the data", words=words, protected=protected
    )
    assert said.startswith("Watched words: 2 of 3 are never a target in the data: half␣known, gone. Add examples")
    assert remedy in said
