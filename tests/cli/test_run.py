"""``vocabguard run``: programs that know nothing of the guard, and what must stay theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vocabguard.cli.app import InputError
from vocabguard.cli.run import HOOK, command_of, environment
from vocabguard.runlog import RunLog

TOP = Path(__file__).parents[2]
PROGRAM = TOP / "tests" / "processes" / "launched.py"
QUICK = ("--set", "log.console=false", "--set", "probe.enabled=false", "--set", "log.report=false")
GUARDED = "vocabguard: Trainer is guarded"
NOTHING = "vocabguard run: nothing was watched"
OTHER = """
import importlib.util, sys

class Other:
    busy = False

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer" or self.busy:
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        self.busy = False
        execute = spec.loader.exec_module
        def then(module):
            execute(module)
            open({ran!r}, "w").close()
        spec.loader.exec_module = then
        return spec

sys.meta_path.insert(0, Other())
"""


def vocabguard(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """The command in a process of its own, as a shell starts it."""
    start = [sys.executable, "-c", "from vocabguard.cli import main; main()"]
    paths = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **({"env": inherited} | options),  # type: ignore[call-overload]
    )  # fmt: skip


def counted(folder: Path) -> list[int]:
    """What the guard counted, by its run folder."""
    found: list[int] = RunLog.open(folder).rows()["exposure/data_target"].tolist()
    return found


def seen(folder: Path, rank: int = 0) -> list[int]:
    """What the program's own spy saw."""
    found: list[int] = json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8"))
    return found


def test_a_script_is_guarded_and_keeps_its_exit_code(tmp_path: Path) -> None:
    hidden = tmp_path / "site"
    hidden.mkdir()
    # Another tool that waits for the same module, and writes that it came.
    (hidden / "sitecustomize.py").write_text(OTHER.format(ran=str(tmp_path / "ran")))
    paths = os.pathsep.join([str(TOP), str(hidden)])
    run = vocabguard(
        "run", "--config", "protect", *QUICK, PROGRAM, tmp_path / "out", "--exit", 7,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _, told = run.communicate()
    assert run.returncode == 7, told
    assert told.count(GUARDED) == 1
    assert "(protect log.console=false" in told
    assert NOTHING not in told
    assert counted(tmp_path / "out" / "vocabguard") == seen(tmp_path / "out")
    assert sum(seen(tmp_path / "out")) > 50
    history = json.loads((tmp_path / "out" / "history-0.json").read_text())
    assert any("vocabguard/exposure/never" in entry for entry in history)
    assert (tmp_path / "ran").exists(), "another sitecustomize is hidden"


def test_a_trainer_with_a_guard_of_its_own_is_left_alone(tmp_path: Path) -> None:
    run = vocabguard("run", "--config", "protect", "-m", "launched", tmp_path, "--own", cwd=PROGRAM.parent)
    _, told = run.communicate()
    assert run.returncode == 0, told
    assert "Trainer has a guard of its own; nothing was added" in told
    assert NOTHING not in told
    assert counted(tmp_path / "own") == seen(tmp_path)
    assert not (tmp_path / "vocabguard").exists()
    settings = json.loads((tmp_path / "own" / "run.json").read_text())["config"]
    assert not settings["echo"]["enabled"]


def test_the_children_of_torchrun_are_guarded(tmp_path: Path) -> None:
    program = ("torchrun", "--nproc-per-node", 2, "--master-port", "0", "--standalone", PROGRAM, tmp_path)
    run = vocabguard("run", *QUICK, "--", *program)
    _, told = run.communicate()
    assert run.returncode == 0, told
    assert told.count(GUARDED) == 1, "by the main process alone"
    assert NOTHING not in told
    both = [one + other for one, other in zip(seen(tmp_path, 0), seen(tmp_path, 1), strict=True)]
    assert counted(tmp_path / "vocabguard") == both


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["hugging face", "lightning"])
def test_a_program_under_accelerate_launch(tmp_path: Path, trainer: str) -> None:
    options = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    program = ["accelerate", "launch", *options.split(), PROGRAM, tmp_path]
    program += ["--lightning"] if trainer == "lightning" else []
    run = vocabguard("run", "--config", "hold", *QUICK, "--", *program)
    _, told = run.communicate()
    assert run.returncode == 0, told
    assert told.count("Trainer is guarded (hold log.console=false") == 1
    assert sum(counted(tmp_path / "vocabguard")) > 50
    if trainer != "lightning":
        assert counted(tmp_path / "vocabguard") == seen(tmp_path)


def test_where_nothing_trains_one_line_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:], 'sitecustomize' in sys.modules)\nsys.exit(3)\n")
    run = vocabguard("run", script, "--lr", "1e-3", "--config", "its own")
    out, told = run.communicate()
    assert (run.returncode, out) == (3, "['--lr', '1e-3', '--config', 'its own'] True\n")
    (line,) = told.splitlines()
    assert line.startswith(NOTHING)


def wait_for(there: Callable[[], bool]) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_program_itself(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    begun = tmp_path / "begun"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(9))\n"
        f"open({str(begun)!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    run = vocabguard("run", script)
    wait_for(begun.exists)
    run.send_signal(number)
    run.communicate(timeout=20)
    assert run.returncode == (9 if number == signal.SIGINT else -signal.SIGTERM)


def test_what_cannot_be_run_is_refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("--config", "protcet", "x.py"): "config is 'protcet'",
        ("--set", "echo.dose=much", "x.py"): "echo.dose",
        ("absent.py",): "absent.py: there is no such script",
        ("--", "no-such-program-here"): "no-such-program-here: there is no such program",
        (): "Missing argument",
    }
    for arguments, why in wrong.items():
        assert run("run", *arguments) == 2
        assert why in capsys.readouterr().err, arguments


def test_command_lines() -> None:
    assert command_of(["-m", "json.tool", "-h"]) == [sys.executable, "-m", "json.tool", "-h"]
    assert command_of([str(PROGRAM), "x"]) == [sys.executable, str(PROGRAM), "x"]
    assert command_of(["sh", "-c", "true"])[0].endswith("/sh")
    beside = command_of([Path(sys.executable).name])[0]
    assert Path(beside).parent == Path(sys.executable).parent
    with pytest.raises(InputError, match="no such program"):
        command_of(["no-such-program-here"])


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("seed: 3\n")
    found = environment({"PYTHONPATH": "/x", "A": "b", "VOCABGUARD_REPORT": "/outer"}, "my.yaml", ["a=b c", "d=1"])
    assert found == {
        "A": "b", "PYTHONPATH": f"{HOOK}{os.pathsep}/x", "VOCABGUARD": str(tmp_path / "my.yaml"),
        "VOCABGUARD_SET": "'a=b c' d=1",
    }  # fmt: skip
    assert environment({}, None, [])["VOCABGUARD"] == "1"
    assert environment({}, "protect", [])["VOCABGUARD"] == "protect"


def test_a_python_without_vocabguard_is_told_before_step_1(tmp_path: Path) -> None:
    """As a program of another environment: its trainer's module is a stand-in, and vocabguard is not on its path."""
    module = tmp_path / "transformers" / "trainer.py"
    module.parent.mkdir()
    (module.parent / "__init__.py").touch()
    module.write_text("class Trainer:\n    def train(self):\n        print('trained')\n")
    script = tmp_path / "script.py"
    script.write_text("from transformers.trainer import Trainer\nTrainer().train()\n")
    inherited = {"PATH": os.environ["PATH"], "VOCABGUARD": "1", "PYTHONPATH": f"{HOOK}{os.pathsep}{tmp_path}"}
    hidden = "import sys; sys.modules['vocabguard'] = None; exec(open(sys.argv[1]).read())"
    done = subprocess.run(
        [sys.executable, "-c", hidden, str(script)], env=inherited, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot import vocabguard" in done.stderr
    assert "install it there" in done.stderr
