"""Real models for the forecast: short fine-tunes watched check by check, and the bench's runs read from their weights.

    python tests/benchmarks/early_real.py FOLDER CACHE

FOLDER holds the recordings of ``early_warning.py``, CACHE the converted models and the runs of ``real_models.py``.
The short fine-tunes take 1 to 3 minutes each on an idle core. Of the bench's runs only weights in bfloat16 are left:
rows at each tenth, and what the data asked up to there; there are no gradients. Rounding adds to how far a row seems to
have moved, so what rounding the base row does to it is taken off, squared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from early_runs import BETAS, WARMUP, Setup, chosen_rows, record, save
from real.data import IGNORE, Row, training_rows
from real.models import base_folder, load_base
from real.train import Recipe
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, DataCollatorForSeq2Seq, get_scheduler, set_seed

from vocabguard.vocabulary.table import build_table

REAL = ("smollm2", "gemma3")
CHECKS = 24
_LONGEST, _BATCH = 32, 2

SHORT = (
    Setup("english", "adamw95", 1e-3, "linear", _BATCH, tied=True, steps=48, seed=1, base="smollm2"),
    Setup("english", "adamw95", 3e-4, "linear", _BATCH, tied=True, steps=32, seed=2, base="gemma3"),
    Setup("english", "adamw", 3e-4, "constant_with_warmup", _BATCH, steps=40, seed=3, base="smollm2"),
    Setup("english", "adamw", 1e-4, "constant_with_warmup", _BATCH, tied=True, steps=32, seed=4, base="gemma3"),
    Setup("english", "adamw", 2e-4, "cosine", _BATCH, tied=True, steps=40, seed=5, base="smollm2"),
    Setup("english", "adamw", 1e-3, "cosine", _BATCH, tied=True, steps=24, seed=6, base="gemma3"),
)
"""Fine-tunes of real models with the guard watching."""

BENCH = (
    "tied/control-0", "tied/control-1", "tied/control-2", "constant/control-0", "constant/control-1",
    "constant/control-2", "untied/control-0", "full1e-4/control-0", "full2e-5/control-0", "gemma/control-0",
)  # fmt: skip
"""Runs of the bench in which nothing was done and output rows learned."""


def run(setup: Setup, folder: Path, cache: Path) -> Path:
    """One short fine-tune, if it is not there yet."""
    path = folder / f"{setup.name}.npz"
    if path.exists():
        return path
    set_seed(setup.seed)
    model, tokenizer = load_base(cache, setup.base, untied=not setup.tied)
    rows = training_rows(tokenizer, steps=setup.steps, batch=setup.batch, copies=1, longest=_LONGEST, seed=setup.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setup.rate, betas=BETAS[setup.optimizer], weight_decay=0.0, fused=True
    )
    warm = round(WARMUP * setup.steps)
    schedule = get_scheduler(setup.schedule, optimizer, num_warmup_steps=warm, num_training_steps=setup.steps)
    loader = DataLoader(rows, batch_size=setup.batch, collate_fn=DataCollatorForSeq2Seq(tokenizer))  # type: ignore[arg-type]
    kept = record(model, tokenizer, loader, optimizer, schedule, steps=setup.steps, checks=CHECKS)
    save(path, kept | {f"setup/{name}": value for name, value in asdict(setup).items()})
    return path


@dataclass(frozen=True)
class _Matrix:
    """Rows and their base.

    Attributes:
        base: (V, d) float32.
        rounding: (V,) float32, squared length of what bfloat16 takes off a base row.
    """

    base: torch.Tensor
    rounding: torch.Tensor

    def drift(self, rows: torch.Tensor, unexposed: torch.Tensor) -> dict[str, np.ndarray]:
        """As `RowDrift` has it, without the rounding."""
        moved = rows - self.base
        shift = moved[unexposed].mean(0)
        length, now = self.base.norm(dim=1), rows.norm(dim=1)
        l2 = (moved.square().sum(1) - self.rounding).clamp(min=0).sqrt()
        cosine = _cosine(self.base, rows, self.rounding)
        found = {"cosine": cosine, "residual": _cosine(self.base, rows - shift, self.rounding), "l2": l2}
        return {name: value.numpy() for name, value in (found | {"norm_ratio": now / length}).items()}


def _cosine(base: torch.Tensor, rows: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
    """cos(rows, base) for rows whose displacement has lost what rounding added across the base row."""
    length = base.norm(dim=1, keepdim=True)
    along = (rows * base).sum(1, keepdim=True) / length.square()
    across = (rows - along * base).square().sum(1) / length.squeeze(1).square()
    across = (across - rounding / length.squeeze(1).square()).clamp(min=0)
    along = along.squeeze(1)
    return along / (along.square() + across).sqrt()


def read(name: str, folder: Path, cache: Path) -> Path:
    """The recording of a run of the bench, ``recipe/arm-seed``, if it is not there yet."""
    path, run_folder = folder / f"bench-{name.replace('/', '-')}.npz", cache / name
    if path.exists():
        return path
    told = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    recipe, seed = Recipe(**told["recipe"]), int(told["seed"])
    base_path = base_folder(cache, recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    size = AutoConfig.from_pretrained(base_path).vocab_size
    table, chosen = build_table(tokenizer, size), chosen_rows(size)
    rows = training_rows(
        tokenizer, steps=recipe.steps, batch=recipe.batch, copies=recipe.copies, longest=recipe.longest, seed=seed
    )
    base = _head(base_path / "model.safetensors")[chosen]
    matrix = _Matrix(base, (base.bfloat16().float() - base).square().sum(1))
    seen = [_start(len(chosen))]
    steps = [0]
    counts = _counts(rows, recipe.batch, size)
    for percent in range(10, 101, 10):
        weights = run_folder / f"weights-{percent:03d}.safetensors"
        if not weights.exists():
            continue
        steps.append(-(-recipe.steps * percent // 100))
        asked = {key: value[chosen] for key, value in counts[steps[-1]].items()}
        unexposed = torch.from_numpy(asked["data_target"] == 0)
        seen.append(seen[0] | matrix.drift(_head(weights)[chosen], unexposed) | asked)
    setup = Setup(
        "english", "adamw95" if recipe.beta2 == 0.95 else "adamw", recipe.rate, recipe.schedule, recipe.batch,
        tied=not recipe.untied, steps=recipe.steps, seed=seed, base=recipe.model,
    )  # fmt: skip
    save(path, {
        **{name: np.stack([check[name] for check in seen]) for name in seen[0]},
        "group": table.group.numpy()[chosen], "live": table.live.numpy()[chosen], "rows": size, "width": base.shape[1],
        "base_norm": base.norm(dim=1).numpy(), "prior": counts[recipe.steps]["data_target"][chosen],
        "prior_complete": True, "rates": _rates(recipe), "step": np.array(steps), "loss": told["loss"][1],
        "push_samples": np.zeros(len(steps), dtype=np.int64),
        **{f"setup/{name}": value for name, value in asdict(setup).items()},
    })  # fmt: skip
    return path


def _head(path: Path) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        name = "lm_head.weight" if "lm_head.weight" in file.keys() else "model.embed_tokens.weight"  # noqa: SIM118
        found: torch.Tensor = file.get_tensor(name).float()
    return found


def _start(rows: int) -> dict[str, np.ndarray]:
    """The base itself: nothing moved, nothing asked."""
    none, one = np.zeros(rows, dtype=np.float32), np.ones(rows, dtype=np.float32)
    drift = {"cosine": one, "residual": one, "l2": none, "norm_ratio": one}
    counts = {"data_target": none.astype(np.int32), "inputs": none.astype(np.int32)}
    return drift | counts | {
        "last_target": np.full(rows, -1, dtype=np.int32), "pull": none, "push": none, "input_only": none
    }  # fmt: skip


def _counts(rows: list[Row], batch: int, size: int) -> dict[int, dict[str, np.ndarray]]:
    """After each step: targets, inputs and the step of the last target of every token."""
    found, targets, inputs = {}, np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
    last = np.full(size, -1, dtype=np.int32)
    for step, part in enumerate(_batches(rows, batch), start=1):
        for row in part:
            asked = np.array([label for label in row["labels"][1:] if label != IGNORE], dtype=np.int64)
            targets = targets + np.bincount(asked, minlength=size).astype(np.int32)
            inputs = inputs + np.bincount(row["input_ids"], minlength=size).astype(np.int32)
            last = last.copy()
            last[asked] = step
        found[step] = {"data_target": targets, "inputs": inputs, "last_target": last}
    return found


def _batches(rows: list[Row], batch: int) -> Iterator[list[Row]]:
    return (rows[at : at + batch] for at in range(0, len(rows), batch))


def _rates(recipe: Recipe) -> np.ndarray:
    """Learning rates of all steps, as the trainer had them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.rate)
    warm = max(1, recipe.steps // 20)
    schedule = get_scheduler(recipe.schedule, optimizer, num_warmup_steps=warm, num_training_steps=recipe.steps)
    found = []
    for _ in range(recipe.steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return np.array(found)


def record_all(folder: Path, cache: Path) -> None:
    """Record all that is not there yet."""
    for name in BENCH:
        print(read(name, folder, cache), flush=True)
    for setup in SHORT:
        print(run(setup, folder, cache), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cache", type=Path)
    asked = parser.parse_args()
    record_all(asked.folder, asked.cache)
