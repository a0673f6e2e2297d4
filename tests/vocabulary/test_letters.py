"""What texts look like, against Python's own string methods."""

from __future__ import annotations

import random
import unicodedata

from vocabguard.vocabulary.letters import Looks

SEEDS = 3
HARD = "aBcdEFzß ŉǅΣςİı1.-ªⅫ"


def naive_shape(text: str) -> int:
    """Word by word, by the methods of `str`."""
    word = text.removeprefix(" ")
    if not word.isalpha():
        return -1
    lower, title, upper = word.islower(), word.istitle(), word.isupper()
    if not (lower or title or upper or word.lower() == word.upper()):
        return -1
    bits = (len(word) < len(text), word.isascii(), len(word) == 1, lower, title, upper)
    return sum(bit << place for place, bit in enumerate(bits))


def some_texts(seed: int) -> list[str]:
    """Short texts of all kinds of characters, with and without a space before them."""
    chance = random.Random(seed)
    points = [
        *range(0x250),
        *range(0x370, 0x600),
        *range(0x1E00, 0x2000),
        *range(0x3040, 0x3100),
        *range(0x10400, 0x10450),
    ]
    characters = [chr(point) for point in points]
    texts = [
        "".join(chance.choices(characters if chance.random() < 0.5 else HARD, k=chance.randint(0, 5)))
        for _ in range(20_000)
    ]
    return [(" " if chance.random() < 0.3 else "") + text for text in texts]


def test_looks_are_those_of_the_strings() -> None:
    def class_of(character: str) -> int:
        return ord(unicodedata.category(character)[0])

    for seed in range(SEEDS):
        texts = some_texts(seed)
        looks = Looks.of(texts, class_of)
        assert looks.shape.tolist() == [naive_shape(text) for text in texts]
        assert looks.alphanumeric.tolist() == [text.isalnum() for text in texts]
        assert looks.letters.tolist() == [text.removeprefix(" ").isalpha() for text in texts]
        assert looks.first.tolist() == [min(map(class_of, text), default=-1) for text in texts]


def test_no_text_and_parts_of_characters() -> None:
    assert Looks.of([], ord).shape.tolist() == []
    assert Looks.of(["", "\ud800", " "], lambda _: 7).first.tolist() == [-1, 7, 7]
    assert Looks.of(["", " "], lambda _: 0).letters.tolist() == [False, False]
