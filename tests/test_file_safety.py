"""What is on disk is whole, safe to open, and of a version that its reader knows."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from vocabguard.cli import main
from vocabguard.results import CheckResult, NotApplicable, Transition, Watch
from vocabguard.runlog import NOTES, SCHEMA, RunLog, RunWriter

TOP = Path(__file__).parents[1]
NONE = NotApplicable("not here")
WATCH = Watch(head=NONE, embedding=NONE, probe=NONE, preflight=NONE, live=0, never_trained=0, run_dir=None)
WRITER = "vocabguard/files.py"
"""The one module that writes files; elsewhere a library may write to what its `replacing` gives."""

# Of that module: one only adds to a file's end, the other writes to what `replacing` gives.
NOT_WHOLE = {"append_line", "write_lines"}


def sources() -> list[Path]:
    package = [path for path in (TOP / "vocabguard").rglob("*.py") if "integrations" not in path.parts]
    return sorted(package) + sorted((TOP / "integrations").glob("*.py"))


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def calls(node: ast.AST) -> list[ast.Call]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Call)]


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Calls and imports that could run code of a file."""
    found = []
    for call in calls(tree):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        of_torch = name_of(call) == "torch.load" and given.get("weights_only") != "True"
        if of_torch or given.get("allow_pickle") == "True":
            found.append(ast.unparse(call))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                each.name for each in node.names if each.name in ("pickle", "dill", "joblib", "marshal", "shelve")
            ]
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{each.name}" for each in node.names if each.name == "load"]
    return found


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file in place."""
    last = name_of(call).rpartition(".")[2]
    if last == "open":
        modes = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        modes += [
            word.value.value for word in call.keywords if word.arg == "mode" and isinstance(word.value, ast.Constant)
        ]
        return any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)
    return last in ("write_text", "write_bytes", "save_file") or name_of(call) == "torch.save"


def moves(call: ast.Call) -> bool:
    """Whether a call is `os.replace`, `os.rename` or a path's; `replace` of a text has two arguments."""
    name = name_of(call)
    return name in ("os.replace", "os.rename") or (name.endswith((".replace", ".rename")) and len(call.args) == 1)


def safe_names(function: ast.FunctionDef) -> set[str]:
    """Names that `replacing` gives within a function."""
    items = [item for node in ast.walk(function) if isinstance(node, ast.With) for item in node.items]
    return {
        item.optional_vars.id
        for item in items
        if isinstance(item.optional_vars, ast.Name) and ast.unparse(item.context_expr).startswith("replacing(")
    }


def bare_writes(tree: ast.AST) -> set[str]:
    """Functions that write a file in place, or move one into its place."""

    def bare(function: ast.FunctionDef) -> bool:
        safe = safe_names(function)
        written = [call for call in calls(function) if writes(call)]
        unsafe = [call for call in written if not safe & {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}]
        return bool(unsafe) or any(moves(call) for call in calls(function))

    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and bare(node)}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(TOP)))
def test_no_file_runs_code_and_none_is_seen_half_written(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # What processes of one run send each other, as torch's own broadcast of objects does, is no file.
    messages = ["pickle"] if str(path.relative_to(TOP)) == "vocabguard/collective.py" else []
    assert unsafe_loads(tree) == messages
    if str(path.relative_to(TOP)) != WRITER:
        assert bare_writes(tree) == set()


def test_no_exception_has_outlived_its_reason() -> None:
    found = {str(path.relative_to(TOP)): bare_writes(ast.parse(path.read_text(encoding="utf-8"))) for path in sources()}
    assert found.pop(WRITER) == NOT_WHOLE | {"replacing"}
    assert set().union(*found.values()) == set()


def test_those_rules_find_what_they_are_for() -> None:
    bad = "torch.load(p)\ntorch.load(p, weights_only=False)\nnp.load(p, allow_pickle=True)\nimport pickle"
    assert len(unsafe_loads(ast.parse(bad))) == 4
    assert unsafe_loads(ast.parse("torch.load(p, weights_only=True)")) == []
    for line in ("p.write_text(x)", "open(p, 'wb')", "p.open('w', encoding='utf-8')", "save_file(x, p)"):
        assert bare_writes(ast.parse(f"def f():\n    {line}")) == {"f"}, line
        assert bare_writes(ast.parse(f"def f():\n    with replacing(q) as p:\n        {line}")) == set()
        assert bare_writes(ast.parse(f"def f():\n    with replacing(q) as r:\n        {line}")) == {"f"}
    for line in ("os.replace(p, q)", "p.replace(q)"):
        assert bare_writes(ast.parse(f"def f():\n    {line}")) == {"f"}, line
    assert bare_writes(ast.parse("def f():\n    p.open('rb')\n    open(p)\n    text.replace(p, q)")) == set()


def started(folder: Path) -> RunWriter:
    writer = RunWriter(folder)
    writer.start({}, WATCH, ("latin",))
    return writer


def filled(folder: Path, step: int) -> RunWriter:
    """One line more in every file of lines."""
    writer = started(folder)
    alert = Transition("rule", "firing", "warning", "vocabguard/head/below_0.95", 0.1, step, "語")
    classes = torch.zeros(1, dtype=torch.uint8)
    writer.check(CheckResult(step, NONE, NONE, NONE, classes, None, {}, transitions=(alert,)))
    for kind in NOTES:
        writer.note(kind, step, {"text": "嘉祺"})
    return writer


def steps_of(folder: Path) -> dict[str, list[int]]:
    log = RunLog.open(folder)
    found = {kind: [line["step"] for line in log.notes(kind)] for kind in NOTES}
    return found | {"checks": [line["step"] for line in log.checks()], "alerts": [alert.step for alert in log.alerts()]}


@pytest.mark.parametrize("name", ["checks", "alerts", *NOTES])
def test_every_file_of_lines_may_end_anywhere(tmp_path: Path, name: str) -> None:
    """Its last line cut after each of its bytes: the lines before are read, and a resume writes whole lines again."""
    filled(tmp_path, 10)
    path = tmp_path / f"{name}.jsonl"
    before = path.read_bytes()
    filled(tmp_path, 20)
    whole = path.read_bytes()
    for end in range(len(before), len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps_of(tmp_path)[name] == [10]
        started(tmp_path)
        assert path.read_bytes() == before
    path.write_bytes(whole[:-1])
    assert steps_of(tmp_path)[name] == [10, 20]
    filled(tmp_path, 30)
    assert steps_of(tmp_path) == {
        kind: [10, 20, 30] if kind == name else steps for kind, steps in steps_of(tmp_path).items()
    }


def test_a_writer_killed_before_the_file_is_in_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither ``run.json`` nor rows are opened under their own name for writing."""
    writer = filled(tmp_path, 10)
    writer.rows(10, {"live": torch.ones(3, dtype=torch.bool)})
    before = {name: (tmp_path / name).read_bytes() for name in ("run.json", "rows-10.safetensors")}

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    for write in (lambda: started(tmp_path), lambda: writer.rows(10, {"live": torch.zeros(3, dtype=torch.bool)})):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert RunLog.open(tmp_path).rows(10)["live"].all()


def test_a_newer_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, 10)
    path = tmp_path / "run.json"
    newer = json.loads(path.read_text(encoding="utf-8")) | {"schema": SCHEMA + 1}
    path.write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}; .* reads schema {SCHEMA}"):
        RunLog.open(tmp_path)
    monkeypatch.setattr("sys.argv", ["vocabguard", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert f"has schema {SCHEMA + 1}; this version of vocabguard reads schema {SCHEMA}" in " ".join(said.err.split())
