"""What guards of two processes send: nothing in a step under watch, one mask in a step that holds rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard.collective import WORDS

ROWS, EVERY, STEPS = 131, 12, 24
CHECKS = (EVERY - 1, STEPS - 1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, together: Any) -> list[dict[str, Any]]:
    """What both processes of every case sent and found."""
    folder: Path = tmp_path_factory.mktemp("messages")
    together("messages.py", folder)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", ["watching", "tied", "sharded"])
def test_a_step_under_watch_sends_nothing(case: str, ranks: list[dict[str, Any]]) -> None:
    for here in ranks:
        sent = here[case]["sent"]
        assert len(sent) == STEPS
        assert [step for step, messages in enumerate(sent) if messages] == list(CHECKS)
        # At a check the masks of all its steps are packed: targets, and with tied weights inputs of sampled steps; one
        # more says of which tokens the counts are sent in full.
        masks = [message for message in sent[CHECKS[0]] if message[2] == "torch.uint8"]
        steps = EVERY + (2 if case == "tied" else 0) + 1
        assert masks == [("own", steps * -(-ROWS // 8), "torch.uint8")]


def test_the_first_check_of_a_plain_run_has_few_messages(ranks: list[dict[str, Any]]) -> None:
    masks = EVERY + 1  # of the steps, and of the tokens whose counts are sent in full
    flag = ("own", 2 + WORDS, "torch.int64")
    *sent, logged = ranks[0]["watching"]["sent"][CHECKS[0]]
    assert sent == [flag, ("own", masks * -(-ROWS // 8), "torch.uint8"), ("own", ROWS, "torch.int32"), flag]
    assert logged[2] == "object"


def test_a_check_of_spread_rows_sends_few_values_a_row(ranks: list[dict[str, Any]]) -> None:
    """FSDP2, head and embedding: counts, what rows have moved, pull and push; besides masks, flags and logged keys."""
    width, shift = 16, "torch.float64"
    for here in ranks:
        sent = here["sharded"]["sent"][CHECKS[0]]
        flags = [message for message in sent if message[1:] == (2 + WORDS, "torch.int64")]
        assert len(flags) <= 5
        assert len(sent) <= 12
        # One piece of talk for both matrices: mean displacements with push's share, then what is told of each row.
        assert [size for _, size, kind in sent if kind == shift] == [2 * (width + 1) + 2]
        values = [size for _, size, kind in sent if kind in ("torch.int32", "gathered torch.float32")]
        assert sum(values) <= 5 * (ROWS + 1)


@pytest.mark.parametrize("case", ["hold", "tied hold"])
def test_a_step_that_holds_sends_one_mask(case: str, ranks: list[dict[str, Any]]) -> None:
    for here in ranks:
        for step, messages in enumerate(here[case]["sent"]):
            masks = [message for message in messages if message[0] == "training's"]
            assert masks == [("training's", ROWS, "torch.uint8")]
            assert step in CHECKS or len(messages) == 1
    assert torch.equal(ranks[0][case]["held"], ranks[1][case]["held"])
    assert torch.equal(ranks[0][case]["weight"], ranks[1][case]["weight"])
    assert 0 < int(ranks[0][case]["held"].sum()) < ROWS


def test_a_full_ring_asks_before_the_check(ranks: list[dict[str, Any]]) -> None:
    """It makes no difference to what is found when the others are asked."""
    for here in ranks:
        asked = [step for step, messages in enumerate(here["short ring"]["sent"]) if messages]
        assert asked == [step for step in range(STEPS) if step % 2]
        for name, found in here["watching"]["exposure"].items():
            other = here["short ring"]["exposure"][name]
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(other)), name


@pytest.mark.parametrize("case", ["watching", "tied", "hold"])
def test_a_run_goes_on_where_steps_waited(case: str, ranks: list[dict[str, Any]]) -> None:
    """Cut off between two checks, it ends as one that was left alone, to the bit."""
    for here in ranks:
        whole, parts = here[case], here[f"{case} gone on"]
        for name, found in whole["exposure"].items():
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(parts["exposure"][name])), name
        assert whole["exposure"]["pull"].any()
        assert whole["exposure"]["push"].any()
        assert torch.equal(whole["weight"], parts["weight"])
        if case == "hold":
            assert torch.equal(whole["held"], parts["held"])
