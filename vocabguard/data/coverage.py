"""How often each token is a target of training data, counted before any training.

The counts can be kept in a file: ``data_target`` and ``inputs`` (V,) int64, ``group`` (V,) uint8, ``live`` (V,) bool,
and what they were counted from as JSON in the metadata's ``coverage``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabguard.data.choices import Loss
from vocabguard.data.encode import Batch, Rendered, TargetEncoder
from vocabguard.data.readers import Example, Examples, Text, TokenRows
from vocabguard.data.render import Trainer, TurnTally
from vocabguard.data.roles import ROLES, UnknownRoleError
from vocabguard.data.tables import DataError
from vocabguard.files import one_line, require_regular, tensor_file, write_file
from vocabguard.measure.exposure import CLASS_STARTS, exposure_classes
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.runlog import versions
from vocabguard.vocabulary.table import VocabTable, fit_rows

SCHEMA = 1
"""Version of the file's layout; a newer one is refused."""

CHUNK = 512
"""Examples that are encoded at once, fewer where they are long."""

_LONG = 2**21  # characters, or token ids, that are encoded at once
_READ_ON = 1_000_000  # rows that are read on for a full list of unknown roles
_SHOWN = 20  # rows among which one with targets is looked for, to be shown

_VECTORS = {"data_target": torch.int64, "inputs": torch.int64, "group": torch.uint8, "live": torch.bool}
_WORKER: list[TargetEncoder] = []


@dataclass(frozen=True)
class CoverageSource:
    """What was counted, and how.

    Attributes:
        tokenizer: its name or folder.
        vocabulary: SHA-256 of its pieces and ids, hexadecimal.
        loss: which tokens of conversations and prompts are targets.
        eos: whether texts got the EOS token.
        max_length: tokens of a row, or None.
        epochs: the counts are those of so many passes.
        groups: names of the script groups, in the order of ``group``.
        trainer: whose rules for conversations without marks; empty in files of older versions, as what follows.
        template: SHA-256 of the tokenizer's chat templates, and of TRL's where that was used.
        kinds: what the rows were read as.
        notes: what else was done with them.
        shard: which part of the rows, as ``index/count``.
        example: a row as the model reads it, in pieces, each with whether it is a target.
    """

    tokenizer: str
    vocabulary: str
    files: tuple[str, ...]
    loss: str
    eos: bool
    max_length: int | None
    epochs: int
    groups: tuple[str, ...]
    trainer: str = ""
    template: str = ""
    kinds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shard: str = "1/1"
    example: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class RowTally:
    """Rows that were read, in one pass.

    Attributes:
        without_targets: those without a target, e.g. since their answer was cut off; a trainer may drop them.
        cut: those that were longer than the longest allowed.
        turns_exact: assistant turns found exactly, where the template does not mark them; see `TurnTally`.
        turns_by_text: found by their text.
        turns_missing: not found, so that they count as no target.
        turns_silent: out of the loss by ``weight: 0`` or ``train: false``.
        chats_marked: conversations whose template marks the assistant's text.
        chats_trl: conversations encoded with TRL's training template.
        calls_lost: turns whose tool calls the template does not write.
    """

    rows: int = 0
    without_targets: int = 0
    cut: int = 0
    turns_exact: int = 0
    turns_by_text: int = 0
    turns_missing: int = 0
    turns_silent: int = 0
    chats_marked: int = 0
    chats_trl: int = 0
    calls_lost: int = 0

    @property
    def conversations(self) -> bool:
        """Whether the assistant's turns of any conversation were looked for."""
        return any((self.chats_marked, self.chats_trl, self.turns_exact, self.turns_by_text, self.turns_missing))

    def __add__(self, other: RowTally) -> RowTally:
        return RowTally(*(getattr(self, spec.name) + getattr(other, spec.name) for spec in fields(self)))


@dataclass(frozen=True)
class WordCount:
    """How often a word of several tokens is a target, whole, and how often the model reads it."""

    word: str
    targets: int
    inputs: int


Sequences = tuple[tuple[int, ...], ...]
"""The ways in which a word is encoded."""


@dataclass(frozen=True, eq=False)
class Coverage:
    """Counts over V ids, one more than the tokenizer's highest.

    Attributes:
        data_target: (V,) int64, how often each token is a target, over all epochs.
        inputs: (V,) int64, how often the model reads it.
        group: (V,) uint8, index into ``source.groups``.
        live: (V,) bool, tokens that can be targets; see `VocabTable.live`.
        words: counts of words of several tokens that were asked about.
    """

    data_target: Tensor
    inputs: Tensor
    group: Tensor
    live: Tensor
    tally: RowTally
    source: CoverageSource
    words: tuple[WordCount, ...] = ()

    @property
    def classes(self) -> Tensor:
        """(V,) uint8, index into `results.EXPOSURE_CLASSES`."""
        return exposure_classes(self.data_target)

    @property
    def never_share(self) -> float:
        """Share in [0, 1] of the live tokens that are never a target; 0 if none is live."""
        return int((self.live & (self.data_target == 0)).sum()) / max(1, int(self.live.sum()))

    def targets_for(self, rows: int) -> Tensor:
        """(rows,) int64: `data_target` for a matrix of so many rows; rows beyond the tokenizer have 0.

        Raises:
            ValueError: if the matrix has fewer rows than there are ids.
        """
        if rows < len(self.data_target):
            raise ValueError(f"the coverage is of {len(self.data_target)} ids, the matrix has {rows} rows")
        return fit_rows(self.data_target, rows)

    def save(self, path: str | Path) -> None:
        """Write the file that `load_coverage` reads.

        Raises:
            OSError: if it cannot be written.
        """
        # What is new since the first version has an entry of its own, for that version to read these files too.
        both = [_parted(asdict(part)) for part in (self.source, self.tally)]
        (told, more), (tally, more_tally) = both
        metadata = {
            "coverage": {"schema": SCHEMA, "tally": tally, **told},
            "more": {"tally": more_tally, **more, "words": [asdict(word) for word in self.words]},
        }
        vectors = {name: getattr(self, name).contiguous() for name in _VECTORS}
        metadata["evidence"] = {"versions": versions(), "tokenizer": {"vocabulary": self.source.vocabulary}}
        write_file(path, tensor_file(vectors, {key: json.dumps(part) for key, part in metadata.items()}))


def load_coverage(path: str | Path) -> Coverage:
    """Read what `Coverage.save` wrote.

    Raises:
        ValueError: if it is missing, damaged, no coverage, or of a newer schema.
    """
    try:
        with safe_open(str(require_regular(path)), framework="pt") as file:
            metadata = file.metadata() or {}
            told, more = json.loads(metadata["coverage"]), json.loads(metadata.get("more", "{}"))
            if told.pop("schema") != SCHEMA:
                raise ValueError(f"{path}: is of another schema; this version of vocabguard reads schema {SCHEMA}")
            vectors = {name: file.get_tensor(name) for name in _VECTORS}
        tally = RowTally(**told.pop("tally"), **more.pop("tally", {}))
        words = tuple(WordCount(**word) for word in more.pop("words", ()))
        told |= more
        lists: dict[str, Any] = {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
        if "example" in lists:
            lists["example"] = tuple((str(text), bool(asked)) for text, asked in lists["example"])
        source = CoverageSource(**{**told, **lists})
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: is no coverage file ({one_line(error)}); `vocabguard coverage --out` writes them"
        ) from error
    size = vectors["data_target"].numel()
    wrong = [name for name, kind in _VECTORS.items() if vectors[name].dtype != kind or vectors[name].shape != (size,)]
    if wrong:
        raise ValueError(f"{path}: {wrong} are not vectors of one length and of the types {list(_VECTORS.values())}")
    return Coverage(**vectors, tally=tally, source=source, words=words)


_MORE = (
    "trainer",
    "template",
    "kinds",
    "notes",
    "shard",
    "example",
    "turns_silent",
    "chats_marked",
    "chats_trl",
    "calls_lost",
)


def _parted(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first version of the file knew, and what is new."""
    return {k: v for k, v in told.items() if k not in _MORE}, {k: v for k, v in told.items() if k in _MORE}


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's pieces and ids: two with the same one number their tokens alike."""
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def measure_coverage(
    examples: Iterable[Example], tokenizer: Any, table: VocabTable, *, name: str = "", files: Sequence[str] = (),
    loss: Loss = "assistant", eos: bool = True, max_length: int | None = None, epochs: int = 1, workers: int = 1,
    progress: Callable[[int], object] | None = None, trainer: Trainer = "trl",
    words: Mapping[str, Sequences] | None = None, fast: bool = True,
) -> Coverage:  # fmt: skip
    """Count targets and inputs of all examples.

    Args:
        examples: read once, in chunks.
        table: of the same tokenizer.
        name: of the tokenizer, kept with the counts.
        files: names of the data files, kept with the counts.
        loss, eos, max_length, trainer, fast: see `TargetEncoder`.
        epochs: the counts are multiplied by it.
        workers: processes that encode; 1 is this one, with the tokenizer's own threads.
        progress: gets the rows of each chunk that is done.
        words: words of several tokens to count, whole, with the ways in which they are encoded.

    Raises:
        DataError: for an example that cannot be used.
        ValueError: for an option out of range, or if there is no example.
    """
    for label, value in (("epochs", epochs), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{label} is {value}; allowed: at least 1")
    options: dict[str, Any] = {"loss": loss, "eos": eos, "max_length": max_length, "trainer": trainer, "fast": fast}
    encoder = TargetEncoder(tokenizer, **options)  # wrong options are refused here, not in a worker that then breaks
    counts, tally, example = (
        np.zeros((2, len(table)), dtype=np.int64),
        RowTally(),
        ShownRow(tokenizer, TargetEncoder(tokenizer, **{**options, "fast": False})),
    )
    remaining, sequences = iter(examples), tuple((words or {}).values())
    of_words = np.zeros((len(sequences), 2), dtype=np.int64)
    try:
        for found in _counted(example.seen(remaining), tokenizer, options, encoder, workers, sequences):
            found.add_to(counts)
            of_words += found.words
            tally += found.rows
            if progress is not None:
                progress(found.rows.rows)
    except UnknownRoleError as error:
        raise _all_unknown(error, examples, remaining) from error
    if not tally.rows:
        raise ValueError(f"no rows in {', '.join(files) or 'the data'}; there is nothing to count")
    both = torch.from_numpy(counts) * epochs
    kinds, notes = _reading(examples)
    notes = (*notes, encoder.texts.told) if encoder.texts.told else notes
    source = CoverageSource(
        name, vocabulary_hash(tokenizer), tuple(files), loss, eos, max_length, epochs, table.names, trainer,
        encoder.renderer.identity(tally.chats_trl > 0), kinds, notes, _shard_of(examples), example.pieces,
    )  # fmt: skip
    rows = zip(words or (), (of_words * epochs).tolist(), strict=True)
    told = tuple(WordCount(word, *row) for word, row in rows)
    return Coverage(both[0].clone(), both[1].clone(), table.group, table.live, tally, source, told)


@dataclass(frozen=True, eq=False)
class Counted:
    """Counts of a few examples.

    Attributes:
        ids: (n,) int64, those that occur.
        counts: (2, n) int64, how often each is a target and an input.
        rows: what was counted.
        words: (k, 2) int64, how often each word is a target, whole, and an input.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    rows: RowTally
    words: NDArray[np.int64]

    def add_to(self, counts: NDArray[np.int64]) -> None:
        """Add to (2, V) int64 counts."""
        counts[:, self.ids] += self.counts


def count_rows(encoder: TargetEncoder, examples: Sequence[Example], words: Sequence[Sequences] = ()) -> Counted:
    """Counts of a few examples: a pure function of them, for `datasets.map(batched=True)` and the like.

    Args:
        examples: at least one.
        words: the ways in which words of several tokens are encoded, to be counted too.

    Raises:
        DataError: for an example that cannot be used.
    """
    sources = encoder.render(examples)
    return _count_batches(encoder.batches(sources), encoder.renderer.take_tally(), words)


def _count_batches(batches: Sequence[Batch], turns: TurnTally, words: Sequence[Sequences]) -> Counted:
    """Counts of the batches of a few examples."""
    # Counting into a vector is linear; sorting the ids, as `numpy.unique` does, took as long as the tokenizer.
    counts = [(seen := np.bincount(batch.ids), _asked(batch, seen)) for batch in batches]
    read, asked = (sum_counts([pair[side] for pair in counts]) for side in (0, 1))
    ids = np.flatnonzero(read)
    cut = sum(int(batch.cut.sum()) for batch in batches)
    rows, without = sum(batch.count for batch in batches), sum(batch.without_targets for batch in batches)
    tally = RowTally(
        rows,
        without,
        cut,
        turns.exact,
        turns.by_text,
        turns.missing,
        turns.silent,
        turns.marked,
        turns.trl,
        turns.calls_lost,
    )
    of_words = [
        [sum(counts) for counts in zip(*(_occurrences(batch, ways) for batch in batches), strict=True)]
        for ways in words
    ]
    return Counted(ids, np.stack([asked[ids], read[ids]]), tally, np.array(of_words, dtype=np.int64).reshape(-1, 2))


def _asked(batch: Batch, read: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each id is a target, by the fewer of those that are and those that are not."""
    few = 2 * np.count_nonzero(batch.target) < len(batch.target)
    found = np.bincount(batch.ids[batch.target if few else ~batch.target], minlength=len(read))
    return found if few else read - found


def _occurrences(batch: Batch, ways: Sequences) -> tuple[int, int]:
    """How often a word is a target, all of it, and how often it is read."""
    starts = np.zeros(len(batch.ids) + 1, dtype=np.bool_)
    starts[np.cumsum(batch.lengths)] = True
    targets = inputs = 0
    for way in ways:
        at = np.flatnonzero(batch.ids[: max(0, len(batch.ids) - len(way) + 1)] == way[0])
        asked = batch.target[at]
        for place, token in enumerate(way[1:], start=1):
            same = (batch.ids[at + place] == token) & ~starts[at + place]
            at, asked = at[same], asked[same] & batch.target[at[same] + place]
        targets, inputs = targets + int(asked.sum()), inputs + len(at)
    return targets, inputs


def sum_counts(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sum of vectors of which some are shorter.

    >>> sum_counts([np.array([1, 2]), np.array([5])]).tolist()
    [6, 2]
    """
    total = np.zeros(max(map(len, parts), default=0), dtype=np.int64)
    for part in parts:
        total[: len(part)] += part
    return total


def _counted(
    examples: Iterable[Example], tokenizer: Any, options: dict[str, Any], encoder: TargetEncoder, workers: int,
    words: Sequence[Sequences],
) -> Iterator[Counted]:  # fmt: skip
    chunks = _chunks(examples)
    if workers == 1:
        return _counted_here(chunks, encoder, words)
    return _counted_elsewhere(chunks, tokenizer, options, workers, words)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples, so many at a time, and no more than memory has room for."""
    chunk: list[Example] = []
    weight = 0
    for example in examples:
        chunk.append(example)
        if isinstance(example, Text):
            weight += len(example.text)
        elif isinstance(example, TokenRows):
            weight += len(example.ids)
        if len(chunk) >= CHUNK or weight >= _LONG:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


def _counted_here(
    chunks: Iterable[Sequence[Example]], encoder: TargetEncoder, words: Sequence[Sequences]
) -> Iterator[Counted]:
    """Chat templates are rendered here while a thread has the tokenizer, which lets go of Python's lock."""

    def count(sources: Sequence[Rendered], turns: TurnTally) -> Counted:
        return _count_batches(encoder.batches(sources), turns, words)

    def submitted(pool: ThreadPoolExecutor) -> Iterator[Future[Counted]]:
        for chunk in chunks:
            sources = encoder.render(chunk)
            yield pool.submit(count, sources, encoder.renderer.take_tally())

    with ThreadPoolExecutor(1, thread_name_prefix="vocabguard") as pool:
        yield from _in_order(submitted(pool), 2)


def _counted_elsewhere(
    chunks: Iterable[Sequence[Example]], tokenizer: Any, options: dict[str, Any], workers: int,
    words: Sequence[Sequences],
) -> Iterator[Counted]:  # fmt: skip
    # Forked children of a process with running threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, options)) as pool:
        try:
            yield from _in_order((pool.submit(_count_in_worker, chunk, words) for chunk in chunks), 3 * workers)
        except BrokenProcessPool as error:
            raise ValueError(f"a worker process ended without an answer ({error}); --workers 1 uses none") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(futures: Iterable[Future[Counted]], most: int) -> Iterator[Counted]:
    """Results in order, of which so many may be on their way: the data need not fit in memory."""
    waiting: deque[Future[Counted]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker(tokenizer: Any, options: dict[str, Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process each is enough
    _WORKER.append(TargetEncoder(tokenizer, **options))


def _count_in_worker(examples: Sequence[Example], words: Sequence[Sequences]) -> Counted:
    return count_rows(_WORKER[0], examples, words)


class ShownRow:
    """A row in words, for people to see what is counted as a target.

    Attributes:
        pieces: of the first row that has targets among the first few, or of the first: text, and whether it is one.
    """

    def __init__(self, tokenizer: Any, encoder: TargetEncoder) -> None:
        self.pieces: tuple[tuple[str, bool], ...] = ()
        self._tokenizer, self._encoder, self._looked = tokenizer, encoder, 0

    def seen(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The same examples, of which the first are looked at."""
        for example in examples:
            if self._looked < _SHOWN:
                self._look(example)
            yield example

    def _look(self, example: Example) -> None:
        self._looked += 1
        try:
            row = next(iter(self._encoder.encode([_first_row(example)])))
        except DataError:  # it is refused where it is counted
            return
        if row.target.any():
            self._looked = _SHOWN
        elif self.pieces:
            return
        edges = [0, *(np.flatnonzero(np.diff(row.target)) + 1).tolist(), len(row.ids)]
        self.pieces = tuple(
            (self._tokenizer.decode(row.ids[begin:end].tolist()), bool(row.target[begin]))
            for begin, end in itertools.pairwise(edges)
            if end > begin
        )


def _first_row(example: Example) -> Example:
    if not isinstance(example, TokenRows) or len(example.lengths) < 2:
        return example
    end = int(example.lengths[0])
    return TokenRows(example.place, example.ids[:end], example.target[:end].copy(), example.lengths[:1])


def _reading(examples: Iterable[Example]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the rows were read as, and what else was done with them."""
    if not isinstance(examples, Examples):
        return (), ()
    kinds = tuple(f"{kind}{f', {count} files' if count > 1 else ''}" for kind, count in examples.kinds.items())
    renamed = tuple(
        f"role {name!r} read as {role!r} in {count:,} turns" for (name, role), count in examples.roles.renamed.items()
    )
    if renamed:
        renamed = (
            *renamed,
            "TRL renames no roles: where the names above stand in your data, it renders them as they are",
        )
    return kinds, (*renamed, *(f"{note} ({count:,} rows)" for note, count in examples.notes.items()))


def _shard_of(examples: Iterable[Example]) -> str:
    return f"{examples.shard.index}/{examples.shard.count}" if isinstance(examples, Examples) else "1/1"


def _all_unknown(error: UnknownRoleError, examples: Iterable[Example], remaining: Iterator[Example]) -> DataError:
    """All roles of the data that nobody knows, with their counts."""
    if not isinstance(examples, Examples):
        return error
    rows = sum(1 for _ in itertools.islice(remaining, _READ_ON))
    counts = ", ".join(f"{r!r} ({n:,} turns)" for r, n in examples.roles.seen.most_common() if r not in ROLES)
    upto = f" in the first {rows:,} rows" if rows == _READ_ON else ""
    return DataError(f"{error}. All that are unknown{upto}: {counts}; say what they are, e.g. --role NAME=assistant")


AT_RISK = CLASS_STARTS[1]
"""Targets below which a token is at risk: the classes never and 1-4."""


@dataclass(frozen=True)
class GroupRow:
    """One line of the table.

    Attributes:
        group: name of a script group, or ``all``.
        live: its live tokens, at least one.
        classes: how many of them are in each of `results.EXPOSURE_CLASSES`.
    """

    group: str
    live: int
    classes: tuple[int, ...]


def group_rows(coverage: Coverage) -> tuple[GroupRow, ...]:
    """All live tokens, then the groups that have some, those with most tokens that are never a target first."""
    groups, live = coverage.source.groups, coverage.live
    pairs = coverage.group[live].long() * len(EXPOSURE_CLASSES) + coverage.classes[live].long()
    counts = torch.bincount(pairs, minlength=len(groups) * len(EXPOSURE_CLASSES)).view(len(groups), -1)
    rows = [_row(name, part) for name, part in zip(groups, counts, strict=True) if int(part.sum())]
    return (_row("all", counts.sum(0)), *sorted(rows, key=lambda row: -row.classes[0]))


def _row(name: str, counts: Tensor) -> GroupRow:
    return GroupRow(name, int(counts.sum()), tuple(counts.tolist()))


def coverage_totals(coverage: Coverage) -> dict[str, Any]:
    """Totals: ``live`` tokens, ``targets`` and ``inputs`` of the data, ``never_share`` in [0, 1], ``classes``."""
    return {
        "live": int(coverage.live.sum()),
        "targets": int(coverage.data_target.sum()),
        "inputs": int(coverage.inputs.sum()),
        "never_share": coverage.never_share,
        "classes": dict(zip(EXPOSURE_CLASSES, group_rows(coverage)[0].classes, strict=True)),
    }


def at_risk(
    coverage: Coverage, count: int, below: int = AT_RISK, *, ranks: Tensor | None = None, without: Tensor | None = None
) -> list[int]:
    """Ids of live tokens with few targets: the fewest first, of these the most read, of these the lowest ids.

    A token that the data makes the model read and not say is the case to fear; in most tokenizers low ids are the
    commoner words.

    Args:
        count: at most so many.
        below: targets that are enough.
        ranks: (V,) int64, instead of what the data reads: of as many targets the lowest first.
        without: ids to leave out, such as those of the chat template.
    """
    chosen = coverage.live & (coverage.data_target < below)
    if without is not None:
        chosen[without] = False
    ids = chosen.nonzero().flatten()
    order = -coverage.inputs if ranks is None else ranks
    ids = ids[torch.argsort(order[ids], stable=True)]
    ids = ids[torch.argsort(coverage.data_target[ids], stable=True)]
    found: list[int] = ids[:count].tolist()
    return found
