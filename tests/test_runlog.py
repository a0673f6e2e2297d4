import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch

from vocabguard.results import (
    CheckResult,
    Exposure,
    Forecast,
    NotApplicable,
    Preflight,
    ProbeResult,
    RowDrift,
    TokenReport,
    Transition,
    Watch,
    WatchedMatrix,
)
from vocabguard.runlog import SCHEMA, RunLog, RunWriter, row_vectors

V = 6
GROUPS = ("latin", "ja")
WATCH = Watch(
    head=WatchedMatrix("head", V, 4, "bfloat16", False, False, "a copy"),
    embedding=NotApplicable("it is frozen"),
    probe=None,
    preflight=Preflight(torch.arange(V), 10, 80, True, 0.5),
    live=5,
    never_trained=1,
    run_dir="run",
    notes=("a note",),
)


def drift(seed):
    generator = torch.Generator().manual_seed(seed)
    cosine, residual, l2, ratio = torch.rand(4, V, generator=generator)
    cosine[1] = math.nan
    flags = torch.zeros(V, dtype=torch.bool)
    return RowDrift(cosine, residual, l2, ratio, flags, flags)


def exposure():
    return Exposure(
        inputs=torch.arange(V),
        data_target=torch.arange(V) * 2,
        echo_target=torch.zeros(V, dtype=torch.int64),
        last_target=torch.full((V,), -1),
        pull=torch.rand(V),
        push=torch.rand(V),
        input_only=torch.zeros(V),
        push_samples=3,
        push_share=0.25,
        steps=30,
    )


def probe():
    instead = torch.tensor([[1, 1], [0, 2]])
    return ProbeResult(("list", "quoted"), torch.tensor([1, 2]), instead == 1, torch.rand(2, 2), instead, instead)


def transition(step, state="firing", value=0.034):
    return Transition("head_degraded", state, "warning", "vocabguard/head/below_0.95", value, step, "語 is bad.")


def check(step, transitions=(), scalars=None, **fields):
    known = {
        "head": drift(step),
        "embedding": NotApplicable("it is frozen"),
        "exposure": exposure(),
        "classes": torch.zeros(V, dtype=torch.uint8),
        "probe": None,
        "scalars": {"vocabguard/head/below_0.95": step / 1000, "vocabguard/overhead": math.nan}
        if scalars is None
        else scalars,
        "firing": ("head_degraded",),
        "worst": (TokenReport(3, "嘉祺", "ja", "1-4", 0.5, math.nan, 2, 4, 7, None, "x"),),
        "seconds": 0.1,
    }
    return CheckResult(step=step, transitions=transitions, **(known | fields))


def write(folder, steps, fire_at=(), rows_at=(), groups=GROUPS):
    writer = RunWriter(folder)
    writer.start({"drift": {"every_n_steps": 10}}, WATCH, groups)
    for step in steps:
        result = check(step, tuple(transition(step) for _ in range(step in fire_at)))
        writer.check(result)
        if step in rows_at:
            writer.rows(step, row_vectors(result, torch.zeros(V, dtype=torch.uint8), torch.ones(V, dtype=torch.bool)))
    return writer


def strict(text):
    """JSON as the standard has it: Python would read NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_written_can_be_read_back(tmp_path):
    writer = RunWriter(tmp_path / "deep" / "run")
    writer.start({"seed": 3, "path": tmp_path, "nan": math.nan, "np": np.float32(0.5)}, WATCH, GROUPS)
    rises, falls = transition(10), transition(20, "resolved", math.inf)
    writer.check(check(10, (rises,)))
    writer.check(check(20, (falls,), probe=probe(), firing=(), watched=check(20).worst))
    log = RunLog.open(str(tmp_path / "deep" / "run"))
    assert log.meta["schema"] == SCHEMA
    assert log.meta["groups"] == ["latin", "ja"]
    assert log.meta["config"] == {"seed": 3, "path": str(tmp_path), "nan": None, "np": 0.5}
    first, second = log.checks()
    assert (first["step"], first["seconds"], first["probed"], first["firing"]) == (10, 0.1, False, ["head_degraded"])
    assert (second["step"], second["probed"], second["firing"]) == (20, True, [])
    assert [token["text"] for token in second["watched"]] == ["嘉祺"]
    assert first["scalars"] == {"vocabguard/head/below_0.95": 0.01, "vocabguard/overhead": None}
    assert first["worst"] == [dataclasses.asdict(check(10).worst[0]) | {"residual": None}]
    assert log.alerts()[0] == rises
    assert math.isnan(log.alerts()[1].value)
    assert dataclasses.replace(log.alerts()[1], value=math.inf) == falls


def test_the_watch_is_written_without_its_vectors(tmp_path):
    write(tmp_path, [])
    assert RunLog.open(tmp_path).meta["watch"] == {
        "head": {
            "name": "head",
            "rows": V,
            "width": 4,
            "dtype": "bfloat16",
            "tied": False,
            "bias": False,
            "baseline": "a copy",
        },
        "embedding": {"not_applicable": "it is frozen"},
        "probe": None,
        "preflight": {
            "data_target": {"shape": [V], "dtype": "torch.int64"},
            "batches": 10,
            "rows": 80,
            "complete": True,
            "seconds": 0.5,
            "tokens": 0,
        },
        "live": 5,
        "never_trained": 1,
        "run_dir": "run",
        "notes": ["a note"],
    }


def test_files_are_strict_json_and_whole_at_every_moment(tmp_path):
    writer = write(tmp_path, [10], fire_at=[10], rows_at=[10])
    writer.check(check(20, scalars={"a": math.inf, "b": -math.inf, "c": torch.tensor(0.5), "d": np.int64(2)}))
    strict((tmp_path / "run.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "checks.jsonl").read_text(encoding="utf-8").splitlines()
    assert strict(lines[-1])["scalars"] == {"a": None, "b": None, "c": 0.5, "d": 2}
    assert "嘉祺" in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "checks.jsonl",
        "alerts.jsonl",
        "rows-10.safetensors",
    }


@pytest.mark.parametrize("text", ["\udc80", "\u2028\n\0"])
def test_any_text_of_a_token_survives(tmp_path, text):
    worst = (dataclasses.replace(check(10).worst[0], text=text),)
    writer = write(tmp_path, [])
    writer.check(check(10, worst=worst))
    writer.check(check(20))
    assert [line["worst"][0]["text"] for line in RunLog.open(tmp_path).checks()] == [text, "嘉祺"]


def test_texts_of_all_ids(tmp_path):
    writer = write(tmp_path, [10])
    assert RunLog.open(tmp_path).texts() == []
    writer.texts(["", ""])
    assert RunLog.open(tmp_path).texts() == []
    told = ["a", "\udc80", "", "嘉祺"]
    writer.texts(tuple(told))
    assert RunLog.open(tmp_path).texts() == told
    (tmp_path / "texts.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"texts\.json holds no list of texts"):
        RunLog.open(tmp_path).texts()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    writer = write(tmp_path, [10], rows_at=[10])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        writer.rows(10, {"classes": torch.ones(V)})
    with pytest.raises(OSError, match="disk full"):
        RunWriter(tmp_path).start({}, WATCH, GROUPS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_check_says_how_long_the_run_will_be_or_why_that_is_not_forecast(tmp_path):
    writer = RunWriter(tmp_path)
    writer.start({}, WATCH, GROUPS)
    writer.check(check(10, forecast=NotApplicable("no schedule is known")))
    writer.check(check(20, forecast=Forecast(20, 500, *torch.rand(4, V))))
    said = [line["forecast"] for line in RunLog.open(tmp_path).checks()]
    assert said == [{"not_applicable": "no schedule is known"}, {"total": 500}]


def test_row_vectors_by_name_and_dtype():
    result = check(10, probe=probe())
    group, live = torch.zeros(V, dtype=torch.uint8), torch.ones(V, dtype=torch.bool)
    vectors = row_vectors(result, group, live)
    assert {name: (tuple(one.shape), one.dtype) for name, one in vectors.items()} == {
        "group": ((V,), torch.uint8),
        "live": ((V,), torch.bool),
        "classes": ((V,), torch.uint8),
        **{f"head/{name}": ((V,), torch.float32) for name in ("cosine", "residual", "l2", "norm_ratio")},
        **{f"exposure/{name}": ((V,), torch.int64) for name in ("inputs", "data_target", "echo_target", "last_target")},
        **{f"exposure/{name}": ((V,), torch.float32) for name in ("pull", "push", "input_only")},
        "probe/ids": ((2,), torch.int64),
        "probe/said": ((2, 2), torch.bool),
        "probe/instead": ((2, 2), torch.int64),
        "probe/probability": ((2, 2), torch.float32),
    }
    assert vectors["head/l2"] is result.head.l2
    assert vectors["probe/said"].tolist() == [[True, True], [False, False]]
    nothing = check(10, head=NotApplicable("no head"), exposure=NotApplicable("off"))
    assert set(row_vectors(nothing, group, live)) == {"group", "live", "classes"}


def test_rows_come_back_exactly_even_from_shared_memory(tmp_path):
    writer = write(tmp_path, [10, 20])
    shared = torch.rand(V, 2)
    for step in (20, 5):
        writer.rows(step, {"left": shared[:, 0] * step, "same": shared, "view": shared[:, 1], "again": shared.T[1]})
    log = RunLog.open(tmp_path)
    assert log.row_steps == (5, 20)
    assert torch.equal(log.rows()["left"], shared[:, 0] * 20)
    assert torch.equal(log.rows(5)["left"], shared[:, 0] * 5)
    assert torch.equal(log.rows(5)["view"], log.rows(5)["again"])
    assert torch.equal(log.rows(5)["same"], shared)
    with pytest.raises(ValueError, match=r"no rows of step 7; there are rows of steps \[5, 20\]"):
        log.rows(7)


def test_a_run_without_checks_yet_is_empty(tmp_path):
    write(tmp_path, [])
    log = RunLog.open(tmp_path)
    assert (log.checks(), log.alerts(), log.row_steps) == ([], [], ())
    with pytest.raises(ValueError, match=r"no rows of step None; there are rows of steps \[\]"):
        log.rows()


@pytest.mark.parametrize("key", ["head/below_0.95", "vocabguard/head/below_0.95"])
def test_one_scalar_over_the_run(tmp_path, key):
    writer = write(tmp_path, [10, 20])
    writer.check(check(30, scalars={"vocabguard/loss": 1.0}))
    log = RunLog.open(tmp_path)
    assert log.scalar(key) == ([10, 20], [0.01, 0.02])
    steps, values = log.scalar("overhead")
    assert steps == [10, 20]
    assert all(math.isnan(value) for value in values)
    with pytest.raises(KeyError, match=r"'head/below_95'; did you mean 'head/below_0.95'"):
        log.scalar("head/below_95")
    with pytest.raises(KeyError, match=r"logged are \['head/below_0.95', 'loss', 'overhead'\]"):
        log.scalar("zzz")


@pytest.mark.parametrize(
    "attempts", [[[10, 20, 30], [40, 50]], [[10, 20, 30], [20, 30, 40, 50]], [[10, 20], [], [20, 30, 40, 50]]]
)
def test_stop_and_resume_reads_like_an_uninterrupted_run(tmp_path, attempts):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write(whole, [10, 20, 30, 40, 50], fire_at=[20, 50], rows_at=[30, 50])
    for steps in attempts:
        write(parts, steps, fire_at=[20, 50], rows_at=[30, 50])
    one, other = RunLog.open(whole), RunLog.open(parts)
    assert [line | {"attempt": 0} for line in other.checks()] == one.checks()
    assert other.alerts() == one.alerts()
    assert other.row_steps == one.row_steps == (30, 50)
    assert other.scalar("head/below_0.95") == one.scalar("head/below_0.95")
    assert len(other.meta["resumed"]) == len(attempts) - 1


def test_what_an_abandoned_attempt_found_later_is_not_shown(tmp_path):
    write(tmp_path, [10, 20, 30, 40], fire_at=[10, 40], rows_at=[10, 40])
    write(tmp_path, [20])
    log = RunLog.open(tmp_path)
    assert [line["step"] for line in log.checks()] == [10, 20]
    assert [alert.step for alert in log.alerts()] == [10]
    assert log.row_steps == (10,)
    assert len((tmp_path / "checks.jsonl").read_bytes().splitlines()) == 5, "nothing is ever taken out of the file"


def test_resume_keeps_the_start_and_takes_the_new_settings(tmp_path):
    write(tmp_path, [])
    created, path = RunLog.open(tmp_path).meta["created"], tmp_path / "run.json"
    path.write_text(path.read_text(encoding="utf-8").replace(created, "2000-01-01T00:00:00+00:00"), encoding="utf-8")
    RunWriter(tmp_path).start({"seed": 4}, WATCH, GROUPS)
    meta = RunLog.open(tmp_path).meta
    assert meta["created"].startswith("2000")
    assert meta["config"] == {"seed": 4}


@pytest.mark.parametrize(
    "torn", ['{"attempt": 0, "step": 99, "sca', '{"attempt": 0, "worst": "\u5609'.encode()[:-1], "{"]
)
def test_a_torn_last_line_is_survived_by_readers_and_by_a_resume(tmp_path, torn):
    write(tmp_path, [10, 20], fire_at=[10])
    for name in ("checks.jsonl", "alerts.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn if isinstance(torn, bytes) else torn.encode())
    assert [line["step"] for line in RunLog.open(tmp_path).checks()] == [10, 20]
    assert [alert.step for alert in RunLog.open(tmp_path).alerts()] == [10]
    write(tmp_path, [30], fire_at=[30])
    assert [line["step"] for line in RunLog.open(tmp_path).checks()] == [10, 20, 30]
    assert [alert.step for alert in RunLog.open(tmp_path).alerts()] == [10, 30]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    write(tmp_path, [10, 20])
    path = tmp_path / "checks.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert [line["step"] for line in RunLog.open(tmp_path).checks()] == [10, 20]
    write(tmp_path, [30])
    assert [line["step"] for line in RunLog.open(tmp_path).checks()] == [10, 20, 30]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    write(tmp_path, [10])
    with (tmp_path / "checks.jsonl").open("a") as file:
        file.write("{broken\n{}\n")
    with pytest.raises(ValueError, match=r"checks\.jsonl has a line, not its last, that is not JSON"):
        RunLog.open(tmp_path).checks()


def test_a_newer_schema_is_refused_by_reader_and_writer(tmp_path):
    write(tmp_path, [10])
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"schema": SCHEMA + 1}))
    for use in (lambda: RunLog.open(tmp_path), lambda: RunWriter(tmp_path).start({}, WATCH, GROUPS)):
        with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}; this version of vocabguard reads schema {SCHEMA}"):
            use()


@pytest.mark.parametrize("content", ["", "[]", "{}", "{broken"])
def test_another_run_json_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is not a vocabguard run"):
        RunLog.open(tmp_path)


def test_a_run_of_another_tokenizer_is_not_gone_on_with(tmp_path):
    write(tmp_path, [10])
    with pytest.raises(ValueError, match=r"groups \['latin', 'ja'\]; this one has \['latin'\]"):
        write(tmp_path, [20], groups=["latin"])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a run folder; expected run\.json"):
        RunLog.open(tmp_path)


def test_writing_needs_a_start(tmp_path):
    for use in (lambda: RunWriter(tmp_path).check(check(10)), lambda: RunWriter(tmp_path).rows(10, {})):
        with pytest.raises(RuntimeError, match=r"call start\(\) before"):
            use()


def test_lines_in_another_order_say_the_same(tmp_path):
    """Steps are read off the beginning of each line, as the writer makes it, or else from the whole line."""
    meta = {"schema": SCHEMA, "config": {}, "watch": {}, "groups": []}
    (tmp_path / "run.json").write_text(json.dumps(meta))
    path = tmp_path / "checks.jsonl"
    steps = [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4), (2, 2), (2, 5)]
    kept = [(0, 1), (2, 2), (2, 5)]
    told = [{"attempt": attempt, "step": step, "scalars": {"x": step}} for attempt, step in steps]
    for turned in (0, 3, 7):
        lines = [dict(reversed(line.items())) if place < turned else line for place, line in enumerate(told)]
        for torn in ("", '{"attempt": 3, "step": 0, "scalars": {'):
            path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
            log = RunLog(tmp_path, meta)
            assert [(line["attempt"], line["step"]) for line in log.each_check()] == kept
            assert log.checks() == list(log.each_check())
