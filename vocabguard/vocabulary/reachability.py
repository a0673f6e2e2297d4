"""How a tokenizer's pieces spell text, and which of its ids encoding a text can ever give.

A token that no text can give is no target in training and no loss when it drifts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import regex
from tokenizers import models
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_PIECE = regex.compile(r"<0x([0-9A-F]{2})>")
"""A byte-fallback piece, as SentencePiece writes it."""

_CHARACTER_OF: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
_BYTE_OF = {ord(character): chr(byte) for byte, character in _CHARACTER_OF.items()}
# Where a piece may come through that does not alone: inside a word, before a word, in scripts without spaces.
_SURROUNDINGS = (("", ""), ("a", ""), ("", "a"), ("a", "a"), ("1", "1"), ("。", "。"), ("\n", "\n"), ("a ", " a"))
_LETTERS = "aeiost1."
# What may stand before and after a part of a character to make it whole UTF-8.
_UTF8_BEFORE = (b"", b"\xc3", b"\xe1", b"\xe1\x80", b"\xf1", b"\xf1\x80", b"\xf1\x80\x80")
_UTF8_AFTER = (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0", b"\xa0\x80", b"\x90\x80\x80")


@dataclass(frozen=True)
class Spelling:
    """How pieces spell text.

    Attributes:
        byte_level: each character of a piece is a byte (GPT-2).
        metaspace: ``▁`` is the space.
        inside: prefix of pieces inside a word, e.g. ``##``, or empty.
        final: suffix of pieces at the end of a word, e.g. ``</w>``, or empty.

    Example:
        >>> gpt2 = Spelling(byte_level=True, metaspace=False, inside="", final="")
        >>> gpt2.text("Ġtoken"), gpt2.piece(" né"), gpt2.text(gpt2.piece("é")[0])
        (' token', 'ĠnÃ©', None)
    """

    byte_level: bool
    metaspace: bool
    inside: str
    final: str

    @classmethod
    def of(cls, tokenizer: Any) -> Spelling:
        """Read from a transformers tokenizer, fast or slow."""
        backend = rust_backend(tokenizer)
        if backend is None:
            vocabulary = tokenizer.get_vocab()
            prefixed = sum(piece.startswith("##") for piece in vocabulary) * 20 > len(vocabulary)
            return cls(hasattr(tokenizer, "byte_encoder"), True, "##" if prefixed else "", "</w>")
        parts = [part.__getstate__().decode() for part in (backend.decoder, backend.pre_tokenizer) if part is not None]
        states = "".join(parts)
        inside = getattr(backend.model, "continuing_subword_prefix", None) or ""
        final = getattr(backend.model, "end_of_word_suffix", None) or ""
        return cls("ByteLevel" in states, "▁" in states or backend.decoder is None, inside, final)

    def core(self, piece: str) -> str:
        """The piece without its marks of place in a word."""
        if not (self.inside or self.final):
            return piece
        return piece.removeprefix(self.inside).removesuffix(self.final) or piece

    def text(self, piece: str) -> str | None:
        """What a piece says, with its leading space; None where it is not whole UTF-8."""
        core = self.core(piece)
        if not self.byte_level:
            return core.replace("▁", " ") if self.metaspace else core
        try:
            return self.raw(piece).decode("utf-8")
        except UnicodeEncodeError:  # outside the byte alphabet: written as it is
            return core
        except UnicodeDecodeError:
            return None

    def texts(self, pieces: Sequence[str | None]) -> list[str | None]:
        """What many pieces say; None for None, too."""
        if self.byte_level or self.inside or self.final or not self.metaspace:
            return [None if piece is None else self.text(piece) for piece in pieces]
        joined = "\0".join([piece or "" for piece in pieces]).replace("▁", " ").split("\0")
        if len(joined) != len(pieces):  # a piece holds the sign that should divide them
            return [None if piece is None else self.text(piece) for piece in pieces]
        return [None if piece is None else text for piece, text in zip(pieces, joined, strict=True)]

    def raw(self, piece: str) -> bytes:
        """The bytes of a byte-level piece; a UnicodeEncodeError if a character of it stands for no byte."""
        return self.core(piece).translate(_BYTE_OF).encode("latin-1")

    def piece(self, text: str) -> str:
        """The piece that would say `text`, whether or not there is one."""
        if self.byte_level:
            return "".join(_CHARACTER_OF[byte] for byte in text.encode("utf-8")) + self.final
        return (text.replace(" ", "▁") if self.metaspace else text) + self.final


def rust_backend(tokenizer: Any) -> Any | None:
    """The ``tokenizers.Tokenizer`` of a fast tokenizer, None for a slow one."""
    return tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None


def reachable_ids(
    tokenizer: Any,
    ids: Iterable[int],
    pieces: Sequence[str | None],
    texts: Sequence[str | None],
    looks: Sequence[int],
) -> set[int]:
    """The ids that encoding some text can give.

    Of a fast tokenizer, a piece is reachable when its model, given the piece, gives back that one token, and when the
    normalizer and the pre-tokenizer let the piece through in one part. The first is necessary: no merge and no best
    segmentation of a longer text crosses the token's borders, so it would be the same on the piece alone. A slow
    tokenizer is asked to encode the text in a few surroundings. A byte piece needs a character that is spelled with it.

    Args:
        ids: the ids in question; no added tokens.
        pieces: V pieces by id.
        texts: V texts by id, None for pieces that are not whole UTF-8.
        looks: V numbers by id: words of one number, which are of one group and one case, are taken to be treated alike
            by pre-tokenizers; -1 for texts that are looked at one by one.
    """
    backend, spelling = rust_backend(tokenizer), Spelling.of(tokenizer)
    pipeline = _Pipeline.of(backend, spelling) if backend else None
    # Not the whole fast tokenizer: it may be set to truncate, and starts threads that a later fork warns of.
    encode: _Encode = pipeline.encode if pipeline else partial(tokenizer.encode, add_special_tokens=False)
    ids = list(ids)
    bytes_too = not spelling.byte_level
    fallback = {i for i in ids if bytes_too and _is_byte(pieces[i])}
    reached = fallback & _emitted_by_characters(encode) if fallback else fallback
    ids = [i for i in ids if pieces[i] is not None and i not in fallback]
    if pipeline is not None:
        return reached | pipeline.emitted(ids, pieces, texts, looks)
    return reached | {i for i in ids if _round_trip(encode, i, texts[i])}


def _is_byte(piece: str | None) -> bool:
    return piece is not None and piece[:3] == "<0x" and BYTE_PIECE.fullmatch(piece) is not None


_Encode = Callable[[str], list[int]]


def _round_trip(encode: _Encode, token_id: int, text: str | None) -> bool:
    """Whether encoding the text, in some surroundings, gives the id; parts of characters get the benefit of doubt."""
    return text is None or any(token_id in encode(before + text + after) for before, after in _SURROUNDINGS)


def _emitted_by_characters(encode: _Encode) -> set[int]:
    """The ids that spelling characters one by one gives: all of the basic plane, and every 61st beyond it."""
    points = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 61)]
    found: set[int] = set()
    for begin in range(0, len(points), 512):
        found.update(encode("".join(map(chr, points[begin : begin + 512]))))
    return found


@dataclass(frozen=True)
class _Pipeline:
    """A fast tokenizer taken apart.

    Attributes:
        model: cuts one word into tokens; always by merges, and always alike.
        whole_words: the tokenizer first looks whole words up, so that a piece needs no merges if it can be a word.
        normalize: text to text.
        split: text to words, spelled as pieces are.
        spelling: of its pieces.
        passed: kinds of plain words that were seen to pass the pre-tokenizer in one part.
    """

    model: Any
    whole_words: bool
    normalize: Callable[[str], str]
    split: Callable[[str], list[str]]
    spelling: Spelling
    passed: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, backend: Any, spelling: Spelling) -> _Pipeline:
        model, whole_words = backend.model, getattr(backend.model, "ignore_merges", False)
        if whole_words or getattr(model, "dropout", None):
            model = copy.deepcopy(model)
            model.ignore_merges, model.dropout = False, None
        normalize = backend.normalizer.normalize_str if backend.normalizer else str
        cut = backend.pre_tokenizer.pre_tokenize_str if backend.pre_tokenizer else None
        split = (lambda text: [word for word, _ in cut(text)]) if cut else (lambda text: [text])
        return cls(model, whole_words, normalize, split, spelling)

    def encode(self, text: str) -> list[int]:
        """The ids of the text, by merges alone and without added tokens."""
        return [i for word in self.split(self.normalize(text)) for i in _cut(self.model, word)]

    def emitted(
        self, ids: Iterable[int], pieces: Sequence[str | None], texts: Sequence[str | None], looks: Sequence[int]
    ) -> set[int]:
        """Those of the ids that some text gives; of plain words, which most are, no more is asked than must be."""
        found = set()
        tokenize, normalize, split, passed = self.model.tokenize, self.normalize, self.split, self.passed
        unmarked = not (self.spelling.inside or self.spelling.final)

        def cut(piece: str) -> int:
            try:
                tokens = tokenize(piece)
            except Exception:  # the library raises no narrower one
                return -1
            return int(tokens[0].id) if len(tokens) == 1 else -1

        for i in ids:
            piece, text, look = pieces[i] or "", texts[i], looks[i]
            if unmarked and text is not None and (len(piece) == 1 or cut(piece) == i):  # one character stays one
                normal = normalize(text)
                if look in passed:
                    if text in normal or piece in normal:
                        found.add(i)
                        continue
                elif look < 0 and any(piece in word for word in split(normal)):
                    found.add(i)
                    continue
            if self.emits(i, piece, text, look):
                found.add(i)
        return found

    def emits(self, token_id: int, piece: str, text: str | None, look: int) -> bool:
        """Whether some text gives the id."""
        words = self._words(piece) if self.spelling.inside or self.spelling.final else (piece,)
        merged = any(token_id in _cut(self.model, word) for word in words)
        if text is None:
            return merged and _in_some_utf8(self.spelling.raw(piece))
        if not (merged or self.whole_words):
            return False
        core = self.spelling.core(piece)
        if not merged:
            return any(core in words for words in self._surrounded(text))
        return self._passes(core, text, look)

    def _words(self, piece: str) -> list[str]:
        """Words in which the model would place the piece: itself, or more around it where its place is marked."""
        inside, final = self.spelling.inside, self.spelling.final
        if isinstance(self.model, models.WordPiece):
            return [piece]
        heads = _LETTERS if inside and piece.startswith(inside) else ("",)
        tails = _LETTERS if final and not piece.endswith(final) else ("",)
        core = self.spelling.core(piece)
        return [head + core + tail for head in heads for tail in tails]

    def _passes(self, core: str, text: str, look: int) -> bool:
        """Whether normalizer and pre-tokenizer leave `core` in one part of some text."""
        if look in self.passed:
            normal = self.normalize(text)
            if text in normal or core in normal:
                return True
        for words in self._surrounded(text):
            if any(core in word for word in words):
                if look >= 0:
                    self.passed.add(look)
                return True
        return False

    def _surrounded(self, text: str) -> Iterator[list[str]]:
        """The words of the text, alone and in surroundings."""
        return (self.split(self.normalize(before + text + after)) for before, after in _SURROUNDINGS)


def _cut(model: Any, word: str) -> list[int]:
    """The ids of a word; none where the model would need an unknown token and has none."""
    try:
        return [token.id for token in model.tokenize(word)]
    except Exception:  # the library raises no narrower one
        return []


def _in_some_utf8(raw: bytes) -> bool:
    """Whether the bytes can be a part of a text."""
    return any(_is_utf8(before + raw + after) for before in _UTF8_BEFORE for after in _UTF8_AFTER)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
