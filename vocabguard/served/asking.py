"""What a served model says when it is asked to repeat words: forced where the server lets see that, else freely.

Three ways: the first where the server knows it, else the one that the base follows better:

- ``echo``: a completion of no token that gives back the log-probabilities of its prompt, in which a list of words
  stands three times. A word is right where every token of its last copy was the most likely one, as in the offline
  probe.
- ``chat``: an answer to a request to repeat, at temperature 0, of which the words are compared.
- ``text``: a completion of a text in which the list stands twice, at temperature 0, compared in the same way.
"""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from vocabguard.served.client import Server, ServerError
from vocabguard.served.modes import MODES, Mode
from vocabguard.served.words import word_lists

_LIST = {"echo": 12, "chat": 8, "text": 12}
_TRIAL = ["river", "stone", "cloud", "letter", "garden", "winter", "music", "bread"]
_REQUESTS = (
    "Repeat exactly these words, one per line, in this order, and nothing else:\n{list}",
    "Copy this list word for word, one word per line:\n{list}",
)
# From the first letter or figure to the last; with a letter, since a list may be numbered.
_WORD = regex.compile(r"(?=.*\p{L})[\p{L}\p{N}](?:.*[\p{L}\p{M}\p{N}])?")
# Answers of these say that a server has no such address, or takes no such request.
_UNKNOWN = (400, 404, 405, 415, 422, 501)


@dataclass(frozen=True)
class Said:
    """One model's answers.

    Attributes:
        mode: how it was asked.
        right: for each word, in which of the asks it was right.
        probability: of each word, mean over the asks; None where the mode does not show it.
        instead: for each word what came in its place, where that is one other word.
    """

    mode: Mode
    right: list[list[bool]]
    probability: list[float] | None
    instead: list[list[str]]


def mode_of(server: Server, asked: Mode | None = None) -> Mode:
    """How to ask: forced where the server knows that, else the way in which its model repeats more of a short list.

    A model that was not trained for chats continues a text and answers nothing, and the other way round.

    Args:
        asked: the only one to try.

    Raises:
        ServerError: if it knows none.
    """
    last = ServerError(f"{server.url}: does not give the log-probabilities of a prompt; allowed: another --ask-by")
    shares: dict[Mode, int] = {}
    for mode in MODES if asked is None else (asked,):
        try:
            found = _answer_of(server, mode, _TRIAL, 0)
        except ServerError as error:
            if error.status not in _UNKNOWN:
                raise
            last = error
            continue
        if found is not None and mode in (asked, "echo"):
            return mode
        if found is not None:
            shares[mode] = sum(one.right for one in found)
            if shares[mode] == len(_TRIAL):
                return mode
    if not shares:
        raise last
    return max(shares, key=shares.__getitem__)


def ask_words_of(
    server: Server, words: Sequence[str], *, mode: Mode, asks: int, seed: int, tell: Callable[[int, int], None]
) -> Said:
    """Ask for every word in several lists among other words.

    Raises:
        ServerError: for a request that fails for good.
    """
    lists = [(ask, one) for ask in range(asks) for one in word_lists(len(words), _LIST[mode], seed, ask)]

    def work(item: tuple[int, list[int]], stop: threading.Event) -> list[_Answer]:
        ask, places = item
        found = _answer_of(server, mode, [words[place] for place in places], ask, stop)
        if found is None:
            raise ServerError(f"{server.url}: gives the log-probabilities of some prompts and not of others")
        return found

    answers = server.map(work, lists, tell)
    right = [[False] * asks for _ in words]
    chance = [0.0] * len(words)
    instead: list[list[str]] = [[] for _ in words]
    seen: set[tuple[int, int]] = set()
    for (ask, places), found in zip(lists, answers, strict=True):
        for place, one in zip(places, found, strict=True):
            if (ask, place) in seen:  # a filler
                continue
            seen.add((ask, place))
            right[place][ask] = one.right
            chance[place] += one.probability / asks
            instead[place] += [one.instead] if one.instead is not None else []
    return Said(mode, right, chance if mode == "echo" else None, instead)


@dataclass(frozen=True)
class _Answer:
    """Of one word in one list."""

    right: bool
    probability: float
    instead: str | None


def _answer_of(
    server: Server, mode: Mode, words: Sequence[str], ask: int, stop: threading.Event | None = None
) -> list[_Answer] | None:
    """Of each word of a list; None where the mode is ``echo`` and the server does not show what it needs."""
    shown = "\n".join(words)
    if mode == "echo":
        prompt = f"{shown}\n\n{shown}\n\n{shown}"
        told = server.post("/completions", _completion(server, prompt, 1) | {"echo": True, "logprobs": 1}, stop)
        return _forced(prompt, words, _choice(told, server))
    # Bytes: no tokenizer makes more tokens of a text.
    room = len(shown.encode()) + 4 * len(words) + 16
    if mode == "text":
        told = server.post("/completions", _completion(server, f"{shown}\n\n{shown}\n\n", room), stop)
        return _compared(words, _text(_choice(told, server).get("text")), first=len(words))
    request = _REQUESTS[ask % len(_REQUESTS)].replace("{list}", shown)
    body = {"model": server.model, "messages": [{"role": "user", "content": request}], "max_tokens": room,
            "temperature": 0, "stream": False}  # fmt: skip
    message = _choice(server.post("/chat/completions", body, stop), server).get("message")
    return _compared(words, _text(message.get("content") if isinstance(message, Mapping) else None))


def _completion(server: Server, prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": False}


def _choice(told: Mapping[str, Any], server: Server) -> Mapping[str, Any]:
    choices = told.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        said = told.get("error", "no choices in the answer")
        raise ServerError(f"{server.url}: {str(said)[:160]}", 400 if "error" in told else 200)
    first: Mapping[str, Any] = choices[0]
    return first


def _text(content: Any) -> str:
    """What was said, of a text or of parts; nothing where there is none."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _forced(prompt: str, words: Sequence[str], choice: Mapping[str, Any]) -> list[_Answer] | None:
    """Each word of the prompt's last copy, by the log-probabilities of its tokens."""
    found = choice.get("logprobs")
    if not isinstance(found, Mapping):
        return None
    tokens, own, tops = (found.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not (isinstance(tokens, list) and isinstance(own, list) and isinstance(tops, list)):
        return None
    if not len(tokens) == len(own) == len(tops) > 1:
        return None
    spans = _spans(prompt, [str(token) for token in tokens], found.get("text_offset"))
    if spans is None:
        return None
    begin, answers = len(prompt) - len("\n".join(words)), []
    for word in words:
        end = begin + len(word)
        inside = [place for place, (start, stop) in enumerate(spans) if start < end and stop > begin]
        marks = [(own[place], tops[place]) for place in inside]
        if not inside or any(not _number(mine) or not isinstance(best, Mapping) for mine, best in marks):
            return None
        right = all(mine >= max(filter(_number, best.values()), default=math.inf) - 1e-4 for mine, best in marks)
        instead = next((str(max(best, key=best.__getitem__)) for mine, best in marks
                        if best and mine < max(best.values()) - 1e-4), None)  # fmt: skip
        answers.append(_Answer(right, math.exp(min(0.0, sum(mine for mine, _ in marks))), instead))
        begin = end + 1
    return answers


def _spans(prompt: str, tokens: Sequence[str], offsets: Any) -> list[tuple[int, int]] | None:
    """Where in the prompt each token stands; None where that cannot be told.

    Texts of tokens that are parts of a character are odd, and servers count them in ways of their own: only where the
    tokens spell the prompt are they believed.
    """
    if isinstance(offsets, list) and len(offsets) == len(tokens) and all(isinstance(at, int) for at in offsets):
        first = offsets[0]
        starts = [at - first for at in offsets]
    else:
        starts, at = [], 0
        for token in tokens:
            starts.append(at)
            at += len(token)
    # A token that begins a sequence has a text of its own before the prompt in some servers.
    for shift in (0, len(tokens[0])):
        moved = [start - shift for start in starts]
        whole = [(start, token) for start, token in zip(moved, tokens, strict=True)
                 if 0 <= start < len(prompt) and token and "\ufffd" not in token]  # fmt: skip
        inside = [pair for pair in whole if pair[0] + len(pair[1]) <= len(prompt)]
        if inside and all(prompt.startswith(token, start) for start, token in inside):
            ends = [*moved[1:], moved[-1] + len(tokens[-1])]
            return [(start, max(end, start)) for start, end in zip(moved, ends, strict=True)]
    return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _compared(words: Sequence[str], answer: str, first: int | None = None) -> list[_Answer]:
    """The words of an answer held against those asked for; one that is left out does not shift the others.

    Models lay lists out in ways of their own: on one line, numbered, with commas. None of that is a word.

    Args:
        first: words that count, since a completed text goes on.
    """
    wanted = [_bare(word) or word for word in words]
    parts = answer.split()[: None if first is None else first]
    said = [bare for part in parts if (bare := _bare(part) or (part if part in wanted else ""))]
    right, instead = [False] * len(words), dict[int, str]()
    matcher = difflib.SequenceMatcher(None, wanted, said, autojunk=False)
    for kind, start, stop, other, until in matcher.get_opcodes():
        for place in range(start, stop):
            right[place] = kind == "equal"
            if kind == "replace" and stop - start == until - other:
                instead[place] = said[other + place - start][:40]
    return [_Answer(one, float(one), instead.get(place)) for place, one in enumerate(right)]


def _bare(part: str) -> str:
    """A word without what stands around it, empty where there are no letters: marks of a list, commas, quotes.

    >>> [_bare(part) for part in ("river,", "2.", '"東京"', "don't")]
    ['river', '', '東京', "don't"]
    """
    found = _WORD.search(part)
    return "" if found is None else found[0]
