"""Every engine finds what one process finds, or says in words and within seconds that it does not.

What is right and what is refused stands in `tests/rehearsals/results/engines.json`, from which the table of
`integrations/README.md` is written; here the engines of torch are tried again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from by_path import module_of

REHEARSAL = Path(__file__).parents[1] / "rehearsals" / "engines.py"
QUICK = ("fsdp1_flat", "fsdp2", "tp_columns", "pipeline")
REST = ("ddp", "fsdp1_orig", "fsdp2_tied", "fsdp2_offload", "tp", "tp_auto", "context", "sequence")
FOUR = ("hsdp", "fsdp2_tp")
MOST = {"fsdp2": (4, 6), "fsdp1_flat": (8, 10), "tp_columns": (8, 11)}
"""Values of 4 bytes a row: in the largest message of a check, and in all of it. Of rows in parts more sums are told."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, together: Any) -> Path:
    """Holds what a process by itself found, and the engines of the quick lane."""
    folder: Path = tmp_path_factory.mktemp("engines")
    together("engines.py", folder, "plain", count=1)
    together("engines.py", folder, *QUICK, timeout=900)
    return folder


@pytest.fixture(scope="module")
def more(folder: Path, together: Any) -> Path:
    """The other engines beside them."""
    together("engines.py", folder, "plain_tied", count=1)
    together("engines.py", folder, *REST, timeout=1200)
    together("engines.py", folder, *FOUR, count=4, timeout=1200)
    return folder


def check(folder: Path, kind: str) -> None:
    engines, count = module_of(REHEARSAL), 4 if kind in FOUR else 2
    found = engines.judged(folder, kind, count)
    known = json.loads(engines.RESULTS.read_text(encoding="utf-8"))["engines"][kind]["measures"]
    assert {name: one["verdict"] for name, one in found.items()} == {
        name: one["verdict"] for name, one in known.items()
    }, found
    assert "wrong" not in {one["verdict"] for one in found.values()}
    assert engines.faulty(folder, kind, count) == ""
    for one in found.values():
        assert one["verdict"] == "right" or (len(one["why"]) > 20 and one["seconds"] < 60), one
        assert kind != "pipeline" or one["seconds"] < 10


@pytest.mark.parametrize("kind", QUICK)
def test_engine(kind: str, folder: Path) -> None:
    check(folder, kind)


def test_a_stage_with_neither_head_nor_embedding(tmp_path: Path, together: Any) -> None:
    """All processes are told, at once, and their training goes on."""
    together("engines.py", tmp_path, "pipeline:watch,shared", count=3)
    engines = module_of(REHEARSAL)
    for mode in ("watch", "shared"):
        told = {}
        for one in engines.load(tmp_path, "pipeline", mode, 3):
            assert one["attach_seconds"] < 10
            assert len(one["losses"]) == engines.STEPS
            told[one["failure"]] = one["watch"]
        (failure,) = told
        assert "process 1: none" in failure
        assert "a model that is cut into pipeline stages is not followed" in failure


@pytest.mark.slow
@pytest.mark.parametrize("kind", REST + FOUR)
def test_other_engines(kind: str, more: Path) -> None:
    check(more, kind)


@pytest.mark.parametrize("kind", ["fsdp1_flat", "fsdp2", "tp_columns"])
def test_no_matrix_is_sent(kind: str, folder: Path) -> None:
    """All of a check, counts and both matrices, is few values a row; where rows are whole at most 6, gradients too."""
    engines = module_of(REHEARSAL)
    rows = len(engines.load(folder, kind, "watch", 2)[0]["counts"])
    rows += rows % 2  # both processes send as many, and the number is odd
    for one in engines.load(folder, kind, "watch", 2):
        total, largest, messages = one["sent_at_check"]
        assert 0 < largest <= MOST[kind][0] * rows
        assert total <= MOST[kind][1] * rows
        assert messages <= 14
        assert one["sent_in_step"] == (0, 0, 0), "a step under watch sends nothing"


def test_all_engines_are_tried() -> None:
    assert set(QUICK + REST + FOUR) == set(module_of(REHEARSAL).NAMES) - set(module_of(REHEARSAL).DEEPSPEED)
