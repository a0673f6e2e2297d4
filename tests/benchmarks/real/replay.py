"""The guard over a run that has been trained: the same batches observed, the saved weights checked, no training.

What the guard says of a run is then developed without training it anew: probes, references, rules, verdicts. Only what
reads gradients or the optimizer's steps is missing (pull and push, the forecast).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real.data import training_rows
from real.models import load_base
from real.train import QUIET, Recipe
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from vocabguard import VocabGuard

WATCHING = ("echo.enabled=false", "hold.enabled=false", "forecast.enabled=false", "exposure.push_every_n_steps=0")


def load_weights(model: Any, path: Path) -> None:
    """Put saved weights into a model; a tied head is saved once, as the input rows."""
    loaded = model.load_state_dict(load_file(path), strict=False)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}, loaded.missing_keys


def replay(cache: Path, run: Path, looks: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Check a run's weights, evenly over its course, the end too.

    Args:
        cache: the bench's folder.
        run: of a finished run.
        looks: how many; a divisor of ten.
        overrides: settings of the guard.

    Returns:
        ``checks``: step, seconds of the probe, scalars and firing rules of each, the base's first; ``alerts`` at
        warning or above.
    """
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    recipe = Recipe(**told["recipe"])
    model, tokenizer = load_base(cache, recipe.model, untied=recipe.untied)
    rows = training_rows(
        tokenizer, steps=recipe.steps, batch=recipe.batch, copies=recipe.copies, longest=recipe.longest,
        seed=told["seed"],
    )  # fmt: skip
    loader: Any = DataLoader(rows, batch_size=recipe.batch, collate_fn=DataCollatorForSeq2Seq(tokenizer))  # type: ignore[arg-type]
    folder, every = run / "replay", recipe.steps // looks
    shutil.rmtree(folder, ignore_errors=True)
    cadence = (f"drift.every_n_steps={every}", f"probe.every_n_steps={every}", f"seed={told['seed']}")
    guard = VocabGuard("watch", tokenizer=tokenizer, overrides=[*WATCHING, *cadence, *overrides], **QUIET)
    guard.attach(model, total_steps=recipe.steps, dataloader=loader, hook_model=False, run_dir=str(folder))
    checks = [as_plain(guard)]
    for step, batch in enumerate(loader, start=1):
        guard.observe_batch(batch)
        if step % every == 0:
            load_weights(model, run / f"weights-{100 * step // recipe.steps:03d}.safetensors")
        if guard.step(step) is not None:
            checks.append(as_plain(guard))
    guard.finish(check=False)
    file = folder / "alerts.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    fired = [line for line in lines if line["state"] == "firing" and line["level"] != "info"]
    return {
        "checks": checks, "failure": guard.failure,
        "alerts": [{key: line[key] for key in ("step", "rule", "level", "value")} for line in fired],
    }  # fmt: skip


def as_plain(guard: VocabGuard) -> dict[str, Any]:
    """The last check as JSON holds it."""
    last = guard.last
    assert last is not None
    kept = ("probe/", "reference/", "head/cosine", "head/below", "exposure/never")
    scalars = {key.removeprefix("vocabguard/"): value for key, value in last.scalars.items()}
    return {
        "step": last.step, "probe_seconds": last.probe_seconds, "firing": list(last.firing),
        "scalars": {key: value for key, value in scalars.items() if key.startswith(kept)},
    }  # fmt: skip
