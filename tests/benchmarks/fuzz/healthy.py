"""Small healthy inputs of every kind that the command line takes; the fuzz damages copies of them."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vocabguard import VocabGuard

ROWS, WIDTH = 96, 16
# An optional package: without it no Parquet file is made, and none is damaged.
PARQUET = find_spec("pyarrow") is not None
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUIET: dict[str, Any] = {"log": {"console": False, "tensorboard": False}, "on_error": "raise"}
CHAT_ROW = {"messages": [{"role": "user", "content": "a cab"}, {"role": "assistant", "content": "bad ace"}]}


def tokenizer() -> PreTrainedTokenizerFast:
    """Single letters, a few merges and four markers: 90 ids for 96 rows."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<|end|>", "<|user|>", "<|assistant|>", "<pad>", "Ġ", *letters, *(letter.upper() for letter in letters)]
    merges = [(letters[i], letters[i + 1]) for i in range(25)] + [("Ġ", letter) for letter in letters[:8]]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    built = Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(pieces[:4])
    found = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>", pad_token="<pad>")
    found.chat_template = CHAT
    return found


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=ROWS, **sizes, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
    )


def moved(model: Any) -> Any:
    """The model with all its vocabulary rows moved, each differently far."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight.add_(0.03 * torch.rand(ROWS, 1, generator=generator) * torch.randn(ROWS, WIDTH, generator=generator))
    return model


def make(folder: Path) -> Path:
    """Write all of them.

    Returns:
        The folder, with ``base`` and ``tuned`` (models with tokenizers), ``single.safetensors``, ``sharded``,
        ``pickled``, ``last.ckpt``, the adapters ``lora``, ``dora``, ``tokens``; ``tok`` (a tokenizer); ``data`` (files
        of every kind); ``run`` (a run folder). ``scan.safetensors`` and ``coverage.safetensors`` the commands write.
    """
    words, base, tuned = tokenizer(), llama(), moved(llama())
    for name, model in {"base": base, "tuned": tuned}.items():
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    words.save_pretrained(folder / "tok")
    _checkpoints(folder, tuned)
    _adapters(folder)
    _data(folder / "data")
    _run(folder / "run", words)
    return folder


def _checkpoints(folder: Path, tuned: Any) -> None:
    rows = {name: value.clone().contiguous() for name, value in tuned.state_dict().items()}
    save_file(rows, folder / "single.safetensors", metadata={"format": "pt"})
    (folder / "sharded").mkdir()
    tuned.save_pretrained(folder / "sharded", max_shard_size="8KB")
    (folder / "pickled").mkdir()
    torch.save(rows, folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "config.json").write_text((folder / "base" / "config.json").read_text(encoding="utf-8"))
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in rows.items()}, "epoch": 1}, folder / "last.ckpt"
    )


def _adapters(folder: Path) -> None:
    shared = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "base_model_name_or_path": str(folder / "base")}
    lora = {"lora_A.weight": torch.randn(2, WIDTH), "lora_B.weight": torch.randn(ROWS, 2)}
    head = "base_model.model.lm_head."
    embedding = "base_model.model.model.embed_tokens."
    kinds: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
        "lora": (
            {"target_modules": ["lm_head"], "alpha_pattern": {}},
            {head + key: value for key, value in lora.items()}
            | {
                embedding + "lora_embedding_A": torch.randn(2, ROWS),
                embedding + "lora_embedding_B": torch.randn(WIDTH, 2),
            },
        ),
        "dora": (
            {"use_dora": True},
            {**{head + key: value for key, value in lora.items()}, head + "lora_magnitude_vector": torch.rand(ROWS)},
        ),
        "tokens": (
            {"trainable_token_indices": {"embed_tokens": [3, 5]}},
            {embedding + "token_adapter.trainable_tokens_delta": torch.randn(2, WIDTH)},
        ),
    }
    for name, (config, tensors) in kinds.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps(shared | config), encoding="utf-8")


def _data(folder: Path) -> None:
    folder.mkdir()
    texts = [{"text": "a cab bade"}, {"text": "face"}] * 3
    completions = [{"prompt": "a cab", "completion": "bad"}] * 3
    for name, rows in {"chats": [CHAT_ROW] * 3, "texts": texts, "completions": completions}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        if PARQUET:
            import pyarrow as pa  # type: ignore[import-untyped]
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / "lines.txt").write_text("a cab\nbad ace\n", encoding="utf-8")
    (folder / "answer.txt").write_text("a cab bade a face " * 20, encoding="utf-8")


def _run(folder: Path, words: Any) -> None:
    """A real run with echo, a probe and an alert, of four steps."""
    model = llama()
    guard = VocabGuard(
        tokenizer=words, drift={"every_n_steps": 2}, probe={"sample": 8, "every_n_steps": 2},
        alerts={"moved": {"metric": "head/cosine_min", "op": "<", "threshold": 0.9999}},
        neighbors={"k": 3, "every_n_checks": 1}, **QUIET,
    )  # fmt: skip
    optimizer, rng = torch.optim.SGD(model.parameters(), lr=0.5), random.Random(0)
    guard.attach(model, optimizer, total_steps=4, run_dir=folder)
    for step in range(1, 5):
        ids = torch.tensor([[rng.randrange(4, 90) for _ in range(12)] for _ in range(2)])
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        guard.step(step)
        optimizer.zero_grad()
    guard.finish()
