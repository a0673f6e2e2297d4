import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from vocabguard import collective

EXPOSURE = """
import torch
from vocabguard.results import Exposure


def exposure(number):
    return Exposure(
        inputs=torch.tensor([0, 1, 2]) + number,
        data_target=torch.tensor([[1, 0, 1], [2, 1, 0]][number]),
        echo_target=torch.tensor([2, 2, 2]),
        last_target=torch.tensor([[-1, 7, 3], [-1, -1, 9]][number]),
        pull=torch.tensor([[2.5, 0, 4], [1, 3, 0]][number]),
        push=torch.full((3,), 9.0),
        input_only=torch.rand(3),
        push_samples=1,
        push_share=0.5,
        steps=9,
    )
"""

TWO = f"""
import sys, torch, torch.distributed as dist
from vocabguard import collective as c
{EXPOSURE}
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
value = dict(every=7, why="rank 0 timed it")
assert c.agree(value if number == 0 else None) == value
local = exposure(number)
summed = c.total_exposure(local)
assert summed.inputs.tolist() == [1, 3, 5] and summed.data_target.tolist() == [3, 1, 1], summed
assert summed.echo_target.tolist() == [4, 4, 4] and summed.last_target.tolist() == [-1, 7, 9], summed
assert summed.pull.tolist() == [2.5, 3, 4] and summed.push.tolist() == [9, 9, 9] and summed.steps == 9
dist.destroy_process_group()
"""


def test_the_exposure_of_one_process_is_its_own():
    namespace = {}
    exec(EXPOSURE, namespace)
    local = namespace["exposure"](0)
    assert collective.total_exposure(local) is local


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
