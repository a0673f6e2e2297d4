"""The command line says what is wrong in one line; `tests/benchmarks/cli_fuzz.py` asks for it in thousands of ways."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vocabguard.cli import app

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    """The benchmark's own module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.syspath_prepend(str(BENCHMARKS / "fuzz"))
        import cli_fuzz

        yield cli_fuzz


@pytest.fixture(scope="module")
def healthy(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = fuzz.prepared(tmp_path_factory.mktemp("healthy"))
    return found


@pytest.fixture
def work(fuzz: Any, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the healthy inputs, and the folder that commands run in."""
    fuzz.copied(healthy, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused with one line, and gives the line."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code, told = run(*arguments), capsys.readouterr()
        assert (code, told.out) == (2, ""), told
        (line,) = told.err.strip().splitlines()
        assert line.startswith("vocabguard: ")
        assert app.LAST_RESORT not in line
        return line

    return call


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_part_of_the_fuzz(fuzz: Any, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(fuzz.cases(seed=7, rounds=1))
    assert len(cases) >= 1000
    assert {case.command for case in cases} == set(app.COMMANDS)
    found, faults = {}, []
    for case in cases[::29]:
        folder = tmp_path / "work"
        fuzz.copied(healthy, folder)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            found[case.seed], told = fuzz.outcome(case, folder)
        if found[case.seed] in fuzz.FAULTS:
            faults.append((found[case.seed], case.argv, case.file, case.seed, told[-300:]))
        shutil.rmtree(folder)
    assert faults == []
    assert {"refused", "fine", "findings"} <= set(found.values())


def test_the_last_resort(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """What nobody foresaw is one line too, and its traceback is there for who asks."""

    def broken(*_args: Any, **_options: Any) -> Any:
        raise KeyError("a\nb")

    monkeypatch.setattr("vocabguard.rows.checkpoints.open_checkpoint", broken)
    assert run("scan", tmp_path, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "scan failed (KeyError: 'a\\nb')" in said
    assert "VOCABGUARD_TRACEBACK=1 shows where" in said
    monkeypatch.setenv("VOCABGUARD_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["vocabguard", "scan", str(tmp_path), str(tmp_path)])
    with pytest.raises(KeyError):
        app.main()


# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left", [("run.json",), ("run.json", "texts.json"), ("run.json", "checks.jsonl", "texts.json")]
)
def test_a_run_that_was_killed_before_its_first_rows(
    work: Path, run: Callable[..., int], left: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (work / "run").iterdir():
        if path.name not in left:
            path.unlink()
    code = run("report", work / "run", "--out", work / "page.html")
    told = capsys.readouterr()
    assert (work / "page.html").is_file()
    assert told.err == ""
    if "checks.jsonl" in left:
        assert code == 1
    else:
        assert code == 0
        assert "No check was logged: nothing is known about this run." in told.out


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_probe_whose_parts_do_not_fit(work: Path, command: str, run: Callable[..., int], capsys: Any) -> None:
    file = work / "probe.safetensors"
    with safe_open(file, "pt") as opened:
        header, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    texts = json.dumps([True] * len(json.loads(header["texts"])))
    save_file(tensors, file, metadata={**header, "texts": texts})
    assert run(command, file) == 2
    told = capsys.readouterr().err
    assert "its parts do not fit each other" in told
    assert app.LAST_RESORT not in told


@pytest.mark.parametrize("name", ["run.json", "checks.jsonl", "texts.json", "rows-4.safetensors", "alerts.jsonl"])
def test_a_fifo_in_a_run_folder(work: Path, refused: Callable[..., str], name: str, run: Callable[..., int]) -> None:
    (work / "run" / name).unlink()
    os.mkfifo(work / "run" / name)
    if name == "texts.json":  # a run may have none
        assert run("report", work / "run", "--json") in (0, 1)
    else:
        refused("report", work / "run", "--json")


# -- paths -------------------------------------------------------------------------------------------------------------


def test_paths(work: Path, refused: Callable[..., str]) -> None:
    assert "no path that can be followed" in refused("scan", "~nobody_at_all/model", work / "base")
    assert "loop" in refused("scan", work / "base", work / "loop").lower()
    assert "a b" in refused("scan", work / "a\nb", work / "base")
    assert "loop" in refused("repair", work / "base", work / "tuned", "--out", work / "loop").lower()
    for empty in ("--tokenizer", "--coverage", "--run", "--head", "--embedding"):
        refused("scan", work / "base", work / "tuned", empty, "")
    refused("scan", work / "base", work / "tuned", "--out", "")
    refused("report", "")
    refused("coverage", "", work / "data")
    refused("coverage", work / "tok", "")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_fifo_for_a_config(work: Path, run: Callable[..., int], name: str) -> None:
    (work / "tuned" / name).unlink()
    os.mkfifo(work / "tuned" / name)
    began = time.monotonic()
    for line in ("scan base tuned --json", "explain base tuned 5", "coverage tuned data", "echo tuned --ids x.jsonl"):
        assert run(*line.split()) in (0, 1, 2)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("option", ["--coverage", "--run", "--tokenizer"])
def test_a_fifo_for_an_option(work: Path, refused: Callable[..., str], option: str) -> None:
    os.mkfifo(work / "fifo.safetensors")
    refused("scan", work / "base", work / "tuned", option, work / "fifo.safetensors")
    refused("scan", work / "base", work / "tuned", option, work / "fifo")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "compressed", "meta", "quantised", "complex", "nested"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_rows_in_memory(work: Path, refused: Callable[..., str], fuzz: Any, kind: str) -> None:
    state = {"lm_head.weight": fuzz.ways.CKPT[kind](), "model.embed_tokens.weight": torch.randn(96, 16)}
    torch.save({"state_dict": state}, work / "last.ckpt")
    said = refused("scan", work / "base", work / "last.ckpt")
    assert "lm_head.weight" in said or "torch.load" in said


CONFIGS: dict[str, dict[str, Any]] = {
    "no regex": {"alpha_pattern": {"(": 2}},
    "an endless regex": {"alpha_pattern": {"(l|lm|m|_|h|he|e|a|ad|d)+(l|lm|m|_|h|he|e|a|ad|d)+x": 2}},
    "a list of patterns": {"alpha_pattern": ["lm_head"]},
    "alpha is a text": {"lora_alpha": "4"},
    "alpha is not a number": {"lora_alpha": float("nan")},
    "alpha is infinite": {"lora_alpha": float("inf")},
    "alpha is huge": {"lora_alpha": 10**400},
    "alpha of a pattern is null": {"alpha_pattern": {"lm_head": None}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_adapters(work: Path, refused: Callable[..., str], name: str, run: Callable[..., int]) -> None:
    path = work / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | CONFIGS[name]), encoding="utf-8")
    began = time.monotonic()
    if name == "an endless regex":  # it is none here: what it does not fit in a second is refused
        assert run("scan", work / "base", work / "lora") in (1, 2)
    else:
        assert "alpha" in refused("scan", work / "base", work / "lora") or name == "alpha is huge"
    assert time.monotonic() - began < 20


PARTS: dict[str, dict[str, torch.Tensor]] = {
    "rank 0": {"lora_A.weight": torch.zeros(0, 16), "lora_B.weight": torch.zeros(96, 0)},
    "lengths of another shape": {"lora_magnitude_vector": torch.ones(5)},
    "lengths of columns": {"lora_magnitude_vector": torch.ones(16)},
    "lengths are a matrix": {"lora_magnitude_vector": torch.ones(96, 1)},
    "a flat part": {"lora_A.weight": torch.zeros(16)},
    "a number": {"lora_B.weight": torch.tensor(1.0)},
}


@pytest.mark.parametrize("name", PARTS)
def test_damaged_parts_of_an_adapter(work: Path, refused: Callable[..., str], name: str) -> None:
    parts = {"lora_A.weight": torch.randn(2, 16), "lora_B.weight": torch.randn(96, 2)} | PARTS[name]
    save_file({f"base_model.model.lm_head.{key}": part for key, part in parts.items()},
              work / "lora" / "adapter_model.safetensors")  # fmt: skip
    assert "LoRA" in refused("scan", work / "base", work / "lora")


def test_a_header_of_400_000_names_takes_seconds(tmp_path: Path, run: Callable[..., int]) -> None:
    entries: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [24, 8], "data_offsets": [768 * place, 768 * place + 768]}
        for place, name in enumerate(("lm_head.weight", "model.embed_tokens.weight"))
    }
    for i in range(400_000):
        at = 1536 + 4 * i
        name = f"model.layers.{i // 100}.mlp.experts.{i % 100}.weight"
        entries[name] = {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]}
    header = json.dumps(entries).encode()
    content = struct.pack("<Q", len(header)) + header + torch.randn(384).numpy().tobytes() + b"\0" * 1_600_000
    (tmp_path / "model.safetensors").write_bytes(content)
    began = time.process_time()
    assert run("scan", tmp_path / "model.safetensors", tmp_path / "model.safetensors", "--json") == 0
    assert time.process_time() - began < 60  # each of them is read


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="templates are tried in a process of their own")
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 10**11 }}", "takes more than 1 GiB"),
        ("{% for m in messages %}{{ m.content | center(10**10) }}{% endfor %}", "takes more than 1 GiB"),
        ("{{ 9**(9**9) }}", "takes more than 4 s"),
    ],
)
def test_templates_that_take_everything(
    work: Path, refused: Callable[..., str], template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vocabguard.compare.trial._SECONDS", 4)
    (work / "template.jinja").write_text(template, encoding="utf-8")
    assert said in refused("coverage", work / "tok", work / "data", "--chat-template", work / "template.jinja")


def test_numbers_that_are_none(work: Path, refused: Callable[..., str], run: Callable[..., int]) -> None:
    """Some versions of the parser of options refuse them by themselves."""
    for line in (
        "report run --threshold nan", "report run --threshold-forgotten nan", "scan base tuned --threshold nan",
        "repair base tuned --out new --strength nan", "repair base tuned --out new --cosine-below nan",
    ):  # fmt: skip
        assert run(*line.split()) == 2
        assert not (work / "new").exists()
    most = "99999999999999999999"
    for option in ("--max-length", "--epochs", "--workers"):
        assert f"{option} is {most}; allowed: at most" in refused("coverage", work / "tok", work / "data", option, most)


# -- standard output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize(
    "line",
    [
        "scan base tuned", "scan base tuned --json", "explain base tuned a 5 --no-ask", "report run",
        "coverage tok data/chats.jsonl", "coverage tok data/chats.jsonl --json",
    ],
)  # fmt: skip
def test_an_output_that_lacks_characters(work: Path, line: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["vocabguard", *line.split()])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code in (0, 1, None)
    assert out.errors == "strict"
    out.flush()
    said = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    if "--json" in line:
        assert json.loads(said)


@pytest.mark.slow
@pytest.mark.parametrize("redirect", [">&-", "| true", "2>&-", "< /dev/null >&- 2>&-"])
def test_outputs_that_are_closed(work: Path, redirect: str) -> None:
    code = f"{sys.executable} -c 'from vocabguard.cli.app import main; main()' scan base tuned {redirect}"
    done = subprocess.run(["bash", "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr + done.stdout
