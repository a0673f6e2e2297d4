"""Rows on their way to an accelerator, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def on_device(rows: Tensor, parts: Iterable[slice], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows on a device; from pinned memory the next one is on its way while one is read.

    Args:
        rows: (V, D), on any device.
        parts: which rows.

    Yields:
        The slice, and (n, D) rows in their dtype, valid until the next is asked for. The host does not wait where they
        are on the device or pinned.

    Example:
        >>> [(part.start, rows.tolist()) for part, rows in on_device(torch.eye(2), [slice(1, 2)], torch.device("cpu"))]
        [(1, [[0.0, 1.0]])]
    """
    if rows.device == device:
        yield from ((part, rows[part]) for part in parts)
    elif device.type == "cuda" and rows.is_pinned():
        yield from _ahead(((part, rows[part]) for part in parts), device)
    else:
        yield from ((part, rows[part].to(device)) for part in parts)


def _ahead(chunks: Iterator[tuple[slice, Tensor]], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Pinned chunks, copied by a stream of their own into two buffers: one is filled while the other is read."""
    reading, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    buffers: list[Tensor] = []
    read: list[torch.cuda.Event] = []

    def send(place: int, rows: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        if len(buffers) <= place:  # the first chunks are the longest
            buffers.append(torch.empty_like(rows, device=device))
            buffers[place].record_stream(copying)
            # What the rows hold may still be on its way from the device, by the stream that reads them.
            read.append(reading.record_event())
        copying.wait_event(read[place])
        with torch.cuda.stream(copying):
            filled = buffers[place][: len(rows)].copy_(rows, non_blocking=True)
            return filled, copying.record_event()

    turn, coming = 0, None
    for part, rows in chunks:
        sent = (part, *send(turn % 2, rows))
        if coming is not None:
            yield from _arrived(*coming, reading, read, (turn - 1) % 2)
        turn, coming = turn + 1, sent
    if coming is not None:
        yield from _arrived(*coming, reading, read, (turn - 1) % 2)


def _arrived(
    part: slice, rows: Tensor, copied: torch.cuda.Event, reading: torch.cuda.Stream, read: list[torch.cuda.Event],
    place: int,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """One chunk, once it is there; its buffer is free when all that was asked of it is done."""
    reading.wait_event(copied)
    yield part, rows
    read[place] = reading.record_event()
