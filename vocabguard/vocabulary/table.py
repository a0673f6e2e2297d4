"""`VocabTable`: what each row of a vocabulary matrix stands for. Knows a tokenizer, never a model.

Every id gets a script group, and is told apart as control, padded or unreachable: rows that no alarm should count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
import torch
from torch import Tensor

from vocabguard.vocabulary.letters import Looks
from vocabguard.vocabulary.reachability import BYTE_PIECE, Spelling, reachable_ids

GROUPS = (
    "ja", "ko", "zh", "cyrillic", "arabic", "hebrew", "devanagari", "thai", "greek", "latin",
    "digits_punctuation", "code", "bytes", "control", "padded", "other",
)  # fmt: skip
"""Groups of ids; the index is the value in ``VocabTable.group``.

- ``ja`` holds kana (with the prolonged sound and voicing marks), ``ko`` hangul, ``zh`` han without kana; then one group
  a script. A piece of several scripts goes to the first of them in this order; Latin letters yield to every other.
- ``digits_punctuation``: no letters; ``code``: at most Latin letters and a sign of code or markup (`_CODE`).
- ``bytes``: ``<0xE3>`` and pieces that are not whole UTF-8; ``control``: special, chat and tool markers;
  ``padded``: rows without a token; ``other``: letters of other scripts, emoji, lone marks.
"""

# The class of a character is the first that matches.
_CHARACTER_CLASSES = (
    ("digits_punctuation", r"[[\p{N}\p{P}\p{Z}\p{C}\p{Sm}\p{Sc}\p{Sk}]--[\p{Han}゛゜]]"),
    ("ja", r"[\p{Hiragana}\p{Katakana}[[\p{scx=Hira}\p{scx=Kana}]&&[\p{L}\p{M}゛゜]]]"),
    ("ko", r"\p{Hangul}"),
    ("zh", r"[\p{Han}〆]"),
    ("cyrillic", r"\p{Cyrillic}"),
    ("arabic", r"[\p{Arabic}[\p{scx=Arab}&&[\p{L}\p{M}]]]"),
    ("hebrew", r"\p{Hebrew}"),
    ("devanagari", r"\p{Devanagari}"),
    ("thai", r"\p{Thai}"),
    ("greek", r"[\p{Greek}µ]"),
    ("latin", r"\p{Latin}"),
    ("letter", r"\p{L}"),
    ("symbol", r"."),
)
_CLASS_PATTERN = regex.compile("(?V1s)" + "|".join(f"(?P<{name}>{chars})" for name, chars in _CHARACTER_CLASSES))
# The class of a piece is the first that one of its characters has.
_CLASS_ORDER = (*GROUPS[:9], "letter", "latin", "symbol", "digits_punctuation")
_CLASS_GROUP = tuple(GROUPS.index(name if name in GROUPS else "other") for name in _CLASS_ORDER)

_CODE = regex.compile(
    r"""
      </ | < [\p{L}!?%] | [/?%"'-]>               # tags and their ends
    | & (?: \#?\w+ ; | nbsp | quot | amp | [lg]t\b )      # entities
    | [{}\\]                                      # braces and commands: {% ${ \frac
    | -> | => | :: | := | [=!<>+*/%|&^]= | == | && | \|\| | \+\+ | << | >> | // | /\* | \*/     # operators
    | \w [(\[] | [(\[][)\]] | \]\[ | [)\]] ; | \(["'$@] | ["'][)\]]                  # calls and subscripts
    | \w = | = [\w"'] | [\p{L}\d]_[\p{L}\d] | __ | \b_\p{L} | \$[\p{L}_(]      # assignments and names
    """,
    regex.VERBOSE,
)
_MARKER = regex.compile(r"<\|[^|]+\|>|<｜[^｜]+｜>|<(?:unused|reserved|extra_id)[\w-]*>|\[unused\d+\]")
# Of added tokens only: ordinary pieces may look like this too, `<div>` or `[0]`.
_ADDED_MARKER = regex.compile(r"<\|?[^<>\s]+\|?>|\[[^\[\]\s]+\]")
# Names for tokens without a meaning, of control tokens only. T5 trains its `<extra_id_0>`, and Nemotron's chats use it.
_RESERVED = regex.compile(r"(?i)[<\[|｜]+(?:unused|reserved|place▁?holder|dummy)[\w▁]*\d+[>\]|｜]+")
_HTML = regex.compile(
    r"</?(?:[abipqsu]|h[1-6]|t(?:able|head|body|foot|[rdh])|caption|blockquote|strong|em|su[bp]|code|pre|[uod]l|li|d[td]"
    r"|div|span|img|br|hr)/?>"
)


@dataclass(frozen=True, eq=False)
class VocabTable:
    """What is known about each of the V rows.

    Attributes:
        group: (V,) uint8, index into `names`.
        control: (V,) bool, special tokens and chat or tool markers.
        reachable: (V,) bool, the tokenizer can emit the id when it encodes some text.
        padded: (V,) bool, no token has this id.
        trained: (V,) bool, not known as never trained at the base; all True when built.
        texts: what each id says, V strings; see `text`.
        names: the groups.

    Example:
        >>> table = plain_table(4).with_trained(torch.tensor([True, True, True, False]))
        >>> table.live.tolist(), table.group_of(0), table.text(2)
        ([True, True, True, False], 'other', '<row 2>')
    """

    group: Tensor
    control: Tensor
    reachable: Tensor
    padded: Tensor
    trained: Tensor
    texts: tuple[str, ...] = field(repr=False)
    names: tuple[str, ...] = GROUPS

    @property
    def live(self) -> Tensor:
        """(V,) bool: a token of the tokenizer, reachable, no control token, trained at the base."""
        return ~self.padded & self.reachable & ~self.control & self.trained

    @cached_property
    def idle(self) -> Tensor:
        """(V,) bool: rows that no text reaches, padded or unreachable ones; control tokens are not among them."""
        return (self.padded | ~self.reachable) & ~self.control

    @cached_property
    def reserved(self) -> Tensor:
        """(V,) bool: control tokens named as reserved or unused, like ``<unused7>``. A model may have trained some."""
        named = torch.zeros_like(self.control)
        ids = self.control.nonzero().flatten()
        named[ids] = torch.tensor([bool(_RESERVED.fullmatch(self.texts[i])) for i in ids.tolist()], dtype=torch.bool)
        return named

    def with_trained(self, mask: Tensor) -> VocabTable:
        """The same table with another `trained`; a ValueError if the mask is not (V,)."""
        if mask.shape != self.group.shape:
            raise ValueError(f"the mask of trained rows has shape {tuple(mask.shape)}; allowed: ({len(self)},)")
        return replace(self, trained=mask.to(torch.bool))

    def mask(self, group_name: str) -> Tensor:
        """(V,) bool: the rows of a group, live or not; a ValueError for an unknown group."""
        if group_name not in self.names:
            raise ValueError(f"unknown group {group_name!r}; allowed: {list(self.names)}")
        return self.group == self.names.index(group_name)

    def group_of(self, token_id: int) -> str:
        """The name of an id's group."""
        return self.names[int(self.group[token_id])]

    def text(self, token_id: int) -> str:
        """What the id decodes to; its piece where that is not readable, ``<row 8170>`` where it has none."""
        return self.texts[token_id] or f"<row {token_id}>"

    def __len__(self) -> int:
        """V."""
        return len(self.group)


def build_table(tokenizer: Any, rows: int) -> VocabTable:
    """Classify every row of a vocabulary matrix; ids that no token has become padded rows.

    Ids beyond the matrix are left out (`ids_beyond`). Slow tokenizers take longer: they are asked one text at a time.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"the": 0, "東京": 1, "<|end|>": 2}))
        >>> table = build_table(PreTrainedTokenizerFast(tokenizer_object=words), rows=4)
        >>> [table.group_of(token) for token in range(4)], table.live.tolist()
        (['latin', 'zh', 'control', 'padded'], [True, True, False, False])
    """
    pieces = _pieces_by_id(tokenizer, rows)
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    control = _control_ids(tokenizer, pieces, added)
    spelling = Spelling.of(tokenizer)
    texts = spelling.texts(pieces)
    for token_id, text in added.items():
        if token_id < rows:
            texts[token_id] = text
    looks = Looks.of([text or "" for text in texts], _class_of)
    group = _groups(texts, pieces, control, looks)
    in_question = (i for i in range(rows) if i not in added)
    reached = added.keys() | reachable_ids(tokenizer, in_question, pieces, texts, looks.with_kinds(group))
    return VocabTable(
        group=torch.from_numpy(group),
        control=_mask(control, rows),
        reachable=_mask(reached, rows),
        padded=torch.tensor([piece is None for piece in pieces]),
        trained=torch.ones(rows, dtype=torch.bool),
        texts=tuple(text or piece or "" for text, piece in zip(texts, pieces, strict=True)),
    )


def ids_beyond(tokenizer: Any, rows: int) -> int:
    """How many ids of a tokenizer have no row in a matrix."""
    return sum(token_id >= rows for token_id in tokenizer.get_vocab().values())


def plain_table(rows: int) -> VocabTable:
    """The table of a model without a tokenizer: V rows, all live, all in the group ``other``."""
    none = torch.zeros(rows, dtype=torch.bool)
    group = torch.full((rows,), GROUPS.index("other"), dtype=torch.uint8)
    return VocabTable(group, control=none, reachable=~none, padded=none, trained=~none, texts=("",) * rows)


def fit_rows(values: Tensor, rows: int, fill: float = 0) -> Tensor:
    """(..., V) numbers, cut or filled up to another number of rows, in a new tensor of their dtype and device.

    A matrix may have other rows than a table or a count.

    Example:
        >>> fit_rows(torch.tensor([3, 1]), 4, fill=-1).tolist(), fit_rows(torch.tensor([[3, 1]]), 1).tolist()
        ([3, 1, -1, -1], [[3]])
    """
    found = values.new_full((*values.shape[:-1], rows), fill)
    kept = min(rows, values.shape[-1])
    found[..., :kept] = values[..., :kept]
    return found


def resolve_token(tokenizer: Any, item: int | str, rows: int) -> int:
    """The id of a token given as an id or as text.

    A text is taken, in this order, as the token that says exactly it, as what encoding it gives (a tokenizer may lower
    its case or put a space before it), as its token with a leading space, or as its ``##`` form inside a word.

    Raises:
        ValueError: if the id is out of range (0 to V - 1), or the text is not one token.
    """
    if isinstance(item, int):
        if not 0 <= item < rows:
            raise ValueError(f"token id {item} is out of range; allowed: 0 to {rows - 1}")
        return item
    vocabulary, spelling = tokenizer.get_vocab(), Spelling.of(tokenizer)
    cut: list[int] = tokenizer.encode(item, add_special_tokens=False)
    encoded = cut[0] if len(cut) == 1 and cut[0] != tokenizer.unk_token_id else None
    exact = vocabulary.get(spelling.piece(item), vocabulary.get(item))
    spaced = vocabulary.get(spelling.piece(" " + item), vocabulary.get(f"{spelling.inside}{item}"))
    for found in (exact, encoded, spaced):
        if item and found is not None:
            return resolve_token(tokenizer, int(found), rows)
    raise ValueError(f"{item!r} is not one token; it is cut into {tokenizer.convert_ids_to_tokens(cut)} (ids {cut})")


def _mask(ids: Iterable[int], rows: int) -> Tensor:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.tensor(sorted(i for i in ids if i < rows), dtype=torch.long)] = True
    return mask


def _pieces_by_id(tokenizer: Any, rows: int) -> list[str | None]:
    pieces: list[str | None] = [None] * rows
    for piece, token_id in tokenizer.get_vocab().items():
        if token_id < rows:
            pieces[token_id] = piece
    return pieces


def _control_ids(tokenizer: Any, pieces: list[str | None], added: dict[int, str]) -> set[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    markers = {i for i, text in added.items() if _ADDED_MARKER.fullmatch(text) and not _HTML.fullmatch(text)}
    named = {i for i, piece in enumerate(pieces) if piece and piece[0] in "<[" and _MARKER.fullmatch(piece)}
    return special | markers | named | set(tokenizer.all_special_ids)


def _class_of(character: str) -> int:
    """Index into `_CLASS_ORDER`."""
    match = _CLASS_PATTERN.match(character)
    return _CLASS_ORDER.index(str(match and match.lastgroup))


def _groups(
    texts: list[str | None], pieces: list[str | None], control: set[int], looks: Looks
) -> npt.NDArray[np.uint8]:
    """(V,) index into `GROUPS` for each id."""
    latin = _CLASS_ORDER.index("latin")
    first = np.where(looks.first < 0, _CLASS_ORDER.index("symbol"), looks.first)
    group = np.array(_CLASS_GROUP, dtype=np.uint8)[first]
    # Half of most vocabularies are ASCII words, in which there is no sign to look for.
    for i in np.flatnonzero((first >= latin) & ~looks.alphanumeric & ~looks.ascii_words).tolist():
        text = texts[i]
        if text is not None and len(text.strip()) >= 2 and _CODE.search(text):
            group[i] = GROUPS.index("code")
    padded, held, raw = GROUPS.index("padded"), GROUPS.index("control"), GROUPS.index("bytes")
    for i in [i for i, text in enumerate(texts) if text is None or text[:3] == "<0x"]:
        text = texts[i]
        if pieces[i] is None:
            group[i] = padded
        elif text is None or BYTE_PIECE.fullmatch(text):
            group[i] = raw
    group[[i for i in control if i < len(pieces) and pieces[i] is not None]] = held
    return group
