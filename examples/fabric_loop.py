"""A model and your own loop, in Lightning Fabric, as litgpt has them. ``python examples/fabric_loop.py``

The guard is told four things that it finds by itself in Hugging Face models: which modules hold the vocabulary, how the
model is asked for logits (`call`), which batch comes next, and when a step is done.
"""

import torch
from finetune import BATCH, LEARNING_RATE, collator, load_base, training_rows
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from vocabguard import VocabGuard

STEPS, WIDTH, CONTEXT = 60, 64, 512


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to the same."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        seen = self.norms[0](x)
        x = x + self.attention(seen, seen, seen, attn_mask=later, need_weights=False)[0]
        return x + self.feed(self.norms[1](x))


class GPT(nn.Module):
    """A small GPT that takes ids and gives logits, and knows nothing of labels."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(tokens, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.lm_head = nn.Linear(WIDTH, tokens, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) ids to (B, T, V) logits."""
        places = torch.arange(idx.shape[1], device=idx.device)
        return self.lm_head(self.blocks(self.wte(idx) + self.wpe(places)))


def main() -> None:
    """Train, guarded."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    _, tokenizer = load_base()
    rows = training_rows(tokenizer, STEPS, seed=0)
    model = GPT(tokens=8192)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=BATCH, collate_fn=collator(tokenizer)))  # type: ignore[arg-type]

    guard = VocabGuard(
        tokenizer=tokenizer,
        matrices={"head": "lm_head", "embedding": "wte"},
        call=lambda model, ids: model(ids),
        overrides=["drift.every_n_steps=20"],
    )
    guard.attach(
        model, optimizer, total_steps=STEPS, run_dir="runs/fabric_loop", dataloader=loader, hook_model=False,
        inject="batch",
    )  # fmt: skip
    model.train()
    for step, batch in enumerate(loader, start=1):
        guard.observe_batch(batch)  # counts its labels; with echo on, adds rows to it: so before anything else
        logits = model(batch["input_ids"])
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        fabric.backward(loss)
        optimizer.step()
        guard.step(step)
        optimizer.zero_grad()
    guard.finish()


if __name__ == "__main__":
    main()
