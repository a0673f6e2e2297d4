"""Counting in parallel: beside rendering in this process, or in processes that read their own share of the data."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vocabguard.data.counting import Counted, Sequences, chunks_of, count_batches, count_rows, sum_counted
from vocabguard.data.encode import Rendered, TargetEncoder
from vocabguard.data.readers import Example, Examples
from vocabguard.data.render import TurnTally

Progress = Callable[[int], object]

_WORKER: list[_Worker] = []
_TOGETHER = 64  # chunks whose counts are added up, for memory not to grow
_LOOK = 0.2  # seconds between looks at how far the others are


@dataclass
class Seen:
    """What is known of the reading and encoding once all is counted.

    Attributes:
        told: which tokenizer encoded; see `tokenizing.TextTokenizer`.
    """

    told: str = ""

    def take(self, told: str) -> None:
        """Keep what one encoder says."""
        self.told = told


def counted(
    examples: Iterable[Example], tokenizer: Any, options: Mapping[str, Any], encoder: TargetEncoder, workers: int,
    words: Sequence[Sequences], progress: Progress, seen: Seen,
) -> Iterator[Counted]:  # fmt: skip
    """The counts of all examples, in parts.

    Args:
        options: of the encoder.
        workers: processes; 1 is this one.
        words: see `counting.count_rows`.
        progress: gets the rows of each chunk that is done.
        seen: is filled.

    Raises:
        DataError: for an example that cannot be used.
        ValueError: if a process ends without an answer.
    """
    if workers == 1:
        yield from _told(_counted_here(chunks_of(examples), encoder, words), progress)
        seen.take(encoder.texts.told)
    elif isinstance(examples, Examples):
        yield from _counted_by_readers(examples, tokenizer, options, workers, words, progress, seen)
    else:
        yield from _told(_counted_elsewhere(chunks_of(examples), tokenizer, options, workers, words), progress)


def _told(parts: Iterable[Counted], progress: Progress) -> Iterator[Counted]:
    for part in parts:
        yield part
        progress(part.rows.rows)


def _counted_here(
    chunks: Iterable[Sequence[Example]], encoder: TargetEncoder, words: Sequence[Sequences]
) -> Iterator[Counted]:
    """Chat templates are rendered here while a thread has the tokenizer, which lets go of Python's lock."""

    def count(sources: Sequence[Rendered], turns: TurnTally) -> Counted:
        return count_batches(encoder.batches(sources), turns, words)

    def submitted(pool: ThreadPoolExecutor) -> Iterator[Future[Counted]]:
        for chunk in chunks:
            sources = encoder.render(chunk)
            yield pool.submit(count, sources, encoder.renderer.take_tally())

    with ThreadPoolExecutor(1, thread_name_prefix="vocabguard") as pool:
        yield from _in_order(submitted(pool), 2)


def _counted_by_readers(
    examples: Examples, tokenizer: Any, options: Mapping[str, Any], workers: int, words: Sequence[Sequences],
    progress: Progress, seen: Seen,
) -> Iterator[Counted]:  # fmt: skip
    """Each process reads its own rows: no text goes from one to another."""
    context = multiprocessing.get_context("spawn")
    stop, rows = context.Event(), context.SimpleQueue()
    with _pool(workers, (tokenizer, options, stop, rows)) as pool:
        try:
            running = {pool.submit(_count_share, part, words) for part in examples.readers(workers)}
            while running:
                done, running = wait(running, _LOOK, FIRST_COMPLETED)
                while not rows.empty():
                    progress(rows.get())
                for future in done:
                    part, share, told = future.result()
                    examples.add_seen(share)
                    seen.take(told)
                    yield from part
            while not rows.empty():
                progress(rows.get())
        finally:
            stop.set()


def _counted_elsewhere(
    chunks: Iterable[Sequence[Example]], tokenizer: Any, options: Mapping[str, Any], workers: int,
    words: Sequence[Sequences],
) -> Iterator[Counted]:  # fmt: skip
    """Of examples that are nowhere but here."""
    with _pool(workers, (tokenizer, options, None, None)) as pool:
        yield from _in_order((pool.submit(_count_in_worker, chunk, words) for chunk in chunks), 3 * workers)


@contextmanager
def _pool(workers: int, given: tuple[Any, ...]) -> Iterator[ProcessPoolExecutor]:
    # Forked children of a process with running threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, given) as pool:
        try:
            yield pool
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


@dataclass(frozen=True)
class _Worker:
    encoder: TargetEncoder
    stop: Any
    rows: Any


def _start_worker(tokenizer: Any, options: Mapping[str, Any], stop: Any, rows: Any) -> None:
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # a process each is enough
    _WORKER.append(_Worker(TargetEncoder(tokenizer, **options), stop, rows))


def _count_in_worker(examples: Sequence[Example], words: Sequence[Sequences]) -> Counted:
    return count_rows(_WORKER[0].encoder, examples, words)


def _count_share(examples: Examples, words: Sequence[Sequences]) -> tuple[list[Counted], Examples, str]:
    """The counts of a reader's rows, with what it saw of them."""
    worker, parts = _WORKER[0], list[Counted]()
    for chunk in chunks_of(examples):
        if worker.stop.is_set():
            break
        parts.append(count_rows(worker.encoder, chunk, words))
        worker.rows.put(parts[-1].rows.rows)
        if len(parts) == _TOGETHER:
            parts = [sum_counted(parts)]
    return parts, examples, worker.encoder.texts.told
