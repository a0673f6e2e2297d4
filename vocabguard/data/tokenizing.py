"""Texts as token ids, fast: many at once, without a Python object for each token.

Where `fastokens` is installed (the extra ``fast``) and gives the ids that the tokenizer gives on a sample, it encodes;
otherwise the tokenizer's own backend does. Which characters a token covers follows from the bytes that each token
stands for, where they add up to the text's, and is asked of the tokenizer where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vocabguard.files import one_line

Ids = NDArray[np.int64]

SAMPLE = (
    "The quick brown fox; it's 12,345.67 km away!",
    "  two  spaces\n\n\tand tabs \r\n", "Grüße, naïve façade — “quoted”…",
    "Привет, мир", "こんにちは世界", "你好,世界。", "안녕하세요", "مرحبا بالعالم", "नमस्ते दुनिया", "👍🏽👩‍👩‍👧‍👦 ok",
    "def f(x): return x[0] if x else None  # {}", "<div class='a'>&amp;</div>", "a", " ", "\n", "0" * 40,
    "\u0065\u0301 e\u0301 \ufb01 \u00a0x\u200b\ufeff", "<|im_start|>user\nhi<|im_end|>", "<s>x</s> [INST] y [/INST]",
)  # fmt: skip
"""Texts on which a faster tokenizer has to give the same ids, beside the first of the data."""

_LOOKED_AT = 256  # texts of the data that are compared
_ENOUGH = 8  # texts whose bytes add up


class TextTokenizer:
    """A tokenizer, asked for many texts at once.

    Args:
        fast: whether `fastokens` may be taken.

    Attributes:
        told: which backend encodes and why, in words; empty until the first text, and where there is nothing to say.
    """

    def __init__(self, tokenizer: Any, fast: bool = True) -> None:
        self.told = ""
        self._tokenizer, self._wanted = tokenizer, fast
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self._split = bool(getattr(tokenizer, "split_special_tokens", False))
        self._quick: Any = None
        self._bytes: _TokenBytes | None = None
        self._tried = False
        self._ends: dict[str, tuple[int, int] | None] = {}
        if self._backend is not None:
            # A saved tokenizer may come with either, which trainers do not use here.
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self._split

    @property
    def has_places(self) -> bool:
        """Whether the tokenizer knows which characters a token covers."""
        return self._backend is not None

    def flat(self, texts: Sequence[str], special: bool) -> tuple[Ids, NDArray[np.int64]]:
        """(T,) int64 ids of all texts, and (n,) int64 how many each has.

        Args:
            special: with the tokenizer's own special tokens around.

        Raises:
            Exception: whatever the tokenizer raises for a text that it refuses.
        """
        if not self.has_places:
            return flattened([self._tokenizer.encode(text, add_special_tokens=special) for text in texts])
        self._prepare(texts)
        if self._quick is not None:
            try:
                return _by_fastokens(self._quick, texts, special, self._split)
            except Exception:  # of a text that it refuses: the tokenizer says why, or takes it
                return self._slowly(texts, special)
        return self._slowly(texts, special)

    def ended(self, texts: Sequence[str], end: str) -> tuple[Ids, NDArray[np.int64]]:
        """What `flat` gives, with special tokens, of the texts with `end` after those that do not end with it.

        Args:
            end: the text of a special token; may be empty.

        Raises:
            Exception: whatever the tokenizer raises for a text that it refuses.
        """
        if end and self.has_places:
            self._prepare(texts)
            if end not in self._ends:
                self._ends[end] = self._end_of(end, texts)
            if (known := self._ends[end]) is not None:
                return _with_ends(*self.flat(texts, True), *known)
        return self.flat([text if text.endswith(end) else text + end for text in texts], True)

    def _end_of(self, end: str, texts: Sequence[str]) -> tuple[int, int] | None:
        """The id that `end` always becomes after a text, and how many special tokens follow it; None if it may not."""
        added = {str(token): (index, token) for index, token in self._tokenizer.added_tokens_decoder.items()}
        index, own = added.get(end, (-1, None))
        if own is None or self._split or own.normalized or own.lstrip or own.rstrip:
            return None
        for text, (_, token) in added.items():
            parts = [text[place:] for place in range(1, len(text))]
            across = any(end.startswith(part) or part.startswith(end) for part in parts)
            if token.single_word or across:  # a token that could take letters from both sides
                return None
        sample = [text for text in (*SAMPLE, "", end, f"a{end}", *texts[:_LOOKED_AT]) if _is_whole(text)]
        bare, counts = self.flat(sample, False)
        full, more = self.flat(sample, True)
        around = int((more - counts)[0])
        for after in range(around + 1):
            own_ids = _without_ends(full, more, around - after, after)
            if ((more - counts) == around).all() and np.array_equal(own_ids, bare):
                want = self.flat([text if text.endswith(end) else text + end for text in sample], True)
                got = _with_ends(full, more, index, after, around - after)
                if all(np.array_equal(one, other) for one, other in zip(want, got, strict=True)):
                    return index, after
        return None

    def placed(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64], bool]:
        """Ids and lengths as `flat` gives them, without special tokens around, and what each token covers.

        Returns:
            ids; lengths; (T, 2) int64 from the first to before the second; whether these count bytes, not characters.

        Raises:
            Exception: whatever the tokenizer raises for a text that it refuses.
        """
        self._prepare(texts)
        if self._bytes is not None:
            ids, lengths = self.flat(texts, False)
            places, wrong = self._bytes.places(ids, lengths, texts)
            if not wrong.any() or self._mend(places, ids, lengths, texts, np.flatnonzero(wrong)):
                return ids, lengths, places, True
        found = self._slow.encode_batch(texts, add_special_tokens=False)
        ids, lengths = flattened([one.ids for one in found])
        return ids, lengths, _offsets(found, len(ids)), False

    def _mend(
        self, places: NDArray[np.int64], ids: Ids, lengths: NDArray[np.int64], texts: Sequence[str],
        wrong: NDArray[np.int64],
    ) -> bool:  # fmt: skip
        """Ask the tokenizer where the bytes do not add up, of texts that are changed before they are encoded."""
        chosen = [texts[row] for row in wrong.tolist()]
        found = self._slow.encode_batch(chosen, add_special_tokens=False)
        own, counts = flattened([one.ids for one in found])
        at = np.isin(np.repeat(np.arange(len(lengths)), lengths), wrong)
        if not np.array_equal(own, ids[at]):  # not seen before; all is asked of the tokenizer then
            return False
        places[at] = _in_bytes(_offsets(found, len(own)), counts, chosen)
        return True

    @property
    def _slow(self) -> Any:
        return self._backend

    def _slowly(self, texts: Sequence[str], special: bool) -> tuple[Ids, NDArray[np.int64]]:
        return flattened([found.ids for found in self._slow.encode_batch_fast(texts, add_special_tokens=special)])

    def _prepare(self, texts: Sequence[str]) -> None:
        """Once, with the first texts: see what is faster and gives the same."""
        if self._tried:
            return
        self._tried = True
        sample = [*SAMPLE, *[text for text in texts[:_LOOKED_AT] if _is_whole(text)]]
        if self._wanted:
            self._quick, self.told = _checked(self._backend, sample, self._split)
        self._bytes = _token_bytes(self._tokenizer, self._backend, sample)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which is refused later, by its place
        return False
    return True


def _checked(backend: Any, sample: Sequence[str], split: bool) -> tuple[Any, str]:
    """`fastokens` for the same tokenizer, and what is to be said of it."""
    try:
        import fastokens  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None, ""
    try:
        quick = fastokens.Tokenizer.from_json_str(backend.to_str())
        for special in (False, True):
            want = flattened([found.ids for found in backend.encode_batch_fast(sample, add_special_tokens=special)])
            got = _by_fastokens(quick, sample, special, split)
            if not all(np.array_equal(one, other) for one, other in zip(want, got, strict=True)):
                return None, "fastokens gives other ids than the tokenizer on a sample, and is not used"
    except Exception as error:  # a kind of tokenizer that it does not read
        return None, f"fastokens cannot stand in for the tokenizer ({one_line(error, 100)}), and is not used"
    return quick, f"Tokenized by fastokens: ids equal to the tokenizer's own on {len(sample):,} texts"


def _by_fastokens(quick: Any, texts: Sequence[str], special: bool, split: bool) -> tuple[Ids, NDArray[np.int64]]:
    ids, offsets = quick.encode_batch_flat(list(texts), add_special_tokens=special, split_special_tokens=split)
    edges = np.frombuffer(offsets, dtype=np.uint64).astype(np.int64)
    return np.frombuffer(ids, dtype=np.uint32).astype(np.int64), np.diff(edges)


def _with_ends(ids: Ids, lengths: Ids, end: int, after: int, before: int = 0) -> tuple[Ids, Ids]:
    """Rows with an id at their end, before the last `after`, where it is not there already."""
    ends = np.cumsum(lengths) - after
    there = lengths - after > before
    there[there] = ids[ends[there] - 1] == end
    if there.all():
        return ids, lengths
    lengths = lengths + ~there
    places = (np.cumsum(lengths) - after - 1)[~there]
    found = np.empty(len(ids) + len(places), dtype=np.int64)
    others = np.ones(len(found), dtype=np.bool_)
    others[places] = False
    found[places], found[others] = end, ids
    return found, lengths


def _without_ends(ids: Ids, lengths: Ids, before: int, after: int) -> Ids:
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return ids[(place >= before) & (place < np.repeat(lengths, lengths) - after)]


class _TokenBytes:
    """Which bytes of a text each token covers.

    Args:
        surfaces: the bytes that each of V tokens stands for.
        leading, trailing: (V,) int64, bytes at either end that the tokenizer does not count as covered.
    """

    def __init__(self, surfaces: Sequence[bytes], leading: Ids, trailing: Ids) -> None:
        self._covered = np.fromiter(map(len, surfaces), np.int64, len(surfaces))
        self._table = np.frombuffer(b"".join(surfaces) or b"\0", dtype=np.uint8)
        self._at = np.cumsum(self._covered) - self._covered
        self._leading, self._trailing = leading, trailing
        self._trims = bool(leading.any() or trailing.any())

    def places(
        self, ids: Ids, lengths: NDArray[np.int64], texts: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(T, 2) int64 bytes that each token covers, and (n,) bool texts that the tokens' bytes are not."""
        ids = np.minimum(ids, len(self._covered) - 1)
        plain = np.fromiter(map(str.isascii, texts), np.bool_, len(texts))
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        other = np.flatnonzero(~plain).tolist()
        codes = [texts[row].encode() for row in other]
        sizes[other] = [len(code) for code in codes]
        covered = self._covered[ids]
        ends = np.cumsum(covered)
        whole = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(lengths)])]
        ends -= np.repeat(whole[:-1], lengths)
        begins = ends - covered
        wrong = np.diff(whole) != sizes
        if other:
            # As many bytes need not be the same ones: a letter may be written otherwise before it is encoded.
            at = np.repeat(~plain & ~wrong, lengths)
            wrong[other] |= self._differ(ids[at], covered[at], sizes, other, codes, wrong)
        if self._trims:
            begins = np.minimum(begins + self._leading[ids], ends)
            ends = np.maximum(ends - self._trailing[ids], begins)
        return np.stack([begins, ends], axis=1), wrong

    def _differ(
        self, ids: Ids, covered: Ids, sizes: NDArray[np.int64], rows: Sequence[int], codes: Sequence[bytes],
        wrong: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:  # fmt: skip
        """(k,) bool, of k rows with bytes as many as their tokens', whether they are others."""
        chosen = ~wrong[rows]
        counts = sizes[rows][chosen]
        text = np.frombuffer(b"".join(code for code, one in zip(codes, chosen, strict=True) if one), dtype=np.uint8)
        starts = np.cumsum(covered) - covered
        told = self._table[np.repeat(self._at[ids] - starts, covered) + np.arange(len(text))]
        found = np.zeros(len(rows), dtype=np.bool_)
        if len(counts):
            found[chosen] = np.logical_or.reduceat(told != text, np.cumsum(counts) - counts)
        return found


def _token_bytes(tokenizer: Any, backend: Any, sample: Sequence[str]) -> _TokenBytes | None:
    """The way of counting bytes that gives the tokenizer's own places on most of a sample; None if none does."""
    found = backend.encode_batch(list(sample), add_special_tokens=False)
    ids, lengths = flattened([one.ids for one in found])
    want = _offsets(found, len(ids))
    best, most = None, _ENOUGH - 1
    likely = "▁" not in tokenizer.get_vocab()
    for byte_level in (likely, not likely):
        if most == len(sample):
            break
        surfaces, spaces = _surfaces(tokenizer, byte_level)
        nothing = np.zeros(len(surfaces), dtype=np.int64)
        for trimmed in ((nothing, nothing), spaces):
            counted = _TokenBytes(surfaces, *trimmed)
            places, wrong = counted.places(ids, lengths, sample)
            # Of texts that are changed before they are encoded the bytes are others; the others tell.
            told = ~np.repeat(wrong, lengths)
            right = len(wrong) - int(wrong.sum())
            if right > most and np.array_equal(_whole(places, lengths, sample)[told], want[told]):
                best, most = counted, right
    return best


def _whole(places: NDArray[np.int64], lengths: Ids, texts: Sequence[str]) -> NDArray[np.int64]:
    """Places by byte as places by character: a part of a character covers it, as the tokenizer has it."""
    found = places.copy()
    at = 0
    for text, length in zip(texts, lengths.tolist(), strict=True):
        if not text.isascii():
            edges = _ends(text)
            row = places[at : at + length]
            found[at : at + length, 0] = np.searchsorted(edges, row[:, 0], side="right")
            found[at : at + length, 1] = np.searchsorted(edges, row[:, 1], side="left") + (row[:, 1] > 0)
        at += length
    return found


def _surfaces(tokenizer: Any, byte_level: bool) -> tuple[list[bytes], tuple[Ids, Ids]]:
    """V tokens as bytes, and (V,) the spaces at the beginning and end of each."""
    vocabulary = tokenizer.get_vocab()
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    size = 1 + max(vocabulary.values(), default=-1)
    surfaces = [b""] * size
    leading, trailing = (np.zeros(size, dtype=np.int64) for _ in range(2))
    for piece, index in vocabulary.items():
        if index in added:
            surfaces[index] = added[index].encode()
            continue
        if byte_level:
            text, space = piece, "Ġ "
            surfaces[index] = _bytes_of(piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            surfaces[index] = _byte(piece)
            continue
        else:
            text, space = piece.replace("▁", " "), " "
            surfaces[index] = text.encode("utf-8", "replace")
        leading[index], trailing[index] = len(text) - len(text.lstrip(space)), len(text) - len(text.rstrip(space))
    return surfaces, (leading, trailing)


def _byte(piece: str) -> bytes:
    try:
        return bytes([int(piece[3:5], 16)])
    except ValueError:  # looks like a byte's name and is none
        return piece.encode()


def _bytes_of(piece: str) -> bytes:
    try:
        return piece.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # of another alphabet: bytes that no text has
        return b"\xff" * len(piece)


def _letters_of_bytes() -> dict[int, int]:
    """The byte of each letter in the alphabet of byte-level tokenizers, by their code points."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {**{byte: byte for byte in shown}, **{256 + place: byte for place, byte in enumerate(others)}}


_BYTE_OF = _letters_of_bytes()


def _in_bytes(places: NDArray[np.int64], lengths: Ids, texts: Sequence[str]) -> NDArray[np.int64]:
    """Places by character as places by byte."""
    found = places.copy()
    at = 0
    for text, length in zip(texts, lengths.tolist(), strict=True):
        if not text.isascii():
            edges = np.concatenate([[0], _ends(text)])
            found[at : at + length] = edges[places[at : at + length]]
        at += length
    return found


def _ends(text: str) -> NDArray[np.int64]:
    """(n,) int64, the byte after each of n characters."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.cumsum(1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000), dtype=np.int64)


def _offsets(found: Sequence[Any], count: int) -> NDArray[np.int64]:
    characters = chain.from_iterable(chain.from_iterable(one.offsets for one in found))
    return np.fromiter(characters, np.int64, 2 * count).reshape(-1, 2)


def flattened(rows: Sequence[Sequence[int]]) -> tuple[Ids, NDArray[np.int64]]:
    """All ids in one array, and how many each row has.

    >>> flattened([[5, 6], [], [7]])
    (array([5, 6, 7]), array([2, 0, 1]))
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum())), lengths


def single(encode: Callable[[str], Any], texts: Sequence[str]) -> tuple[int, Exception] | None:
    """The first text that is refused, by its place, and why; None if none is."""
    for place, text in enumerate(texts):
        try:
            encode(text)
        except Exception as error:  # the libraries raise no narrower one
            return place, error
    return None
