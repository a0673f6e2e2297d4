"""Training examples as token ids with a mask of targets, as a supervised fine-tuning trainer would make them.

The rules are those of TRL's ``SFTTrainer``, and of its ``DPOTrainer`` for preference pairs, without packing, which
changes neither inputs nor targets. `render` says which text of a conversation is the assistant's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vocabguard.data.choices import LOSSES, Loss
from vocabguard.data.readers import Chat, Completion, DataError, Example, Preference, Text, TokenRows
from vocabguard.data.render import ChatRenderer, Trainer
from vocabguard.data.templates import Span
from vocabguard.data.tokenizing import Ids, TextTokenizer, single
from vocabguard.files import one_line

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """One row of a batch.

    Attributes:
        ids: (T,) int64.
        target: (T,) bool, this token is a target; never the first, which nothing comes before.
        cut: whether the row was longer than the longest allowed.
    """

    ids: Ids
    target: Mask
    cut: bool


@dataclass(frozen=True)
class Batch:
    """Rows that were tokenized together, one after the other.

    Attributes:
        ids: (T,) whole numbers, of all rows.
        lengths: (n,) int64, tokens of each row.
        cut: (n,) bool, see `Encoded`.
        order: (n,) int64, which example each row is; -1 for what is read beside it, a rejected answer.
        asked: (T,) bool, see `Encoded`; None where the targets are all tokens but the first of each row.
    """

    ids: NDArray[np.integer[Any]]
    lengths: NDArray[np.int64]
    cut: Mask
    order: NDArray[np.int64]
    asked: Mask | None

    @functools.cached_property
    def target(self) -> Mask:
        """(T,) bool, see `Encoded`."""
        if self.asked is not None:
            return self.asked
        target = np.ones(len(self.ids), dtype=np.bool_)
        target[self.firsts] = False
        return target

    @property
    def firsts(self) -> Ids:
        """Where rows begin that have a token."""
        return (np.cumsum(self.lengths) - self.lengths)[self.lengths > 0]

    @property
    def without_targets(self) -> int:
        """Rows without a target."""
        if self.asked is None:
            return int(((self.lengths < 2) & (self.order >= 0)).sum())
        some = self.lengths > 0
        asked = np.zeros(len(self.lengths), dtype=np.bool_)
        if some.any():
            asked[some] = np.logical_or.reduceat(self.target, (np.cumsum(self.lengths) - self.lengths)[some])
        return int((~asked & (self.order >= 0)).sum())

    @property
    def count(self) -> int:
        """Rows, without what is read beside them."""
        return int((self.order >= 0).sum())

    def rows(self) -> Iterator[tuple[int, Encoded]]:
        """The rows, each with its place among the examples."""
        edges = np.cumsum(self.lengths)[:-1]
        ids = self.ids.astype(np.int64, copy=False)
        parts = zip(np.split(ids, edges), np.split(self.target, edges), self.cut.tolist(), strict=True)
        for place, part in zip(self.order.tolist(), parts, strict=True):
            if place >= 0:
                yield place, Encoded(*part)


@dataclass(slots=True)  # frozen ones take three times as long to make, and there is one for each row
class Source:
    """What to tokenize.

    Attributes:
        special: whether the tokenizer puts its own special tokens around.
        spans: the targets by characters; None is all of the text.
        prompt: targets begin where the ids of this text end, or part from those of `text`.
        beside: a rejected answer with its prompt, which is read, and may part from the prompt earlier.
    """

    place: str
    text: str
    special: bool
    spans: list[Span] | None = None
    prompt: str | None = None
    beside: str | None = None


@dataclass(slots=True)
class Documents:
    """Texts alone, without the end that they get.

    Attributes:
        prompts: texts that they begin with, which are no targets; None where all is.
    """

    examples: Sequence[Example]
    texts: list[str]
    prompts: list[str] | None = None


Rendered = Source | TokenRows | Documents
"""What `TargetEncoder.render` gives for an example, or for many texts."""


class TargetEncoder:
    """Encodes examples and says which tokens are targets.

    - Conversations: the assistant's tokens and what ends its turns (``assistant``); only the last such turn, with later
      turns cut off (``completion``); everything (``all``). No end-of-sequence token but the template's own.
    - Prompts with completions: the completion (``assistant``, ``completion``), everything (``all``).
    - Preference pairs: the chosen answer; the rejected one is read only, since the loss pushes it away.
    - Texts: everything. Texts and completions that are texts get the EOS token if they do not end with it.
    - Token ids: the targets that their labels are.

    Args:
        loss: which tokens of conversations and prompts are targets.
        eos: whether texts get the EOS token.
        max_length: tokens of a row; the rest is cut off at the end. None cuts nothing.
        trainer: whose rules for conversations without marks; see `ChatRenderer`.
        fast: whether `fastokens` may encode, where it is installed; see `TextTokenizer`.

    Raises:
        ValueError: for another loss, or a `max_length` below 1.
    """

    def __init__(
        self, tokenizer: Any, *, loss: Loss = "assistant", eos: bool = True, max_length: int | None = None,
        trainer: Trainer = "trl", fast: bool = True,
    ) -> None:  # fmt: skip
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; allowed: {', '.join(LOSSES)}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; allowed: at least 1")
        self.renderer = ChatRenderer(tokenizer, trainer)
        self._tokenizer, self._loss, self._max_length = tokenizer, loss, max_length
        self._size = _ids_of(tokenizer)
        self._eos: str = (tokenizer.eos_token or "") if eos else ""
        self.texts = TextTokenizer(tokenizer, fast)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The examples as rows, in order.

        Args:
            examples: any mix; many at once are faster, since the tokenizer uses threads.

        Raises:
            DataError: for an example that the chat template or the tokenizer refuses.
        """
        found = dict(row for batch in self.batches(self.render(examples)) for row in batch.rows())
        return [found[place] for place in range(len(found))]

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The examples as texts: the first half of `encode`, which holds Python's lock.

        Raises:
            DataError: for an example that the chat template refuses.
        """
        # Rows of few tokens, where what is done for each row is what takes time.
        kinds = set(map(type, examples))
        if kinds == {Text}:
            return [Documents(examples, [example.text for example in examples])]  # type: ignore[union-attr]
        if kinds == {Completion}:
            pairs = [(example.prompt, example.completion) for example in examples]  # type: ignore[union-attr]
            if set(map(type, chain.from_iterable(pairs))) == {str}:
                prompts = None if self._loss == "all" else [prompt for prompt, _ in pairs]
                return [Documents(examples, list(map("".join, pairs)), prompts)]  # type: ignore[arg-type]
        return [self._source(example) for example in examples]

    def batches(self, sources: Sequence[Rendered]) -> list[Batch]:
        """The texts as ids, in batches that are tokenized alike: the second half, during which other threads can run.

        Raises:
            DataError: for a text that the tokenizer refuses, or an id that is no token's.
        """
        if len(sources) == 1 and isinstance(sources[0], Documents):
            return [self._documents(sources[0])]
        kinds: dict[tuple[bool, bool], list[tuple[int, Source]]] = {}
        tokens: list[tuple[int, TokenRows]] = []
        for place, source in enumerate(sources):
            if isinstance(source, TokenRows):
                tokens.append((place, source))
            elif isinstance(source, Source):
                kinds.setdefault((source.special, source.spans is not None), []).append((place, source))
        found = [
            self._batch([source for _, source in of_kind], np.array([place for place, _ in of_kind]), *kind)
            for kind, of_kind in kinds.items()
        ]
        if any(source.beside is not None for of_kind in kinds.values() for _, source in of_kind):
            found.append(self._beside([source for of_kind in kinds.values() for _, source in of_kind]))
        return [*found, *([self._token_batch(tokens)] if tokens else [])]

    def _documents(self, documents: Documents) -> Batch:
        """Texts of which every token is a target, but for a prompt."""
        texts, prompts, examples = documents.texts, documents.prompts, documents.examples
        try:
            ids, lengths = self.texts.ended(texts, self._eos)
        except Exception as error:  # one text spoils the batch: say which
            raise self._refused([example.place for example in examples], texts, True, error) from error
        target = None
        if prompts is not None:
            target, starts = np.ones(len(ids), dtype=np.bool_), np.cumsum(lengths) - lengths
            shared = common_prefixes(*self._tokenize(examples, prompts, True), ids, starts, lengths)
            _clear_beginnings(target, starts, shared)
        return self._cut(ids, target, lengths, np.arange(len(lengths)))

    def _source(self, example: Example) -> Source | TokenRows:
        if isinstance(example, Text):  # the cheapest rows, so that a call more would be seen
            text = example.text
            return Source(example.place, text if text.endswith(self._eos) else text + self._eos, True)
        if isinstance(example, TokenRows):
            return example
        if isinstance(example, Chat):
            return self._chat(example)
        if isinstance(example, Preference):
            return self._pair(example)
        prompt, completion = example.prompt, example.completion
        if isinstance(prompt, str) and isinstance(completion, str):
            whole = self._ended(prompt + completion)
            return Source(example.place, whole, special=True, prompt=None if self._loss == "all" else prompt)
        return self._answer(example)

    def _pair(self, pair: Preference) -> Source:
        """The chosen answer as a completion; TRL's ``DPOTrainer`` has no loss on prompts, whatever `loss`."""
        if isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str):
            chosen, rejected = (self._ended(pair.prompt + text) for text in (pair.chosen, pair.rejected))
            return Source(pair.place, chosen, special=True, prompt=pair.prompt, beside=rejected)
        prompt, *both = (list(part) for part in (pair.prompt, pair.chosen, pair.rejected))
        texts = (self.renderer.text(pair.place, prompt + part, pair.options) for part in both)  # type: ignore[arg-type]
        chosen, rejected = texts
        before = self.renderer.text(pair.place, prompt, pair.options, generate=True)  # type: ignore[arg-type]
        return Source(pair.place, chosen, special=False, prompt=before, beside=rejected)

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
        texts = [source.text for source in sources]
        if not marked:
            ids, lengths = self._tokenize(sources, texts, special)
            return self._cut(ids, self._after_prompts(sources, ids, lengths, special), lengths, order)
        if not self.texts.has_places:
            ids, lengths = self._tokenize(sources, texts, special)
            rows = zip(sources, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)
            target = np.concatenate([self._by_prefixes(source, row) for source, row in rows])
            return self._cut(ids, target, lengths, order)
        try:
            ids, lengths, places, in_bytes = self.texts.placed(texts)
        except Exception as error:  # one text spoils the batch: say which
            raise self._refused([source.place for source in sources], texts, special, error) from error
        return self._cut(ids, _inside(places, lengths, sources, in_bytes), lengths, order)

    def _beside(self, sources: list[Source]) -> Batch:
        """The rejected answers, which have no target."""
        chosen = [source for source in sources if source.beside is not None]
        found = [
            self._tokenize(alike, [source.beside or "" for source in alike], special)
            for special in (False, True)
            if (alike := [source for source in chosen if source.special is special])
        ]
        ids, lengths = (np.concatenate([part[i] for part in found]) for i in (0, 1))
        return self._cut(ids, np.zeros(len(ids), dtype=np.bool_), lengths, np.full(len(lengths), -1))

    def _token_batch(self, sources: list[tuple[int, TokenRows]]) -> Batch:
        """Rows that are ids already; those of one example share its place."""
        rows = [source for _, source in sources]
        ids = rows[0].ids if len(rows) == 1 else np.concatenate([source.ids for source in rows])
        # Read as one without a sign, what is below 0 is above all.
        if len(ids) and int(ids.view(f"u{ids.dtype.itemsize}").max()) >= self._size:
            wrong = next(
                row for row in rows if len(row.ids) and (int(row.ids.min()) < 0 or int(row.ids.max()) >= self._size)
            )
            raise DataError(f"{wrong.place}: 'input_ids' goes from {wrong.ids.min()} to {wrong.ids.max()}; allowed: 0 "
                            f"to {self._size - 1}, the ids of this tokenizer")  # fmt: skip
        order = np.repeat([place for place, _ in sources], [len(source.lengths) for source in rows])
        everything = all(source.target.all() for source in rows)
        target = None if everything else np.concatenate([source.target for source in rows])
        return self._cut(ids, target, np.concatenate([source.lengths for source in rows]), order)

    def _cut(
        self, ids: NDArray[np.integer[Any]], target: Mask | None, lengths: NDArray[np.int64], order: NDArray[np.int64]
    ) -> Batch:
        """Rows without what is too long of them, and without targets that nothing comes before.

        Args:
            target: (T,) bool; None is all.
        """
        starts = np.cumsum(lengths) - lengths
        if target is not None:
            target[starts[lengths > 0]] = False
        if self._max_length is None:
            return Batch(ids, lengths, np.zeros(len(lengths), dtype=np.bool_), order, target)
        kept = np.arange(len(ids)) - np.repeat(starts, lengths) < self._max_length
        cut = (lengths > self._max_length) & (order >= 0)
        shorter = np.minimum(lengths, self._max_length)
        return Batch(ids[kept], shorter, cut, order, None if target is None else target[kept])

    def _after_prompts(self, sources: list[Source], ids: Ids, lengths: NDArray[np.int64], special: bool) -> Mask:
        """Targets of rows that begin with a prompt, or are all target."""
        target = np.ones(len(ids), dtype=np.bool_)
        asked = [i for i, source in enumerate(sources) if source.prompt is not None]
        if not asked:
            return target
        starts, chosen = np.cumsum(lengths) - lengths, np.array(asked)
        prompts = self._tokenize([sources[i] for i in asked], [sources[i].prompt or "" for i in asked], special)
        shared = np.zeros(len(sources), dtype=np.int64)
        shared[chosen] = common_prefixes(*prompts, ids, starts[chosen], lengths[chosen])
        pairs = [place for place, i in enumerate(asked) if sources[i].beside is not None]
        if pairs:
            of_pairs = [sources[asked[place]] for place in pairs]
            found, counts = self._tokenize(of_pairs, [source.beside or "" for source in of_pairs], special)
            own = np.isin(np.repeat(np.arange(len(asked)), prompts[1]), pairs)
            alike = common_prefixes(prompts[0][own], prompts[1][pairs], found, np.cumsum(counts) - counts, counts)
            shared[chosen[pairs]] = np.minimum(shared[chosen[pairs]], alike)
        _clear_beginnings(target, starts, shared)
        return target

    def _tokenize(
        self, sources: Sequence[Source | Example], texts: list[str], special: bool
    ) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of all texts, and each one's length."""
        try:
            return self.texts.flat(texts, special)
        except Exception as error:  # one text spoils the batch: say which
            raise self._refused([source.place for source in sources], texts, special, error) from error

    def _refused(self, places: list[str], texts: list[str], special: bool, error: Exception) -> DataError:
        found = single(lambda text: self.texts.flat([text], special), texts)
        place, error = found or (0, error)
        return DataError(f"{places[place]}: the tokenizer refuses the text ({one_line(error)})")

    def _by_prefixes(self, source: Source, ids: Ids) -> Mask:
        """Targets where the tokenizer knows no offsets: between the ids of the text before and up to a span's end."""
        mask = np.zeros(len(ids), dtype=np.bool_)
        for span in source.spans or ():
            texts = [source.text[:edge] for edge in span]
            parts, lengths = self._tokenize([source] * 2, texts, False)
            begin, end = (common_prefix(part, ids) for part in np.split(parts, lengths[:1]))
            mask[begin:end] = True
        return mask


def common_prefix(prompt: Ids, ids: Ids) -> int:
    """How many ids two rows, (P,) and (T,) int64, have in common at their beginning.

    >>> common_prefix(np.array([5, 6, 7]), np.array([5, 6, 8, 9]))
    2
    """
    shorter = min(len(prompt), len(ids))
    different = np.flatnonzero(prompt[:shorter] != ids[:shorter])
    return int(different[0]) if len(different) else shorter


def common_prefixes(prompts: Ids, counts: Ids, ids: Ids, starts: Ids, lengths: Ids) -> Ids:
    """(n,) int64, how many ids each of n prompts has in common with a row at their beginning; see `common_prefix`.

    Args:
        prompts: (P,) int64, of all prompts, one after the other.
        counts: (n,) int64, ids of each prompt.
        ids: (T,) int64, in which the rows lie.
        starts, lengths: (n,) int64, where each prompt's row is.

    >>> rows = np.array([5, 6, 8, 9, 5, 7])
    >>> common_prefixes(np.array([5, 6, 7, 5]), np.array([3, 1]), rows, np.array([0, 4]), np.array([4, 2])).tolist()
    [2, 1]
    """
    of_row = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(prompts)) - np.repeat(np.cumsum(counts) - counts, counts)
    other = place >= lengths[of_row]
    other[~other] = prompts[~other] != ids[(starts[of_row] + place)[~other]]
    found = np.minimum(counts, lengths)
    wrong = np.flatnonzero(other)[::-1]  # of several in a row the first is written last
    found[of_row[wrong]] = place[wrong]
    return found


def _clear_beginnings(target: Mask, starts: Ids, counts: Ids) -> None:
    """Take so many of each row's first tokens out."""
    first = np.cumsum(counts) - counts
    target[np.repeat(starts - first, counts) + np.arange(int(counts.sum()))] = False


def _inside(places: NDArray[np.int64], lengths: NDArray[np.int64], sources: Sequence[Source], in_bytes: bool) -> Mask:
    """(T,) bool: the tokens of which any character is in a span of their row.

    Args:
        places: (T, 2) int64, the characters, or bytes, of each token in its row's text.
        lengths: (n,) int64, tokens of each row.
        sources: the n rows, with spans.
    """
    begins, ends, of_row, sizes = _edges(sources, in_bytes)
    if not len(begins):
        return np.zeros(len(places), dtype=np.bool_)
    shifts = np.cumsum(sizes) - sizes  # as if the texts were one
    begins, ends = begins + shifts[of_row], ends + shifts[of_row]
    order = np.argsort(ends, kind="stable")
    begins, ends = begins[order], ends[order]
    begun = np.append(np.minimum.accumulate(begins[::-1])[::-1], np.iinfo(np.int64).max)
    shift = np.repeat(shifts, lengths)
    inside: Mask = begun[np.searchsorted(ends, places[:, 0] + shift, side="right")] < places[:, 1] + shift
    return inside


def _edges(sources: Sequence[Source], in_bytes: bool) -> tuple[Ids, Ids, Ids, Ids]:
    """(S,) int64 begins and ends of all spans and the rows that they are of; (n,) int64 sizes of the texts, and one."""
    edges: list[Span] = []
    counts, sizes = [], []
    for source in sources:
        spans, text = source.spans or [], source.text
        if in_bytes and not text.isascii():
            edges += [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in spans]
            sizes.append(len(text.encode()) + 1)
        else:
            edges += spans
            sizes.append(len(text) + 1)
        counts.append(len(spans))
    begins, ends = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    return begins, ends, np.repeat(np.arange(len(sources)), counts), np.array(sizes, dtype=np.int64)


def _ids_of(tokenizer: Any) -> int:
    """Ids that a tokenizer has; without its vocabulary none is refused."""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return 1 + max(vocabulary.values(), default=np.iinfo(np.int64).max - 1)
