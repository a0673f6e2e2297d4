"""The fine-tunes of ``early_warning.py``: small bases under many configurations, every row followed to the end.

Each run is a plain loop with the guard watching, and leaves one ``.npz``: what the guard knew at each check, and where
each row ended. The base is the embedded one or one of the small bases of ``early_bases.py``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Adafactor, get_scheduler, set_seed

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from copying import Row, chat_row
from corpus import Chat, load, package_folder
from early_bases import SHAPES, base_of
from finetune import collator, load_base

from vocabguard import VocabGuard
from vocabguard.results import Exposure, Preflight, RowDrift

LONGEST = 64
CHECKS = 50
BETAS = {"adamw": (0.9, 0.999), "adamw95": (0.9, 0.95), "adamw0": (0.0, 0.999)}
WARMUP = 0.04
GRADIENT_NORM = 1.0
MOST_ROWS = 8192
"""Rows of a larger vocabulary that are kept of a run: as many, drawn at random."""
LANGUAGES = {"english": "en", "russian": "ru", "spanish": "es", "chinese": "zh_Hans", "korean": "ko", "hindi": "hi"}


@dataclass(frozen=True)
class Setup:
    """One fine-tune.

    Attributes:
        data: see `texts`.
        optimizer: ``adamw`` (betas 0.9, 0.999), ``adamw95`` (0.9, 0.95), ``adamw0`` (0, 0.999), ``rmsprop`` (0, 0.99),
            ``sgd`` (momentum 0.9) or ``adafactor``.
        rate: highest learning rate.
        schedule: of the learning rate, by its name in transformers.
        batch: rows a step.
        tied: whether one matrix is input and output.
        steps: optimizer steps.
        seed: of the data's order.
        base: ``embedded``, or a name of `early_bases.SHAPES`.
    """

    data: str
    optimizer: str
    rate: float
    schedule: str
    batch: int
    tied: bool = False
    steps: int = 240
    seed: int = 0
    base: str = "embedded"

    @property
    def name(self) -> str:
        """A file name."""
        tied = "-tied" if self.tied else ""
        base = () if self.base == "embedded" else (self.base,)
        parts = (*base, self.data, self.optimizer, f"{self.rate:g}", self.schedule, f"b{self.batch}")
        return "-".join(parts) + f"{tied}-{self.steps}-s{self.seed}"


_corpus = functools.cache(load)


def texts(data: str) -> tuple[list[Chat], list[str]]:
    """Chats and lines of a data set: a language, ``code`` (Python) or ``mixed`` (three languages and code)."""
    if data == "code":
        return [], code_lines()
    if data == "mixed":
        parts = [texts(name) for name in ("english", "spanish", "korean", "code")]
        return [c for chats, _ in parts for c in chats], [x for _, lines in parts for x in lines[:2000]]
    corpus = _corpus("train")
    chats = [chat for chat in corpus.chats if chat.language == data]
    return chats, [text for language, text in corpus.lines if language == LANGUAGES[data]]


def code_lines() -> list[str]:
    """Blocks of Python source of an installed package."""
    blocks = []
    for path in sorted((package_folder("django") / "db").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        blocks += ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    return [block for block in blocks if block.strip()]


def rows_of(tokenizer: Any, setup: Setup) -> list[Row]:
    """Rows of all steps in order: the data's passes, shuffled anew each time."""
    chats, lines = texts(setup.data)
    rows = [chat_row(tokenizer, chat, LONGEST) for chat in chats]
    rows += [line_row(tokenizer, line) for line in lines]
    rng, ordered = Random(setup.seed), []
    while len(ordered) < setup.steps * setup.batch:
        ordered += rng.sample(rows, len(rows))
    return ordered[: setup.steps * setup.batch]


def line_row(tokenizer: Any, line: str) -> Row:
    """A text, trained on whole."""
    ids = tokenizer.encode(line, add_special_tokens=False)[:LONGEST]
    return {"input_ids": ids, "labels": list(ids)}


def optimizer_of(setup: Setup, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all parameters."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if setup.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=setup.rate, momentum=0.9)
    if setup.optimizer == "adafactor":
        return Adafactor(weights, lr=setup.rate, relative_step=False, scale_parameter=False)
    if setup.optimizer == "rmsprop":
        return torch.optim.RMSprop(weights, lr=setup.rate, alpha=0.99)
    return torch.optim.AdamW(weights, lr=setup.rate, betas=BETAS[setup.optimizer], weight_decay=0.0, fused=True)


def _numbers(last: Any) -> dict[str, Any]:
    head, exposure = last.head, last.exposure
    assert isinstance(head, RowDrift)
    assert isinstance(exposure, Exposure)
    return {
        "step": last.step,
        "cosine": head.cosine.numpy(),
        "residual": head.residual.numpy(),
        "l2": head.l2.numpy(),
        "norm_ratio": head.norm_ratio.numpy(),
        "data_target": exposure.data_target.numpy().astype(np.int32),
        "inputs": exposure.inputs.numpy().astype(np.int32),
        "last_target": exposure.last_target.numpy().astype(np.int32),
        "pull": exposure.pull.numpy(),
        "push": exposure.push.numpy(),
        "input_only": exposure.input_only.numpy(),
        "push_samples": exposure.push_samples,
    }


def run(setup: Setup, folder: Path) -> Path:
    """Fine-tune one configuration, if it is not there yet.

    Returns:
        Its file.
    """
    path = folder / f"{setup.name}.npz"
    if path.exists():
        return path
    set_seed(setup.seed)
    model, tokenizer = load_base() if setup.base == "embedded" else base_of(setup.base, folder)
    if setup.tied:
        tie(model)
    optimizer = optimizer_of(setup, model)
    specific = {"num_cycles": 3} if setup.schedule == "cosine_with_restarts" else {}
    schedule = get_scheduler(
        setup.schedule,
        optimizer,
        num_warmup_steps=round(WARMUP * setup.steps),
        num_training_steps=setup.steps,
        scheduler_specific_kwargs=specific,
    )
    loader = DataLoader(rows_of(tokenizer, setup), batch_size=setup.batch, collate_fn=collator(tokenizer))  # type: ignore[arg-type]
    checks = CHECKS if setup.base == "embedded" else CHECKS // 2
    kept = record(model, tokenizer, loader, optimizer, schedule, steps=setup.steps, checks=checks)
    save(path, kept | {f"setup/{name}": value for name, value in asdict(setup).items()})
    return path


def record(
    model: Any, tokenizer: Any, loader: Any, optimizer: torch.optim.Optimizer, schedule: Any, *, steps: int, checks: int
) -> dict[str, Any]:
    """Fine-tune over a loader's batches with the guard watching.

    Args:
        checks: about so many in the run.

    Returns:
        What the guard knew at each check, by name; rows are the first axis but one, or the first.
    """
    head = model.get_output_embeddings().weight
    norms = head.detach().float().norm(dim=1).numpy()
    every, rates, seen, losses = max(1, steps // checks), [], [], []
    overrides = [f"drift.every_n_steps={every}", "exposure.push_every_n_steps=4", "probe.enabled=false"]
    guard = VocabGuard(
        "watch", tokenizer=tokenizer, overrides=[*overrides, "forecast.enabled=false"],
        alerts={}, log={"console": False, "tensorboard": False, "report": False},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        guard.attach(model, optimizer, total_steps=steps, run_dir=out, dataloader=loader, hook_model=False)
        model.train()
        seen.append(_numbers(guard.last))
        for step, batch in enumerate(loader, start=1):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            guard.observe_batch(batch)
            loss = _loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            if guard.step(step) is not None:
                seen.append(_numbers(guard.last))
            optimizer.zero_grad()
            losses.append(loss.item())
        guard.finish(check=False)
    assert guard.failure is None, guard.failure
    steps_seen, samples = ([check.pop(name) for check in seen] for name in ("step", "push_samples"))
    table, flight = guard.table, guard.watch.preflight
    counted = isinstance(flight, Preflight)
    chosen = chosen_rows(len(norms))
    kept = {
        "group": table.group.numpy(), "live": table.live.numpy(), "base_norm": norms,
        "prior": flight.data_target.numpy() if counted else np.zeros(len(norms), dtype=np.int64),
    }  # fmt: skip
    stacked = {name: np.stack([check[name][chosen] for check in seen]) for name in seen[0]}
    return {
        **{name: value[chosen] for name, value in kept.items()}, **stacked, "rows": len(norms),
        "prior_complete": counted and flight.complete, "width": head.shape[1], "rates": np.array(rates),
        "step": np.array(steps_seen), "push_samples": np.array(samples), "loss": float(np.mean(losses)),
    }  # fmt: skip


def chosen_rows(count: int) -> np.ndarray:
    """Ascending ids of the rows that are kept of a run."""
    every = np.arange(count)
    return (
        every if count <= 2 * MOST_ROWS else np.sort(np.random.default_rng(0).choice(every, MOST_ROWS, replace=False))
    )


def _loss(model: Any, batch: Any) -> torch.Tensor:
    """Mean cross entropy of the targets; logits are computed where there is one."""
    ids, labels = batch["input_ids"], batch["labels"]
    hidden = model.model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden[kept]), labels[:, 1:][kept])


def tie(model: Any) -> None:
    """Make the input rows the output rows too: the base's head has the better conditioned rows."""
    model.get_input_embeddings().weight = model.get_output_embeddings().weight
    model.config.tie_word_embeddings = True


def save(path: Path, kept: dict[str, Any]) -> None:
    """Write a run's file whole or not at all: a stopped benchmark goes on where it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(file, **kept)
    path.with_suffix(".part").replace(path)


def degraded_share(path: Path) -> float:
    """Share of the live rows that ended below 0.95."""
    with np.load(path) as found:
        return float((found["cosine"][-1][found["live"]] < 0.95).mean())


LINEAR, COSINE, CONSTANT, RESTARTS = "linear", "cosine", "constant_with_warmup", "cosine_with_restarts"

HELD_OUT_DATA, HELD_OUT_OPTIMIZER = "russian", "adafactor"
"""No fine-tune with either is ever seen in fitting."""

TUNING = (
    Setup("english", "adamw", 6.3e-4, LINEAR, 12),
    Setup("english", "adamw", 6.2e-4, COSINE, 8, seed=1),
    Setup("english", "adamw", 3.6e-4, CONSTANT, 12, seed=2),
    Setup("english", "adamw", 6.5e-4, RESTARTS, 24, seed=3),
    Setup("english", "adamw95", 4.2e-4, LINEAR, 12, seed=4),
    Setup("english", "sgd", 0.5, LINEAR, 12),
    Setup("english", "adamw", 6.3e-4, LINEAR, 12, tied=True, seed=5),
    Setup("english", "adamw", 1e-4, LINEAR, 12, seed=6),
    Setup("code", "adamw", 8e-4, LINEAR, 8, seed=7),
    Setup("code", "adamw", 4.5e-4, CONSTANT, 12, tied=True, seed=8),
    Setup("code", "adamw95", 5e-4, COSINE, 12, seed=9),
    Setup("code", "sgd", 0.7, CONSTANT, 12, seed=10),
    Setup("mixed", "adamw", 7e-4, RESTARTS, 12, seed=11),
    Setup("mixed", "adamw95", 4.5e-4, LINEAR, 16, seed=12),
    Setup("mixed", "adamw", 3.8e-4, CONSTANT, 8, seed=13),
    Setup("mixed", "sgd", 0.5, COSINE, 12, seed=14),
    Setup("mixed", "adamw95", 2.5e-4, CONSTANT, 12, tied=True, seed=15),
    Setup("spanish", "adamw", 6.5e-4, COSINE, 12, seed=16),
    Setup("spanish", "adamw95", 4.5e-4, RESTARTS, 8, seed=17),
    Setup("korean", "adamw", 7e-4, LINEAR, 16, seed=18),
    Setup("korean", "adamw", 1.5e-4, COSINE, 12, seed=19),
    Setup("korean", "adamw95", 2.2e-4, CONSTANT, 12, seed=20),
    Setup("code", "adamw95", 5.5e-4, CONSTANT, 8, steps=120, seed=21),
    Setup("mixed", "adamw", 9e-4, LINEAR, 12, steps=120, seed=22),
    Setup("english", "adamw", 5e-4, LINEAR, 12, steps=480, seed=50),
    Setup("english", "adamw", 7e-4, LINEAR, 12, seed=51),
    Setup("chinese", "adamw", 7e-4, LINEAR, 12, seed=60),
    Setup("chinese", "adamw95", 4.5e-4, COSINE, 8, seed=61),
    Setup("hindi", "adamw", 7e-4, RESTARTS, 12, seed=62),
    Setup("hindi", "rmsprop", 4e-4, LINEAR, 12, seed=63),
    Setup("chinese", "rmsprop", 4e-4, COSINE, 16, seed=64),
    Setup("spanish", "rmsprop", 2.5e-4, CONSTANT, 12, seed=65),
    Setup("code", "rmsprop", 5e-4, LINEAR, 12, seed=66),
    Setup("mixed", "rmsprop", 4e-4, RESTARTS, 12, tied=True, seed=67),
    Setup("english", "rmsprop", 3e-4, LINEAR, 12, steps=480, seed=68),
    Setup("chinese", "adamw95", 1.9e-4, LINEAR, 12, steps=480, seed=69),
    Setup("mixed", "adamw95", 2.2e-4, COSINE, 12, steps=480, seed=70),
    Setup("code", "adamw0", 6e-4, LINEAR, 12, seed=71),
    Setup("hindi", "adamw0", 5e-4, COSINE, 12, seed=72),
    Setup("english", "rmsprop", 8e-5, LINEAR, 12, seed=73),
    Setup("mixed", "adamw0", 3.5e-4, CONSTANT, 12, seed=74),
    Setup("korean", "adamw0", 6e-4, RESTARTS, 8, seed=75),
    Setup("english", "adamw", 1e-3, LINEAR, 12, seed=80),
    Setup("chinese", "adamw", 1e-3, COSINE, 12, seed=81),
    Setup("spanish", "adamw", 1.1e-3, LINEAR, 16, seed=82),
    Setup("code", "adamw", 1.1e-3, COSINE, 12, seed=83),
    Setup("korean", "adamw", 1e-3, RESTARTS, 16, seed=84),
    Setup("hindi", "adamw95", 8e-4, LINEAR, 12, seed=85),
    Setup("mixed", "adamw", 6e-4, CONSTANT, 12, seed=86),
    Setup("english", "adamw95", 4e-4, COSINE, 12, steps=480, seed=87),
    Setup("spanish", "adamw0", 9e-4, LINEAR, 12, seed=88),
    Setup("chinese", "rmsprop", 6e-4, CONSTANT, 12, seed=89),
)
HELD_OUT = (
    Setup("russian", "adamw", 9e-4, LINEAR, 12, seed=30),
    Setup("russian", "adamw", 5e-4, CONSTANT, 8, seed=31),
    Setup("russian", "adamw", 9e-4, RESTARTS, 16, seed=32),
    Setup("russian", "adamw95", 6e-4, COSINE, 12, seed=33),
    Setup("russian", "sgd", 0.5, LINEAR, 12, seed=34),
    Setup("russian", "adamw", 8e-4, COSINE, 12, tied=True, seed=35),
    Setup("russian", "adamw", 1e-4, LINEAR, 12, seed=36),
    Setup("russian", "adafactor", 8e-4, LINEAR, 12, seed=37),
    Setup("russian", "adafactor", 4.5e-4, CONSTANT, 8, seed=38),
    Setup("english", "adafactor", 6.3e-4, COSINE, 12, seed=39),
    Setup("code", "adafactor", 7.5e-4, LINEAR, 12, seed=40),
    Setup("mixed", "adafactor", 6.5e-4, RESTARTS, 12, seed=41),
    Setup("english", "adafactor", 7e-4, LINEAR, 16, tied=True, seed=42),
    Setup("code", "adafactor", 1e-4, COSINE, 12, seed=43),
    Setup("russian", "adamw", 1e-3, LINEAR, 12, seed=52),
    Setup("russian", "adamw95", 3.6e-4, LINEAR, 12, steps=480, seed=45),
    Setup("russian", "adamw95", 1e-4, COSINE, 12, seed=46),
    Setup("mixed", "adafactor", 1e-4, LINEAR, 12, seed=47),
)
"""Rates are such that most runs end with 2 to 50 % of the live rows below 0.95, and a few with none or with more."""


def _shaped(base: str, number: int, count: int) -> list[Setup]:
    """Some fine-tunes of a small base: data, optimizer, rate, schedule, length and batch drawn independently."""
    rng, setups = Random(f"{base} {number}"), []
    for seed in range(count):
        schedule = rng.choice((LINEAR, COSINE, CONSTANT, RESTARTS))
        optimizer = rng.choice(("adamw", "adamw", "adamw95", "adamw95", "adamw0", "rmsprop")) if seed else "sgd"
        # Half of the runs move rows as little as fine-tunes of real models do.
        rate = 10 ** rng.uniform(-4.3, -2.8) * (0.6 if schedule == CONSTANT else 1)
        rate = 0.3 if optimizer == "sgd" else float(f"{rate:.1e}")
        setups.append(
            Setup(
                rng.choice(("english", "spanish", "korean", "chinese", "hindi", "code", "mixed")), optimizer, rate,
                schedule, rng.choice((4, 8, 12)), tied=rng.random() < 0.4, steps=rng.choice((60, 100, 160)),
                seed=seed, base=base,
            )
        )  # fmt: skip
    return setups


SHAPED = tuple(setup for turn in zip(*(_shaped(base, 0, 10) for base in SHAPES), strict=True) for setup in turn)
"""Fine-tunes of the bases of other shapes."""


def run_all(folder: Path) -> None:
    """Run what is not there yet, tuning and held-out configurations in turn."""
    longest = max(len(TUNING), len(HELD_OUT))
    for index in range(longest):
        for setups in (TUNING, HELD_OUT):
            if index < len(setups):
                path = run(setups[index], folder)
                print(f"{degraded_share(path):7.2%}  {setups[index].name}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    run_all(parser.parse_args().folder)
