"""What many texts are made of, found for each character once and put together for all texts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_POINTS = 0x110000
_ALPHABETIC, _ALPHANUMERIC, _ASCII, _LOWER, _UPPER, _TITLE, _CASELESS = (1 << bit for bit in range(7))
_CASED = _LOWER | _UPPER | _TITLE


@dataclass(frozen=True)
class Looks:
    """What n texts look like; of an empty text nothing is so.

    Attributes:
        first: (n,) int64, the smallest class among a text's characters; -1 for an empty one.
        letters: (n,) bool, letters only, after at most one space.
        alphanumeric: (n,) bool, as ``str.isalnum``.
        shape: (n,) int64, what a pre-tokenizer sees in the word after at most one space: the space, ASCII, a single
            letter, lower, title and upper case, a bit each; -1 where that is no word of letters in one of these cases
            or without case.
    """

    first: Ints
    letters: Flags
    alphanumeric: Flags
    shape: Ints

    @property
    def ascii_words(self) -> Flags:
        """(n,) bool, ASCII letters in one case, after at most one space."""
        found: Flags = (self.shape >= 0) & (self.shape & 2 != 0)
        return found

    def with_kinds(self, kinds: npt.NDArray[np.uint8]) -> list[int]:
        """A number for each text that tells shapes of different kinds apart; -1 where there is no shape."""
        found: list[int] = np.where(self.shape < 0, -1, self.shape * 256 + kinds).tolist()
        return found

    @classmethod
    def of(cls, texts: Sequence[str], class_of: Callable[[str], int]) -> Looks:
        """Look at texts.

        Args:
            class_of: the class of a character, in [0, 255]; asked once for each that occurs.

        Example:
            >>> found = Looks.of(["the", " The", "tHe", "x1", ""], lambda character: int(character.isspace()))
            >>> found.letters.tolist(), found.alphanumeric.tolist()
            ([True, True, True, False, False], [True, False, True, True, False])
            >>> found.shape.tolist(), found.first.tolist()
            ([10, 19, -1, -1, -1], [0, 0, 0, 0, -1])
        """
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        flags, classes = _tables(points, class_of)
        some = np.flatnonzero(lengths)
        starts = (np.cumsum(lengths) - lengths)[some]
        first, shape = np.full(len(texts), -1, dtype=np.int64), np.full(len(texts), -1, dtype=np.int64)
        letters, alphanumeric = np.zeros(len(texts), dtype=np.bool_), np.zeros(len(texts), dtype=np.bool_)
        if len(some):
            first[some] = np.minimum.reduceat(classes[points], starts)
            of_point = flags[points]
            alphanumeric[some] = np.bitwise_and.reduceat(of_point, starts) & _ALPHANUMERIC != 0
            letters[some], shape[some] = _words(points, of_point, starts, lengths[some])
        return cls(first, letters, alphanumeric, shape)


def _tables(points: npt.NDArray[np.uint32], class_of: Callable[[str], int]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Flags and classes by code point, filled where one occurs."""
    flags, classes = np.zeros((2, _POINTS), dtype=np.uint8)
    seen = np.zeros(_POINTS, dtype=np.bool_)
    seen[points] = True
    for point in np.flatnonzero(seen).tolist():
        one = chr(point)
        upper = one.isupper()
        flags[point] = (
            _ALPHABETIC * one.isalpha() + _ALPHANUMERIC * one.isalnum() + _ASCII * (point < 128)
            + _LOWER * one.islower() + _UPPER * upper + _TITLE * (one.istitle() and not upper)
            + _CASELESS * (one.lower() == one.upper())
        )  # fmt: skip
        classes[point] = class_of(one)
    return flags, classes


def _words(
    points: npt.NDArray[np.uint32], flags: npt.NDArray[np.uint8], starts: Ints, lengths: Ints
) -> tuple[Flags, Ints]:
    """`Looks.letters` and `Looks.shape` of texts that are not empty."""
    spaced = points[starts] == ord(" ")
    # A leading space is taken off by flags that disturb nothing.
    flags = flags.copy()
    flags[starts[spaced]] = _ALPHABETIC | _ASCII | _CASELESS
    all_of, any_of = np.bitwise_and.reduceat(flags, starts), np.bitwise_or.reduceat(flags, starts)
    word = lengths - spaced
    letters = (all_of & _ALPHABETIC != 0) & (word > 0)
    cased = flags & _CASED != 0
    before = np.zeros_like(cased)
    before[1:] = cased[:-1]
    before[starts] = False
    # As `str.istitle`: a capital after a letter without case or none, small letters after letters with case.
    broken = np.where(flags & (_UPPER | _TITLE) != 0, before, (flags & _LOWER != 0) & ~before)
    has_case = any_of & _CASED != 0
    lower = (any_of & _LOWER != 0) & (any_of & (_UPPER | _TITLE) == 0)
    upper = (any_of & _UPPER != 0) & (any_of & (_LOWER | _TITLE) == 0)
    title = has_case & ~np.logical_or.reduceat(broken, starts)
    bits = (spaced, all_of & _ASCII != 0, word == 1, lower, title, upper)
    shape = sum(bit.astype(np.int64) << place for place, bit in enumerate(bits))
    plain = letters & (lower | title | upper | (all_of & _CASELESS != 0))
    return letters, np.where(plain, shape, -1)
