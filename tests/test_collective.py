import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from vocabguard import collective

TWO = """
import sys, torch, torch.distributed as dist
from vocabguard import collective as c
number, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=number, world_size=2)
assert (c.rank(), c.world_size(), c.is_main()) == (number, 2, number == 0)
mine = torch.arange(6).reshape(2, 3).T + 100 * number
if number:  # the same values, laid out otherwise
    mine = mine.contiguous()
before = mine.clone()
both = c.total(mine)
assert torch.equal(both, torch.tensor([[100, 106], [102, 108], [104, 110]])), both
assert both.dtype == torch.int64 and torch.equal(mine, before)
assert c.total(torch.tensor(0.5, requires_grad=True)).item() == 1.0
value = dict(every=7, why="rank 0 timed it", at=torch.arange(3))
told = c.agree(value if number == 0 else None)
assert torch.equal(told.pop("at"), torch.arange(3)) and told == dict(every=7, why="rank 0 timed it")
assert c.everyone(number) == [0, 1]
assert c.any_of(torch.tensor([number == 0, False, True])).tolist() == [True, False, True]
assert c.largest(torch.tensor([number, -number])).tolist() == [1, 0]

piece = c.Piece(2**40 - 1, 5 + number)
assert piece.words == [2**41 - 2, 11, 0], piece.words
assert piece.any_bits(torch.tensor([1 + number, 0], dtype=torch.uint8)).tolist() == [3, 0]
assert piece.gathered(torch.tensor([[number, 7]])).tolist() == [[[0, 7]], [[1, 7]]]

def work(times):
    found = []
    for turn in range(times):
        found.append((yield c.Telling(torch.tensor([turn + number, 10.0]))).tolist())
        every = yield c.Telling(torch.tensor([[float(number)]]), gathered=True)
        found.append(every.tolist())
    return found

def other():
    return (yield c.Telling(torch.tensor(number, dtype=torch.float64))).item()

sent, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather
dist.all_reduce = lambda tensor, *a, **k: sent.append(tensor.tolist()) or all_reduce(tensor, *a, **k)
dist.all_gather = lambda many, one, **k: sent.append(one.tolist()) or all_gather(many, one, **k)
once, twice, wide = [[1, 20], [[[0]], [[1]]]], [[1, 20], [[[0]], [[1]]], [3, 20], [[[0]], [[1]]]], 1
assert c.together([work(1), work(2), other()]) == [once, twice, wide]
# A flag, then a message of each kind, for all works that go on.
flag = [0, 0, 0, 0, 0]
assert sent == [
    flag, [number, 10, number, 10], [number], flag, [number, number],
    flag, [1 + number, 10], flag, [number],
], sent
dist.destroy_process_group()
"""


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "is_initialized")


@pytest.fixture
def uninitialised():
    assert not dist.is_initialized()


@pytest.mark.parametrize("kind", ["uninitialised", "missing", "world_of_one"])
def test_alone_everything_is_the_identity(kind, request):
    request.getfixturevalue(kind)
    assert (collective.rank(), collective.world_size(), collective.is_main()) == (0, 1, True)
    tensor = torch.rand(3, requires_grad=True)
    summed = collective.total(tensor)
    assert torch.equal(summed, tensor)
    assert summed.data_ptr() != tensor.data_ptr()
    assert not summed.requires_grad
    value = {"a": object()}
    assert collective.agree(value) is value
    assert collective.everyone(value) == [value]
    piece = collective.Piece(4, 2)
    assert piece.words == [4, 2, 0]
    assert piece.gathered(tensor.detach()).tolist() == [tensor.tolist()]
    assert torch.equal(piece.largest(tensor), tensor)


def test_a_bool_has_no_sum():
    with pytest.raises(TypeError, match=r"torch\.bool; allowed: integer and floating"):
        collective.total(torch.tensor([True]))


def test_two_processes(tmp_path):
    command = [sys.executable, "-W", "error", "-c", TWO]
    ranks = [
        subprocess.Popen([*command, str(number), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
