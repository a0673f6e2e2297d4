"""Tokens that matter by name: those that end an answer, those that were added, those that are watched.

Of each kind one sentence says which are never a target, and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vocabguard.text import listed, visible

_ANSWER = "zzanswerzz"
_NEW_PAD = 'tokenizer.add_special_tokens({"pad_token": "<|pad|>"}), model.resize_token_embeddings(len(tokenizer))'


@dataclass(frozen=True)
class EndTokens:
    """Tokens that end an answer.

    Attributes:
        stops: generation stops at these: every EOS of the generation configuration, and the tokenizer's.
        turn: what the chat template puts after an assistant's answer; None where it has no such token.
        padding: the token that fills batches up.
    """

    stops: tuple[int, ...] = ()
    turn: int | None = None
    padding: int | None = None

    @property
    def every(self) -> tuple[int, ...]:
        """All of them, each once."""
        turn = () if self.turn is None else (self.turn,)
        return tuple(dict.fromkeys((*turn, *self.stops)))


def end_tokens(tokenizer: Any, generation: int | Iterable[int] | None = None) -> EndTokens:
    """The tokens that end an answer. `generation`: ``generation_config.eos_token_id``, one id, several or None."""
    given = () if generation is None else (generation,) if isinstance(generation, int) else generation
    own = getattr(tokenizer, "eos_token_id", None)
    stops = dict.fromkeys(int(one) for one in (*given, own) if one is not None)
    return EndTokens(tuple(stops), end_of_turn(tokenizer), getattr(tokenizer, "pad_token_id", None))


def end_of_turn(tokenizer: Any) -> int | None:
    """The first special or added token that the chat template puts after an assistant's answer, if any."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        _, found, tail = text.rpartition(_ANSWER)
        ids = tokenizer.encode(tail, add_special_tokens=False) if found else []
    except Exception:  # templates are programs of their own and raise what they like
        return None
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((int(one) for one in ids if one in known), None)


def added_tokens(tokenizer: Any, base_rows: int | None = None) -> frozenset[int]:
    """Ids of the tokens that were added since the base, without those for padding, beginnings and the unknown.

    They are those beyond the base's rows and those that were added to the tokenizer after it was loaded. Where neither
    is known, all of the tokenizer's added tokens.
    """
    added = set(tokenizer.added_tokens_decoder)
    loaded = getattr(tokenizer, "init_kwargs", {}).get("added_tokens_decoder")
    since = added - {int(one) for one in loaded} if loaded else set()
    if base_rows is not None:
        since |= {one for one in tokenizer.get_vocab().values() if one >= base_rows}
    elif not since:
        since = added
    return frozenset(since - {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id})


def named_sentences(
    counts: Tensor, tokenizer: Any, ends: EndTokens, where: str, *, added: Collection[int] = (),
    words: Mapping[str, Sequence[int]] | None = None, protected: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Which of the tokens that matter are never a target; nothing where all is well.

    Args:
        counts: (V,) int64, targets of the data.
        where: how much of the data was read, as in ``all 3 batches of the training data``.
        added: ids that were added since the base.
        words: the watch list, text -> ids.
        protected: whether echo repeats tokens in this run.
    """
    said = [_ends(counts, tokenizer, ends, where)]
    fresh = sorted(one for one in added if one < len(counts) and one not in ends.every)
    missing = [one for one in fresh if not int(counts[one])]
    if missing:
        shown = listed([_name(tokenizer, one) for one in missing], len(missing))
        said.append(
            f"Added tokens: {len(missing):,} of {len(fresh):,} {_are(missing)} never a target in {where}: {shown}. "
            "If the model is to write them, add examples whose answers contain them."
        )
    lost = [text for text, ids in (words or {}).items() if any(not int(counts[one]) for one in ids)]
    if lost:
        shown = listed([visible(text) for text in lost], len(lost))
        remedy = "; echo repeats them" if protected else ', or turn protection on: VocabGuardCallback("protect")'
        said.append(
            f"Watched words: {len(lost):,} of {len(words or {}):,} {_are(lost)} never a target in {where}: {shown}. "
            f"Add examples whose answers contain them{remedy}."
        )
    return tuple(filter(None, said))


def _ends(counts: Tensor, tokenizer: Any, ends: EndTokens, where: str) -> str:
    known = [one for one in ends.every if one < len(counts)]
    missing = [one for one in known if not int(counts[one])]
    if not missing:
        return ""
    names = listed([_name(tokenizer, one) for one in missing], len(missing))
    state = f"{names} {_are(missing)} never a target in {where}"
    learned = [one for one in known if one not in missing]
    if not learned:
        why = "the model does not learn to stop"
        if ends.padding in missing:
            return f"End tokens: {state}: {why}. {_shared_padding(tokenizer, ends.padding)}"
        return (
            f"End tokens: {state}: {why}. End each example with {_name(tokenizer, missing[0])}, inside the part that "
            "has labels; with max_length, look whether it is cut off."
        )
    shown = listed([f"{_name(tokenizer, one)} ({int(counts[one]):,} times)" for one in learned], len(learned))
    if not any(one in ends.stops for one in learned):
        stops = sorted({*ends.stops, *learned})
        return (
            f"End tokens: {state}; answers end with {shown}, at which generation does not stop. Set "
            f"model.generation_config.eos_token_id = {stops}."
        )
    return f"End tokens: {state}; answers end with {shown}, and generation stops there. Nothing to do for such answers."


def shared_padding(tokenizer: Any, ends: EndTokens) -> str:
    """What comes of padding that is an end token, where the collator is not known; empty where it is not."""
    return _shared_padding(tokenizer, ends.padding) if ends.padding in ends.every else ""


def _shared_padding(tokenizer: Any, padding: int | None) -> str:
    name = _name(tokenizer, padding)
    # Many tokenizers have one that nothing uses.
    spare = [one for one in tokenizer.get_vocab() if "pad" in one.lower() and one != name and one[:1] in "<["]
    remedy = f"tokenizer.pad_token = {min(spare)!r}" if spare else _NEW_PAD
    return (
        f"{name} is the padding too, which DataCollatorForLanguageModeling and others take out of the labels. Give "
        f"padding a token of its own: {remedy}."
    )


def _are(found: Sequence[object]) -> str:
    return "is" if len(found) == 1 else "are"


def _name(tokenizer: Any, token: int | None) -> str:
    return visible(str(tokenizer.convert_ids_to_tokens(token)))
