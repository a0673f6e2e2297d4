"""Training examples as token ids with a mask of targets, as a supervised fine-tuning trainer would make them.

The rules are those of TRL's ``SFTTrainer``, without packing, which changes neither inputs nor targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vocabguard.offline.coverage_examples import Chat, Completion, Example, Text
from vocabguard.offline.coverage_render import ChatRenderer
from vocabguard.offline.coverage_shapes import Span
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
class Batch:
    """Rows that were tokenized together, one after the other.

    Attributes:
        ids: (T,) int64, of all rows.
        target: (T,) bool, see `Encoded`.
        lengths: (n,) int64, tokens of each row.
        cut: (n,) bool, see `Encoded`.
        order: (n,) int64, which example each row is.
    """

    ids: Ids
    target: Mask
    lengths: NDArray[np.int64]
    cut: Mask
    order: NDArray[np.int64]

    @property
    def without_targets(self) -> int:
        """Rows that ask for nothing."""
        row_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return int((np.bincount(row_of[self.target], minlength=len(self.lengths)) == 0).sum())

    def rows(self) -> Iterator[tuple[int, Encoded]]:
        """The rows, each with its place among the examples."""
        edges = np.cumsum(self.lengths)[:-1]
        parts = zip(np.split(self.ids, edges), np.split(self.target, edges), self.cut.tolist(), strict=True)
        yield from ((place, Encoded(*part)) for place, part in zip(self.order.tolist(), parts, strict=True))


@dataclass(frozen=True)
class Source:
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
        found = dict(row for batch in self.batches(self.render(examples)) for row in batch.rows())
        return [found[place] for place in range(len(found))]

    def render(self, examples: Sequence[Example]) -> list[Source]:
        """The examples as texts: the first half of `encode`, which holds Python's lock.

        Raises:
            DataError: for an example that the chat template refuses.
        """
        return [self._source(example) for example in examples]

    def batches(self, sources: Sequence[Source]) -> list[Batch]:
        """The texts as ids, in batches that are tokenized alike: the second half, during which other threads can run.

        Raises:
            DataError: for a text that the tokenizer refuses.
        """
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for place, source in enumerate(sources):
            kinds.setdefault((source.special, source.spans is not None), []).append(place)
        return [self._batch([sources[i] for i in places], np.array(places), *kind) for kind, places in kinds.items()]

    def _source(self, example: Example) -> Source:
        if isinstance(example, Text):
            return Source(example.place, self._ended(example.text), special=True)
        if isinstance(example, Chat):
            return self._chat(example)
        prompt, completion = example.prompt, example.completion
        if isinstance(prompt, str) and isinstance(completion, str):
            whole = self._ended(prompt + completion)
            return Source(example.place, whole, special=True, prompt=None if self._loss == "all" else prompt)
        return self._answer(example)

    def _chat(self, chat: Chat) -> Source:
        if self._loss == "all":
            return Source(chat.place, self.renderer.text(chat.place, chat.turns, chat.options), special=False)
        if self._loss == "assistant":
            text, spans = self.renderer.assistant_spans(chat.place, chat.turns, chat.options)
            return Source(chat.place, text, special=False, spans=spans)
        last = max((i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise DataError(f"{chat.place}: no assistant's turn after another one; the completion is such a turn")
        return self._answer(Completion(chat.place, chat.turns[:last], chat.turns[last : last + 1], chat.options))

    def _answer(self, example: Completion) -> Source:
        """A conversation of which the end is the target."""
        prompt, completion = list(example.prompt), list(example.completion)
        text = self.renderer.text(example.place, prompt + completion, example.options)  # type: ignore[arg-type]
        if self._loss == "all":
            return Source(example.place, text, special=False)
        before = self.renderer.text(example.place, prompt, example.options, generate=True)  # type: ignore[arg-type]
        return Source(example.place, text, special=False, prompt=before)

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _batch(self, sources: list[Source], order: NDArray[np.int64], special: bool, marked: bool) -> Batch:
        ids, lengths, places = self._tokenize(sources, [source.text for source in sources], special, marked)
        starts = np.cumsum(lengths) - lengths
        if places is not None:
            target = _inside(places, lengths, sources)
        elif marked:
            rows = zip(sources, np.split(ids, starts[1:]), strict=True)
            target = np.concatenate([self._by_prefixes(source, row) for source, row in rows])
        else:
            target = self._after_prompts(sources, ids, lengths, special)
        target[starts[lengths > 0]] = False
        if self._max_length is None:
            return Batch(ids, target, lengths, np.zeros(len(lengths), dtype=np.bool_), order)
        kept = np.arange(len(ids)) - np.repeat(starts, lengths) < self._max_length
        cut = lengths > self._max_length
        return Batch(ids[kept], target[kept], np.minimum(lengths, self._max_length), cut, order)

    def _after_prompts(self, sources: list[Source], ids: Ids, lengths: NDArray[np.int64], special: bool) -> Mask:
        """Targets of rows that begin with a prompt, or are all target."""
        target = np.ones(len(ids), dtype=np.bool_)
        asked = [i for i, source in enumerate(sources) if source.prompt is not None]
        if not asked:
            return target
        chosen = [sources[i] for i in asked]
        found, counts, _ = self._tokenize(chosen, [source.prompt or "" for source in chosen], special, False)
        ends = np.cumsum(lengths)
        for i, prompt in zip(asked, np.split(found, np.cumsum(counts)[:-1]), strict=True):
            start = ends[i] - lengths[i]
            target[start : start + common_prefix(prompt, ids[start : ends[i]])] = False
        return target

    def _tokenize(
        self, sources: list[Source], texts: list[str], special: bool, marked: bool
    ) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64] | None]:
        """The ids of all texts, each one's length and, if `marked` and the tokenizer knows, (T, 2) their characters."""
        if self._backend is None:
            slow: Callable[[str], list[int]] = lambda text: self._tokenizer.encode(text, add_special_tokens=special)  # noqa: E731
            rows = [_single(slow, source, text) for source, text in zip(sources, texts, strict=True)]
            return (*_joined(rows), None)
        encode = self._backend.encode_batch if marked else self._backend.encode_batch_fast
        try:
            found = encode(texts, add_special_tokens=special)
        except Exception:  # one text spoils the batch: say which
            one: Callable[[str], Any] = lambda text: encode([text], add_special_tokens=special)[0]  # noqa: E731
            found = [_single(one, source, text) for source, text in zip(sources, texts, strict=True)]
        ids, lengths = _joined([e.ids for e in found])
        if not marked:
            return ids, lengths, None
        characters = chain.from_iterable(chain.from_iterable(e.offsets for e in found))
        return ids, lengths, np.fromiter(characters, np.int64, 2 * len(ids)).reshape(-1, 2)

    def _by_prefixes(self, source: Source, ids: Ids) -> Mask:
        """Targets where the tokenizer knows no offsets: between the ids of the text before and up to a span's end."""
        mask = np.zeros(len(ids), dtype=np.bool_)
        for span in source.spans or ():
            texts = [source.text[:edge] for edge in span]
            parts, lengths, _ = self._tokenize([source] * 2, texts, False, False)
            begin, end = (common_prefix(part, ids) for part in np.split(parts, lengths[:1]))
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


def _inside(places: NDArray[np.int64], lengths: NDArray[np.int64], sources: Sequence[Source]) -> Mask:
    """(T,) bool: the tokens of which any character is in a span of their row.

    Args:
        places: (T, 2) int64, the characters of each token in its row's text.
        lengths: (n,) int64, tokens of each row.
        sources: the n rows, with spans.
    """
    texts = np.array([len(source.text) + 1 for source in sources], dtype=np.int64)
    shifts = np.cumsum(texts) - texts  # as if the texts were one
    spans = [
        (shift + a, shift + b) for shift, s in zip(shifts.tolist(), sources, strict=True) for a, b in s.spans or ()
    ]
    if not spans:
        return np.zeros(len(places), dtype=np.bool_)
    begins, ends = np.array(sorted(spans, key=lambda span: span[1]), dtype=np.int64).T
    begun = np.append(np.minimum.accumulate(begins[::-1])[::-1], np.iinfo(np.int64).max)
    shift = np.repeat(shifts, lengths)
    inside: Mask = begun[np.searchsorted(ends, places[:, 0] + shift, side="right")] < places[:, 1] + shift
    return inside


def _joined(rows: Sequence[Sequence[int]]) -> tuple[Ids, NDArray[np.int64]]:
    """All ids in one array, and how many each row has."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum())), lengths


def _single(encode: Callable[[str], Any], source: Source, text: str) -> Any:
    try:
        return encode(text)
    except Exception as error:  # the libraries raise no narrower one
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{source.place}: the tokenizer refuses the text ({told})") from error
