"""Two processes' counts are exact, in whatever order they are told; and a check sends one value a row for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ROWS = 61


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, together: Any) -> list[dict[str, Any]]:
    """What both processes found and sent."""
    folder: Path = tmp_path_factory.mktemp("counting")
    together("counting.py", folder)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_counts_and_last_targets_are_those_of_all_processes(ranks: list[dict[str, Any]]) -> None:
    for here in ranks:
        assert here["wrong"] == []


def test_each_kind_of_exchange_was_tried(ranks: list[dict[str, Any]]) -> None:
    """Two kinds of counts and four, tokens in full, last targets that no mask has told."""
    sizes = [[message[1] for message in sent if message[2] == "torch.int32"] for sent in ranks[0]["sent"]]
    counts = [first for first, *_ in sizes]
    assert {ROWS, 2 * ROWS} < set(counts)
    assert any(ROWS < size < 2 * ROWS for size in counts)
    assert {len(messages) for messages in sizes} == {1, 2}


def test_an_ordinary_check_has_a_flag_masks_and_counts(ranks: list[dict[str, Any]]) -> None:
    for here in ranks:
        flag, masks, counts = here["ordinary"]
        assert flag == ("own", 2 + 3, "torch.int64")
        assert masks == ("own", 2 * -(-ROWS // 8), "torch.uint8")
        assert counts == ("own", ROWS, "torch.int32")


def test_a_row_whose_gradient_lies_in_two_processes(ranks: list[dict[str, Any]]) -> None:
    """Parts of elements, one of them empty, with the cut between two rows and in the middle of one."""
    assert [list(one["edges"]) for one in ranks[0]["in parts"]] == [[], [], [30], [60], []]
    for here in ranks:
        for one in here["in parts"]:
            whole, found = one["whole"], one["found"]
            assert torch.equal(found["data_target"], whole["data_target"])
            for name in ("pull", "push"):
                assert whole[name].max() > 1
                torch.testing.assert_close(found[name], whole[name], rtol=1e-6, atol=1e-7)
            assert found["push_share"] == pytest.approx(whole["push_share"], rel=1e-6)
