"""How much a repair gives back, on the main example's fine-tune of the embedded base.

    python tests/benchmarks/repair_quality.py [--steps 300] [--seed 0] [--keep FOLDER]

The base is tuned as in the control arm of ``examples/sparse_token_forgetting.py`` (about a minute), then repaired with
each method, rows chosen by counts of data targets and by cosine. Recall is of every live token in the two templates
that the fine-tune never used; loss is that of the held-out English chats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from evaluate import recall, validation_loss
from finetune import ASSETS, fine_tune, load_base, training_rows

from vocabguard.measure.exposure import count_targets
from vocabguard.measure.probe import retained
from vocabguard.offline.checkpoint import open_checkpoint
from vocabguard.offline.repair import STRENGTH, lost_rows, plan_repair, write_repaired
from vocabguard.offline.scan import scan


def tuned_pair(folder: Path, steps: int, seed: int) -> torch.Tensor:
    """Fine-tune into ``folder``; the data targets of each token."""
    model, tokenizer = load_base()
    rows = training_rows(tokenizer, steps, seed)
    counts = sum(count_targets(torch.tensor([row["labels"]]), True, 8192) for row in rows)
    fine_tune(model, tokenizer, rows, trainer="hf", callbacks=[], folder=folder / "run", seed=seed)
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    assert isinstance(counts, torch.Tensor)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the models, else a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        counts = tuned_pair(folder, arguments.steps, arguments.seed)
        if arguments.keep:
            torch.save(counts, folder / "counts.pt")
        base, tokenizer = load_base()
        pair = open_checkpoint(ASSETS), open_checkpoint(folder / "tuned")
        found = {
            known: scan(*pair, tokenizer=tokenizer, data_target=counts if known else None) for known in (True, False)
        }
        table = found[True].table
        said = recall(base, tokenizer, table)
        tuned = AutoModelForCausalLM.from_pretrained(folder / "tuned")
        before, loss = retained(said, recall(tuned, tokenizer, table)), validation_loss(tuned, tokenizer)
        print(f"tuned: retained {before:.4f}, validation loss {loss:.4f}")
        for known, scanned in found.items():
            for method, strength in (("shift", 1.0), ("shift", STRENGTH), ("shift", 0.5), ("rows", 0.0)):
                out = folder / f"{method}-{strength}-{'counts' if known else 'cosine'}"
                plan = plan_repair(scanned, *lost_rows(scanned), method, strength)
                write_repaired(pair[1], plan, out)
                model = AutoModelForCausalLM.from_pretrained(out)
                after, then = retained(said, recall(model, tokenizer, table)), validation_loss(model, tokenizer)
                returned = (after - before) / (1 - before)
                print(
                    f"{method:5} {strength:4} {plan.chosen_by:42} {len(plan.ids):6,} rows: retained {after:.4f}, "
                    f"{returned:.1%} of the loss returned, validation loss {then / loss - 1:+.2%}"
                )


if __name__ == "__main__":
    main()
