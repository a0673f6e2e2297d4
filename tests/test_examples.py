"""The examples run as a user runs them, and the main one shows what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.runlog import RunLog

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARES = ("below_0.95", "below_0.90")


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """Run an example in a folder of its own; its output."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def forget(folder: Path, trainer: str, *arguments: str) -> dict[str, Any]:
    """Run the main example with one trainer; its JSON."""
    told = folder / f"{trainer}.json"
    run_example("sparse_token_forgetting.py", folder, "--trainer", trainer, "--json", str(told), *arguments)
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_trainer", "lightning_trainer", "pytorch_loop"])
def test_shortest_examples(tmp_path: Path, name: str) -> None:
    run_example(f"{name}.py", tmp_path)
    (meta,) = (tmp_path / "runs").rglob("run.json")
    log = RunLog.open(meta.parent)
    steps = [check["step"] for check in log.checks()]
    assert steps[0] == 0
    assert steps[-1] == 60
    assert {20, 40} <= set(steps)
    assert log.rows()["exposure/data_target"].sum() > 0
    _, mean = log.scalar("head/cosine_mean")
    assert mean[0] == pytest.approx(1)
    assert mean[-1] < 0.9999
    assert list((tmp_path / "runs").rglob("events.out.tfevents*"))
    # Everything lies in the folder that the example names.
    assert [path.name for path in tmp_path.iterdir() if path.name != "lightning_logs"] == ["runs"]


@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_json_of_the_main_example(tmp_path: Path, trainer: str) -> None:
    found = forget(tmp_path, trainer, "--steps", "12", "--logdir", str(tmp_path / "logs"))
    assert found.keys() == {"base", "control"}
    base, control = found["base"], found["control"]
    groups = set(control["retained"]["groups"])
    assert {"ja", "ko", "zh", "cyrillic", "arabic", "latin"} <= groups
    assert {"all", "groups"} <= base["retained"].keys()
    assert base["retained"]["groups"].keys() == groups
    assert base["val_loss"] > 0

    head = control["head"]
    assert {"cosine_mean", "cosine_min", "residual_p01", *SHARES, "groups", "classes"} <= head.keys()
    assert head["groups"].keys() == groups
    assert set(head["classes"]) == set(control["retained"]["classes"]) == set(EXPOSURE_CLASSES)
    for part in (*head["groups"].values(), *head["classes"].values()):
        # A class that no live token is in has no numbers.
        assert not part or {"cosine_mean", "cosine_min", *SHARES} <= part.keys()
    assert -1 <= head["cosine_min"] < head["cosine_mean"] < 1
    assert 0 <= control["retained"]["all"] <= 1
    assert control["val_loss"] > 0
    assert control["echo"] == {"dose": 0.0, "targets_per_live_token": 0.0}
    assert control["wall_seconds"] > 0
    sizes = control["tokens"]
    assert sum(sizes["classes"].values()) == sum(sizes["groups"].values()) > 7000

    (meta,) = (tmp_path / "logs").rglob("run.json")
    steps = [check["step"] for check in RunLog.open(meta.parent).checks()]
    assert steps[0] == 0
    assert steps[-1] == 12
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_the_main_example_shows_what_it_promises(tmp_path: Path) -> None:
    found = {trainer: forget(tmp_path, trainer) for trainer in ("hf", "lightning")}
    for told in found.values():
        base, control = told["base"], told["control"]
        kept, sizes = control["retained"], control["tokens"]
        assert base["retained"]["all"] >= 0.97
        assert control["head"]["below_0.95"] >= 0.049
        assert kept["classes"]["never"] <= 0.80
        assert kept["classes"]["20+"] >= 0.85
        large = [group for group, count in sizes["groups"].items() if count >= 100]
        assert "ja" in sorted(large, key=lambda group: kept["groups"][group])[:3]
    assert found["hf"]["base"] == found["lightning"]["base"]
    hf, lightning = found["hf"]["control"], found["lightning"]["control"]
    assert hf["tokens"] == lightning["tokens"]
    assert hf["retained"]["all"] == pytest.approx(lightning["retained"]["all"], abs=0.02)
    for kind in ("never", "1-4", "5-19", "20+"):
        assert hf["retained"]["classes"][kind] == pytest.approx(lightning["retained"]["classes"][kind], abs=0.02), kind
