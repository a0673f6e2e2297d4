"""What a reference text says of the bench's runs, by replay of their saved weights.

    python tests/benchmarks/real_reference.py CACHE --kept FOLDER --json tests/benchmarks/real/reference.json

CACHE is the folder of `real_models.py`, from which this only reads. The whole shipped text is read by the base, and by
each run at some tenths; what each target's negative log-likelihood was is kept in FOLDER, so that settings are tried
without reading anew. A line a tenth: mean rise in nats by exposure class (data targets up to then) with its interval,
as the guard computes it with ``--max-tokens``, and what the rule ``rare_loss`` says. *Gone*: of the rare targets to
which the base gave a chance of 1 in 2 or more, the share to which the run gives 1 in 10 or less, in the whole text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import torch
from real.data import target_counts, training_rows
from real.models import load_base
from real.train import Recipe
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from vocabguard.config import ReferenceConfig
from vocabguard.config.schema import default_rules
from vocabguard.guard.reference import reference_texts, windows_of
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.intervals import z_of_look
from vocabguard.measure.reference import RARE, Windows, summarise_reference, token_nll
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.vocabulary.table import VocabTable, build_table

BATCH_TOKENS, EVERYTHING = 1024, 10**9


class Reader:
    """Lets bases and runs read the text, each once.

    Args:
        folder: of the bench.
        kept: where likelihoods are kept.
    """

    def __init__(self, folder: Path, kept: Path, config: ReferenceConfig) -> None:
        self._folder, self._kept, self._config = folder, kept, config
        self._base = cache(self._load)

    def _load(self, model: str, untied: bool) -> tuple[Any, Any, VocabTable, Windows]:
        loaded, tokenizer = load_base(self._folder, model, untied=untied)
        table = build_table(tokenizer, loaded.get_output_embeddings().weight.shape[0])
        everything = replace(self._config, max_tokens=EVERYTHING)
        windows = windows_of(loaded, tokenizer, reference_texts(everything), everything)
        # Runs are kept in bfloat16: a base of finer numbers would differ by the rounding alone.
        rounded = {name: value.bfloat16().float() for name, value in loaded.state_dict().items()}
        loaded.load_state_dict(rounded)
        return loaded.eval(), tokenizer, table, windows

    def nll(self, recipe: Recipe, path: Path | None, percent: int) -> torch.Tensor:
        """Of a run at a tenth; of the base where path is None."""
        named = f"base-{recipe.model}" if path is None else f"{path.parent.name}-{path.name}-{percent:03d}"
        kept = self._kept / f"{named}.pt"
        if not kept.exists():
            model, _, _, windows = self._base(recipe.model, recipe.untied)
            base = {name: value.clone() for name, value in model.state_dict().items()}
            if path is not None:
                loaded = model.load_state_dict(load_file(path / f"weights-{percent:03d}.safetensors"), strict=False)
                assert not loaded.unexpected_keys, loaded.unexpected_keys
                assert set(loaded.missing_keys) <= {"lm_head.weight"}, loaded.missing_keys
            began = time.process_time()
            torch.save(token_nll(model, windows, batch_tokens=BATCH_TOKENS), kept)
            print(f"{named}: {time.process_time() - began:.0f} CPU s", file=sys.stderr)
            model.load_state_dict(base)
        found: torch.Tensor = torch.load(kept, weights_only=True)
        return found

    def _taken(self, model: Any, tokenizer: Any, windows: Windows) -> torch.Tensor:
        """(m,) int64, the windows that the guard would read."""
        wanted = windows_of(model, tokenizer, reference_texts(self._config), self._config)
        place = {ids: row for row, ids in enumerate(_without_filling(windows))}
        return torch.tensor([place[ids] for ids in _without_filling(wanted)])

    def entry(self, path: Path, percent: int, look: int) -> dict[str, Any]:
        """What the guard would have logged."""
        told = json.loads((path / "run.json").read_text(encoding="utf-8"))
        recipe = Recipe(**told["recipe"])
        model, tokenizer, table, windows = self._base(recipe.model, recipe.untied)
        rows = training_rows(
            tokenizer, steps=recipe.steps, batch=recipe.batch, copies=recipe.copies, longest=recipe.longest,
            seed=told["seed"],
        )  # fmt: skip
        classes = exposure_classes(target_counts(rows[: len(rows) * percent // 100], len(table)))
        parts = {name: classes == index for index, name in enumerate(EXPOSURE_CLASSES)}
        parts |= {name: table.mask(name) for name in table.names}
        base, now = self.nll(recipe, None, 0), self.nll(recipe, path, percent)
        rare = torch.stack([parts[name] for name in RARE]).any(0)[windows.targets]
        known = rare & windows.measured & (base < math.log(2))
        gone = float((now[known] > math.log(10)).double().mean())
        taken = self._taken(model, tokenizer, windows)
        windows, base, now = Windows(windows.ids[taken], windows.lengths[taken]), base[taken], now[taken]
        found = summarise_reference(windows, base, now, parts, z=z_of_look(look))
        rule = default_rules()["rare_loss"]
        fires = found.get("rare_rise_low", 0.0) > rule.threshold
        return {
            "recipe": path.parent.name, "arm": told["arm"], "seed": told["seed"], "percent": percent, "look": look,
            "loss": told["loss"], "base_nll": float(base.nanmean()), "fires": fires,
            "gone": round(gone, 4), "known": int(known.sum()),
            "found": {name: round(value, 4) for name, value in found.items() if name.split("/")[0] not in table.names},
        }  # fmt: skip


def _without_filling(windows: Windows) -> list[tuple[int, ...]]:
    return [tuple(ids[:length]) for ids, length in zip(windows.ids.tolist(), windows.lengths.tolist(), strict=True)]


def shown(found: dict[str, float], name: str) -> str:
    """A rise and its interval."""
    if name not in found:
        return "-"
    return f"{found[name]:+.2f} ({found[name + '_low']:+.2f} to {found[name + '_high']:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("runs", nargs="*", help="recipe/arm-seed; all finished ones where none is named")
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--percent", default="20,50,100")
    parser.add_argument("--max-tokens", type=int, default=ReferenceConfig().max_tokens)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    asked.kept.mkdir(parents=True, exist_ok=True)
    reader = Reader(asked.cache, asked.kept, ReferenceConfig(max_tokens=asked.max_tokens))
    paths = [asked.cache / name for name in asked.runs] or [
        path.parent for path in sorted(asked.cache.glob("*/*/run.json"))
    ]
    names = [f"{name}/nll_rise" for name in EXPOSURE_CLASSES] + ["rare_rise"]
    table, entries = Table("run", "%", "nll", *names, "gone", "rare_loss"), []
    for path in paths:
        for look, percent in enumerate(map(int, asked.percent.split(",")), start=1):
            one = reader.entry(path, percent, look)
            entries.append(one)
            found = one["found"]
            table.add_row(
                f"{path.parent.name}/{path.name}", str(percent), f"{one['base_nll']:.2f} -> {found['nll']:.2f}",
                *(shown(found, name) for name in names), f"{100 * one['gone']:.0f} %", "fires" if one["fires"] else "",
            )  # fmt: skip
    Console(width=200, highlight=False).print(table)
    if asked.json:
        asked.json.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
