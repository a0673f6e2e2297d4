"""The name under which this package is installed: the one that the index has as ``vocabguard`` is another author's."""

from __future__ import annotations

import re
import subprocess
import tomllib
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from vocabguard import installation

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
OTHER = re.compile(r"""(?x)
    \b(?: pip[0-9.]* | uv | uvx | pipx | poetry | pdm | conda ) \s+ (?: pip \s+ )?
    (?: install | add | run | tool \s+ (?: install | run ) )? (?: \s+ -{1,2} [\w-]+ )* [^\n`]*?
    (?<! [\w/.-] ) vocabguard (?! [\w/.-] )
""")
"""An install line in which ``vocabguard`` stands as a requirement."""
EXTRA = re.compile(r"(?<![\w-])vocabguard\[")


def texts() -> Iterator[tuple[str, str]]:
    found = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False).stdout.split()
    names = found or [str(path.relative_to(TOP)) for path in TOP.rglob("*") if path.is_file()]
    for name in names:
        read = Path(name).suffix in (".md", ".py", ".toml", ".txt", ".j2", ".yaml", ".yml", "")
        if read and (TOP / name).is_file() and Path(name) != Path(__file__).relative_to(TOP):
            yield name, (TOP / name).read_text(encoding="utf-8", errors="replace")


def fetches_the_other(line: str) -> bool:
    """Whether a line would install the other package."""
    if "uninstall" in line or not re.search(r"\b(install|add|uvx|pipx run|tool run)\b", line):
        return False
    return bool(OTHER.search(line) or EXTRA.search(line))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("pip install vocabguard", True),
        ("python -m pip install -U 'vocabguard[trl]'", True),
        ("uv pip install torch vocabguard", True),
        ("uv add vocabguard", True),
        ("uvx vocabguard scan", True),
        ('pip install -e ".[trl]"', False),
        ("pip install vocabulary_guard-0.1.0-py3-none-any.whl", False),
        ("pip install -e . && vocabguard scan BASE TUNED", True),  # two lines are clearer
        ("git clone https://example.org/vocabguard.git && pip install ./vocabguard", False),
        ("pip uninstall vocabguard vocabulary-guard", False),
    ],
)
def test_install_lines_are_told_apart(line: str, wrong: bool) -> None:
    assert fetches_the_other(line) is wrong


def test_no_line_installs_the_other_package() -> None:
    wrong = [f"{name}: {line}" for name, text in texts() for line in text.splitlines() if fetches_the_other(line)]
    assert wrong == []


def test_the_project_has_the_name_and_the_version_that_the_code_tells() -> None:
    project = PROJECT["project"]
    assert (project["name"], project["dynamic"]) == (installation.DISTRIBUTION, ["version"])
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vocabguard.installation.VERSION"}
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    assert [line for line in extras if line.startswith("vocabguard")] == []
    assert installation._OURS in project["keywords"]


def installed(folder: Path, keywords: str) -> Path:
    info = folder / "vocabguard-0.3.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vocabguard\nVersion: 0.3.1\nKeywords: {keywords}\n")
    return folder


def test_the_other_package_beside_this_one_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed(tmp_path / "other", "agents,lint,vocabulary")))
    assert installation.other_owner() == "vocabguard 0.3.1"
    with pytest.warns(UserWarning, match="overwrite each other's files.*pip uninstall vocabguard vocabulary-guard"):
        installation.warn_of_other_owner()


def test_this_package_under_its_old_name_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed(tmp_path / "old", "fine-tuning,token forgetting")))
    assert metadata.version("vocabguard") == "0.3.1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        installation.warn_of_other_owner()
