"""Manners of the command line: version, help, completion, choices, colours, pipes, Ctrl-C, what comes next."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vocabguard
from vocabguard.cli import models
from vocabguard.cli.app import COMMANDS, INTERRUPTED, InputError, build, command_in, main
from vocabguard.cli.show import sparkline

TOP = Path(__file__).parents[2]
ASSETS = TOP / "examples" / "assets"
START = [sys.executable, "-c", "from vocabguard.cli import main; main()"]


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VOCABGUARD", "_VOCAB"))}
    return inherited | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1", "COLUMNS": "100"} | more


def command(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    line = [*START, *map(str, arguments)]
    return subprocess.run(line, env=environment(**more), capture_output=True, text=True, check=False)


def invoke(name: str, *arguments: object) -> Any:
    return CliRunner().invoke(build((name,)), [name, *map(str, arguments)])


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    done = command(flag)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vocabguard {vocabguard.__version__}\n", "")


def test_help_lists_every_command_with_its_line() -> None:
    short, long = command("-h"), command("--help")
    assert (short.returncode, short.stdout) == (0, long.stdout)
    text = " ".join(long.stdout.replace("│", " ").split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in text
    assert "1 findings over a threshold" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_takes_h_and_tells_its_exit_codes(name: str) -> None:
    done = invoke(name, "-h")
    assert done.exit_code == 0
    assert name == "run" or "Exit code 0" in " ".join(done.output.split())
    function = getattr(importlib.import_module(f"vocabguard.cli.{name}"), name)
    assert (inspect.getdoc(function) or "").split("\n")[0].endswith(".")


def test_a_wrong_name_is_answered_with_the_right_one() -> None:
    done = command("scna")
    assert done.returncode == 2
    assert "Did you mean 'scan'?" in done.stderr


def completed(words: str) -> list[str]:
    done = command(
        _VOCABGUARD_COMPLETE="complete_bash", COMP_WORDS=f"vocabguard {words}", COMP_CWORD=str(len(words.split(" ")))
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_choices() -> None:
    assert completed("re") == ["replay", "repair", "report"]
    assert {"--tokenizer", "--threshold", "--top"} <= set(completed("scan --t"))
    assert completed("coverage A b.jsonl --rank m") == ["merges"]
    assert "complete" in command("--show-completion", "bash", SHELL="/bin/bash").stdout.lower()


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("coverage", "--trainer", "trl|transformers"), ("coverage", "--loss", "assistant|completion|all"),
        ("repair", "--method", "shift|rows|echo|auto"), ("probe", "--ask-by", "echo|chat|text"),
        ("coverage", "--kind", "messages, completion, text"),
        ("scan", "--dtype", "auto, float32, bfloat16, float16"),
    ],
)  # fmt: skip
def test_choices_are_shown_as_choices(name: str, option: str, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", invoke(name, "--help").output).split())
    assert re.search(f"{option} .{{0,200}}{re.escape(values)}", text), text


_AFTER_HELP = """
import json, pathlib, re, sys
from vocabguard.cli import main
try:
    main()
except SystemExit as left:
    heavy = [name for name in ("torch", "numpy", "transformers", "safetensors", "jinja2") if name in sys.modules]
    status = pathlib.Path("/proc/self/status")
    peak = re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1] if status.exists() else 0
    print(json.dumps([left.code, heavy, int(peak)]), file=sys.stderr)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_needs_no_torch(name: str) -> None:
    """Help answers at once: what a command works with is imported when it works."""
    line = [sys.executable, "-c", _AFTER_HELP, name, "--help"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    code, heavy, kilobytes = json.loads(done.stderr)
    assert (code, heavy) == (0, [])
    assert f"vocabguard {name}" in done.stdout
    assert kilobytes < 60 * 1024


def test_the_command_of_a_line() -> None:
    assert command_in(["-V", "report", "scan"]) == "report"
    assert command_in([]) is None


@pytest.fixture
def pair(changed_assets: Callable[..., Path]) -> Path:
    return changed_assets(lambda rows: rows[300:900].mul_(-1))


def test_colours_only_where_they_are_wanted(pair: Path) -> None:
    scan = ("scan", ASSETS, pair, "--no-body")
    assert "\x1b[" not in command(*scan).stdout, "a pipe"
    assert "\x1b[3" in command(*scan, FORCE_COLOR="1").stdout
    assert "\x1b[3" not in command(*scan, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_a_reader_that_leaves_early_is_no_fault(pair: Path) -> None:
    line = [*START, "scan", str(ASSETS), str(pair), "--no-body", "--top", "500"]
    with subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "fault of vocabguard" not in errors


def test_ctrl_c_is_not_a_finding(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130 in the midst of work: 1 would mean findings."""
    monkeypatch.setattr("vocabguard.compare.scan.scan", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.argv", ["vocabguard", "scan", str(ASSETS), str(pair)])
    # Shells let programs in the background ignore it, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == INTERRUPTED


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    line = [*START, "scan", "none", "none"]
    with subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (INTERRUPTED, 2), errors
    assert "Traceback" not in errors


def test_a_scan_ends_with_the_next_commands(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    done = invoke("scan", ASSETS, pair, "--no-body", "--out", out)
    assert done.exit_code == 1
    ends = done.output.partition("\nNext:\n")[2]
    assert f"vocabguard probe {pair} {ASSETS}" in ends
    assert re.search(rf"vocabguard explain {ASSETS} {pair} \d+ \d+ \d+\n", ends)
    assert f"vocabguard report {out}" in ends
    assert "Next" not in invoke("scan", ASSETS, pair, "--no-body", "--json").stdout


def test_a_trainers_output_folder_stands_for_its_newest_checkpoint(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for step in (20, 100):
        shutil.copytree(pair, output / f"checkpoint-{step}")
    assert models.model_path(str(output)) == str(output / "checkpoint-100")
    assert "the newest checkpoint in it is" in capsys.readouterr().err
    assert models.model_path(str(pair)) == str(pair)
    assert models.model_path(str(tmp_path)) == str(tmp_path), "no checkpoint: what it is, the command tells"
    weights = output / "checkpoint-100" / "model.safetensors"
    before = weights.read_bytes()
    refused = invoke("scan", ASSETS, output, "--no-body", "--out", weights)
    assert "is read here, and would be lost" in str(refused.exception)
    assert weights.read_bytes() == before
    done = invoke("scan", ASSETS, output, "--no-body", "--json")
    assert json.loads(done.stdout)["tuned"].endswith("checkpoint-100")


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        if name == "org/gone":
            raise OSError("404")
        return str(ASSETS)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.model_path("org/model") == str(ASSETS)
    assert models.tokenizer_path("org/model") == str(ASSETS)
    assert "*.safetensors" in calls[0][1]
    assert "*.safetensors" not in calls[1][1]
    with pytest.raises(InputError, match="org/gone: there is no such path, and the Hugging Face hub has no such model"):
        models.model_path("org/gone")
    (tmp_path / "org").mkdir()
    assert models.model_path("org/model") == "org/model", "a folder of that name is there: a path"
    assert models.model_path("a/b/c") == "a/b/c"


def test_sparklines_share_their_scale() -> None:
    assert sparkline([0.0, 1.0], 0.0, 1.0, "utf-8") == "▁█"
    assert sparkline([0.5, 0.5], 0.0, 1.0, "utf-8") == "▅▅"
    assert sparkline([0.5], 0.5, 0.5, "utf-8") == "▁"
    assert sparkline([float("nan"), 1.0], 0.0, 1.0, "latin-1") == " @"
