"""Real multilingual text for the examples: chats in 28 languages and interface messages in 99.

Both come as PyPI packages (the ``examples`` extra): ``chatterbot-corpus`` and ``django``. Nothing is downloaded at run
time. The split is a function of the text alone, so pre-training, fine-tuning and evaluation agree on it without a file.
"""

from __future__ import annotations

import gettext
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import regex
import yaml

Split = Literal["train", "validation", "probe"]
PLACEHOLDER = regex.compile(r"%\([^)]*\)[sd]|%[sd]|\{[^}]*\}")

CODES = {
    "bengali": "bn", "chinese": "zh", "dutch": "nl", "english": "en", "french": "fr", "german": "de", "hebrew": "he",
    "hindi": "hi", "indonesian": "id", "italian": "it", "japanese": "ja", "korean": "ko", "marathi": "mr",
    "persian": "fa", "portuguese": "pt", "russian": "ru", "spanish": "es", "swedish": "sv", "tamil": "ta",
    "telugu": "te", "thai": "th", "traditionalchinese": "zh", "turkish": "tr", "ukrainian": "uk", "urdu": "ur",
}  # fmt: skip
"""Folders of ``chatterbot-corpus`` whose answers are in one known language, and its ISO 639 code."""


@dataclass(frozen=True)
class Chat:
    """One exchange: the user's turn and the assistant's answer."""

    language: str
    user: str
    assistant: str


@dataclass(frozen=True)
class Corpus:
    """Chats and single lines of one split."""

    chats: tuple[Chat, ...]
    lines: tuple[tuple[str, str], ...]  # (language, text)

    def english(self) -> tuple[Chat, ...]:
        """The English chats, in a fixed order."""
        return tuple(chat for chat in self.chats if chat.language == "english")


def normalise(text: str) -> str:
    """What counts as the same text: letters and digits only, case folded."""
    return regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", text).casefold().strip()


def split_of(text: str) -> Split:
    """Which split a text belongs to, by a hash of its normalised form: 85 % train, 10 % validation, 5 % probe."""
    bucket = int.from_bytes(hashlib.sha256(normalise(text).encode()).digest()[:4], "big") % 100
    return "validation" if bucket < 10 else "probe" if bucket < 15 else "train"


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name!r} is not installed; `pip install -e '.[examples]'` in a clone brings it")
    return Path(spec.origin).parent


def all_chats() -> Iterator[Chat]:
    """Every exchange of ``chatterbot-corpus``: a conversation of n turns gives n - 1 of them."""
    for path in sorted((package_folder("chatterbot_corpus") / "data").glob("*/*.yml")):
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for conversation in loaded["conversations"]:
            turns = [" ".join(str(turn).split()) for turn in conversation]
            for user, assistant in pairwise(turns):
                if normalise(user) and normalise(assistant):
                    yield Chat(path.parent.name, user, assistant)


def answers_by_language() -> dict[str, list[str]]:
    """The distinct answers of every folder in `CODES`."""
    answers: dict[str, dict[str, None]] = {language: {} for language in CODES}
    for chat in all_chats():
        if chat.language in answers:
            answers[chat.language][chat.assistant] = None
    return {language: list(texts) for language, texts in answers.items()}


def all_messages() -> Iterator[tuple[str, str]]:
    """(locale, message) of every translated line in Django's catalogues."""
    for path in sorted(package_folder("django").rglob("locale/*/LC_MESSAGES/django.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for source, translated in catalogue.items():
            text = " ".join(PLACEHOLDER.sub(" ", translated).split())
            if source and normalise(text):
                yield path.parts[-3], text


def load(split: Split) -> Corpus:
    """One split, de-duplicated: no normalised text of one split occurs in another.

    Args:
        split: ``"train"``, ``"validation"`` or ``"probe"``.

    Returns:
        Chats whose *question* falls in the split (all answers to one question stay together) and the catalogue lines of
        the split that are said in no chat. Where splits share an answer, training yields to probe, probe to validation.
    """
    chats = {(normalise(chat.user), normalise(chat.assistant)): chat for chat in all_chats()}
    stronger = {"validation": (), "probe": ("validation",), "train": ("validation", "probe")}[split]
    taken = {text for key in chats if split_of(key[0]) in stronger for text in key}
    chosen = tuple(chat for key, chat in chats.items() if split_of(key[0]) == split and taken.isdisjoint(key))
    texts = {text for key in chats for text in key}
    lines = []
    for language, text in all_messages():
        key_text = normalise(text)
        if split_of(text) == split and key_text not in texts:
            texts.add(key_text)
            lines.append((language, text))
    return Corpus(chosen, tuple(lines))
