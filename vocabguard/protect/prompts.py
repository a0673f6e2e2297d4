"""Prompts of the probe and of echo rows: instructions rendered with the tokenizer's chat template into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from vocabguard.measure.probe import PromptContext
from vocabguard.protect.rows import EchoPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{tokens}"
"""Where the probed tokens go in an instruction."""

_TOKEN = "{token}"
_SHOTS = 4
_MARK = "\U0010fffd"  # the last private-use character: no tokenizer merges it with a neighbour
_ANSWER = "\U0010fffc"  # the one before it stands for the assistant's turn


def render_context(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, k: int, *, turns: Sequence[str] = (), chat: bool = True
) -> PromptContext:
    """The ids around the probed tokens, which are spliced in as ids: encoded as text they would merge into others.

    With a chat template, the instruction is a user's turn and the copy begins where the assistant's turn does. Without
    one, it is plain text from the beginning of a document (with the BOS token, if the tokenizer adds one), and the copy
    begins on the next line.

    Args:
        name: of the context; errors name ``probe.contexts.<name>``.
        text: shows the list at each ``{tokens}``; or is a line for each token, which stands at both ``{token}``.
        k: tokens in a list.
        turns: what user and assistant say in turn, from the user's first to its last turn, instead of `text`.
        chat: False takes `text` for plain text from a document's beginning, which the copy follows at once.

    Raises:
        ValueError: if the text shows no list, or the chat template does not render each of them once.
    """
    key = f"probe.contexts.{name}"
    if _TOKEN in text and not turns:
        return _render_pairs(tokenizer, name, text, k)
    texts = tuple(turns) or (text,)
    shown = sum(one.count(PLACE) for one in texts)
    if not shown:
        raise ValueError(f"{key}: the text is {text!r}; it needs {PLACE!r} at least once, or {_TOKEN!r} twice")
    marked = [one.replace(PLACE, _MARK) for one in texts]
    if chat:
        start, rendered = _rendered(tokenizer, key, marked)
    else:
        start, rendered = _beginning(tokenizer), marked[0]
    if rendered.count(_MARK) != shown:
        found = rendered.count(_MARK)
        raise ValueError(f"{key}: the chat template renders the {shown} lists {found} times; expected {shown}")
    before, *between, after = rendered.split(_MARK)
    return PromptContext(
        name, tuple(start + _encode(tokenizer, before)), tuple(_encode_inside(tokenizer, after)), k,
        between=tuple(tuple(_encode_inside(tokenizer, part)) for part in between),
    )  # fmt: skip


class Way(Protocol):
    """A way of asking, as settings name it; see `render_context`."""

    text: str
    k: int
    turns: list[str]
    chat: bool


def render_pool(tokenizer: PreTrainedTokenizerBase, ways: Mapping[str, Way]) -> tuple[PromptContext, ...]:
    """Contexts by name, in order, without those that come to the same prompt as an earlier one.

    Where only some templates fail, as those that take no turn but the first, the others remain.

    Raises:
        ValueError: if none can be rendered; the first reason.
    """
    found: dict[tuple[object, ...], PromptContext] = {}
    failed: list[ValueError] = []
    for name, way in ways.items():
        try:
            context = render_context(tokenizer, name, way.text, way.k, turns=way.turns, chat=way.chat)
        except ValueError as error:
            failed.append(error)
            continue
        key = (context.before, context.after, context.between, context.k, context.shots)
        found.setdefault(key, context)
    if not found:
        raise failed[0]
    return tuple(found.values())


def _render_pairs(tokenizer: PreTrainedTokenizerBase, name: str, text: str, k: int) -> PromptContext:
    """A line for each token, the first ones as examples; plain text."""
    before, *rest = text.split(_TOKEN)
    if before or len(rest) != 2 or not all(rest):
        raise ValueError(f"probe.contexts.{name}: the text is {text!r}; allowed: '{_TOKEN}...{_TOKEN}...'")
    after, end = (tuple(_encode_inside(tokenizer, part)) for part in rest)
    return PromptContext(name, tuple(_beginning(tokenizer)), after, k, between=(end,), shots=_SHOTS)


def render_echo(tokenizer: PreTrainedTokenizerBase, key: str, text: str) -> EchoPrompt:
    """The ids around the list, its copy, and the end of the assistant's turn; see `render_context`.

    The whole conversation is rendered, as it is for training: some templates put more before an answer than they do
    where one is to be generated. Without a chat template the end is the EOS token, if there is one. Errors name `key`.
    """
    if text.count(PLACE) != 1:
        raise ValueError(f"{key}: the text is {text!r}; it needs exactly one {PLACE!r}")
    content = text.replace(PLACE, _MARK)
    if not getattr(tokenizer, "chat_template", None):
        start, rendered = _rendered(tokenizer, key, [content])
        before, after = _split(rendered, _MARK, key)
        close = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    else:
        start, rendered = _rendered(tokenizer, key, [content], answer=_ANSWER)
        before, rest = _split(rendered, _MARK, key)
        after, end = _split(rest, _ANSWER, key)
        close = _encode_inside(tokenizer, end)
    opening = start + _encode(tokenizer, before)
    return EchoPrompt(tuple(opening), tuple(_encode_inside(tokenizer, after)), tuple(close))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, key: str, turns: Sequence[str], answer: str | None = None
) -> tuple[list[int], str]:
    """Ids of the document's beginning, and the prompt (and answer) as text."""
    if not getattr(tokenizer, "chat_template", None):
        return _beginning(tokenizer), "".join(f"{turn}\n" for turn in turns)
    said = [*turns] if answer is None else [*turns, answer]
    messages = [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(said)]
    try:
        return [], str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))
    except Exception as error:
        # Templates are programs of their own and raise what they like.
        turn = "a user's turn" if len(turns) == 1 else f"{len(turns)} turns"
        raise ValueError(f"{key}: the chat template fails on {turn}: {error}") from error


def _split(rendered: str, mark: str, key: str) -> tuple[str, str]:
    if rendered.count(mark) != 1:
        whose = "user" if mark == _MARK else "assistant"
        found = rendered.count(mark)
        raise ValueError(f"{key}: the chat template renders the {whose}'s text {found} times; expected 1")
    before, _, after = rendered.partition(mark)
    return before, after


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False) if text else []
    return ids


def _encode_inside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text that follows other text: some tokenizers put a space before whatever comes first."""
    mark, whole = _encode(tokenizer, _MARK), _encode(tokenizer, _MARK + text)
    # An unknown mark may swallow its neighbour, so it cannot be told from the text.
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in mark
    if unknown or whole[: len(mark)] != mark:
        return _encode(tokenizer, text)
    return whole[len(mark) :]
