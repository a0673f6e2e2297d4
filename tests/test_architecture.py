"""The house holds: layers, no circles, no families of files, one name for one thing, files that stay short."""

from __future__ import annotations

import ast
import collections
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import vocabguard

TOP = Path(__file__).parents[1]
FLOORS = {
    "installation": 0,
    "config": 1, "settings": 1, "results": 1, "vocabulary": 1, "text": 2, "files": 2, "collective": 2,
    "rows": 3, "runlog": 3, "measure": 4, "alerts": 5, "protect": 5, "views": 6, "data": 6, "served": 6,
    "compare": 7, "report": 8,
    "guard": 9, "integrations": 10,
    "cli": 11,  # `repair --method echo` trains with the guard's own callback
}  # fmt: skip
READS_CONFIG = {"config", "settings", "guard", "cli", "integrations", "__init__"}
TWO_HOMES = {
    "scan": "the command bears the name of the function that does its work",
    "probe": "the command bears the name of the function that does its work",
    "VocabGuardCallback": "one name in both trainers, told apart by the module",
}
"""Public names that two modules define, and why."""

SET_FROM_OUTSIDE = {
    # What trainers and other libraries are told by.
    "control.should_save", "control.should_training_stop", "control.should_log", "trainer.should_stop",
    "loader.collate_fn", "loaded.chat_template", "environment.filters", "self._backend.encode_special_tokens",
    "module.training", "model.dropout", "model.ignore_merges", "stand.defaults", "moved.optimizer", "moved._step_count",
    "moved._schedulers",
    # Records of the module that sets them: the process group's state, a reader's place, counts of turns.
    "line.opened", "line.failed", "line.sent", "behind.rows",
    "loop.body",  # of a parsed chat template, which gets marks
    "record.length",
}  # fmt: skip


def modules() -> list[Path]:
    package = [path for path in (TOP / "vocabguard").rglob("*.py") if "integrations" not in path.parts]
    return sorted(package) + sorted((TOP / "integrations").rglob("*.py"))


def name_of(path: Path) -> str:
    """``vocabguard.measure.drift`` of its file."""
    parts = path.relative_to(TOP).with_suffix("").parts
    parts = parts if parts[0] == "vocabguard" else ("vocabguard", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    """The folder or file right below the package."""
    parts = name_of(path).split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, in functions and for type checking too."""
    known = {name_of(other) for other in modules()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vocabguard":
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= names & known | ({node.module} if names - known else set())
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "vocabguard"}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(TOP)))
def test_layers(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for other in imports_of(path):
        there = other.split(".")[1]
        assert FLOORS[there] <= FLOORS[room], f"{room} imports {other}, a floor above it"
        if there in ("config", "settings"):
            assert room in READS_CONFIG, f"{room} reads the configuration; it takes plain values"


def test_no_circle() -> None:
    graph = {name_of(path): imports_of(path) - {name_of(path)} for path in modules()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_families_of_files() -> None:
    """Three files that share a prefix are a folder."""
    families = collections.Counter((path.parent, path.stem.split("_")[0]) for path in modules() if path.stem[0] != "_")
    assert {f"{folder}/{prefix}": count for (folder, prefix), count in families.items() if count > 2} == {}


def test_one_home_for_a_public_name() -> None:
    homes = collections.defaultdict(set)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                homes[node.name].add(name_of(path))
    assert {name: where for name, where in homes.items() if len(where) > 1 and name not in TWO_HOMES} == {}
    assert all(len(homes[name]) > 1 for name in TWO_HOMES), "an exception that is none any more"


def set_from_outside(path: Path) -> set[str]:
    """Attributes that a file sets of anything but `self`, as ``owner.attribute``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (one for group in targets for one in (group.elts if isinstance(group, ast.Tuple) else [group])):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) not in ("self", "cls"):
                found.add(ast.unparse(target))
    return found


def test_nobody_sets_another_objects_attribute() -> None:
    found = {one for path in modules() for one in set_from_outside(path)}
    assert found <= SET_FROM_OUTSIDE, found - SET_FROM_OUTSIDE
    assert found >= SET_FROM_OUTSIDE, "an exception that is none any more"


def test_public_face_is_small_and_brings_no_trainer() -> None:
    code = (
        "import sys, vocabguard; "
        "assert len(vocabguard.__all__) <= 15; "
        "assert all(hasattr(vocabguard, name) for name in vocabguard.__all__); "
        "assert 'lightning' not in sys.modules, 'lightning'; "
        "assert 'transformers.trainer' not in sys.modules, 'transformers.trainer'; "
        "assert 'integrations' not in sys.modules, 'integrations'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TOP)


UNTRIED = {"sums_loop", "moved_loop", "finish_loop", "sums_by_numba"}
"""Public functions of `measure` without an example: they need numba, which is optional."""


def test_what_is_public_can_be_tried_where_it_is_documented() -> None:
    face = {name: getattr(vocabguard, name) for name in vocabguard.__all__ if name != "__version__"}
    assert [name for name, one in face.items() if ">>>" not in (one.__doc__ or "")] == []
    functions = [
        node
        for path in (TOP / "vocabguard" / "measure").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert {node.name for node in functions if ">>>" not in (ast.get_docstring(node) or "")} == UNTRIED


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(TOP)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 800} == {}
    assert statistics.median(lengths.values()) <= 200
