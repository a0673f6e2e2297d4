"""Two processes find what one process finds on the same global batches: DDP, and FSDP2 with its sharded rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from by_path import module_of

SCRIPT = Path(__file__).parents[1] / "processes" / "spread.py"
# A prime number of rows does not divide by two.
KINDS = ["ddp:512", "fsdp:512", "fsdp:509", "tied:509"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, together: Any) -> Path:
    """Holds what both ranks of every kind have found."""
    folder: Path = tmp_path_factory.mktemp("spread")
    together("spread.py", folder, *KINDS)
    return folder


def found(folder: Path, kind: str, rank: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{kind.replace(':', '-')}-{rank}.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_find_what_one_finds(kind: str, folder: Path, tmp_path: Path) -> None:
    spread, rows = module_of(SCRIPT), int(kind.partition(":")[2])
    alone = spread.train(kind.partition(":")[0], rows, tmp_path)
    for rank in range(2):
        here = found(folder, kind, rank)
        for name in ("inputs", "data_target", "echo_target", "last_target", "push_samples", "steps"):
            assert torch.equal(torch.as_tensor(here["exposure"][name]), torch.as_tensor(alone["exposure"][name])), name
        assert int(here["exposure"]["data_target"].sum()) == spread.STEPS * spread.BATCH * (spread.LENGTH - 1)
        for name in ("pull", "push", "input_only", "push_share"):
            one, other = (torch.as_tensor(run["exposure"][name]) for run in (here, alone))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(here["head"]["cosine"].double(), here["naive"], rtol=0, atol=1e-6)
        assert here["naive"].min() < 0.999
        for matrix in ("head", "embedding"):
            for name in ("cosine", "residual", "l2"):
                torch.testing.assert_close(here[matrix][name], alone[matrix][name], rtol=0, atol=1e-6)
            for name in ("bad", "zero"):
                assert torch.equal(here[matrix][name], alone[matrix][name])
        assert torch.equal(here["trained"], alone["trained"])
        assert torch.equal(here["counts"], alone["exposure"]["data_target"])
        assert here["firing"] == alone["firing"]
        assert here["scalars"].keys() == alone["scalars"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_judge_alike_and_one_writes(kind: str, folder: Path) -> None:
    one, other = (found(folder, kind, rank) for rank in range(2))
    assert one["scalars"] == other["scalars"]
    assert one["firing"] == other["firing"]
    assert one["baselines"] == other["baselines"]
    run = folder / f"run-{kind.replace(':', '-')}-2"
    assert len([line for line in (run / "checks.jsonl").read_text().splitlines() if json.loads(line)]) == 4
    assert [path.name for path in folder.glob(f"{run.name}*")] == [run.name], "one process makes a folder"


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_is_sent(kind: str, folder: Path) -> None:
    rows, width = int(kind.partition(":")[2]), module_of(SCRIPT).WIDTH
    for rank in range(2):
        here = found(folder, kind, rank)
        assert 0 < here["sent_in_steps"] <= 6 * rows < rows * width
    if not kind.startswith("ddp"):
        assert "in this process" in here["watched"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_that_are_saved_are_those_of_the_start(kind: str, folder: Path) -> None:
    from safetensors.torch import load_file

    name, rows = kind.split(":")
    start = module_of(SCRIPT).model_of(int(rows), tied=name == "tied").state_dict()
    baselines = found(folder, kind, 0)["baselines"]
    assert baselines.keys() == ({"head"} if name == "tied" else {"head", "embedding"})
    for matrix, reference in baselines.items():
        key = {"head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}[matrix]
        assert torch.equal(load_file(reference["path"])[reference["key"]], start[key])


def test_lightning_shards_a_model(tmp_path: Path, together: Any) -> None:
    together("model_parallel.py", tmp_path)
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert [one["here"], other["here"]] == [255, 254]
    for here in (one, other):
        assert here["step"] == 20
        assert torch.equal(here["targets"], one["mine"] + other["mine"])
        torch.testing.assert_close(here["cosine"].double(), here["naive"], rtol=0, atol=1e-6)
    assert one["naive"].min() < 0.999
