"""litgpt's own model, data and loss in its fine-tuning loop, with the guard's lines: ``litgpt_script.py FOLDER OUT``.

litgpt's commands take no callbacks, so the loop is written out. It counts for itself what it trains on; rows beyond
those of the dataloader's batch are echo's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from litgpt import GPT, Config
from litgpt.data import SFTDataset, get_sft_collate_fn
from litgpt.prompts import Default
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from vocabguard import VocabGuard
from vocabguard.integrations.launched import asked

ROWS = 2


class Tokenizer:
    """What litgpt's data set asks of a tokenizer."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode(self, text: str, bos: Any = None, eos: bool = False, max_length: int = -1) -> Any:
        """Ids as a tensor, closed by the end token."""
        ids = self.inner(text, add_special_tokens=False)["input_ids"] + [self.inner.eos_token_id] * eos
        return torch.tensor(ids[:max_length] if max_length > 0 else ids)


def main() -> None:
    """Train, guarded."""
    folder, out = Path(sys.argv[1]), sys.argv[2]
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(1)
    inner = AutoTokenizer.from_pretrained(folder / "model")
    chats = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    data = [{"instruction": chat[0]["content"], "input": "", "output": chat[1]["content"]} for chat in chats]
    rows = SFTDataset(data, Tokenizer(inner), prompt_style=Default(), max_seq_length=256)
    collate = get_sft_collate_fn(max_seq_length=256, pad_id=0, ignore_index=-100)
    model = GPT(Config(
        block_size=512, vocab_size=8192, padded_vocab_size=8192, n_layer=1, n_head=4, n_embd=32, rotary_percentage=1.0,
    ))  # fmt: skip
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=ROWS, collate_fn=collate))

    config, settings = asked() or (None, ())
    guard = VocabGuard(
        config, tokenizer=inner, matrices={"head": "lm_head", "embedding": "transformer.wte"},
        call=lambda model, ids: model(ids), overrides=settings,
    )  # fmt: skip
    guard.attach(
        model, optimizer, total_steps=6, run_dir=Path(out) / "vocabguard", dataloader=loader, hook_model=False,
        inject="batch",
    )  # fmt: skip
    seen: dict[str, Any] = {"data": {}, "echo": {}, "steps": 0, "history": [], "kind": "litgpt.GPT in Fabric"}
    model.train()
    for step, batch in enumerate(loader, start=1):
        guard.observe_batch(batch)
        for row, line in enumerate(batch["labels"].tolist()):
            of = seen["data" if row < ROWS else "echo"]
            for label in line[1:]:
                if label != -100:
                    of[label] = of.get(label, 0) + 1
        logits = model(batch["input_ids"])
        loss = chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])
        fabric.backward(loss)
        optimizer.step()
        guard.step(step)
        optimizer.zero_grad()
        seen["steps"] = step
        if step == 6:
            break
    guard.finish()
    seen["global_step"] = seen["steps"]
    Path(f"{os.environ['SPY']}-0.json").write_text(json.dumps(seen), encoding="utf-8")


main()
