"""Prompts of the probe and of echo rows: instructions rendered with the tokenizer's chat template into token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vocabguard.measure.probe import PromptContext
from vocabguard.protect.rows import EchoPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{tokens}"
"""Where the probed tokens go in an instruction."""

_MARK = "\U0010fffd"  # the last private-use character: no tokenizer merges it with a neighbour
_ANSWER = "\U0010fffc"  # the one before it stands for the assistant's turn


def render_context(tokenizer: PreTrainedTokenizerBase, name: str, text: str, k: int) -> PromptContext:
    """The ids around the probed tokens, which are spliced in as ids: encoded as text they would merge into others.

    With a chat template, the instruction is a user's turn and the copy begins where the assistant's turn does. Without
    one, it is plain text from the beginning of a document (with the BOS token, if the tokenizer adds one), and the copy
    begins on the next line.

    Raises:
        ValueError: if the text has not exactly one ``{tokens}``, or the chat template does not render it once.
    """
    key = f"probe.contexts.{name}"
    start, rendered = _rendered(tokenizer, key, text)
    before, after = _split(rendered, _MARK, key)
    return PromptContext(name, tuple(start + _encode(tokenizer, before)), tuple(_encode_inside(tokenizer, after)), k)


def render_echo(tokenizer: PreTrainedTokenizerBase, key: str, text: str) -> EchoPrompt:
    """The ids around the list, its copy, and the end of the assistant's turn; see `render_context`.

    The whole conversation is rendered, as it is for training: some templates put more before an answer than they do
    where one is to be generated. Without a chat template the end is the EOS token, if there is one. Errors name `key`.
    """
    if not getattr(tokenizer, "chat_template", None):
        start, rendered = _rendered(tokenizer, key, text)
        before, after = _split(rendered, _MARK, key)
        close = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    else:
        start, rendered = _rendered(tokenizer, key, text, answer=_ANSWER)
        before, rest = _split(rendered, _MARK, key)
        after, end = _split(rest, _ANSWER, key)
        close = _encode_inside(tokenizer, end)
    opening = start + _encode(tokenizer, before)
    return EchoPrompt(tuple(opening), tuple(_encode_inside(tokenizer, after)), tuple(close))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, key: str, text: str, answer: str | None = None
) -> tuple[list[int], str]:
    """Ids of the document's beginning, and the prompt (and answer) as text with `_MARK` where the tokens go."""
    if text.count(PLACE) != 1:
        raise ValueError(f"{key}: the text is {text!r}; it needs exactly one {PLACE!r}")
    content = text.replace(PLACE, _MARK)
    if not getattr(tokenizer, "chat_template", None):
        return _beginning(tokenizer), content + "\n"
    turns = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        return [], str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
    except Exception as error:
        # Templates are programs of their own and raise what they like.
        raise ValueError(f"{key}: the chat template fails on a user's turn: {error}") from error


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
