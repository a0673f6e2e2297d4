"""How long `build_table` takes on a synthetic multilingual tokenizer of 262,144 pieces.

``python tests/benchmarks/vocabulary_speed.py`` prints the best and the median of five builds, and the least processor
time, for a byte-level BPE (GPT-2 style) and a BPE with byte fallback over ``▁`` (Gemma style), or, with ``--tokenizer
FOLDER``, for a real one. ``--train FOLDER --size 151643`` trains a byte-level BPE of that size, split as Qwen's and
Llama's are, on up to 6,000 files of text and code under a folder, which takes minutes. No network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vocabguard.vocabulary.table import build_table

SCRIPTS = {  # first letter, number of letters, share of the pieces
    "latin": ("a", 26, 0.50),
    "cyrillic": ("а", 32, 0.10),
    "han": ("一", 3000, 0.14),
    "kana": ("ぁ", 80, 0.08),
    "hangul": ("가", 2000, 0.05),
    "arabic": ("ء", 26, 0.04),
    "devanagari": ("अ", 53, 0.04),
    "thai": ("ก", 46, 0.03),
    "greek": ("α", 25, 0.02),
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_TABLE: dict[int, str] = bytes_to_unicode()

Merges = list[tuple[str, str]]


def grow(units: list[list[str]], space: str, merges: Merges, pieces: set[str], room: int) -> None:
    """Add pieces made of two older pieces of one script, with their merges, until `room` is taken."""
    rng = Random(0)
    shares = [share for _, _, share in SCRIPTS.values()]
    while len(pieces) < room:
        own = rng.choices(units, shares)[0]
        left = space if rng.random() < 0.02 else own[int(len(own) * rng.random() ** 2)]
        right = own[int(len(own) * rng.random() ** 3)]
        joined = left + right
        if len(joined) <= 24 and joined not in pieces:
            pieces.add(joined)
            merges.append((left, right))
            own.append(joined)


def spell(character: str, merges: Merges, pieces: set[str]) -> str:
    """A character's bytes as a byte-level piece, with the merges that make it."""
    symbols = [BYTE_TABLE[byte] for byte in character.encode()]
    made = symbols[0]
    for symbol in symbols[1:]:
        if made + symbol not in pieces:
            pieces.add(made + symbol)
            merges.append((made, symbol))
        made += symbol
    return made


def byte_level(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` pieces."""
    merges = Merges()
    pieces = set(BYTE_TABLE.values())
    units = [
        [spell(chr(ord(first) + offset), merges, pieces) for offset in range(count)]
        for first, count, _ in SCRIPTS.values()
    ]
    grow(units, BYTE_TABLE[32], merges, pieces, size)
    core = Tokenizer(models.BPE(vocab=_numbered(sorted(BYTE_TABLE.values()), merges), merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def byte_fallback(size: int) -> PreTrainedTokenizerFast:
    """A BPE of `size` pieces over characters, ``▁`` for the space, with byte fallback."""
    merges = Merges()
    units = [[chr(ord(first) + offset) for offset in range(count)] for first, count, _ in SCRIPTS.values()]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *chain.from_iterable(units)]
    grow(units, "▁", merges, set(alphabet), size)
    core = Tokenizer(models.BPE(vocab=_numbered(alphabet, merges), merges=merges, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def trained(folder: Path, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` pieces, trained on the texts under a folder."""
    files = sorted(path for ending in ("md", "po", "py", "rst", "txt") for path in folder.rglob(f"*.{ending}"))
    Random(0).shuffle(files)
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in files[:6000])
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, max_token_length=24, special_tokens=["<|end|>"], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def _numbered(alphabet: list[str], merges: Merges) -> dict[str, int]:
    names = dict.fromkeys(alphabet) | dict.fromkeys(left + right for left, right in merges)
    return {piece: index for index, piece in enumerate(names)}


def main() -> None:
    """Build, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=262_144)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", help="a folder that transformers can load a tokenizer from")
    parser.add_argument("--train", type=Path, help="a folder of texts to train a byte-level BPE on")
    arguments = parser.parse_args()
    styles: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
        style.__name__: partial(style, arguments.size) for style in (byte_level, byte_fallback)
    }
    if arguments.train:
        styles = {f"trained on {arguments.train}": partial(trained, arguments.train, arguments.size)}
    if arguments.tokenizer:
        styles = {arguments.tokenizer: partial(AutoTokenizer.from_pretrained, arguments.tokenizer)}
    for name, style in styles.items():
        tokenizer = style()
        walls, processor = [], []
        for _ in range(arguments.repeats):
            began = time.perf_counter(), time.process_time()
            table = build_table(tokenizer, len(tokenizer))
            walls.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
        counts = torch.bincount(table.group.long(), minlength=len(table.names)).tolist()
        print(f"{name}: {len(table)} ids, {min(walls):.2f} s best, {statistics.median(walls):.2f} s median, ")
        print(f"  {min(processor):.2f} s of processor time; {int(table.reachable.sum())} reachable; ", end="")
        print(", ".join(f"{name} {count}" for name, count in zip(table.names, counts, strict=True) if count))


if __name__ == "__main__":
    main()
