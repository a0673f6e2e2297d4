"""How often each token is a target of training data, counted before any training.

The counts can be kept in a file: ``data_target`` and ``inputs`` (V,) int64, ``group`` (V,) uint8, ``live`` (V,) bool,
and what they were counted from as JSON in the metadata's ``coverage``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabguard.data.choices import Loss
from vocabguard.data.counting import RowTally, Sequences
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.parallel import Seen, counted
from vocabguard.data.readers import Example, Examples, TokenRows
from vocabguard.data.render import Trainer
from vocabguard.data.roles import ROLES, UnknownRoleError
from vocabguard.data.tables import DataError
from vocabguard.files import one_line, require_regular, tensor_file, write_file
from vocabguard.measure.exposure import CLASS_STARTS, exposure_classes
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.runlog import versions
from vocabguard.vocabulary.table import VocabTable, fit_rows

SCHEMA = 1
"""Version of the file's layout; a newer one is refused."""

_READ_ON = 1_000_000  # rows that are read on for a full list of unknown roles
_SHOWN = 20  # rows among which one with targets is looked for, to be shown

_VECTORS = {"data_target": torch.int64, "inputs": torch.int64, "group": torch.uint8, "live": torch.bool}


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
class WordCount:
    """How often a word of several tokens is a target, whole, and how often the model reads it."""

    word: str
    targets: int
    inputs: int


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
    example = ShownRow(tokenizer, TargetEncoder(tokenizer, **{**options, "fast": False}))
    counts, tally, seen = np.zeros((2, len(table)), dtype=np.int64), RowTally(), Seen()
    remaining, sequences = iter(examples), tuple((words or {}).values())
    of_words = np.zeros((len(sequences), 2), dtype=np.int64)
    source_of: Iterable[Example] = example.seen(remaining)
    told_of = progress if progress is not None else int
    try:
        if workers > 1 and isinstance(examples, Examples):
            example.look_at(examples.readers(1)[0])
            source_of = examples
        for found in counted(source_of, tokenizer, options, encoder, workers, sequences, told_of, seen):
            found.add_to(counts)
            of_words += found.words
            tally += found.rows
    except UnknownRoleError as error:
        raise _all_unknown(error, examples, remaining) from error
    if not tally.rows:
        raise ValueError(f"no rows in {', '.join(files) or 'the data'}; there is nothing to count")
    both = torch.from_numpy(counts) * epochs
    kinds, notes = _reading(examples)
    notes = (*notes, seen.told) if seen.told else notes
    source = CoverageSource(
        name, vocabulary_hash(tokenizer), tuple(files), loss, eos, max_length, epochs, table.names, trainer,
        encoder.renderer.identity(tally.chats_trl > 0), kinds, notes, _shard_of(examples), example.pieces,
    )  # fmt: skip
    rows = zip(words or (), (of_words * epochs).tolist(), strict=True)
    told = tuple(WordCount(word, *row) for word, row in rows)
    return Coverage(both[0].clone(), both[1].clone(), table.group, table.live, tally, source, told)


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
        remaining = iter(examples)
        while self._looked < _SHOWN and (first := list(islice(remaining, 1))):
            self._look(first[0])
            yield first[0]
        yield from remaining

    def look_at(self, examples: Iterable[Example]) -> None:
        """Look at the first of them."""
        deque(islice(self.seen(examples), _SHOWN), 0)

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
    rows = sum(1 for _ in islice(remaining, _READ_ON))
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
