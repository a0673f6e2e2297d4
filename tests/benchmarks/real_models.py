"""Do real models lose tokens, and what does the guard see and prevent of it?

    python tests/benchmarks/real_models.py CACHE train tied --arms control,protect --seeds 0,1,2
    python tests/benchmarks/real_models.py CACHE judge
    python tests/benchmarks/real_models.py CACHE replay tied --looks 2
    python tests/benchmarks/real_models.py CACHE probe smollm2 gemma3 --seeds 0,1,2,3,4
    python tests/benchmarks/real_models.py CACHE steptime constant --set echo.armed=true echo.dose=0.1
    python tests/benchmarks/real_models.py CACHE price constant --planned 2400
    python tests/benchmarks/real_models.py CACHE table
    python tests/benchmarks/real_models.py CACHE summary

CACHE is a folder outside the repository: converted models, and for every run its weights at each tenth (bfloat16, 3 GB
a run of SmolLM2). Everything is resumable: what is there is not done again. ``judge`` asks the weights of a run for
tokens in two ways that nothing else uses (`real.recall`); ``--percent`` asks earlier ones too. Recipes and arms:
`real.train`. ``replay`` runs the guard over a run's saved weights (`real.replay`). On 2 cores a run of ``tied`` takes 6
to 10 minutes, a judgement 2. ``summary`` writes the tables of ``tests/README.md`` from the files in ``real/``:
``results.json`` of ``judge``, ``replays.json`` of ``replay constant tied untied gemma lora --arms control --looks 2``
and, from before, of other arms of ``tied``, ``constant`` and ``full1e-4``, where those of ``tied`` and ``full1e-4``
were replayed with ``--set probe.budget=1``; ``probing.json`` there is of ``probe --seeds 0,1 --tokens 128``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import torch
from real.models import SOURCES, load_base
from real.price import price
from real.probing import agreement, null_run
from real.recall import ask, judge
from real.replay import load_weights, replay
from real.steptime import step_time
from real.summary import README, written
from real.train import ARMS, RECIPES, Recipe, run
from rich.console import Console
from rich.table import Table

from vocabguard.files import one_line
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.intervals import wilson
from vocabguard.measure.sampling import stratified_sample
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.vocabulary.table import VocabTable, build_table

TOKENS, SAMPLE_SEED = 512, 11
NOISE = "base among other neighbours"


def runs(folder: Path, names: list[str]) -> list[Path]:
    """Finished runs, in order."""
    return [path.parent for name in names for path in sorted((folder / name).glob("*/run.json"))]


@cache
def told_of(path: Path) -> dict[str, Any]:
    """What a run wrote down when it ended."""
    told: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return told


class Judge:
    """Asks the bases and the runs; keeps what it has asked.

    Args:
        folder: the bench's.
        tokens: asked for, drawn by script group and exposure class.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self._folder, self._tokens = folder, tokens
        self._base = cache(self._load)

    def _load(self, recipe: Recipe) -> tuple[Any, Any, VocabTable]:
        model, tokenizer = load_base(self._folder, recipe.model, untied=recipe.untied)
        return model, tokenizer, build_table(tokenizer, model.get_output_embeddings().weight.shape[0])

    def sample(self, path: Path) -> torch.Tensor:
        """(n,) int64, the tokens that a run is asked for: the same in all arms of a seed."""
        told = told_of(path)
        recipe = Recipe(**told["recipe"])
        classes = exposure_classes(torch.tensor(told["data_target"]))
        table = self._base(recipe)[2]
        return stratified_sample(table.group.long() * 8 + classes.long(), table.live, self._tokens, SAMPLE_SEED)

    def asked(self, path: Path, percent: int | None, seed: int = 0) -> dict[str, torch.Tensor]:
        """``ids``, ``said`` and ``nats`` of a run's weights; of the base where percent is None."""
        told, ids = told_of(path), self.sample(path)
        recipe = Recipe(**told["recipe"])
        kept = path / f"asked-{percent}-{self._tokens}.pt"
        if percent is None:
            # All arms of a seed ask their base for the same tokens.
            tokens = zlib.crc32(ids.numpy().tobytes())
            kept = self._folder / "asked" / f"{recipe.model}-{tokens}-{seed}.pt"
            kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            model, tokenizer, _ = self._base(recipe)
            base = {key: value.clone() for key, value in model.state_dict().items()}
            if percent is not None:
                load_weights(model, path / f"weights-{percent:03d}.safetensors")
            said, nats = ask(model.eval(), tokenizer, ids.tolist(), seed=seed)
            model.load_state_dict(base)
            torch.save({"ids": ids, "said": said, "nats": nats}, kept)
        found: dict[str, torch.Tensor] = torch.load(kept, weights_only=True)
        return found


def verdicts(path: Path, keeper: Judge, percent: int) -> dict[str, Any]:
    """What became of a run's tokens by class, and the base's own noise."""
    told = told_of(path)
    base, again, now = keeper.asked(path, None), keeper.asked(path, None, 1), keeper.asked(path, percent)
    classes = exposure_classes(torch.tensor(told["data_target"]))[base["ids"]]
    parts = {"all": torch.ones_like(classes, dtype=torch.bool)}
    parts |= {name: classes == index for index, name in enumerate(EXPOSURE_CLASSES)}
    first = base["said"], base["nats"]
    judged = {name: judge(first, (now["said"], now["nats"]), mask) for name, mask in parts.items()}
    judged[NOISE] = judge(first, (again["said"], again["nats"]), parts["all"])
    return {name: vars(one) | {"lost_interval": wilson(one.lost, one.known)} for name, one in judged.items()}


def alerts_of(path: Path) -> list[dict[str, Any]]:
    """The rules that fired at warning or above, as the run folder tells."""
    file = path / "vocabguard" / "alerts.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [line for line in lines if line["state"] == "firing" and line["level"] != "info"]


def entry_of(path: Path, keeper: Judge) -> dict[str, Any]:
    """A run as the table and the JSON have it."""
    told = told_of(path)
    latest = {key.removeprefix("vocabguard/"): value for key, value in (told.get("latest") or {}).items()}
    steps = sorted(cpu for _, cpu in told["step_seconds"])
    return {
        "recipe": path.parent.name, "arm": told["arm"], "seed": told["seed"], "loss": told["loss"],
        "cpu": told["cpu"], "wall": told["wall"], "step_cpu_median": steps[len(steps) // 2],
        "step_cpu_mean": sum(steps) / len(steps),
        "tokens": verdicts(path, keeper, 100), "failure": told.get("failure"),
        "alerts": sorted({line["rule"] for line in alerts_of(path)}),
        "guard": {key: latest.get(key) for key in ("probe/retained", "head/cosine_mean", "head/cosine_min",
            "head/below_0.95", "forecast/below_0.95", "echo/dose", "echo/targets_per_live_token")},
    }  # fmt: skip


def show(entries: list[dict[str, Any]], console: Console) -> None:
    """A line a run: retained of what the base repeats, with its interval."""
    table = Table(
        "recipe",
        "arm",
        "seed",
        "never: lost of known",
        "retained (95 %)",
        "all: lost",
        "gained",
        "val loss",
        "CPU s",
        "alerts",
    )
    for entry in entries:
        never, every = entry["tokens"]["never"], entry["tokens"]["all"]
        low, high = wilson(never["known"] - never["lost"], never["known"])
        share = 1 - never["lost"] / max(1, never["known"])
        table.add_row(
            entry["recipe"], entry["arm"], str(entry["seed"]), f"{never['lost']} of {never['known']}",
            f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})", f"{every['lost']} of {every['known']}",
            f"{every['gained']} of {every['unknown']}", "{:.3f} -> {:.3f}".format(*entry["loss"]),
            f"{entry['cpu']:.0f}", ", ".join(entry["alerts"]) or "-",
        )  # fmt: skip
    console.print(table)
    noise = [entry["tokens"][NOISE] for entry in entries]
    if noise:
        lost, total = sum(one["lost"] for one in noise), sum(one["known"] for one in noise)
        console.print(f"The base asked once more among other neighbours: {lost} of {total} known tokens 'lost'.")


def show_replays(told: list[dict[str, Any]], console: Console) -> None:
    """A line a check: what the probe says, and the rules that fire."""
    shares = ("retained", "tokens_retained", "skill", "nats")
    table = Table("recipe", "arm", "seed", "step", "base", "known", *shares, "s", "firing")
    for one in told:
        for check in one["checks"]:
            found = check["scalars"]
            cells = [
                f"{found.get(f'probe/{name}', math.nan):.3f} ({found.get(f'probe/{name}_low', math.nan):.3f} to "
                f"{found.get(f'probe/{name}_high', math.nan):.3f})"
                for name in shares
            ]
            table.add_row(
                one["recipe"], one["arm"], str(one["seed"]), str(check["step"]), f"{found['probe/base']:.3f}",
                f"{found['probe/known']:.0f}", *cells, f"{check['probe_seconds']:.0f}", ", ".join(check["firing"]),
            )  # fmt: skip
    console.print(table)


def train_all(asked: argparse.Namespace, names: list[str], console: Console) -> None:
    """Every arm of every seed."""
    for seed in map(int, asked.seeds.split(",")):
        for name in names:
            for arm in asked.arms.split(","):
                path = run(asked.cache, name, arm, seed, overrides=asked.overrides, label=asked.label)
                console.print(f"{path} done")


def replay_all(asked: argparse.Namespace, names: list[str], console: Console) -> None:
    """The guard over the saved weights of the runs."""
    told = [
        {"recipe": path.parent.name, "arm": told_of(path)["arm"], "seed": told_of(path)["seed"]}
        | replay(asked.cache, path, asked.looks, asked.overrides)
        for path in runs(asked.cache, names)
        if asked.arms == "all" or told_of(path)["arm"] in asked.arms.split(",")
    ]
    show_replays(told, console)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


def show_step_time(asked: argparse.Namespace, names: list[str], console: Console) -> None:
    """What protection adds to a step."""
    console.print([step_time(asked.cache, name, asked.overrides) for name in names])


def show_price(asked: argparse.Namespace, names: list[str], console: Console) -> None:
    """What watching costs a run of so many steps."""
    found = [price(asked.cache, name, asked.overrides, planned=asked.planned) for name in names]
    console.print(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def show_probe(asked: argparse.Namespace, names: list[str], console: Console) -> None:
    """Agreement with free generation, and runs in which nothing is lost."""
    found: dict[str, Any] = {}
    for name in asked.recipes or SOURCES:
        found[name] = {"agreement": agreement(asked.cache, name, asked.tokens)}
        console.print(name, found[name]["agreement"])
        found[name]["null"] = [
            null_run(asked.cache, name, int(seed), asked.tokens) for seed in asked.seeds.split(",") if seed
        ]
        for run_ in found[name]["null"]:
            console.print(name, run_)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("what", choices=("train", "judge", "replay", "probe", "steptime", "price", "table", "summary"))
    parser.add_argument("recipes", nargs="*", default=[], help=f"of {', '.join(RECIPES)}; all where none is named")
    parser.add_argument("--arms", default="control,protect", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--percent", default="100", help="of the runs, whose weights judge asks: 10,20,...")
    parser.add_argument("--looks", type=int, default=1, help="replay: checks after the base's, a divisor of ten")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="dotted settings of the guard")
    parser.add_argument("--planned", type=int, default=2400, help="price: steps of the run that is planned for")
    parser.add_argument("--label", help="name of the arm with these settings")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    names = asked.recipes or list(RECIPES)
    console = Console(width=200, highlight=False)
    done = {
        "train": train_all, "replay": replay_all, "probe": show_probe, "steptime": show_step_time, "price": show_price
    }  # fmt: skip
    if asked.what == "summary":
        README.write_text(written(), encoding="utf-8")
        return
    if asked.what in done:
        done[asked.what](asked, names, console)
        return
    keeper = Judge(asked.cache, asked.tokens)
    entries = []
    for path in runs(asked.cache, names):
        over_time = {}
        for percent in map(int, asked.percent.split(",")):
            try:
                never = verdicts(path, keeper, percent)["never"]
            except OSError as error:
                console.print(f"{path}: {one_line(error)}")
            else:
                over_time[percent] = [never["lost"], never["known"], never["gained"], never["unknown"]]
        entries.append(entry_of(path, keeper) | ({"over_time": over_time} if len(over_time) > 1 else {}))
        if asked.what == "judge":
            console.print(json.dumps({key: entries[-1][key] for key in ("recipe", "arm", "seed", "tokens")}))
    show(entries, console)
    if asked.json:
        asked.json.write_text(json.dumps(entries, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
