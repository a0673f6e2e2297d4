"""Rows on their way between an accelerator and the host, chunk by chunk."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


def on_host(rows: Tensor) -> Tensor:
    """A copy on the host; of rows on a CUDA device in pinned memory, if it can be had: they go back six times as fast.

    >>> on_host(torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    kept = torch.empty(rows.shape, dtype=rows.dtype)
    if rows.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # the system lets a process pin no more
            kept = kept.pin_memory()
    return kept.copy_(rows.detach())


def on_device(chunks: Iterable[tuple[Key, Tensor]], device: torch.device) -> Iterator[tuple[Key, Tensor]]:
    """Chunks of rows on a device; from pinned memory the next one is on its way while one is read.

    Args:
        chunks: something that tells them apart, and (n, D) rows on one device, of one dtype.

    Yields:
        The same, with rows that are valid until the next chunk is asked for. The host does not wait where they are on
        the device or pinned.

    Example:
        >>> [(name, rows.tolist()) for name, rows in on_device([("first", torch.ones(1, 2))], torch.device("cpu"))]
        [('first', [[1.0, 1.0]])]
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        return
    chunks = itertools.chain([first], chunks)
    if first[1].device == device:
        yield from chunks
    elif device.type == "cuda" and first[1].device.type == "cpu" and first[1].is_pinned():
        yield from _ahead(chunks, device)
    else:
        yield from ((key, rows.to(device)) for key, rows in chunks)


def _ahead(chunks: Iterator[tuple[Key, Tensor]], device: torch.device) -> Iterator[tuple[Key, Tensor]]:
    """Pinned chunks, copied by a stream of their own into two buffers: one is filled while the other is read."""
    reading, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    buffers: dict[int, Tensor] = {}
    read: dict[int, torch.cuda.Event] = {}  # of each buffer: all that was asked of its rows is done

    def send(place: int, rows: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        if place not in buffers or len(buffers[place]) < len(rows):
            buffers[place] = torch.empty_like(rows, device=device)
            buffers[place].record_stream(copying)
            # What the rows hold may still be on its way from the device, by the stream that reads them.
            read[place] = reading.record_event()
        copying.wait_event(read[place])
        with torch.cuda.stream(copying):
            filled = buffers[place][: len(rows)].copy_(rows, non_blocking=True)
            return filled, copying.record_event()

    coming: tuple[int, Key, Tensor, torch.cuda.Event] | None = None
    for turn, (key, rows) in enumerate(chunks):
        # A row that lies here in part is made anew, so it is not pinned.
        sent = (turn % 2, key, *send(turn % 2, rows if rows.is_pinned() else rows.pin_memory()))
        if coming is not None:
            yield from _arrived(*coming, reading, read)
        coming = sent
    if coming is not None:
        yield from _arrived(*coming, reading, read)


def _arrived(
    place: int, key: Key, rows: Tensor, copied: torch.cuda.Event, reading: torch.cuda.Stream,
    read: dict[int, torch.cuda.Event],
) -> Iterator[tuple[Key, Tensor]]:  # fmt: skip
    """One chunk, once it is there; its buffer is free when all that was asked of it is done."""
    reading.wait_event(copied)
    yield key, rows
    read[place] = reading.record_event()
