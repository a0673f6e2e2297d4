"""The tables of `integrations/README.md` are those of the rehearsals' results, and say what the page says they say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from by_path import module_of
from packaging.requirements import Requirement

REHEARSALS = Path(__file__).parent / "rehearsals"
RESULTS = sorted((REHEARSALS / "results").glob("*.json"))
CLIENTS = [path for path in RESULTS if path.stem not in ("trackers", "engines", "served")]


@pytest.fixture(scope="module")
def table() -> Any:
    return module_of(REHEARSALS / "table.py", "rehearsals_table")


def test_the_page_is_current(table: Any) -> None:
    page = table.README.read_text(encoding="utf-8")
    assert table.written(page) == page, "run tests/rehearsals/table.py"
    assert {path.stem for path in CLIENTS} == set(table.ORDER)


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.stem)
def test_counts_are_equal_to_the_spys_to_the_last_token(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    for kind in ("plain", "echo"):
        run = found[kind]
        assert (run["exit_code"], run["steps"], run["disabled_itself"], run["echo_off"]) == (0, 6, False, False)
        assert run["counted_data"] == run["spied"] > 100
        assert run["counted_echo"] == run["spied_echo"]
        assert run["tokens_that_differ_data"] == run["tokens_that_differ_echo"] == 0
        assert run["tags_in_tensorboard"] >= 7
        if path.stem not in ("lightning", "litgpt"):
            assert len(run["keys_in_log_history"]) >= 7
            assert run["steps_with_keys"] == list(range(7))
    assert found["echo"]["counted_echo"] > 100
    assert found["echo"]["data_as_without"]


def test_what_was_tried_is_inside_the_ranges_of_the_package() -> None:
    project = tomllib.loads((REHEARSALS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(one) for one in (*project["dependencies"], *project["optional-dependencies"]["trl"])]
    for path in CLIENTS:
        versions = json.loads(path.read_text(encoding="utf-8"))["versions"]
        inside = {one.name: one.specifier.contains(versions[one.name]) for one in asked if one.name in versions}
        assert all(inside.values()), (path.stem, versions)
        assert "torch" in inside


def test_trackers_have_the_keys_at_every_check() -> None:
    found = json.loads((REHEARSALS / "results" / "trackers.json").read_text(encoding="utf-8"))
    assert set(found) == {"wandb", "mlflow", "trackio", "tensorboard", "comet_ml"}
    for one in found.values():
        for way in ("alone", "through_trainer"):
            assert len(one[way]["keys"]) >= 7
            assert one[way]["checks"] == 5
            assert one[way]["last_value_right"]
            assert one[way]["worst_tokens"]


def test_no_engine_is_wrong_and_each_refusal_is_quick_and_in_words(table: Any) -> None:
    found = json.loads((REHEARSALS / "results" / "engines.json").read_text(encoding="utf-8"))
    assert set(found["engines"]) == set(table.ENGINES)
    for kind, one in found["engines"].items():
        assert one["fault"] == "training went on", kind
        assert set(one["measures"]) == set(table.MEASURES)
        for measure in one["measures"].values():
            assert measure["verdict"] in ("right", "refused"), kind
            assert measure["verdict"] == "right" or (measure["seconds"] < 10 and len(measure["why"]) > 20), kind


def test_of_served_models_untouched_ones_are_fine_and_damaged_ones_are_not() -> None:
    found = json.loads((REHEARSALS / "results" / "served.json").read_text(encoding="utf-8"))
    rehearsal = module_of(REHEARSALS / "served_models.py", "served_models")
    for name, one in found.items():
        assert one["right"] is True, name
        assert rehearsal.right_of(one), name
        assert {"command", "versions", "seconds"} <= one.keys()


def test_ray_data_counts_what_the_command_counts() -> None:
    found = json.loads((REHEARSALS / "ray_data.json").read_text(encoding="utf-8"))
    assert set(found["files"]) == {"conversations", "texts", "completions"}
    for row in found["files"].values():
        assert (row["ray"], row["datasets"]) == ("equal", "equal")
        assert row["targets"] > 10_000
