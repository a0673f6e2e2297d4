"""Training examples as token ids with a mask of targets, as a supervised fine-tuning trainer would make them.

The rules are those of TRL's ``SFTTrainer``, without packing, which changes neither inputs nor targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vocabguard.offline.coverage_examples import Chat, Completion, Example, Text
from vocabguard.offline.coverage_render import ChatRenderer, Span
from vocabguard.offline.readers import DataError

Loss = Literal["assistant", "completion", "all"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """One row of a batch.

    Attributes:
        ids: (T,) int64.
        target: (T,) bool, the loss asks for this token; never the first, which nothing comes before.
        cut: whether the row was longer than the longest allowed.
    """

    ids: Ids
    target: Mask
    cut: bool


@dataclass(frozen=True)
class _Source:
    """What to tokenize.

    Attributes:
        place: where it was read.
        text: all of it.
        special: whether the tokenizer puts its own special tokens around.
        spans: the targets by characters; None is all of the text.
        prompt: targets begin where the ids of this text end, or part from those of `text`.
    """

    place: str
    text: str
    special: bool
    spans: list[Span] | None = None
    prompt: str | None = None


class TargetEncoder:
    """Encodes examples and says which tokens are targets.

    - Conversations: the assistant's tokens and what ends its turns (``assistant``); only the last such turn, with later
      turns cut off (``completion``); everything (``all``). No end-of-sequence token but the template's own.
    - Prompts with completions: the completion (``assistant``, ``completion``), everything (``all``).
    - Texts: everything. Texts and completions that are texts get the EOS token if they do not end with it.

    Args:
        tokenizer: a transformers tokenizer.
        loss: which tokens of conversations and prompts are targets.
        eos: whether texts get the EOS token.
        max_length: tokens of a row; the rest is cut off at the end. None cuts nothing.

    Raises:
        ValueError: for another loss, or a `max_length` below 1.
    """

    def __init__(
        self, tokenizer: Any, *, loss: Loss = "assistant", eos: bool = True, max_length: int | None = None
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; allowed: {', '.join(LOSSES)}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; allowed: at least 1")
        self.renderer = ChatRenderer(tokenizer)
        self._tokenizer, self._loss, self._max_length = tokenizer, loss, max_length
        self._eos: str = (tokenizer.eos_token or "") if eos else ""
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._backend is not None:
            # A saved tokenizer may come with either, which trainers do not use here.
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The examples as rows, in order.

        Args:
            examples: any mix; many at once are faster, since the tokenizer uses threads.

        Raises:
            DataError: for an example that the chat template or the tokenizer refuses.
        """
        sources = [self._source(example) for example in examples]
        rows: list[Encoded | None] = [None] * len(sources)
        for special in (False, True):
            for marked in (False, True):
                chosen = [i for i, s in enumerate(sources) if s.special == special and (s.spans is not None) == marked]
                for index, row in zip(chosen, self._rows([sources[i] for i in chosen], special, marked), strict=True):
                    rows[index] = row
        return [row for row in rows if row is not None]

    def _source(self, example: Example) -> _Source:
        if isinstance(example, Text):
            return _Source(example.place, self._ended(example.text), special=True)
        if isinstance(example, Chat):
            return self._chat(example)
        prompt, completion = example.prompt, example.completion
        if isinstance(prompt, str) and isinstance(completion, str):
            whole = self._ended(prompt + completion)
            return _Source(example.place, whole, special=True, prompt=None if self._loss == "all" else prompt)
        return self._answer(example)

    def _chat(self, chat: Chat) -> _Source:
        if self._loss == "all":
            return _Source(chat.place, self.renderer.text(chat.place, chat.turns, chat.options), special=False)
        if self._loss == "assistant":
            text, spans = self.renderer.assistant_spans(chat.place, chat.turns, chat.options)
            return _Source(chat.place, text, special=False, spans=spans)
        last = max((i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise DataError(f"{chat.place}: no assistant's turn after another one; the completion is such a turn")
        return self._answer(Completion(chat.place, chat.turns[:last], chat.turns[last : last + 1], chat.options))

    def _answer(self, example: Completion) -> _Source:
        """A conversation of which the end is the target."""
        prompt, completion = list(example.prompt), list(example.completion)
        text = self.renderer.text(example.place, prompt + completion, example.options)  # type: ignore[arg-type]
        if self._loss == "all":
            return _Source(example.place, text, special=False)
        before = self.renderer.text(example.place, prompt, example.options, generate=True)  # type: ignore[arg-type]
        return _Source(example.place, text, special=False, prompt=before)

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _rows(self, sources: list[_Source], special: bool, marked: bool) -> list[Encoded]:
        ids, offsets = self._tokenize(sources, [source.text for source in sources], special, marked)
        asked = [source for source in sources if source.prompt is not None]
        prompts = iter(self._tokenize(asked, [source.prompt or "" for source in asked], special, False)[0])
        masks = []
        for source, row, places in zip(sources, ids, offsets, strict=True):
            if source.spans is not None:
                masks.append(_inside(places, source.spans) if places is not None else self._by_prefixes(source, row))
            else:
                start = 0 if source.prompt is None else common_prefix(next(prompts), row)
                masks.append(np.arange(len(row)) >= start)
        return [self._row(row, mask) for row, mask in zip(ids, masks, strict=True)]

    def _row(self, ids: Ids, target: Mask) -> Encoded:
        target[:1] = False
        cut = self._max_length is not None and len(ids) > self._max_length
        return Encoded(ids[: self._max_length], target[: self._max_length], cut)

    def _tokenize(
        self, sources: list[_Source], texts: list[str], special: bool, marked: bool
    ) -> tuple[list[Ids], list[NDArray[np.int64] | None]]:
        """The ids of each text and, if `marked` and the tokenizer knows, the (T, 2) characters of each token."""
        if self._backend is None:
            slow: Callable[[str], list[int]] = lambda text: self._tokenizer.encode(text, add_special_tokens=special)  # noqa: E731
            return [_array(_single(slow, s, text)) for s, text in zip(sources, texts, strict=True)], [None] * len(texts)
        encode = self._backend.encode_batch if marked else self._backend.encode_batch_fast
        try:
            found = encode(texts, add_special_tokens=special)
        except Exception:  # one text spoils the batch: say which
            one: Callable[[str], Any] = lambda text: encode([text], add_special_tokens=special)[0]  # noqa: E731
            found = [_single(one, source, text) for source, text in zip(sources, texts, strict=True)]
        places = [np.array(e.offsets, dtype=np.int64).reshape(-1, 2) if marked else None for e in found]
        return [_array(e.ids) for e in found], places

    def _by_prefixes(self, source: _Source, ids: Ids) -> Mask:
        """Targets where the tokenizer knows no offsets: between the ids of the text before and up to a span's end."""
        mask = np.zeros(len(ids), dtype=np.bool_)
        for span in source.spans or ():
            texts = [source.text[:edge] for edge in span]
            begin, end = (common_prefix(part, ids) for part in self._tokenize([source] * 2, texts, False, False)[0])
            mask[begin:end] = True
        return mask


def common_prefix(prompt: Ids, ids: Ids) -> int:
    """How many ids two rows have in common at their beginning.

    Args:
        prompt: (P,) int64.
        ids: (T,) int64.
    """
    shorter = min(len(prompt), len(ids))
    different = np.flatnonzero(prompt[:shorter] != ids[:shorter])
    return int(different[0]) if len(different) else shorter


def _inside(places: NDArray[np.int64], spans: list[Span]) -> Mask:
    """The tokens of which any character is in a span."""
    mask = np.zeros(len(places), dtype=np.bool_)
    for begin, end in spans:
        mask |= (places[:, 1] > begin) & (places[:, 0] < end)
    return mask


def _array(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int64)


def _single(encode: Callable[[str], Any], source: _Source, text: str) -> Any:
    try:
        return encode(text)
    except Exception as error:  # the libraries raise no narrower one
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{source.place}: the tokenizer refuses the text ({told})") from error
