from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Text
from vocabguard.data.replay import Candidate, count_targets_in, find_replay, greedy_cover, needed_targets, written_rows

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
Bag = Counter[int]


def bags(rng: Random, count: int, vocabulary: int) -> list[Bag]:
    return [Counter(int(rng.paretovariate(0.8)) % vocabulary for _ in range(rng.randint(1, 8))) for _ in range(count)]


def candidates(rows: list[Bag]) -> list[Candidate]:
    found = []
    for index, row in enumerate(rows):
        ids = sorted(row)
        found.append(Candidate(index, np.array(ids, dtype=np.int64), np.array([row[i] for i in ids], dtype=np.int64)))
    return found


def gain(row: Bag, left: dict[int, int]) -> int:
    return sum(min(count, left.get(token, 0)) for token, count in row.items())


def plain_greedy(rows: list[Bag], need: dict[int, int]) -> list[int]:
    """The textbook's: all gains anew in every round, the first of the largest."""
    left, chosen = dict(need), []
    open_rows = set(range(len(rows)))
    while open_rows:
        best = max(open_rows, key=lambda place: (gain(rows[place], left), -place))
        if gain(rows[best], left) == 0:
            break
        chosen.append(best)
        open_rows.remove(best)
        left = {token: max(0, count - rows[best][token]) for token, count in left.items()}
    return chosen


def reached(rows: list[Bag], need: dict[int, int]) -> dict[int, int]:
    total: Bag = sum(rows, Counter())
    return {token: min(total[token], count) for token, count in need.items()}


def as_need(need: dict[int, int], size: int) -> Any:
    return np.array([need.get(token, 0) for token in range(size)], dtype=np.int64)


@pytest.mark.parametrize("seed", range(12))
def test_never_more_rows_than_plain_greedy_and_the_same_coverage(seed: int) -> None:
    rng = Random(seed)
    rows, size = bags(rng, 60, 30), 30
    need = {token: rng.randint(0, 4) for token in range(size)}
    chosen = [row.index for row in greedy_cover(candidates(rows), as_need(need, size))]
    plain = plain_greedy(rows, need)
    assert len(chosen) <= len(plain)
    assert set(chosen) <= set(plain), "rows are only given back"
    assert reached([rows[i] for i in chosen], need) == reached(rows, need)


@pytest.mark.parametrize("seed", range(8))
def test_within_the_bound_of_the_best_choice(seed: int) -> None:
    """H(largest gain) times the fewest rows, found by trying all choices."""
    rng = Random(seed)
    rows, size = bags(rng, 11, 8), 8
    need = {token: rng.randint(0, 2) for token in range(size)}
    full = reached(rows, need)
    fewest = next(
        count for count in range(len(rows) + 1) for part in itertools.combinations(rows, count)
        if reached(list(part), need) == full
    )  # fmt: skip
    largest = max(gain(row, need) for row in rows)
    bound = sum(1 / k for k in range(1, largest + 1)) * fewest
    assert fewest <= len(greedy_cover(candidates(rows), as_need(need, size))) <= max(bound, fewest)


WORDS = [
    "the",
    "data",
    "and",
    "of",
    "to",
    "a",
    "in",
    "save",
    "保存",
    "データ",
    "данные",
    "안녕",
    "file",
    "open",
    "close",
    "value",
    "field",
    "this",
    "that",
    "with",
]


def corpus(count: int, seed: int = 0) -> list[Text]:
    rng = Random(seed)
    return [Text(f"line {i}", " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))) for i in range(count)]


@pytest.mark.parametrize("pool", [1, 3, 1000])
def test_everything_that_the_corpus_holds_is_covered(tokenizer: Any, pool: int) -> None:
    rows, encoder = corpus(700), TargetEncoder(tokenizer)
    live = torch.ones(len(tokenizer), dtype=torch.bool)
    need = needed_targets(live, 6)
    found = find_replay(lambda: iter(rows), encoder, need, pool=pool)
    total: Bag = Counter()
    for row in rows:
        total.update(tokenizer.encode(row.text + "<|end|>")[1:])
    kept: Bag = Counter()
    for row in written_rows(lambda: iter(rows), found.chosen):
        assert row in rows
        kept.update(tokenizer.encode(row.text + "<|end|>")[1:])
    assert found.rows == 700
    assert len(found.chosen) < 200
    for token in range(len(tokenizer)):
        assert min(kept[token], 6) == min(total[token], 6)
        assert int(found.covered[token]) == kept[token]
        assert bool(found.available[token]) == (total[token] > 0)
        assert bool(found.met[token]) == (kept[token] >= 6)
    again = count_targets_in(written_rows(lambda: iter(rows), found.chosen), encoder, len(tokenizer))
    assert torch.equal(again, found.covered)


def test_a_whole_corpus_in_the_pool_gives_plain_greedy_or_better(tokenizer: Any) -> None:
    rows = corpus(300)
    need = needed_targets(torch.ones(len(tokenizer), dtype=torch.bool), 5)
    found = find_replay(lambda: iter(rows), TargetEncoder(tokenizer), need, pool=10_000)
    plain = plain_greedy([Counter(tokenizer.encode(row.text + "<|end|>")[1:]) for row in rows],
                         dict.fromkeys(range(len(tokenizer)), 5))  # fmt: skip
    assert set(found.chosen) <= set(plain)
    small = find_replay(lambda: iter(rows), TargetEncoder(tokenizer), need, pool=8)
    assert len(small.chosen) <= 1.5 * len(plain)


def test_candidates_depend_on_the_need_alone(tokenizer: Any) -> None:
    """However long the corpus, no more than `pool` times the need are kept."""
    from vocabguard.data import replay

    rows = candidates([Counter({token % 5: 1}) for token in range(4000)])
    kept, held, number = replay._candidates(rows, np.full(5, 3 * 2, dtype=np.int64))
    assert (len(kept), held.tolist(), number) == (30, [6] * 5, 4000)


def test_need_is_what_is_lacking() -> None:
    live = torch.tensor([True, True, False, True])
    assert needed_targets(live, 5, torch.tensor([0, 3, 0, 9])).tolist() == [5, 2, 0, 0]
    assert needed_targets(live, 2).tolist() == [2, 2, 0, 2]
    with pytest.raises(ValueError, match="targets is 0; allowed"):
        needed_targets(live, 0)
    with pytest.raises(ValueError, match="do not belong together"):
        needed_targets(live, 1, torch.zeros(3, dtype=torch.int64))


def test_refusals(tokenizer: Any) -> None:
    encoder, need = TargetEncoder(tokenizer), torch.ones(len(tokenizer), dtype=torch.int64)
    for rows, needed, pool, told in (
        (corpus(3), need, 0, "pool is 0"),
        (corpus(3), 0 * need, 8, "no token is in need"),
        ([], need, 8, "no rows in the corpus"),
    ):
        with pytest.raises(ValueError, match=told):
            find_replay(lambda rows=rows: iter(rows), encoder, needed, pool=pool)
