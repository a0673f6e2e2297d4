"""How much a repair gives back, on the main example's fine-tune of the embedded base.

    python tests/benchmarks/repair_quality.py [--steps 300] [--seed 0] [--keep FOLDER] [--methods shift,rows,echo]

The base is tuned as in the control arm of ``examples/sparse_token_forgetting.py`` (about a minute; with ``--keep`` a
pair that lies there is taken), then repaired with each method, rows chosen by counts of data targets and by cosine.
Echo trains beside the English chats of the fine-tune and asks in the ways that this small base knows, as the example
does. Recall is of every live token in the two templates that neither the fine-tune nor echo uses; loss is that of the
held-out English chats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from copying import ECHO_INSTRUCTIONS
from corpus import load
from evaluate import recall, validation_loss
from finetune import ASSETS, fine_tune, load_base, training_rows

from vocabguard.cli.repair_train import EchoRun, data_rows, train_echo
from vocabguard.compare.options import STRENGTH
from vocabguard.compare.repair import Plan, lost_rows, plan_repair, write_repaired
from vocabguard.compare.scan import Scan, scan
from vocabguard.data.readers import Chat
from vocabguard.measure.exposure import count_targets
from vocabguard.measure.retention import retained
from vocabguard.rows.checkpoints import open_checkpoint

STRENGTHS = {"shift": (1.0, STRENGTH, 0.3), "rows": (0.0,), "echo": (STRENGTH,)}


def tuned_pair(folder: Path, steps: int, seed: int) -> torch.Tensor:
    """Fine-tune into ``folder``; the data targets of each token."""
    model, tokenizer = load_base()
    rows = training_rows(tokenizer, steps, seed)
    counts = sum(count_targets(torch.tensor([row["labels"]]), True, 8192) for row in rows)
    fine_tune(model, tokenizer, rows, trainer="hf", callbacks=[], folder=folder / "run", seed=seed)
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    assert isinstance(counts, torch.Tensor)
    torch.save(counts, folder / "counts.pt")
    return counts


def repaired(method: str, strength: float, found: Scan, plan: Plan, tokenizer: Any, folder: Path, run: EchoRun) -> Any:
    """The repaired model."""
    if method != "echo":
        out = folder / f"{method}-{strength}-{len(plan.ids)}"
        if not out.exists():
            write_repaired(found.tuned, plan, out)
        return AutoModelForCausalLM.from_pretrained(out)
    chats = [
        Chat("corpus", [{"role": "user", "content": chat.user}, {"role": "assistant", "content": chat.assistant}])
        for chat in load("train").english()
    ]
    live = int(found.live.sum())
    rows = data_rows(chats, tokenizer, run.targets * live, run.max_length)
    model, told = train_echo(found.tuned.path, plan, live, rows, tokenizer, run, lambda *_: None)
    print(f"      {told}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the models, else a temporary one")
    parser.add_argument("--methods", default="shift,rows,echo")
    parser.add_argument("--strength", type=float, help="only this part of the mean shift")
    parser.add_argument("--counts", choices=["known", "unknown", "both"], default="both")
    parser.add_argument("--targets", type=float, default=EchoRun().targets)
    parser.add_argument("--learning-rate", type=float, default=EchoRun().learning_rate)
    parser.add_argument("--batch", type=int, default=EchoRun().batch)
    arguments = parser.parse_args()
    run = EchoRun(arguments.targets, arguments.learning_rate, arguments.batch, instructions=ECHO_INSTRUCTIONS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        there = (folder / "counts.pt").exists()
        counts = torch.load(folder / "counts.pt") if there else tuned_pair(folder, arguments.steps, arguments.seed)
        base, tokenizer = load_base()
        pair = open_checkpoint(ASSETS), open_checkpoint(folder / "tuned")
        tuned = AutoModelForCausalLM.from_pretrained(folder / "tuned")
        for known in {"known": (True,), "unknown": (False,), "both": (True, False)}[arguments.counts]:
            found = scan(*pair, tokenizer=tokenizer, data_target=counts if known else None)
            said = recall(base, tokenizer, found.table)
            before, loss = retained(said, recall(tuned, tokenizer, found.table)), validation_loss(tuned, tokenizer)
            print(f"tuned: retained {before:.4f}, validation loss {loss:.4f}", flush=True)
            for method in arguments.methods.split(","):
                for strength in STRENGTHS[method] if arguments.strength is None else (arguments.strength,):
                    plan = plan_repair(found, *lost_rows(found), "rows" if method == "rows" else "shift", strength)
                    began = time.perf_counter()
                    model = repaired(method, strength, found, plan, tokenizer, folder, run)
                    seconds = time.perf_counter() - began
                    after = retained(said, recall(model, tokenizer, found.table))
                    returned, more = (after - before) / (1 - before), validation_loss(model, tokenizer) / loss - 1
                    print(
                        f"{method:5} {strength:4} {plan.chosen_by:42} {len(plan.ids):6,} rows: retained {after:.4f}, "
                        f"{returned:.1%} of the loss returned, validation loss {more:+.2%}, {seconds:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
