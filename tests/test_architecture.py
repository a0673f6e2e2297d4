"""The layers hold: who may import whom, and what the package brings along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FLOORS = {
    "transitions": 0, "forecasts": 0, "results": 0, "jsonlines": 1, "settings": 0, "settings_protect": 0,
    "settings_alerts": 0, "config": 0, "collective": 1,
    "vocabulary": 1, "reachability": 1, "models": 1, "adapted": 1, "sharded": 1, "matrices": 1, "snapshot": 2,
    "measure": 3, "runlog": 3, "prompts": 4, "alerts": 4, "protect": 4, "views": 5, "offline": 5,
    "guard": 6, "cli": 7, "integrations": 7,
}  # fmt: skip
READS_CONFIG = {"config", "settings", "settings_alerts", "guard", "cli", "integrations", "__init__"}


def modules() -> list[Path]:
    package = [path for path in (TOP / "vocabguard").rglob("*.py") if "integrations" not in path.parts]
    return sorted(package) + sorted((TOP / "integrations").glob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(TOP).parts
    return parts[1].removesuffix(".py") if parts[0] == "vocabguard" else "integrations"


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a module imports, those for type checking only left out."""
    rooms = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "vocabguard":
            rooms |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vocabguard."):
            rooms.add(node.module.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(TOP)))
def test_layers(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for other in imported_rooms(path):
        assert FLOORS[other] <= FLOORS[room], f"{room} imports {other}, a floor above it"
        if other in ("config", "settings", "settings_protect", "settings_alerts"):
            assert room in READS_CONFIG, f"{room} reads the configuration; it takes plain values"


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


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(TOP)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
