"""Rows on their way to a device: in which order two streams fill and read two buffers, by streams that take notes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vocabguard.rows import streams
from vocabguard.rows.streams import on_device, on_host

CPU = torch.device("cpu")


class NotedStream:
    """A stream that notes what it was asked for; a number is an event, told by what came before it."""

    notes: ClassVar[list[tuple[str, str, int]]] = []
    numbers = itertools.count()

    def __init__(self, name: str) -> None:
        self.name = name

    def record_event(self) -> int:
        number = next(self.numbers)
        self.notes.append((self.name, "records", number))
        return number

    def wait_event(self, number: int) -> None:
        self.notes.append((self.name, "waits for", number))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    NotedStream.notes = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: NotedStream("reading"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: NotedStream("copying"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "is_pinned", lambda _rows: True)
    monkeypatch.setattr(Tensor, "record_stream", lambda _rows, _stream: None)
    return NotedStream.notes


def test_a_buffer_is_filled_when_it_has_been_read_and_read_when_it_is_filled(noted: list[Any]) -> None:
    rows = torch.arange(14.0).view(7, 2)
    parts = [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6), slice(6, 7)]
    read: list[tuple[slice, Tensor, int]] = []
    for part, there in streams._ahead(iter((part, rows[part]) for part in parts), CPU):
        read.append((part, there.clone(), there.data_ptr()))
        noted.append(("reader", "reads", len(read)))
    assert [part for part, _, _ in read] == parts
    for part, there, _ in read:
        assert torch.equal(there, rows[part])
    assert all(one[2] == other[2] for one, other in zip(read[2:], read[4:], strict=False)), "two buffers are used again"
    filled = [number for name, what, number in noted if (name, what) == ("copying", "records")]
    assert len(filled) == len(parts)
    for turn, number in enumerate(filled):
        # The reader waits for this very copy before it reads.
        place = noted.index(("reading", "waits for", number))
        assert noted.index(("copying", "records", number)) < place < noted.index(("reader", "reads", turn + 1))
    for turn in range(2, len(parts)):
        # The copy waits for an event that the reader records after it has read what the buffer held.
        place = noted.index(("copying", "records", filled[turn]))
        waited = next(
            number for name, what, number in reversed(noted[:place]) if (name, what) == ("copying", "waits for")
        )
        assert noted.index(("reading", "records", waited)) > noted.index(("reader", "reads", turn - 1))
    # While one is read the next is on its way.
    for turn, number in enumerate(filled[1:], start=1):
        assert noted.index(("copying", "records", number)) < noted.index(("reader", "reads", turn))


def test_rows_that_are_there_or_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 2)

    def chunks() -> Iterator[tuple[int, Tensor]]:
        yield from ((place, rows[place : place + 2]) for place in (0, 2, 4))

    there = list(on_device(chunks(), CPU))
    assert [place for place, _ in there] == [0, 2, 4]
    assert there[0][1].data_ptr() == rows.data_ptr(), "no copy"
    meta = list(on_device(chunks(), torch.device("meta")))
    assert [(place, one.shape, one.device.type) for place, one in meta] == [
        (0, (2, 2), "meta"), (2, (2, 2), "meta"), (4, (1, 2), "meta"),
    ]  # fmt: skip
    assert list(on_device([], CPU)) == []


def test_a_copy_on_the_host_shares_nothing() -> None:
    rows = torch.nn.Parameter(torch.randn(3, 2).t())
    kept = on_host(rows)
    assert torch.equal(kept, rows)
    assert kept.is_contiguous()
    assert not kept.requires_grad
    assert kept.data_ptr() != rows.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_streamed_rows_are_the_rows() -> None:
    rows = on_host(torch.randn(1000, 512, device="cuda"))
    assert rows.is_pinned()
    parts = [slice(start, min(start + 64, 1000)) for start in range(0, 1000, 64)]
    device = torch.device("cuda", torch.cuda.current_device())
    found = [there.clone() for _, there in on_device(((part, rows[part]) for part in parts), device)]
    assert torch.equal(torch.cat(found).cpu(), rows)
