"""What protection keeps and what it costs, over several seeds: each arm against the control of the same seed.

``python examples/protection_table.py --seeds 5`` prints the table and writes ``runs/protection/table.json``; with
``--picture`` also a picture (the ``pictures`` extra brings matplotlib). About 6 minutes a seed on 2 cores. Runs that
the folder holds already are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import base_answers, run_arm
from rich.console import Console
from rich.table import Table

from vocabguard.results import EXPOSURE_CLASSES

_STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 0, 1, 2, ... degrees of freedom."""

Found = dict[str, dict[int, dict[str, Any]]]


def run_seed(seed: int, arms: list[str], folder: Path, steps: int, threads: int) -> None:
    """Run what is missing of one seed, an arm after the other, so that times stand side by side."""
    torch.set_num_threads(threads)
    missing = [arm for arm in arms if not (folder / f"{Path(arm).stem}-{seed}.json").exists()]
    base = base_answers() if missing else None
    for arm in missing:
        assert base is not None
        logs = folder / "logs" / f"{Path(arm).stem}-{seed}"
        log = {"console": False, "tensorboard": False}
        entry = run_arm(arm, base, folder=logs, steps=steps, seed=seed, log=log).entry
        (folder / f"{Path(arm).stem}-{seed}.json").write_text(json.dumps(entry), encoding="utf-8")
        print(f"seed {seed} {arm}: {entry['retained']['classes']}, {entry['wall_seconds']:.0f} s", flush=True)


def load(arms: list[str], seeds: range, folder: Path) -> Found:
    """Arm -> seed -> its entry."""
    return {
        arm: {
            seed: json.loads((folder / f"{Path(arm).stem}-{seed}.json").read_text(encoding="utf-8")) for seed in seeds
        }
        for arm in arms
    }


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half width of the 95 % confidence interval, by Student's t; no width for one value.

    A class without tokens has no share (NaN), which counts for nothing.
    """
    values = [value for value in values if not math.isnan(value)] or [math.nan]
    half = math.nan
    if 1 < len(values) <= len(_STUDENT):
        half = _STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half_width": half, "worst": min(values), "best": max(values)}


def numbers(entry: dict[str, Any], control: dict[str, Any]) -> dict[str, float]:
    """One run as the table shows it, against the control of its seed."""
    kept, kept_control = entry["retained"]["classes"], control["retained"]["classes"]
    # Seconds of work, not of waiting: other programs, and another seed beside this one, do not count.
    longer, more = entry["cpu_seconds"] / control["cpu_seconds"] - 1, entry["positions"] / control["positions"] - 1
    return {
        **{f"retained {kind}": kept[kind] for kind in EXPOSURE_CLASSES},
        **{f"gain {kind}": kept[kind] - kept_control[kind] for kind in EXPOSURE_CLASSES},
        "below 0.95": entry["head"]["below_0.95"],
        "validation loss": entry["val_loss"],
        "validation loss, over control": entry["val_loss"] / control["val_loss"] - 1,
        "repetition": entry["repetition"],
        "repetition, over control": entry["repetition"] - control["repetition"],
        "loops": entry["loops"],
        "loops, over control": entry["loops"] - control["loops"],
        "echo targets per live token": entry["echo"]["targets_per_live_token"],
        "dose": entry["echo"]["dose"],
        "extra tokens": more,
        "extra time": longer,
    }


def summarise(found: Found) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> number -> mean and interval over the seeds."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for arm, runs in found.items():
        rows = [numbers(entry, found["control"][seed]) for seed, entry in runs.items()]
        table[arm] = {name: interval([row[name] for row in rows]) for name in rows[0]}
    return table


def show(table: dict[str, dict[str, dict[str, float]]], seeds: int) -> None:
    """Print it."""
    shown = Table(title=f"{seeds} seeds, mean and 95 % interval; retained in held-out templates", title_justify="left")
    shown.add_column("")
    for arm in table:
        shown.add_column(arm, justify="right")
    for name in next(iter(table.values())):
        as_share = name not in ("validation loss", "echo targets per live token")
        cells = []
        for found in (columns[name] for columns in table.values()):
            scale, unit = (100, " %") if as_share else (1, "")
            digits = 2 if as_share or found["mean"] < 100 else 0
            half = "" if math.isnan(found["half_width"]) else f" ± {found['half_width'] * scale:.{digits}f}"
            cells.append(f"{found['mean'] * scale:.{digits}f}{half}{unit}")
        shown.add_row(name, *cells)
    Console(highlight=False).print(shown)


def _plain(value: Any) -> Any:
    """The value as strict JSON: null for NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if math.isnan(value) else value


def draw(found: Found, path: Path) -> None:
    """Protection against validation loss: a small dot a run, a large one the mean, with the interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, runs in found.items():
        cost = [100 * (run["val_loss"] / found["control"][seed]["val_loss"] - 1) for seed, run in runs.items()]
        kept = [100 * run["retained"]["classes"]["never"] for run in runs.values()]
        across, up = interval(cost), interval(kept)
        points = axes.errorbar(
            across["mean"],
            up["mean"],
            xerr=across["half_width"],
            yerr=up["half_width"],
            fmt="o",
            ms=9,
            capsize=3,
            label=arm,
        )
        axes.scatter(cost, kept, s=14, color=points.lines[0].get_color(), alpha=0.5)
    axes.set_xlabel("validation loss over the control's, %")
    axes.set_ylabel("never a target in the data: still said, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run, then tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default="control,echo,hold_echo", help="comma-separated; control is always run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("runs/protection"))
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, sharing the cores")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    arms = list(dict.fromkeys(["control", *arguments.arms.split(",")]))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    work = partial(run_seed, arms=arms, folder=arguments.folder, steps=arguments.steps, threads=threads)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, range(arguments.seeds)))
    found = load(arms, range(arguments.seeds), arguments.folder)
    table = summarise(found)
    (arguments.folder / "table.json").write_text(json.dumps(_plain(table), indent=2) + "\n", encoding="utf-8")
    show(table, arguments.seeds)
    if arguments.picture:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
