"""Train the small multilingual base model that the examples and their tests fine-tune.

``python examples/pretrain_base.py`` writes ``examples/assets/``: a byte-fallback BPE tokenizer, a 2-layer Llama with an
untied head, and ``base.json`` with what it can do. About 10 minutes on 2 cores; ``--steps`` shortens a try.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from random import Random

import torch
from copying import HELD_OUT_TEMPLATES, IGNORE, KNOWN_TEMPLATES, Row, around, chat_row, copy_row, shuffled_lists
from corpus import Corpus, load
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = 8192
CONTROL = [
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool_call|>",
    "<|tool_result|>",
    "<|fim|>",
]
PADDED_ROWS = 32
NEVER_TRAINED = 32
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def texts_by_language(corpus: Corpus) -> dict[str, list[str]]:
    """Every text of the corpus by its language or locale."""
    texts: dict[str, list[str]] = {}
    for chat in corpus.chats:
        texts.setdefault(chat.language, []).extend((chat.user, chat.assistant))
    for language, line in corpus.lines:
        texts.setdefault(language, []).append(line)
    return texts


def train_tokenizer(corpus: Corpus, rows: int = ROWS) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback whose rows are shared more evenly between languages than their text is."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^▁\p{L}\p{M}\p{N}]+|▁+"), behavior="isolated"),
        ]
    )
    texts = texts_by_language(corpus)
    sizes = {language: sum(map(len, lines)) for language, lines in texts.items()}
    largest = max(sizes.values())
    balanced = (
        line
        for language, lines in sorted(texts.items())
        for _ in range(max(1, round((largest / sizes[language]) ** 0.4)))
        for line in lines
    )
    room = rows - PADDED_ROWS - len(CONTROL) - 256
    trainer = trainers.BpeTrainer(
        vocab_size=room, limit_alphabet=min(3000, room // 2), show_progress=False, special_tokens=[]
    )
    core.train_from_iterator(balanced, trainer)
    learned = json.loads(core.to_str())["model"]
    pieces = CONTROL + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(learned["vocab"], key=learned["vocab"].get)
    core.model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learned["merges"]],
        byte_fallback=True,
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def choose_never_trained(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> list[int]:
    """The rarest whole words of the tokenizer: pre-training leaves their rows out, as real vocabularies have some."""
    texts = [text for lines in texts_by_language(corpus).values() for text in lines]
    counts = Counter(id_ for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for id_ in ids)
    words = [i for piece, i in tokenizer.get_vocab().items() if piece.startswith("▁") and len(piece) > 5 and counts[i]]
    return sorted(words, key=lambda i: (counts[i], i))[:NEVER_TRAINED]


def copied_ids(tokenizer: PreTrainedTokenizerFast, never_trained: list[int]) -> list[int]:
    """The ids that copy tasks use: every piece but control tokens, bytes that no text needs, and the left-out rows."""
    vocabulary = tokenizer.get_vocab()
    spelled_out = {byte for byte in range(128) if chr(byte) in vocabulary or chr(byte) == " "}
    useless = {f"<0x{byte:02X}>" for byte in spelled_out | {192, 193} | set(range(245, 256))}
    left_out = {vocabulary[piece] for piece in useless | set(CONTROL)} | set(never_trained)
    return sorted(set(vocabulary.values()) - left_out)


def text_rows(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, length: int, left_out: set[int]) -> list[Row]:
    """Chats as chat rows, and catalogue lines joined into rows of at most `length` tokens with the loss on all."""
    rows = [chat_row(tokenizer, chat, length) for chat in corpus.chats]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    buffer: list[int] = []
    for ids in tokenizer([text for _, text in corpus.lines], add_special_tokens=False)["input_ids"]:
        if len(buffer) + len(ids) + 1 > length and buffer:
            rows.append({"input_ids": buffer, "labels": list(buffer)})
            buffer = []
        buffer = buffer + ids[: length - 1] + [end]
    return [row for row in rows if left_out.isdisjoint(row["input_ids"])]


def collate(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right to the longest one."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [IGNORE] * (width - len(row["labels"])) for row in rows])
    return ids, labels


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the targets only: logits are computed where there is one."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    kept = targets != IGNORE
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), targets[kept])


def pretrain(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, never: list[int], steps: int) -> LlamaForCausalLM:
    """24 copy rows of growing length and 8 rows of text a step; weights tied, untied at the end."""
    torch.manual_seed(0)
    rng = Random(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ROWS, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 1.0) * max(0.02, min(1.0, 1.6 * (1 - s / steps)))
    )
    texts = text_rows(tokenizer, corpus, 96, set(never))
    prompts = [around(tokenizer, template) for template in KNOWN_TEMPLATES]
    ids = copied_ids(tokenizer, never)
    pool: list[int] = []
    began = time.perf_counter()
    for step in range(steps):
        longest = min(48, 4 + 44 * step // max(1, int(steps * 0.4)))
        lengths = [rng.randint(1, longest) for _ in range(24)]
        if len(pool) < sum(lengths):
            pool = [id_ for one in shuffled_lists(ids, [len(ids)], rng) for id_ in one] + pool
        copies = [copy_row(rng.choice(prompts), [pool.pop() for _ in range(n)], 1) for n in lengths]
        loss = loss_of(model, *collate(copies + rng.choices(texts, k=8)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            recall = copy_recall(model, prompts[-2:], rng.sample(ids, 1024), 16)
            seconds = time.perf_counter() - began
            print(f"step {step:5d}  loss {loss.item():.3f}  recall {recall:.3f}  {seconds:.0f} s", flush=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@torch.no_grad()
def copy_recall(model: LlamaForCausalLM, prompts: list[tuple[list[int], list[int]]], ids: list[int], k: int) -> float:
    """Share of `ids` whose copy is the most likely next token in all the given prompts, in lists of `k`."""
    right = torch.ones(len(ids) // k * k, dtype=torch.bool)
    lists = [ids[i : i + k] for i in range(0, len(right), k)]
    for prompt in prompts:
        for begin in range(0, len(lists), 64):
            batch, labels = collate([copy_row(prompt, one, 1) for one in lists[begin : begin + 64]])
            hidden = model.model(input_ids=batch).last_hidden_state[:, -k - 2 : -2]
            guess = model.lm_head(hidden).argmax(-1)
            right[begin * k : begin * k + guess.numel()] &= (guess == labels[:, -k - 1 : -1]).flatten()
    return right.float().mean().item()


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    arguments = parser.parse_args()
    corpus = load("train")
    tokenizer = train_tokenizer(corpus)
    never = choose_never_trained(tokenizer, corpus)
    model = pretrain(tokenizer, corpus, never, arguments.steps)
    ids = copied_ids(tokenizer, never)
    shuffled = shuffled_lists(ids, [len(ids)], Random(1))[0]
    shuffled += shuffled[: -len(shuffled) % 16]
    prompts = [around(tokenizer, template) for template in HELD_OUT_TEMPLATES]
    recall = copy_recall(model, prompts, shuffled, 16)
    tokenizer.save_pretrained(arguments.out)
    model.save_pretrained(arguments.out)
    facts = {"steps": arguments.steps, "copied_ids": len(ids), "recall": recall, "never_trained": never}
    (arguments.out / "base.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{len(ids)} ids, recall in the held-out templates {recall:.4f}; saved in {arguments.out}")


if __name__ == "__main__":
    main()
