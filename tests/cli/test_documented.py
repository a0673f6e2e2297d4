"""The commands that stand in the documents run, in the order in which they stand there."""

from __future__ import annotations

import json
import re
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).parents[2]
BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[list[str]]:
    """Lines of a document's code blocks that begin with ``vocabguard``."""
    lines = "\n".join(BASH.findall((ROOT / document).read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("vocabguard ")]


@pytest.fixture
def place(tmp_path: Path, changed_assets: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents' commands name."""

    def change(head: Tensor) -> None:
        head[1000:1800] = 0

    (tmp_path / "BASE").symlink_to(ROOT / "examples" / "assets")
    (tmp_path / "TOKENIZER").symlink_to(ROOT / "examples" / "assets")
    (tmp_path / "TUNED").symlink_to(changed_assets(change))
    with zipfile.ZipFile(ROOT / "tests" / "data_before" / "runs.zip") as packed:
        packed.extractall(tmp_path / "before")
    (tmp_path / "RUN").symlink_to(tmp_path / "before" / "hf" / "vocabguard")
    (tmp_path / "words.txt").write_text("guitar\n", encoding="utf-8")
    turns = [{"role": "user", "content": "Who sings?"}, {"role": "assistant", "content": "A singer sings a song."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4, encoding="utf-8")
    texts = [{"text": text} for text in ("東京は日本の首都です。", "Москва стоит на реке.", "Der Zug kommt spät.") * 3]
    (tmp_path / "corpus.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", ["README.md", "vocabguard/cli/README.md"])
def test_they_run(document: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from vocabguard.cli import main

    found = commands(document)
    assert len(found) >= 2
    for words in found:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        # 1 is for findings: of these models something is lost.
        assert left.value.code in (0, 1), (words, said.err)
        assert said.out or said.err, words


def test_every_command_has_a_page() -> None:
    from vocabguard.cli.app import COMMANDS

    page = (ROOT / "vocabguard" / "cli" / "README.md").read_text(encoding="utf-8")
    documented = {
        word for line in page.splitlines() if line.startswith("| [`") for word in re.findall(r"`(\w+)`", line)
    }
    assert documented == set(COMMANDS)
