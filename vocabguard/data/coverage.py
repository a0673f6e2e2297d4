"""How often training data asks for each token, counted before any training.

The counts can be kept in a file: ``data_target`` and ``inputs`` (V,) int64, ``group`` (V,) uint8, ``live`` (V,) bool,
and what they were counted from as JSON in the metadata's ``coverage``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from vocabguard.data.encode import Batch, Loss, Source, TargetEncoder, TurnTally
from vocabguard.data.readers import Example, in_chunks
from vocabguard.files import one_line, require_regular, tensor_file, write_file
from vocabguard.measure.exposure import CLASS_STARTS, exposure_classes
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.runlog import versions
from vocabguard.vocabulary.table import VocabTable, fit_rows

SCHEMA = 1
"""Version of the file's layout; a newer one is refused."""

CHUNK = 512
"""Examples that are encoded at once."""

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
    """

    tokenizer: str
    vocabulary: str
    files: tuple[str, ...]
    loss: str
    eos: bool
    max_length: int | None
    epochs: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class RowTally:
    """Rows that were read, in one pass.

    Attributes:
        without_targets: those that ask for nothing, e.g. since their answer was cut off; a trainer may drop them.
        cut: those that were longer than the longest allowed.
        turns_exact: assistant turns found exactly, where the template does not mark them; see `TurnTally`.
        turns_by_text: found by their text.
        turns_missing: not found, so that they count as no target.
    """

    rows: int = 0
    without_targets: int = 0
    cut: int = 0
    turns_exact: int = 0
    turns_by_text: int = 0
    turns_missing: int = 0

    def __add__(self, other: RowTally) -> RowTally:
        return RowTally(*(getattr(self, spec.name) + getattr(other, spec.name) for spec in fields(self)))


@dataclass(frozen=True, eq=False)
class Coverage:
    """Counts over V ids, one more than the tokenizer's highest.

    Attributes:
        data_target: (V,) int64, how often the loss asks for each token, over all epochs.
        inputs: (V,) int64, how often the model reads it.
        group: (V,) uint8, index into ``source.groups``.
        live: (V,) bool, tokens that can be asked for; see `VocabTable.live`.
    """

    data_target: Tensor
    inputs: Tensor
    group: Tensor
    live: Tensor
    tally: RowTally
    source: CoverageSource

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
        told = {"schema": SCHEMA, "tally": asdict(self.tally), **asdict(self.source)}
        vectors = {name: getattr(self, name).contiguous() for name in _VECTORS}
        evidence = {"versions": versions(), "tokenizer": {"vocabulary": self.source.vocabulary}}
        write_file(path, tensor_file(vectors, {"coverage": json.dumps(told), "evidence": json.dumps(evidence)}))


def load_coverage(path: str | Path) -> Coverage:
    """Read what `Coverage.save` wrote.

    Raises:
        ValueError: if it is missing, damaged, no coverage, or of a newer schema.
    """
    try:
        with safe_open(str(require_regular(path)), framework="pt") as file:
            told = json.loads((file.metadata() or {})["coverage"])
            if told.pop("schema") != SCHEMA:
                raise ValueError(f"{path}: is of another schema; this version of vocabguard reads schema {SCHEMA}")
            vectors = {name: file.get_tensor(name) for name in _VECTORS}
        tally = RowTally(**told.pop("tally"))
        lists: dict[str, Any] = {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
        source = CoverageSource(**{**told, **lists})
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: is no coverage file ({one_line(error)}); `vocabguard coverage --out` writes them"
        ) from error
    size = vectors["data_target"].numel()
    wrong = [name for name, kind in _VECTORS.items() if vectors[name].dtype != kind or vectors[name].shape != (size,)]
    if wrong:
        raise ValueError(f"{path}: {wrong} are not vectors of one length and of the types {list(_VECTORS.values())}")
    return Coverage(**vectors, tally=tally, source=source)


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's pieces and ids: two with the same one number their tokens alike."""
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def measure_coverage(
    examples: Iterable[Example], tokenizer: Any, table: VocabTable, *, name: str = "", files: Sequence[str] = (),
    loss: Loss = "assistant", eos: bool = True, max_length: int | None = None, epochs: int = 1, workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Coverage:  # fmt: skip
    """Count targets and inputs of all examples.

    Args:
        examples: read once, in chunks.
        table: of the same tokenizer.
        name: of the tokenizer, kept with the counts.
        files: names of the data files, kept with the counts.
        loss, eos, max_length: see `TargetEncoder`.
        epochs: the counts are multiplied by it.
        workers: processes that encode; 1 is this one, with the tokenizer's own threads.
        progress: gets the rows of each chunk that is done.

    Raises:
        DataError: for an example that cannot be used.
        ValueError: for an option out of range, or if there is no example.
    """
    for label, value in (("epochs", epochs), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{label} is {value}; allowed: at least 1")
    options = {"loss": loss, "eos": eos, "max_length": max_length}
    counts = np.zeros((2, len(table)), dtype=np.int64)
    tally = RowTally()
    for ids, found, rows in _counted(examples, tokenizer, options, workers):
        counts[:, ids] += found
        tally += rows
        if progress is not None:
            progress(rows.rows)
    if not tally.rows:
        raise ValueError(f"no rows in {', '.join(files) or 'the data'}; there is nothing to count")
    both = torch.from_numpy(counts) * epochs
    source = CoverageSource(name, vocabulary_hash(tokenizer), tuple(files), loss, eos, max_length, epochs, table.names)
    return Coverage(both[0].clone(), both[1].clone(), table.group, table.live, tally, source)


_Counted = tuple[NDArray[np.int64], NDArray[np.int64], RowTally]


def count_rows(encoder: TargetEncoder, examples: Sequence[Example]) -> _Counted:
    """Counts of a few examples.

    Args:
        examples: at least one.

    Returns:
        (n,) int64 ids that occur; (2, n) int64 how often each is a target and an input; the rows.

    Raises:
        DataError: for an example that cannot be used.
    """
    sources = encoder.render(examples)
    return _count_batches(encoder.batches(sources), encoder.renderer.take_tally())


def _count_batches(batches: Sequence[Batch], turns: TurnTally) -> _Counted:
    """Counts of the batches of a few examples; see `count_rows`."""
    all_ids = np.concatenate([batch.ids for batch in batches])
    is_target = np.concatenate([batch.target for batch in batches])
    ids, place = np.unique(all_ids, return_inverse=True)
    counts = np.stack([np.bincount(place[is_target], minlength=len(ids)), np.bincount(place, minlength=len(ids))])
    rows, without = (sum(of) for of in zip(*((len(b.lengths), b.without_targets) for b in batches), strict=True))
    cut = sum(int(batch.cut.sum()) for batch in batches)
    return ids, counts, RowTally(rows, without, cut, turns.exact, turns.by_text, turns.missing)


def _counted(examples: Iterable[Example], tokenizer: Any, options: dict[str, Any], workers: int) -> Iterator[_Counted]:
    chunks = in_chunks(examples, CHUNK)
    encoder = TargetEncoder(tokenizer, **options)  # wrong options are refused here, not in a worker that then breaks
    if workers == 1:
        return _counted_here(chunks, encoder)
    return _counted_elsewhere(chunks, tokenizer, options, workers)


def _counted_here(chunks: Iterable[Sequence[Example]], encoder: TargetEncoder) -> Iterator[_Counted]:
    """Chat templates are rendered here while a thread has the tokenizer, which lets go of Python's lock."""

    def count(sources: Sequence[Source], turns: TurnTally) -> _Counted:
        return _count_batches(encoder.batches(sources), turns)

    def submitted(pool: ThreadPoolExecutor) -> Iterator[Future[_Counted]]:
        for chunk in chunks:
            sources = encoder.render(chunk)
            yield pool.submit(count, sources, encoder.renderer.take_tally())

    with ThreadPoolExecutor(1, thread_name_prefix="vocabguard") as pool:
        yield from _in_order(submitted(pool), 2)


def _counted_elsewhere(
    chunks: Iterable[Sequence[Example]], tokenizer: Any, options: dict[str, Any], workers: int
) -> Iterator[_Counted]:
    # Forked children of a process with running threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, options)) as pool:
        try:
            yield from _in_order((pool.submit(_count_in_worker, chunk) for chunk in chunks), 3 * workers)
        except BrokenProcessPool as error:
            raise ValueError(f"a worker process ended without an answer ({error}); --workers 1 uses none") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(futures: Iterable[Future[_Counted]], most: int) -> Iterator[_Counted]:
    """Results in order, of which so many may be on their way: the data need not fit in memory."""
    waiting: deque[Future[_Counted]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker(tokenizer: Any, options: dict[str, Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process each is enough
    _WORKER.append(TargetEncoder(tokenizer, **options))


def _count_in_worker(examples: Sequence[Example]) -> _Counted:
    return count_rows(_WORKER[0], examples)


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


def at_risk(coverage: Coverage, count: int, below: int = AT_RISK) -> list[int]:
    """Ids of live tokens with few targets: the fewest first, of these the most read, of these the lowest ids.

    A token that the data makes the model read and not say is the case to fear; in most tokenizers low ids are the
    commoner words.

    Args:
        count: at most so many.
        below: targets that are enough.
    """
    ids = (coverage.live & (coverage.data_target < below)).nonzero().flatten()
    ids = ids[torch.argsort(coverage.inputs[ids], descending=True, stable=True)]
    ids = ids[torch.argsort(coverage.data_target[ids], stable=True)]
    found: list[int] = ids[:count].tolist()
    return found
