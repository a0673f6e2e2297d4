"""Training examples as token ids with a mask of targets, as a supervised fine-tuning trainer would make them.

The rules are those of TRL's ``SFTTrainer``, without packing, which changes neither inputs nor targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
import regex
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from vocabguard.data.readers import Chat, Completion, DataError, Example, Text, Turn
from vocabguard.files import one_line

Span = tuple[int, int]
"""Characters from the first to before the second."""

_GENERATION = regex.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class TurnTally:
    """How the assistant's turns were found where the template does not mark them.

    Attributes:
        exact: the renderings with and without the turn differ by it alone.
        by_text: the template is not prefix-preserving here; the turn was found by its text and what follows it.
        missing: neither; the turn counts as no target.
    """

    exact: int = 0
    by_text: int = 0
    missing: int = 0


class ChatRenderer:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tally = TurnTally()
        self._tokenizer = tokenizer
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def take_tally(self) -> TurnTally:
        """How turns were found since the last call."""
        taken, self.tally = self.tally, TurnTally()
        return taken

    def text(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any], *, generate: bool = False) -> str:
        """The conversation as text.

        Args:
            options: further arguments of the template.
            generate: end with what comes before an answer of the assistant.

        Raises:
            DataError: if there is no template, or it fails.
        """
        return self._render(place, turns, options, generate, False)[0]

    def assistant_spans(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The conversation as text, and where the assistant speaks, with what ends its turns.

        A template with ``{% generation %}`` tells itself. Otherwise a turn is what the rendering up to it has more than
        the rendering of what comes before, with the generation prompt. Where these are no prefixes of the whole (some
        templates drop the reasoning of earlier turns), the turn's text is looked for, and its end as it would be alone.

        Raises:
            DataError: if there is no template, or it fails.
        """
        if _GENERATION.search(self._template(place, options)):
            return self._render(place, turns, options, False, True)
        whole = self.text(place, turns, options)
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self.text(place, turns[:number], options, generate=True) if number else ""
                last = number == len(turns) - 1
                after = whole if last else self.text(place, turns[: number + 1], options)
                begin = spans[-1][1] if spans else 0
                span = self._span(whole, before, after, turn, begin)
                spans += [span] if span else []
        return whole, spans

    def _span(self, whole: str, before: str, after: str, turn: Turn, begin: int) -> Span | None:
        if before and after.startswith(before) and whole.startswith(after):
            self.tally.exact += 1
            return len(before), len(after)
        content = turn.get("content")
        text = content.strip() if isinstance(content, str) else ""
        at = whole.find(text, len(before) if before and whole.startswith(before) else begin) if text else -1
        if at < 0:
            self.tally.missing += 1
            return None
        self.tally.by_text += 1
        start = len(before) if before and whole.startswith(before) else at
        end, close = at + len(text), after[after.rfind(text) + len(text) :] if text in after else ""
        return start, end + len(close) * whole.startswith(close, end)

    def _template(self, place: str, options: Mapping[str, Any]) -> str:
        try:
            template = self._tokenizer.get_chat_template(None, options.get("tools"))
        except Exception as error:  # several, by what is missing
            raise DataError(f"{place}: messages need a chat template, and the tokenizer has none") from error
        if not isinstance(template, str) or not template:
            raise DataError(f"{place}: messages need a chat template, and the tokenizer's is empty")
        return template

    def _render(
        self, place: str, turns: Sequence[Turn], options: Mapping[str, Any], generate: bool, track: bool
    ) -> tuple[str, list[Span]]:
        template = self._template(place, options)
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                chat_template=template,
                return_assistant_tokens_mask=track,
                add_generation_prompt=generate,
                **{**self._special, **options},
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            raise DataError(f"{place}: the chat template fails on roles {_roles(turns)}: {one_line(error)}") from error
        texts, spans = rendered
        return str(texts[0]), [(int(begin), int(end)) for begin, end in spans[0]] if track else []


def _roles(turns: Sequence[Turn]) -> str:
    roles = [str(turn["role"]) for turn in turns]
    return ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")


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
    """How many ids two rows, (P,) and (T,) int64, have in common at their beginning.

    >>> common_prefix(np.array([5, 6, 7]), np.array([5, 6, 8, 9]))
    2
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
        raise DataError(f"{source.place}: the tokenizer refuses the text ({one_line(error)})") from error
