"""Whichever way ids and places come, they are those of the tokenizer."""

from __future__ import annotations

import copy
import sys
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat
from vocabguard.data.tokenizing import SAMPLE, TextTokenizer

PARTS = (
    "Hello",
    "there",
    "データ",
    "данные",
    "안녕",
    "👍🏽",
    "naïve",
    "x = 1;",
    "<|end|>",
    "  ",
    "\n",
    "\t",
    "é",
    "ﬁ",
    " ",
)


def texts(seed: int, count: int = 60) -> list[str]:
    rng = Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(0, 12))) for _ in range(count)]


def byte_level(trim: bool, normal: bool) -> Any:
    """A byte-level BPE tokenizer, as Llama 3, Qwen and SmolLM2 have, trained here."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normal:
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts(7, 400), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    found.add_tokens([AddedToken("<|mark|>", lstrip=True, rstrip=True, special=True)])
    return found


@pytest.fixture(params=["assets", "byte level", "trimmed", "normalised"])
def any_tokenizer(request: Any, tokenizer: Any) -> Any:
    if request.param == "assets":
        return copy.deepcopy(tokenizer)
    return byte_level(request.param == "trimmed", request.param == "normalised")


def in_characters(places: Any, in_bytes: bool, lengths: Any, said: list[str]) -> list[tuple[int, int]]:
    """Plainly: the characters of which a token has a byte."""
    found, at = [], 0
    for text, length in zip(said, lengths.tolist(), strict=True):
        owner = [place for place, one in enumerate(text) for _ in one.encode()] if in_bytes else list(range(len(text)))
        for begin, end in places[at : at + length].tolist():
            found.append((owner[begin], owner[end - 1] + 1) if end > begin else (-1, -1))
        at += length
    return found


@pytest.mark.parametrize("seed", range(3))
def test_ids_and_places_are_the_tokenizers(any_tokenizer: Any, seed: int) -> None:
    said = [*texts(seed), *SAMPLE, "a <|mark|> b", "e\u0301"]
    plain = any_tokenizer.backend_tokenizer.encode_batch(said, add_special_tokens=False)
    quick = TextTokenizer(any_tokenizer)
    for _ in range(2):  # the first time looks at the sample
        ids, lengths, places, in_bytes = quick.placed(said)
        assert ids.tolist() == [i for one in plain for i in one.ids]
        assert lengths.tolist() == [len(one) for one in plain]
        want = [(a, b) if b > a else (-1, -1) for one in plain for a, b in one.offsets]
        assert in_characters(places, in_bytes, lengths, said) == want
    flat, counts = quick.flat(said, True)
    assert flat.tolist() == [i for text in said for i in any_tokenizer.encode(text)]
    assert counts.sum() == len(flat)


def test_bytes_are_used_where_they_can_be(tokenizer: Any) -> None:
    for one in (tokenizer, byte_level(False, False)):
        assert TextTokenizer(copy.deepcopy(one)).placed(["Hello there"])[3]


class Pretended:
    """What stands in for the fast tokenizer: the same ids, or one that is wrong."""

    def __init__(self, backend: Any, shift: int) -> None:
        self.backend, self.shift, self.calls = backend, shift, 0

    def encode_batch_flat(self, said: list[str], add_special_tokens: bool, split_special_tokens: bool) -> Any:
        self.calls += 1
        found = [one.ids for one in self.backend.encode_batch(said, add_special_tokens=add_special_tokens)]
        ids = np.array([i + self.shift for one in found for i in one], dtype=np.uint32)
        return ids.tobytes(), np.cumsum([0, *map(len, found)]).astype(np.uint64).tobytes()


@pytest.mark.parametrize(("shift", "used"), [(0, True), (1, False)])
def test_a_faster_tokenizer_has_to_give_the_same(
    tokenizer: Any, shift: int, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(tokenizer)
    pretended, module = Pretended(own.backend_tokenizer, shift), ModuleType("fastokens")
    module.Tokenizer = type("Tokenizer", (), {"from_json_str": staticmethod(lambda text: pretended)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastokens", module)
    quick = TextTokenizer(own)
    said = texts(1)
    before = quick.flat(said, False)[0].tolist()
    calls = pretended.calls
    assert quick.flat(said, False)[0].tolist() == before
    assert (pretended.calls > calls) is used
    assert ("ids equal to the tokenizer's own on" in quick.told) is used
    assert ("other ids than the tokenizer" in quick.told) is not used
    assert TextTokenizer(own, fast=False).flat(said, False)[0].tolist() == before


def test_a_kind_that_is_not_read_is_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> None:
        raise ValueError("unsupported model")

    module = ModuleType("fastokens")
    module.Tokenizer = type("Tokenizer", (), {"from_json_str": staticmethod(refuse)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastokens", module)
    quick = TextTokenizer(copy.deepcopy(tokenizer))
    assert quick.flat(["Hello"], False)[0].tolist() == tokenizer.encode("Hello", add_special_tokens=False)
    assert "unsupported model" in quick.told


def test_the_installed_one_gives_the_same_targets(tokenizer: Any) -> None:
    pytest.importorskip("fastokens")
    said = [
        Chat("", [{"role": "user", "content": a}, {"role": "assistant", "content": b}])
        for a, b in zip(texts(3, 200), texts(4, 200), strict=True)
    ]
    quick, slow = TargetEncoder(copy.deepcopy(tokenizer)), TargetEncoder(copy.deepcopy(tokenizer), fast=False)
    for one, other in zip(quick.encode(said), slow.encode(said), strict=True):
        assert (one.ids.tolist(), one.target.tolist()) == (other.ids.tolist(), other.target.tolist())
    assert "Tokenized by fastokens" in quick.texts.told


def test_letters_that_are_written_otherwise_are_asked_about(tokenizer: Any) -> None:
    """NFC makes the Kelvin sign a K and the ångström sign an Å: bytes that add up in all, and are others in between."""
    own = copy.deepcopy(tokenizer)
    said = ["plain text"] * 3 + ["Å\u0301 K. যয়।", "e\u0301\u212b\u2126\u1f71"]
    quick = TextTokenizer(own)
    _, lengths, places, in_bytes = quick.placed(said)
    plain = own.backend_tokenizer.encode_batch(said, add_special_tokens=False)
    assert in_characters(places, in_bytes, lengths, said) == [
        (a, b) if b > a else (-1, -1) for one in plain for a, b in one.offsets
    ]


def test_the_slow_way_is_for_the_few_texts_that_are_changed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = copy.deepcopy(tokenizer)
    quick = TextTokenizer(own)
    quick.placed(["warm up"])
    asked: list[int] = []
    mend = TextTokenizer._mend

    def seen(self: TextTokenizer, *given: Any) -> bool:
        asked.append(len(given[-1]))
        return mend(self, *given)

    monkeypatch.setattr(TextTokenizer, "_mend", seen)
    quick.placed(["two words", "дом и сад", "こんにちは", "a\tb\n", "👍🏽 ok"])
    assert asked == []
    quick.placed(["two words", "e\u0301", "дом"])
    assert asked == [1]
