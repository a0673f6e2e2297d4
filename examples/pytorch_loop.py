"""The fewest lines for your own loop: attach, step, finish. ``python examples/pytorch_loop.py``"""

import torch
from finetune import BATCH, LEARNING_RATE, collator, load_base, training_rows
from torch.utils.data import DataLoader

from vocabguard.guard import VocabGuard

STEPS = 60

model, tokenizer = load_base()
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
rows = training_rows(tokenizer, STEPS, seed=0)
loader = DataLoader(rows, batch_size=BATCH, collate_fn=collator(tokenizer))  # type: ignore[arg-type]

guard = VocabGuard(tokenizer=tokenizer, overrides=["drift.every_n_steps=20"])
guard.attach(model, optimizer, total_steps=STEPS, run_dir="runs/pytorch_loop", dataloader=loader)
model.train()
for step, batch in enumerate(loader, start=1):
    model(**batch).loss.backward()
    optimizer.step()
    guard.step(step)
    optimizer.zero_grad()
guard.finish()
