"""Lines of strict JSON, and the findings beside the checks that a run folder keeps in them."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vocabguard.files import append_line, mend, plain, read_lines, write_file
from vocabguard.results import CheckResult, NotApplicable, Watch
from vocabguard.runlog import NOTES, RunLog, RunWriter

NONE = NotApplicable("not here")
WATCH = Watch(head=NONE, embedding=NONE, probe=NONE, preflight=NONE, live=0, never_trained=0, run_dir=None)


def started(folder: Path) -> RunWriter:
    writer = RunWriter(folder)
    writer.start({}, WATCH, ("latin",))
    return writer


def check(writer: RunWriter, step: int) -> None:
    writer.check(CheckResult(step, NONE, NONE, NONE, torch.zeros(1, dtype=torch.uint8), None, {}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor(2), 2),
        (torch.zeros(2, 3, dtype=torch.bool), {"shape": [2, 3], "dtype": "torch.bool"}),
        (NONE, {"not_applicable": "not here"}),
        ({3: (True, None)}, {"3": [True, None]}),
        (Path("a/b"), "a/b"),
    ],
)
def test_what_json_can_hold(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)


def test_any_text_survives_and_a_torn_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"text": "嘉祺 \n \ud800"})
    assert read_lines(path) == [{"text": "嘉祺 \n \ud800"}]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": "to')
    assert len(read_lines(path)) == 1
    mend(path)
    append_line(path, {"n": 1})
    assert [list(line) for line in read_lines(path)] == [["text"], ["n"]]
    path.write_bytes(path.read_bytes()[:-1])
    mend(path)
    assert path.read_bytes().endswith(b"}\n"), "a whole line that lacks only its end is kept"
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_notes_come_back_in_order(tmp_path: Path) -> None:
    writer = started(tmp_path)
    writer.note("confusion", 10, {"shares": {"ja": 0.25, "ko": math.nan}})
    writer.note("confusion", 20, {"shares": {"ja": 0.5}})
    writer.note("neighbors", 20, {"id": 3})
    log = RunLog.open(tmp_path)
    assert log.notes("confusion") == [
        {"attempt": 0, "step": 10, "shares": {"ja": 0.25, "ko": None}},
        {"attempt": 0, "step": 20, "shares": {"ja": 0.5}},
    ]
    assert [line["id"] for line in log.notes("neighbors")] == [3]
    assert log.notes("head_or_body") == []
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "confusion.jsonl", "neighbors.jsonl"}
    for line in (tmp_path / "confusion.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_notes_of_an_abandoned_attempt_are_not_shown(tmp_path: Path) -> None:
    writer = started(tmp_path)
    for step in (10, 20, 30):
        check(writer, step)
        writer.note("confusion", step, {"from": "first"})
    with (tmp_path / "confusion.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"torn')
    writer = started(tmp_path)  # resumed at step 15
    check(writer, 20)
    writer.note("confusion", 20, {"from": "second"})
    shown = [(line["step"], line["from"]) for line in RunLog.open(tmp_path).notes("confusion")]
    assert shown == [(10, "first"), (20, "second")]


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"call start\(\) before"):
        RunWriter(tmp_path).note("confusion", 1, {})
    started(tmp_path)
    with pytest.raises(ValueError, match=f"kind is 'checks'; allowed: {', '.join(NOTES)}"):
        RunLog.open(tmp_path).notes("checks")


# -- what is written over ----------------------------------------------------------------------------------------------


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    kept = tmp_path / "there" / "kept.txt"
    kept.write_text("before", encoding="utf-8")
    for name, target in {"link.txt": kept, "second.txt": "link.txt", "new.txt": tmp_path / "there" / "new.txt"}.items():
        (tmp_path / name).symlink_to(target)
        write_file(tmp_path / name, f"by {name}")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text(encoding="utf-8") == f"by {name}"
    assert kept.read_text(encoding="utf-8") == "by second.txt"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["kept.txt", "new.txt"]
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("before", encoding="utf-8")
    path.chmod(mode)
    write_file(path, "after")
    assert path.read_text(encoding="utf-8") == "after"
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_is_refused_and_stays(tmp_path: Path, linked: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    path = tmp_path / "link" if linked else fifo
    if linked:
        path.symlink_to(fifo)
    with pytest.raises(OSError, match="is a FIFO, not a regular file"):
        write_file(path, "after")
    assert fifo.is_fifo()
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted({"fifo", path.name})


@pytest.mark.parametrize(
    ("kind", "said"), [(stat.S_IFCHR, "device"), (stat.S_IFBLK, "device"), (stat.S_IFSOCK, "socket")]
)
def test_a_device_is_refused(tmp_path: Path, kind: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device of this machine is touched: a file says that it is one."""
    path = tmp_path / "device"
    path.write_text("before", encoding="utf-8")
    real = Path.stat

    def told(self: Path, **options: Any) -> Any:
        found = real(self, **options)
        return os.stat_result((kind | 0o666, *found[1:])) if self.name == "device" else found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", told)
        with pytest.raises(OSError, match=f"is a {said}, not a regular file"):
            write_file(path, "after")
    assert path.read_text(encoding="utf-8") == "before"


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "one", "after")
    assert (tmp_path / "one").is_symlink()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is a folder, not a regular file"):
        write_file(tmp_path, "after")


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 255, "嘉" * 85):
        write_file(tmp_path / name, "after")
        assert (tmp_path / name).read_text(encoding="utf-8") == "after"
