"""The examples run as a user runs them, and the main one shows what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
@pytest.mark.parametrize("name", ["hf_trainer", "lightning_trainer", "pytorch_loop", "fabric_loop"])
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


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_json_of_the_main_example(tmp_path: Path, trainer: str) -> None:
    # A fifth of the preset's echo: twelve steps would be long ones else.
    short = ("--steps", "12", "--logdir", str(tmp_path / "logs"), "echo.targets_per_live_token=0.3")
    found = forget(tmp_path, trainer, *short)
    assert found.keys() == {"base", "control", "hold_echo"}
    base, control, protect = found.values()
    assert protect.keys() == control.keys()
    assert protect["echo"]["targets_per_live_token"] == pytest.approx(0.3, abs=0.01)
    assert protect["positions"] > control["positions"] > 0
    assert protect["retained"]["classes"]["never"] > control["retained"]["classes"]["never"]
    for entry in found.values():
        assert 0 <= entry["repetition"] <= 1
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
    assert control["wall_seconds"] > control["guard_seconds"] > control["probe_seconds"] > 0
    assert control["cpu_seconds"] > control["probe_cpu_seconds"] > 0
    assert control["probes"] >= 2
    sizes = control["tokens"]
    assert sum(sizes["classes"].values()) == sum(sizes["groups"].values()) > 7000

    for meta in (tmp_path / "logs").rglob("run.json"):
        steps = [check["step"] for check in RunLog.open(meta.parent).checks()]
        assert steps[0] == 0
        assert steps[-1] == 12
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"control-{trainer}", f"hold_echo-{trainer}"}
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
        protect = told["hold_echo"]
        # Bars for the mean of five seeds, with room for one seed's luck in a class of some 130 tokens.
        assert protect["retained"]["classes"]["never"] >= 0.97
        assert protect["retained"]["classes"]["1-4"] >= 0.95
        assert all(share >= kept["classes"][kind] for kind, share in protect["retained"]["classes"].items())
        assert protect["echo"]["targets_per_live_token"] <= 1.5
        assert protect["val_loss"] <= 1.015 * control["val_loss"]
        large = [group for group, count in sizes["groups"].items() if count >= 100]
        # One seed, and rounding depends on the number of threads: ja is the third lowest with two, the fourth with one.
        assert "ja" in sorted(large, key=lambda group: kept["groups"][group])[:4]
    assert found["hf"]["base"] == found["lightning"]["base"]
    hf, lightning = found["hf"]["control"], found["lightning"]["control"]
    assert hf["tokens"] == lightning["tokens"]
    assert hf["retained"]["all"] == pytest.approx(lightning["retained"]["all"], abs=0.02)
    for kind in ("never", "1-4", "5-19", "20+"):
        assert hf["retained"]["classes"][kind] == pytest.approx(lightning["retained"]["classes"][kind], abs=0.02), kind


@pytest.mark.slow
def test_the_thorough_preset_looks_at_everything_in_both_trainers(tmp_path: Path) -> None:
    logs = {}
    for trainer in ("hf", "lightning"):
        # With a single ask a token is lost at its first miss: in four, twelve steps lose none.
        options = ("--steps", "12", "--logdir", str(tmp_path / "logs"), "probe.asks=1")
        forget(tmp_path, trainer, "--arms", "thorough", *options)
        log = logs[trainer] = RunLog.open(tmp_path / "logs" / f"thorough-{trainer}" / "vocabguard")
        checks = log.checks()
        assert [check["step"] for check in checks] == [0, 4, 8, 10, 12]
        assert log.row_steps == tuple(check["step"] for check in checks), "rows at every check"
        vectors = log.rows()
        assert torch.equal(vectors["probe/ids"], vectors["live"].nonzero().flatten()), "every live token is probed"
        answers = log.notes("confusion")
        assert [line["step"] for line in answers] == [4, 8, 12]
        assert all(len(line["answers"]) == 16 and set(line["answers"].values()) == {4} for line in answers)
        near = log.notes("neighbors")
        assert [line["step"] for line in near] == [12] * 20
        assert all(len(line["then"]) == len(line["now"]) == 10 for line in near)
        [lost] = log.notes("head_or_body")
        assert lost["forgotten"] == lost["head"] + lost["input"] + lost["body"] > 0
        page = (log.folder / "report.html").read_text(encoding="utf-8")
        for heading in ("Answers in many languages", "Nearest rows, then and now", "Where forgotten tokens were lost"):
            assert f"<h3>{heading}</h3>" in page
        assert "Answers with foreign script" in page
    for kind in ("confusion", "neighbors", "head_or_body"):
        assert logs["hf"].notes(kind) == logs["lightning"].notes(kind), kind


@pytest.mark.slow
def test_table_of_arms_over_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "found"
    arguments = ("--seeds", "2", "--steps", "3", "--jobs", "2", "--arms", "hold", "--folder", str(folder))
    said = run_example("protection_table.py", tmp_path, *arguments)
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert table.keys() == {"control", "hold"}
    entries = {
        (arm, seed): json.loads((folder / f"{arm}-{seed}.json").read_text(encoding="utf-8"))
        for arm in table
        for seed in range(2)
    }
    for kind in EXPOSURE_CLASSES[:3]:  # in three steps hardly a token is a target twenty times
        kept = [entries["hold", seed]["retained"]["classes"][kind] for seed in range(2)]
        assert table["hold"][f"retained {kind}"]["mean"] == pytest.approx(sum(kept) / 2)
        # Student's t for two values: 12.706 times half their distance.
        assert table["hold"][f"retained {kind}"]["half_width"] == pytest.approx(
            12.706 * abs(kept[0] - kept[1]) / 2, rel=1e-3, abs=1e-9
        )
    assert table["control"]["extra time"]["mean"] == 0
    assert "2 seeds" in said
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-?.json")}
    # What is there is not made again.
    run_example("protection_table.py", tmp_path, *arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-?.json")} == before


@pytest.mark.slow
def test_the_probe_is_held_against_free_generation(tmp_path: Path) -> None:
    told, kept = tmp_path / "truth.json", tmp_path / "kept"
    # Long enough that there are ten times as many forgotten tokens as are drawn: after 60 steps all are borderline.
    arguments = ("--steps", "180", "--count", "60", "--lists", "3", "--model", str(kept), "--json", str(told))
    said = run_example("probe_truth.py", tmp_path, *arguments)
    found = json.loads(told.read_text(encoding="utf-8"))
    assert found["drawn"] == {"forgotten": 60, "retained": 60}
    assert found["probed"] >= sum(found["sorts"].values()) > 7000
    # The base can say both kinds, in all of the probe's contexts.
    assert min(share for shares in found["base"].values() for share in shares) > 0.85
    # Only the decoding differs.
    assert found["same_prompts"]["agreement"]["all"] >= 0.95
    assert min(found["pooled"]["agreement"].values()) >= 0.9
    for asked in ("probe", "held_out"):
        shares = found[asked]["agreement"]
        assert shares["all"] == pytest.approx((shares["forgotten"] + shares["retained"]) / 2)
        assert min(shares.values()) >= 0.8
        one, other = found[asked]["in_the_answer"].values()
        assert all(lost + 0.2 < still for lost, still in zip(one, other, strict=True))
    assert "60 of" in said
    run_example("probe_truth.py", tmp_path, *arguments, "--count", "10")  # the kept model is read
    again = json.loads(told.read_text(encoding="utf-8"))
    assert again["sorts"] == found["sorts"]
    assert again["drawn"] == {"forgotten": 10, "retained": 10}
