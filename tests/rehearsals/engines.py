"""Try every engine against one process, and keep what came out: ``python tests/rehearsals/engines.py``

    python tests/rehearsals/engines.py --deepspeed ENV/bin/python     all of them; ENV has DeepSpeed and this torch
    python tests/rehearsals/engines.py fsdp2 tp     some, into the results that are there

ENV needs no packages but DeepSpeed: a file `base.pth` in its site-packages that names those of the environment here
lends it the rest, and ``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`` builds it for a CPU.

`tests/processes/engines.py` trains; here what the guards found is held against a process by itself, on the same data.
Each measure is right, refused in words, or wrong. `table.py` puts the table into `integrations/README.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kits")]
from ranks import run_together
from table import ENGINES as NAMES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engines.json"
STEPS = 6
FOUR = ("hsdp", "fsdp2_tp")
DEEPSPEED = ("ulysses", "zero1", "zero2", "zero3")
MODES = ("watch", "echo", "freeze", "shared")
NEVER = 300
"""Rows below this are no target of the data, ever."""


def run(folder: Path, kinds: list[str], count: int, python: str, timeout: float = 1800) -> None:
    """Train under some engines in processes of their own.

    Raises:
        AssertionError: with what was printed, if one fails.
    """
    run_together(
        "engines.py", folder, *kinds, count=count, timeout=timeout, python=python, paths=[HERE.parents[1]],
        environment={"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


def load(folder: Path, kind: str, mode: str, count: int) -> list[dict[str, Any]]:
    """What the ranks found, or the process by itself."""
    ranks = range(count) if count > 1 else ["alone"]
    return [torch.load(folder / f"{kind}-{mode}-{rank}.pt", weights_only=False) for rank in ranks]


def judged(folder: Path, kind: str, count: int) -> dict[str, dict[str, Any]]:
    """Measure -> verdict (``right``, ``refused`` or ``wrong``), seconds of `attach`, and why."""
    alone = {mode: load(folder, "plain_tied" if kind.endswith("tied") else "plain", mode, 1)[0] for mode in MODES}
    found = {mode: load(folder, kind, mode, count) for mode in MODES}
    checks = {
        "drift": lambda: drift(found["watch"]),
        "exposure": lambda: exposure(found["watch"], alone["watch"]),
        "pull and push": lambda: gradients(found["watch"], alone["watch"]),
        "probe": lambda: probe(found["watch"], alone["watch"]),
        "echo": lambda: echo(found["echo"]),
        "hold": lambda: hold(found["freeze"], found["shared"], alone["shared"]),
    }
    modes = {"echo": "echo", "hold": "shared"}
    verdicts = {}
    for name, check in checks.items():
        ranks = found[modes.get(name, "watch")]
        stopped = [one["failure"] for one in ranks]
        verdict, why = ("refused", str(stopped[0])) if all(stopped) else check()
        if any(stopped) and not all(stopped):
            verdict, why = "wrong", f"only some processes stopped: {stopped}"
        seconds = max(one["attach_seconds"] for one in ranks)
        verdicts[name] = {"verdict": verdict, "seconds": round(seconds, 1), "why": why}
    return verdicts


def drift(ranks: list[dict[str, Any]]) -> tuple[str, str]:
    """Cosines against float64 cosines of the gathered rows."""
    worst, reason = 0.0, ""
    for one in ranks:
        for name in ("head", "embedding"):
            if "reason" in one[name]:
                reason = one[name]["reason"]
                continue
            true = torch.nn.functional.cosine_similarity(one["start"][name].double(), one["now"][name].double(), dim=1)
            worst = max(worst, float((one[name]["cosine"].double() - true).abs().max()))
    if reason:
        return "refused", reason
    return ("right" if worst < 1e-6 else "wrong"), f"largest error {worst:.0e}"


def exposure(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> tuple[str, str]:
    """Counts are those of the data, whatever process saw them; so are those that a checkpoint keeps."""
    true = alone["exposure"]["data_target"]
    if "reason" in ranks[0]["exposure"]:
        return "refused", ranks[0]["exposure"]["reason"]
    same = all(torch.equal(one["exposure"][name], alone["exposure"][name]) for one in ranks
               for name in ("data_target", "inputs", "last_target"))  # fmt: skip
    same = same and all(torch.equal(one["counts"], true) for one in ranks)
    counted = int(ranks[0]["exposure"]["data_target"].sum())
    return ("right" if same else "wrong"), f"{counted:,} of {int(true.sum()):,} targets"


def gradients(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> tuple[str, str]:
    """Row norms of the gradient, against a process by itself."""
    if "reason" in ranks[0]["exposure"]:
        return "refused", ranks[0]["exposure"]["reason"]
    if all(bool(one["exposure"][name].isnan().all()) for one in ranks for name in ("pull", "push")):
        told = [note for note in ranks[0]["notes"] if note.startswith("Pull and push")]
        return ("refused", told[0].partition(": ")[2]) if told else ("wrong", "not read, and nobody is told")
    worst = 0.0
    for one in ranks:
        if one["exposure"]["push_samples"] != alone["exposure"]["push_samples"]:
            return "wrong", f"push was sampled {one['exposure']['push_samples']} times in some process"
        for name in ("pull", "push"):
            here, there = one["exposure"][name], alone["exposure"][name]
            worst = max(worst, float((here - there).abs().max() / there.abs().max().clamp(min=1e-9)))
    return ("right" if worst < 1e-3 else "wrong"), f"largest error {worst:.0e} of the largest"


def probe(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> tuple[str, str]:
    """Probabilities of the same tokens in the same contexts."""
    if ranks[0]["probe"] is None:
        return "refused", str(ranks[0]["watch"].get("probe"))
    worst = 0.0
    for one in ranks:
        if not torch.equal(one["probe"]["ids"], alone["probe"]["ids"]):
            return "wrong", "other tokens"
        here, there = one["probe"]["probability"].double(), alone["probe"]["probability"].double()
        worst = max(worst, float(((here - there).abs() / there.clamp(min=1e-12)).max()))
    return ("right" if worst < 5e-3 else "wrong"), f"largest relative error {worst:.0e}"


def echo(ranks: list[dict[str, Any]]) -> tuple[str, str]:
    """Echo targets are those that the batches hold, and processes of one replica have the same batches."""
    off = [note for note in ranks[0]["notes"] if note.startswith("Echo is off")]
    if off:
        return "refused", off[0]
    told = [one["exposure"] for one in ranks]
    replicas = {tuple(one["seen"][1].tolist()): one["seen"] for one in ranks}
    true = torch.stack([seen[1] for seen in replicas.values()]).sum(0)
    data = torch.stack([seen[0] for seen in replicas.values()]).sum(0)
    same = all(torch.equal(one["echo_target"], true) and torch.equal(one["data_target"], data) for one in told)
    alike = all(one["same_batches"] for one in ranks)
    count = int(true.sum())
    return ("right" if same and alike and count > 10 else "wrong"), f"{count} echo targets, same batches: {alike}"


def hold(freeze: list[dict[str, Any]], shared: list[dict[str, Any]], alone: dict[str, Any]) -> tuple[str, str]:
    """Rows that are never a target do not move; or by one mean, as in a process by itself."""
    off = [note for note in freeze[0]["notes"] if note.startswith("Hold is off")]
    if off:
        return "refused", off[0]
    still = max(_moved(one)[:NEVER].abs().max().item() for one in freeze)
    moves = min(float(_moved(one).abs().max()) for one in freeze)
    spread = max(float(_moved(one)[:NEVER].std(dim=0).max()) for one in shared)
    apart = max(float((one["now"]["head"] - alone["now"]["head"]).abs().max()) for one in shared)
    right = still == 0 and moves > 0 and spread < 1e-6 and apart < 1e-4
    return ("right" if right else "wrong"), f"moved {still:.0e}, apart {spread:.0e}, from one process {apart:.0e}"


def _moved(one: dict[str, Any]) -> Tensor:
    moved: Tensor = one["now"]["head"] - one["start"]["head"]
    return moved


def faulty(folder: Path, kind: str, count: int) -> str:
    """What went wrong where one process's guard fails in mid-run; empty if all learned of it and training went on."""
    broken = load(folder, kind, "fault", count)
    if any(len(one["losses"]) != STEPS for one in broken):
        return "training ended"
    if not all(one["failure"] for one in broken):
        return f"not every process learned of it: {[one['failure'] for one in broken]}"
    return ""


def version_in(python: str) -> str:
    """Of DeepSpeed, without importing it."""
    asked = [python, "-c", "import importlib.metadata; print(importlib.metadata.version('deepspeed'))"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", help="all of torch's; with --deepspeed, its own too")
    parser.add_argument("--deepspeed", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    asked = options.engines or [name for name in NAMES if options.deepspeed or name not in DEEPSPEED]
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"engines": {}}
    folder = options.folder or Path(tempfile.mkdtemp())
    run(folder, ["plain", "plain_tied"], 1, sys.executable)
    groups = [
        (2, sys.executable, [kind for kind in asked if kind not in FOUR + DEEPSPEED]),
        (4, sys.executable, [kind for kind in asked if kind in FOUR]),
        (2, options.deepspeed, [kind for kind in asked if kind == "ulysses"]),  # by itself: it stays in its process
        (2, options.deepspeed, [kind for kind in asked if kind in DEEPSPEED and kind != "ulysses"]),
    ]
    for count, python, kinds in groups:
        if not kinds:
            continue
        if python is None:
            parser.error(f"{', '.join(kinds)}: name the environment, --deepspeed ENV/bin/python")
        run(folder, kinds, count, python)
        for kind in kinds:
            fault, found = faulty(folder, kind, count), judged(folder, kind, count)
            results["engines"][kind] = {"processes": count, "fault": fault or "training went on", "measures": found}
            print(kind, {name: one["verdict"] for name, one in found.items()}, fault)
    results["torch"] = torch.__version__
    if options.deepspeed:
        results["deepspeed"] = version_in(options.deepspeed)
    results["engines"] = {kind: results["engines"][kind] for kind in NAMES if kind in results["engines"]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
