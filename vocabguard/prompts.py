"""Prompts of the probe: instructions rendered with the tokenizer's chat template into token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vocabguard.measure.probe import PromptContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{tokens}"
"""Where the probed tokens go in an instruction."""

_MARK = "\U0010fffd"  # the last private-use character: no tokenizer merges it with a neighbour


def render_context(tokenizer: PreTrainedTokenizerBase, name: str, text: str, k: int) -> PromptContext:
    """The ids around the probed tokens, which are spliced in as ids: encoded as text they would merge into others.

    With a chat template, the instruction is a user's turn and the copy begins where the assistant's turn does. Without
    one, it is plain text from the beginning of a document (with the BOS token, if the tokenizer adds one), and the copy
    begins on the next line.

    Args:
        tokenizer: the model's.
        name: of the context.
        text: the instruction, with one ``{tokens}``.
        k: tokens in a list.

    Raises:
        ValueError: if the text has not exactly one ``{tokens}``, or the chat template does not render it once.
    """
    if text.count(PLACE) != 1:
        raise ValueError(f"probe.contexts.{name}: the text is {text!r}; it needs exactly one {PLACE!r}")
    if getattr(tokenizer, "chat_template", None):
        rendered = _rendered_chat(tokenizer, name, text.replace(PLACE, _MARK))
        start: list[int] = []
    else:
        rendered = text.replace(PLACE, _MARK) + "\n"
        start = _beginning(tokenizer)
    if rendered.count(_MARK) != 1:
        found = rendered.count(_MARK)
        raise ValueError(f"probe.contexts.{name}: the chat template renders the user's text {found} times; expected 1")
    before, after = rendered.split(_MARK)
    return PromptContext(name, tuple(start + _encode(tokenizer, before)), tuple(_encode_inside(tokenizer, after)), k)


def _rendered_chat(tokenizer: PreTrainedTokenizerBase, name: str, content: str) -> str:
    turns = [{"role": "user", "content": content}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        # Templates are programs of their own and raise what they like.
        raise ValueError(f"probe.contexts.{name}: the chat template fails on a user's turn: {error}") from error


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
