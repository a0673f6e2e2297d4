"""What processes make of each other's findings: functions of lists, so that no process is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from vocabguard.guard import layout
from vocabguard.guard.agreement import Found, MatrixFound, RefusedError, judged
from vocabguard.guard.layout import Layout, Replicas, layout_of, replicas_of

WHOLE = MatrixFound("", "float32 in a parameter, whole", (8, 4), None, 32)


def found(head: MatrixFound = WHOLE, embedding: MatrixFound = WHOLE, **options: Any) -> Found:
    values = {"rows": 8, "error": "", "tied": False, "layout": Layout((0,), (0,)), "versions": "1"} | options
    return Found(matrices={"head": head, "embedding": embedding}, **values)


def part(start: int, stop: int, *columns: int) -> MatrixFound:
    count = (stop - start) if not columns else 8 * (columns[1] - columns[0])
    return MatrixFound("", "float32 in a parameter, in parts", (8, 4), (start, stop, *columns), count)


def test_whole_matrices() -> None:
    assert judged([found(), found()]) == dict.fromkeys(("head", "embedding"), ("", frozenset({0, 1})))


def test_of_processes_with_the_same_elements_the_first_speaks() -> None:
    parts = [part(0, 18), part(18, 32), part(0, 18), part(18, 32)]
    assert judged([found(one, one) for one in parts])["head"] == ("", frozenset({0, 1}))
    columns = [part(0, 32, 0, 2), part(0, 32, 2, 4)]
    assert judged([found(one, one) for one in columns])["head"] == ("", frozenset({0, 1}))


def test_elements_that_nobody_has() -> None:
    reason, speakers = judged([found(one, one) for one in (part(0, 18), part(0, 18))])["head"]
    assert "18 of its 32 elements" in reason
    assert not speakers


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"rows": 4}, "the vocabulary differs: process 0: 8 rows; process 1: 4 rows"),
        (
            {"rows": None, "error": "none here"},
            "process 1: none \\(none here\\); a model that is cut into",
        ),
        ({"versions": "2"}, "versions differ: process 0: 1; process 1: 2"),
    ],
)
def test_what_the_guard_cannot_do_without(others: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        judged([found(), found(**others)])


def test_nothing_anywhere_is_a_users_mistake() -> None:
    none = found(rows=None, error="nothing to watch")
    with pytest.raises(ValueError, match=r"^nothing to watch$"):
        judged([none, none])


def test_pipeline_stages() -> None:
    missing = MatrixFound(reason="the head is an Identity")
    with pytest.raises(RefusedError, match="pipeline stages"):
        judged([found(head=missing), found(embedding=missing)])


def test_one_matrix_that_differs_is_off_everywhere() -> None:
    verdict = judged([found(), found(replace(WHOLE, kind="bfloat16 in a parameter, whole"))])
    assert "process 1: 8 x 4, bfloat16" in verdict["head"][0]
    assert verdict["embedding"] == ("", frozenset({0, 1}))
    frozen = MatrixFound(reason="the head is frozen")
    assert judged([found(frozen), found(frozen)])["head"][0] == "the head is frozen", "said alike: no difference"


def test_ties_that_differ() -> None:
    verdict = judged([found(tied=True), found()])
    for name in ("head", "embedding"):
        assert "tied differs: process 0: tied; process 1: untied" in verdict[name][0]


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_replicas() -> None:
    data = [Layout((rank,), (rank,)) for rank in range(4)]
    assert [replicas_of(data, rank).number for rank in range(4)] == [0, 1, 2, 3]
    context = [Layout((0,), (0, 1), "context"), Layout((1,), (0, 1), "context")]
    assert replicas_of(context, 1) == Replicas(0, 1, True, "context"), "each process has a part of its own"
    tensor = [Layout((0, 2), (0, 2)), Layout((1, 3), (1, 3)), Layout((0, 2), (0, 2)), Layout((1, 3), (1, 3))]
    assert [replicas_of(tensor, rank).speaks for rank in range(4)] == [True, True, False, False]
    assert [replicas_of(tensor, rank).number for rank in range(4)] == [0, 1, 0, 1]


def test_processes_that_disagree() -> None:
    odd = [Layout((0, 1), (0, 1)), Layout((1,), (1,))]
    refused = replicas_of(odd, 0).refused
    assert refused is not None
    assert "processes 0 and 1 disagree" in refused.reason


class Mesh:
    """Four processes, 2 x 2; this one is number 3."""

    mesh, ndim = torch.arange(4).view(2, 2), 2

    def __init__(self, *names: str) -> None:
        self.mesh_dim_names = names or None

    def get_coordinate(self) -> list[int]:
        return [1, 1]

    def size(self, dim: int) -> int:
        return 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("dp", "tp"), Layout((2, 3), (2, 3))),
        (("tp", "dp"), Layout((1, 3), (1, 3))),
        (("data_parallel", "tensor_parallel"), Layout((2, 3), (2, 3))),
        (("dp_replicate", "dp_shard"), Layout((3,), (3,))),
        (("dp_shard", "cp"), Layout((3,), (2, 3), "context")),
        (("sp", "tp"), Layout((2, 3), (0, 1, 2, 3), "sequence")),
        (("dp_replicate", "dp_shard_cp"), Layout((3,), (3,), "context")),
        ((), Layout((0, 1, 2, 3), (0, 1, 2, 3))),  # tensor parallel by hand, without names
    ],
)
def test_names_of_mesh_dimensions(names: tuple[str, ...], expected: Layout) -> None:
    model: Any = nn.Linear(1, 1)
    model.weight.device_mesh = Mesh(*names)
    with patch.object(layout.collective, "rank", lambda: 3):
        assert layout_of(model) == expected


def test_a_sequence_that_deepspeed_splits_for_accelerate() -> None:
    class Config:
        sp_size = 2

    state = {"device_mesh": None, "parallelism_config": Config()}
    with (
        patch.object(layout.collective, "rank", lambda: 3),
        patch.object(layout, "_accelerate_state", lambda: state),
    ):
        assert layout_of(nn.Linear(1, 1)) == Layout((3,), (2, 3), "sequence")
