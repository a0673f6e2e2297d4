"""Run a client as its users do, twice, and write down what came of it.

    python tests/rehearsals/rehearse.py axolotl --python ENV/bin/python

Clients have pins of their own, so each has an environment of its own, into which this package is installed. The two
runs, without and with echo, are judged by a spy of their own (`spy/`), which counts every batch before the trainer
prepares it; the results go to ``results/CLIENT.json``, and `table` makes the table in ``integrations/README.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import clients
import inputs

from vocabguard.config import GuardConfig
from vocabguard.runlog import RunLog
from vocabguard.views.keys import ChosenKeys

HERE = Path(__file__).parent
TOP = HERE.parents[1]
LIMIT = 900
_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def rehearse(name: str, python: Path, work: Path) -> dict[str, Any]:
    """Both runs of a client."""
    client = clients.CLIENTS[name]
    inputs.write(work / "inputs")
    versions = subprocess.run(
        [str(python), "-c", _VERSIONS, *client.packages, "torch"], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = {
        "client": name, "added": client.added, "needed": client.needed, "versions": json.loads(versions.stdout),
    }  # fmt: skip
    for kind, settings in (("plain", clients.SETTINGS), ("echo", (*clients.SETTINGS, *clients.ECHO))):
        folder = work / kind
        folder.mkdir()
        code = run(client, python, work / "inputs", folder, settings)
        found[kind] = judged(folder, code, client.own_loop)
    data = seen(work / "plain").get("data")
    found["echo"]["data_as_without"] = bool(data) and seen(work / "echo").get("data") == data
    return found


def run(client: clients.Client, python: Path, given: Path, folder: Path, settings: tuple[str, ...]) -> int:
    """One run; its output goes to ``log`` in its folder."""
    command = client.prepare(python, given, folder, settings)
    paths = [str(HERE / "spy"), str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "SPY": str(folder / "spy"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1",
    }  # fmt: skip
    if client.launched:
        chosen = [word for setting in settings for word in ("--set", setting)]
        start = [str(python), "-c", "from vocabguard.cli import main; main()", "run", *chosen, "--"]
        command = [*start, *command]
    else:
        environment |= {"VOCABGUARD": "1", "VOCABGUARD_SET": " ".join(settings)}
    with (folder / "log").open("w", encoding="utf-8") as log:
        return subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT, check=False
        ).returncode


def judged(folder: Path, code: int, own_loop: bool) -> dict[str, Any]:
    """What a run has left behind: the guard's counts beside the spy's, and the keys in the client's trackers."""
    spied, log = seen(folder), guarded(folder)
    told = (folder / "log").read_text(encoding="utf-8", errors="replace")
    result: dict[str, Any] = {
        "exit_code": code, "trainer": spied.get("kind"), "steps": spied.get("global_step"),
        "spied": total(spied.get("data")), "spied_echo": total(spied.get("echo")),
        "disabled_itself": "disabled itself" in told, "echo_off": "echo is off" in told,
    }  # fmt: skip
    counted = {} if log is None else {kind: counts(log, f"exposure/{kind}_target") for kind in ("data", "echo")}
    for kind in ("data", "echo"):
        mine, theirs = counted.get(kind, {}), {int(key): value for key, value in spied.get(kind, {}).items()}
        result[f"counted_{kind}"] = sum(mine.values())
        result[f"tokens_that_differ_{kind}"] = sum(
            mine.get(token, 0) != theirs.get(token, 0) for token in {*mine, *theirs}
        )
    chosen = ChosenKeys(GuardConfig().log.keys)
    logged = {key for entry in spied.get("history", ()) for key in entry}
    result["keys_in_log_history"] = sorted(key for key in logged if key.startswith("vocabguard/") and key in chosen)
    result["steps_with_keys"] = sorted(
        {
            entry["step"]
            for entry in spied.get("history", ())
            if any(key in chosen for key in entry if "vocabguard/" in key)
        }
    )
    result["tags_in_tensorboard"] = len(tags(folder / "out", own_loop))
    return result


def seen(folder: Path) -> dict[str, Any]:
    """What the spy has written; empty where it never came to that."""
    path = folder / "spy-0.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def guarded(folder: Path) -> RunLog | None:
    """The guard's run log."""
    found = sorted(folder.rglob("run.json"))
    return RunLog.open(found[0].parent) if found else None


def counts(log: RunLog, key: str) -> dict[int, int]:
    """Token -> targets, where there are any."""
    try:
        vector = log.rows()[key]
    except (KeyError, ValueError):
        return {}
    return {int(token): int(vector[token]) for token in vector.nonzero().flatten()}


def tags(folder: Path, own_loop: bool) -> set[str]:
    """The guard's chosen keys among the scalars of the client's own TensorBoard files; in an own loop the guard's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: set[str] = set()
    for path in folder.rglob("events.out.tfevents*"):
        if path.parent.name != "vocabguard" or own_loop:
            board = EventAccumulator(str(path)).Reload()
            names = board.Tags()
            found |= {tag for tag in (*names["scalars"], *names["tensors"]) if "vocabguard/" in tag}
    return found


def total(of: dict[str, int] | None) -> int:
    """All counts together."""
    return sum((of or {}).values())


def main() -> None:
    """Rehearse the clients that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=clients.CLIENTS)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python of the client's environment")
    parser.add_argument("--keep", type=Path, help="work here, and leave everything there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = rehearse(given.client, given.python.absolute(), work)
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    (HERE / "results" / f"{given.client}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
