"""Packed counts: exact, whatever they are, whoever has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vocabguard.measure.shared import SharedCounts, decoded, encoded, too_large

ANY = st.one_of(st.integers(0, 40), st.integers(0, 2**17), st.sampled_from([2**31 - 1, 2**31, 2**47 + 5, 2**61]))


def message(news: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What all processes' words add up to in int32, which must not run over, and which tokens are sent in full."""
    large = torch.stack([too_large(one, len(news)) for one in news]).any(0)
    words = [encoded(one, large) for one in news]
    exact = np.sum([one.numpy().astype(object) for one in words], axis=0)
    assert max(exact.tolist(), default=0) < 2**31
    return torch.from_numpy(exact.astype(np.int32)), large


@given(st.integers(1, 5), st.sampled_from([2, 4]), st.integers(1, 6), st.data())
def test_the_sum_is_exact(world: int, kinds: int, rows: int, data: st.DataObject) -> None:
    counts = st.lists(st.lists(ANY, min_size=rows, max_size=rows), min_size=kinds, max_size=kinds)
    news = [torch.tensor(data.draw(counts)) // world for _ in range(world)]
    words, large = message(news)
    assert torch.equal(decoded(words, large, kinds), torch.stack(news).sum(0))


def test_one_value_a_token_is_sent_where_counts_are_small() -> None:
    news = [torch.tensor([[3, 0, 9], [1, 2, 3]]), torch.tensor([[1, 5, 2**40], [2, 2, 2]])]
    words, large = message(news)
    assert large.tolist() == [False, False, True]
    assert len(words) == 3 + 3 * 2


@pytest.mark.parametrize("world", [2, 512, 32_767, 40_000])
def test_as_much_as_just_fits(world: int) -> None:
    most = (2**15 - 1) // world
    news = torch.tensor([[most, most + 1], [most, 0]])
    assert too_large(news, world).tolist() == [False, True]
    assert int(encoded(news[:, :1], torch.tensor([False])).long().sum()) * world < 2**31


def test_many_exchanges_add_up_and_follow_a_resized_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    world, kinds, rows = 3, 4, 50
    counts = [torch.zeros(kinds, rows, dtype=torch.int64) for _ in range(world)]
    shared = [SharedCounts(kinds, rows) for _ in range(world)]
    for turn in range(12):
        for own in counts:
            own.add_(torch.randint(0, 10 ** (1 + turn % 6), own.shape, generator=generator))
        if turn == 6:
            counts = [torch.nn.functional.pad(one[:, :40], (0, 5)) for one in counts]
            for one in shared:
                one.resize(40)
                one.resize(45)
        news = [one.news(own) for one, own in zip(shared, counts, strict=True)]
        words, large = message(news)
        for one, own in zip(shared, counts, strict=True):
            one.add(decoded(words, large, kinds), own)
            assert torch.equal(one.totals, torch.stack(counts).sum(0)), turn
