"""Echo and hold with two processes (DDP over gloo): one stream of echo rows for both, one opinion on what is held."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments
import conftest as kit
from test_hold import asked_by, rows_of
from test_echo import TapeLast
from vocabguard.integrations.huggingface import VocabGuardCallback

folder = Path({folder!r})
tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
data, model, tape = rows_of(4 * 2 * kit.BATCH), kit.tiny_model(), TapeLast()
base = model.state_dict()["lm_head.weight"].clone()
guarded = VocabGuardCallback(
    tokenizer=tokenizer, drift={{"every_n_steps": 2}}, probe={{"enabled": False}},
    echo={{"enabled": True, "targets_per_live_token": 0.02, "list_tokens": 4}},
    hold={{"enabled": True, "mode": "freeze"}},
    **kit.QUIET,
)
trainer = kit.OrderedTrainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "run"), max_steps=4, per_device_train_batch_size=kit.BATCH, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
    ),
    train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
    callbacks=[guarded, tape],
)
assert trainer.args.world_size == 2
trainer.train()
exposure = guarded.guard.last.exposure
echoed = [label for batch in tape.tape.batches for row in batch["labels"][kit.BATCH:].tolist() for label in row
          if label != -100]
torch.save(
    {{"head": model.state_dict()["lm_head.weight"], "data": exposure.data_target, "echo": exposure.echo_target,
      "mine": echoed, "held": guarded.guard.protection.holder.held, "live": guarded.guard.checker.watched.table.live,
      "down": guarded.guard.faults.reason, "asked": asked_by(data), "base": base}},
    folder / f"rank-{{trainer.args.process_index}}.pt",
)
"""


def test_two_processes_share_one_stream_and_hold_alike(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(here=str(HERE), folder=str(tmp_path)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said[-4000:]
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert one["down"] is None
    assert other["down"] is None
    for name in ("head", "data", "echo", "held"):
        assert torch.equal(one[name], other[name]), name
    # Each process echoes tokens of its own; together they are what was counted, none twice.
    assert one["mine"]
    assert other["mine"]
    assert set(one["mine"]).isdisjoint(other["mine"])
    echoed = torch.bincount(torch.tensor(one["mine"] + other["mine"]), minlength=8192)
    assert torch.equal(echoed, one["echo"])
    assert echoed.max() == 1
    live = int(one["live"].sum())
    assert int(echoed.sum()) == int(0.02 * live / 4) * 4
    # Rows that no process asked for are the base's, bit by bit.
    asked, base = one["asked"] | (echoed > 0), one["base"]
    assert torch.equal(one["head"][~asked], base[~asked])
    assert bool((one["head"][asked] != base[asked]).any(dim=1).all())
