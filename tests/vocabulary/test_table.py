from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vocabguard.compare.matching import table_for
from vocabguard.vocabulary.table import GROUPS, VocabTable, build_table, ids_beyond, plain_table, resolve_token

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
TEXTS = [
    "The quick brown fox doesn't jump over 1,234 lazy dogs.",
    "Ça coûte 12 €, n'est-ce pas ? Größe und Straße.",
    "データを保存してください。コーヒー",
    "데이터를 저장하세요.",
    "请保存数据。你好",
    "Пожалуйста, сохраните данные.",
    "الرجاء حفظ البيانات.",
    "कृपया डेटा सहेजें।",
    "if (a != b) { return x->y; }  // done\n\tfoo_bar = '\\\\n'",
    "👍🏽 naïve ﬁ ½ ",
]


def fast(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def random_merges(alphabet: list[str], count: int, seed: int, longest: int = 4) -> list[tuple[str, str]]:
    """Merges in an order that makes some of their pieces impossible."""
    rng, units, merges = Random(seed), list(alphabet), []
    while len(merges) < count:
        left, right = rng.choice(units), rng.choice(units)
        if len(left + right) <= longest and left + right not in units:
            units.append(left + right)
            merges.append((left, right))
    rng.shuffle(merges)
    return merges


def bpe(alphabet: list[str], merges: list[tuple[str, str]], extra: list[str] | None = None, **options) -> models.BPE:
    pieces = alphabet + [left + right for left, right in merges] + (extra or [])
    return models.BPE(vocab=numbered(pieces), merges=merges, **options)


def byte_level(seed: int, **options: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(bpe(["a", "b", "Ġ", "1"], random_merges(["a", "b", "Ġ", "1"], 24, seed), **options))
    words = pre_tokenizers.Split(Regex(r" ?[a-z]+|\d| +"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return fast(core)


def metaspace(seed: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(bpe(["a", "b", "▁", "1"], random_merges(["a", "b", "▁", "1"], 24, seed)))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return fast(core)


def unigram(seed: int) -> PreTrainedTokenizerFast:
    rng, longer = Random(seed), [left + right for left, right in random_merges(["a", "b", "▁", "1"], 20, seed)]
    scores = [("<unk>", 0.0), *((piece, -2.0 - rng.random()) for piece in "ab▁1")]
    core = Tokenizer(models.Unigram([*scores, *((piece, -8 * rng.random()) for piece in longer)], unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    core.decoder = decoders.Metaspace()
    return fast(core, unk_token="<unk>")


def wordpiece(seed: int) -> PreTrainedTokenizerFast:
    parts = ["".join(letters) for n in (2, 3) for letters in itertools.product("ab1", repeat=n)]
    chosen = Random(seed).sample(parts, 12)
    pieces = ["[UNK]", "a", "b", "1", "##a", "##b", "##1", "A", "##aB", "a b", *chosen, *(f"##{p}" for p in chosen)]
    core = Tokenizer(models.WordPiece(numbered(pieces), unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return fast(core, unk_token="[UNK]")


def suffixed(seed: int) -> PreTrainedTokenizerFast:
    plain = random_merges(["a", "b", "1"], 16, seed)
    merges = plain + [(left, f"{right}</w>") for left, right in plain if len(right) == 1]
    core = Tokenizer(bpe(["a", "b", "1", "a</w>", "b</w>", "1</w>"], merges, end_of_word_suffix="</w>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return fast(core)


STYLES: dict[str, Callable[[int], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "whole_words": lambda seed: byte_level(seed, ignore_merges=True),
    "metaspace": metaspace,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "suffixed": suffixed,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("style", STYLES)
def test_reachable_is_what_all_short_texts_give(style: str, seed: int) -> None:
    """Against brute force: every text of up to 7 of the letters that the tokenizer knows."""
    tokenizer = STYLES[style](seed)
    texts = ["".join(letters) for n in range(1, 8) for letters in itertools.product("ab 1", repeat=n)]
    emitted = {i for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False) for i in e.ids}
    table = build_table(tokenizer, len(tokenizer))
    reachable = {i for i in range(len(table)) if table.reachable[i] and not table.control[i]}
    known = set(range(len(table))) - set(tokenizer.added_tokens_decoder)
    assert reachable - emitted == set(), [tokenizer.convert_ids_to_tokens(i) for i in reachable - emitted]
    assert emitted & known - reachable == set()
    assert 0 < len(reachable) < len(table)


GPT4_WORDS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained_byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(GPT4_WORDS), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return core


def trained_prepended() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return core


def trained_unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    core.train_from_iterator(TEXTS * 20, trainer)
    return core


def trained_wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return core


@pytest.mark.parametrize("train", [trained_byte_level, trained_prepended, trained_unigram, trained_wordpiece])
def test_what_texts_give_is_reachable(train: Callable[[], Tokenizer]) -> None:
    tokenizer = fast(train())
    table = build_table(tokenizer, len(tokenizer))
    words = [word for text in TEXTS for word in text.split()]
    lines = [*TEXTS, *words, *(f"{a}{b}" for a, b in zip(words, reversed(words), strict=True))]
    given = {i for encoding in tokenizer.backend_tokenizer.encode_batch(lines) for i in encoding.ids}
    missed = [tokenizer.convert_ids_to_tokens(i) for i in given if not table.reachable[i]]
    assert len(given) > 100
    assert missed == []
    assert table.reachable.float().mean() > 0.95  # a trainer keeps hardly any piece that it cannot give


def tiny(normalizer: normalizers.Normalizer | None = None, extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback over the characters of half of `TEXTS`; `extra` pieces have no merges."""
    characters = sorted({character for text in TEXTS[::2] for character in text.replace(" ", "▁")})
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("タ", "を"), ("ー", "ド"), ("e", "u"), ("-", ">"), ("x", "->")]
    merges = [pair for pair in merges if set("".join(pair)) <= set(characters)]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + characters
    core = Tokenizer(bpe(alphabet, merges, extra, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizer, space]) if normalizer else space
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(core)


def unreachable_pieces(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    table = build_table(tokenizer, len(tokenizer))
    return set(tokenizer.convert_ids_to_tokens((~table.reachable).nonzero().flatten().tolist()))


def test_pieces_without_merges_are_unreachable() -> None:
    planted = {"▁fox", "データ", "zz▁"}
    assert planted <= unreachable_pieces(tiny(extra=sorted(planted)))


def test_pieces_that_the_normalizer_never_leaves_are_unreachable() -> None:
    missing = unreachable_pieces(tiny(normalizers.Lowercase()))
    assert {"T", "P"} & set(tiny().get_vocab()) == {"T"}
    assert "T" in missing
    assert "t" not in missing
    assert "▁the" not in missing


def test_byte_pieces_are_reachable_where_a_character_needs_them() -> None:
    tokenizer = tiny()
    missing, own = unreachable_pieces(tokenizer), set(tokenizer.get_vocab())
    for byte in range(256):
        spelled_otherwise = byte < 128 and (chr(byte) in own or chr(byte) == " ")
        impossible = byte in (0xC0, 0xC1) or byte > 0xF4
        assert (f"<0x{byte:02X}>" in missing) == (spelled_otherwise or impossible), hex(byte)


def test_a_tokenizer_that_truncates_is_read_in_full_and_left_as_it_was() -> None:
    tokenizer, plain = tiny(), unreachable_pieces(tiny())
    tokenizer.backend_tokenizer.enable_truncation(2)
    before = tokenizer.backend_tokenizer.to_str()
    assert unreachable_pieces(tokenizer) == plain
    assert tokenizer.backend_tokenizer.to_str() == before


def test_parts_of_characters_are_reachable_where_utf8_has_them() -> None:
    spelled = bytes_to_unicode()
    wanted = {b"\xe3\x81": True, b"\x81\x82": True, b"\xf0\x9f": True, b"\xc0\x80": False, b"\xe3\xe3": False}
    merges = [(spelled[raw[0]], spelled[raw[1]]) for raw in wanted]
    core = Tokenizer(bpe(sorted(spelled.values()), merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = fast(core)
    table = build_table(tokenizer, len(tokenizer))
    for raw, possible in wanted.items():
        token_id = tokenizer.convert_tokens_to_ids("".join(spelled[byte] for byte in raw))
        assert bool(table.reachable[token_id]) == possible, raw
        assert table.group_of(token_id) == "bytes"
        assert table.text(token_id) == "".join(spelled[byte] for byte in raw)
    assert [f"{b:02x}" for b in range(256) if not table.reachable[tokenizer.convert_tokens_to_ids(spelled[b])]] == [
        "c0", "c1", "f5", "f6", "f7", "f8", "f9", "fa", "fb", "fc", "fd", "fe", "ff",
    ]  # fmt: skip


GROUP_OF = {
    "ja": ["データ", "ー", "してください", "保存して", "ｱ", "ﾞ", " コーヒー", "〱", "゛"],
    "ko": ["데이터", " 저", "ㅋ"],
    "zh": ["保存", "々", "〆", "〇", "二"],
    "cyrillic": ["сохран", " Пр"],
    "arabic": ["حفظ", "ـ", "\u064b", "گر"],
    "hebrew": ["שלום"],
    "devanagari": ["सहे", "ा"],
    "thai": ["ก็"],
    "greek": ["λόγος", "µ"],
    "latin": [" the", "Größe", "don't", "e.g", "naïve", "ﬁ", "a1", "YouTube", "dé"],
    "digits_punctuation": ["123", "、", "。", "・", " ", "\n\n", "{", "«", "...", "½", "۱", "€", "```", "١", "·"],
    "code": [
        "</div>", "<br", "{%", "}}", "->", " =>", "def(", "\\frac", "::", "&nbsp;", "();", '="', "==", "foo_bar",
        "self._x", "/>", "//", "!=", "arr[", "+=", "$name", "']", "<!--", " __",
    ],
    "other": ["ბ", "বাং", "👍", "©", "ሰላም", "\u0301"],
}  # fmt: skip


@pytest.mark.parametrize("group", GROUP_OF)
def test_groups(group: str) -> None:
    pieces = [text.replace(" ", "▁") for text in GROUP_OF[group]]
    core = Tokenizer(models.WordLevel(numbered(pieces), unk_token=pieces[0]))
    core.decoder = decoders.Metaspace()
    table = build_table(fast(core), len(pieces) + 2)
    assert {text: table.group_of(i) for i, text in enumerate(GROUP_OF[group])} == dict.fromkeys(GROUP_OF[group], group)
    assert [table.text(i) for i in range(len(pieces))] == GROUP_OF[group]
    assert table.mask(group).tolist() == [True] * len(pieces) + [False] * 2
    assert table.mask("padded").tolist() == [False] * len(pieces) + [True] * 2
    assert table.text(len(pieces)) == f"<row {len(pieces)}>"
    assert set(table.names) == set(GROUPS)


def test_control_tokens_are_told_from_added_words() -> None:
    tokenizer = tiny(extra=["<unused7>", "<|reserved_1|>"])
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens([AddedToken(text) for text in ("<tool_call>", "[SYS]", "<td>", "嘉祺", "new word", "é")])
    table = build_table(tokenizer, len(tokenizer))
    groups = {piece: table.group_of(i) for piece, i in tokenizer.get_vocab().items()}
    control = {"</s>", "<|im_end|>", "<tool_call>", "[SYS]", "<unused7>", "<|reserved_1|>"}
    assert {piece for piece, name in groups.items() if name == "control"} == control
    assert set(tokenizer.convert_ids_to_tokens(table.control.nonzero().flatten().tolist())) == control
    words = {"嘉祺": "zh", "new word": "latin", "é": "latin", "<td>": "code"}
    assert {piece: groups[piece] for piece in words} == words
    assert all(table.live[tokenizer.convert_tokens_to_ids(piece)] for piece in words)


@pytest.fixture(scope="module")
def base() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def base_table(base: PreTrainedTokenizerFast) -> VocabTable:
    return build_table(base, 8192)


def test_example_base(base: PreTrainedTokenizerFast, base_table: VocabTable) -> None:
    assert int(base_table.padded.sum()) == 32
    assert int(base_table.control.sum()) == 8
    never = json.loads((ASSETS / "base.json").read_text(encoding="utf-8"))["never_trained"]
    assert base_table.live[torch.tensor(never)].all()
    given = sorted({i for ids in base(TEXTS, add_special_tokens=False)["input_ids"] for i in ids})
    assert base_table.live[torch.tensor(given)].all()
    own = base.get_vocab()
    useless = {b for b in range(256) if (b < 128 and chr(b) in own) or b in (0x20, 0xC0, 0xC1) or b > 0xF4}
    missing = base.convert_ids_to_tokens((~base_table.reachable & ~base_table.padded).nonzero().flatten().tolist())
    assert set(missing) == {f"<0x{byte:02X}>" for byte in useless}


def test_reserved_names() -> None:
    """Names of tokens without a meaning; not those that T5 and Nemotron's chats train, nor ordinary pieces."""
    reserved = (
        "<unused7>", "[unused12]", "<|reserved_special_token_3|>", "<|reserved_200017|>", "<reserved_102>",
        "[UNUSED_TOKEN_4]", "<|placeholder1|>", "<｜place▁holder▁no▁796｜>", "<|dummy_5|>",
    )  # fmt: skip
    others = ("<extra_id_0>", "<|im_start|>", "<|extra_0|>", "<|unused|>", "<gh_stars>")
    words = ("unused7", "reserved", "the")
    every = {piece: i for i, piece in enumerate((*words, *reserved, *others))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(every, unk_token="the")))
    tokenizer.add_special_tokens({"additional_special_tokens": [*reserved, *others]})
    table = build_table(tokenizer, len(every) + 2)
    assert {table.text(i) for i in table.reserved.nonzero().flatten().tolist()} == set(reserved)
    assert not (table.idle & table.control).any()
    assert table.idle[-2:].all()


@pytest.mark.parametrize(
    ("item", "text"),
    [(3657, " the"), ("の", "の"), ("ください", "ください"), ("<|end|>", "<|end|>"), (" the", " the"), ("the", " the")],
)
def test_tokens_by_id_or_text(
    base: PreTrainedTokenizerFast, base_table: VocabTable, item: int | str, text: str
) -> None:
    if isinstance(item, int):
        item = base.get_vocab()["▁the"]
    assert base_table.text(resolve_token(base, item, 8192)) == text


def test_exact_text_comes_before_the_spaced_one(base: PreTrainedTokenizerFast) -> None:
    own = base.get_vocab()
    piece = next(p for p in own if p.isascii() and p.isalpha() and f"▁{p}" in own)
    assert resolve_token(base, piece, 8192) == own[piece]
    assert resolve_token(base, f" {piece}", 8192) == own[f"▁{piece}"]
    cased = wordpiece(0)
    assert resolve_token(cased, "##a", 100) == cased.convert_tokens_to_ids("##a")
    assert resolve_token(cased, "a", 100) == cased.convert_tokens_to_ids("a")
    assert resolve_token(cased, "B", 100) == cased.convert_tokens_to_ids("b")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (8192, r"token id 8192 is out of range; allowed: 0 to 8191"),
        (-1, r"token id -1 is out of range"),
        ("sesquipedalian", r"'sesquipedalian' is not one token; it is cut into \['s"),
        ("嘉祺", r"cut into \['<0xE5>'"),
        ("", r"'' is not one token; it is cut into \[\]"),
    ],
)
def test_refused_tokens(base: PreTrainedTokenizerFast, item: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_token(base, item, 8192)


def test_ids_beyond_the_matrix_are_left_out(base: PreTrainedTokenizerFast, base_table: VocabTable) -> None:
    table = build_table(base, 8000)
    assert ids_beyond(base, 8000) == 160
    assert ids_beyond(base, 8160) == 0
    assert table.texts == base_table.texts[:8000]
    for name in ("group", "control", "reachable", "padded", "live"):
        assert torch.equal(getattr(table, name), getattr(base_table, name)[:8000]), name
    with pytest.raises(ValueError, match=r"does not fit the model: it has 8160 ids, the matrix has 8000 rows"):
        table_for(base, 8000)


def test_live_follows_its_parts(base_table: VocabTable) -> None:
    chosen = int(base_table.live.nonzero()[5])
    mask = torch.ones(8192, dtype=torch.bool)
    mask[chosen] = False
    fewer = base_table.with_trained(mask)
    assert (base_table.live ^ fewer.live).nonzero().flatten().tolist() == [chosen]
    assert base_table.trained.all()
    assert len(fewer) == 8192
    excluded = ~base_table.reachable | base_table.control | base_table.padded
    assert torch.equal(base_table.live, ~excluded)
    with pytest.raises(ValueError, match=r"shape \(3,\); allowed: \(8192,\)"):
        base_table.with_trained(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown group 'klingon'"):
        base_table.mask("klingon")


def test_without_a_tokenizer_all_rows_are_live() -> None:
    table = plain_table(5)
    assert table.live.tolist() == [True] * 5
    assert table.mask("other").all()
    assert table.text(3) == "<row 3>"


class SlowTokenizer(PreTrainedTokenizer):
    """Words, then letters; ``▁`` before a word."""

    def __init__(self, pieces: list[str], **options: str) -> None:
        self.pieces = numbered(pieces)
        super().__init__(unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self.pieces, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        words = [word for word in ("▁" + text.replace(" ", " ▁")).split(" ") if word]
        return [part for word in words for part in ([word] if word in self.pieces else list(word))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return next(piece for piece, number in self.pieces.items() if number == index)


def test_slow_tokenizers_are_asked_for_round_trips() -> None:
    tokenizer = SlowTokenizer(["<unk>", "▁", "a", "b", "▁the", "▁ab", "ab", "た▁", "<0xE3>", "<0x61>"])
    table = build_table(tokenizer, 12)
    names = tokenizer.convert_ids_to_tokens(list(range(10)))
    assert {name for i, name in enumerate(names) if not table.reachable[i]} == {"ab", "た▁", "<0xE3>", "<0x61>"}
    assert table.text(4) == " the"
    assert table.group_of(8) == "bytes"
    assert table.padded.tolist() == [False] * 10 + [True] * 2
    assert resolve_token(tokenizer, "the", 12) == 4
