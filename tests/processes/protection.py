"""Two processes of the Hugging Face trainer with echo and hold on.

protection.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import conftest as kit
import torch
from test_echo import TapeLast
from test_hold import asked_by, rows_of
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from vocabguard.integrations.huggingface import VocabGuardCallback


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    data, model, tape = rows_of(4 * 2 * kit.BATCH), kit.tiny_model(), TapeLast()
    base = model.state_dict()["lm_head.weight"].clone()
    guarded = VocabGuardCallback(
        tokenizer=tokenizer,
        drift={"every_n_steps": 2},
        probe={"enabled": False},
        echo={"enabled": True, "targets_per_live_token": 0.02, "list_tokens": 4},
        hold={"enabled": True, "mode": "freeze"},
        **kit.QUIET,
    )
    trainer = kit.OrderedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=4,
            per_device_train_batch_size=kit.BATCH,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[guarded, tape],
    )
    assert trainer.args.world_size == 2
    trainer.train()
    exposure = guarded.guard.last.exposure
    echoed = [
        label
        for batch in tape.tape.batches
        for row in batch["labels"][kit.BATCH :].tolist()
        for label in row
        if label != -100
    ]
    torch.save(
        {
            "head": model.state_dict()["lm_head.weight"],
            "data": exposure.data_target,
            "echo": exposure.echo_target,
            "mine": echoed,
            "held": guarded.guard._protection.holder.held,
            "live": guarded.guard.table.live,
            "down": guarded.guard.failure,
            "asked": asked_by(data),
            "base": base,
        },
        folder / f"rank-{trainer.args.process_index}.pt",
    )


if __name__ == "__main__":
    main()
