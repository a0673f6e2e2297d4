"""Who speaks: the roles of conversations, and the turns of data sets that name and shape them otherwise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vocabguard.data.tables import DataError

Turn = dict[str, Any]
"""One message: ``role`` and ``content``, and what else the chat template knows."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates know."""

_FUNCTION_CALL = "function_call"

ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    _FUNCTION_CALL: "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names that data sets in the ShareGPT form have for them."""


class UnknownRoleError(DataError):
    """A turn of nobody known: the assistant's words may be in it, so that nothing is guessed."""


class RoleReader:
    """Turns as templates take them.

    Args:
        more: further names, and the roles they stand for.

    Attributes:
        renamed: turns by the name that the data has and the role it was read as, where they differ.
        seen: turns by role, after that.
    """

    def __init__(self, more: Mapping[str, str] | None = None) -> None:
        self.renamed: Counter[tuple[str, str]] = Counter()
        self.seen: Counter[str] = Counter()
        self._names = {**ROLE_OF, **(more or {})}

    def turns(self, place: str, name: str, value: Any) -> list[Turn]:
        """A list of messages, or the JSON text of one.

        Args:
            name: of the column.

        Raises:
            DataError: if it is no list of messages.
        """
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            value = _parsed(value)
        if not isinstance(value, list) or not value:
            raise DataError(f"{place}: {name!r} holds {shown(value)}; allowed: a list of messages")
        return [self._turn(place, name, turn) for turn in value]

    def _turn(self, place: str, column: str, turn: Any) -> Turn:
        if isinstance(turn, dict) and "role" not in turn and isinstance(turn.get("from"), str):
            others = {key: part for key, part in turn.items() if key not in ("from", "value")}
            turn = {"role": turn["from"], "content": turn.get("value"), **others}
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(f"{place}: {column!r} holds a message that is {shown(turn)}; allowed: 'role' and 'content'")
        name = str(turn["role"])
        role = self._names.get(name, name)
        if role != name:
            self.renamed[name, role] += 1
            turn = (_with_call(turn) if name == _FUNCTION_CALL else turn) | {"role": role}
        self.seen[role] += 1
        # Tables fill what other rows have with nulls, which templates would read as given.
        found: Turn = {key: part for key, part in turn.items() if part is not None}
        if not isinstance(found.get("content", ""), (str, list)):
            raise DataError(f"{place}: a message's 'content' is {shown(found['content'])}; "
                            "allowed: a text, a list of parts")  # fmt: skip
        return found


def _with_call(turn: Turn) -> Turn:
    """A turn whose text is the JSON of a call, or of several, as a turn with tool calls."""
    told = _parsed(turn.get("content"))
    calls = told if isinstance(told, list) else [told]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return turn
    made = [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
    return {**turn, "content": "", "tool_calls": made}


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def shown(value: Any) -> str:
    """A value for an error message.

    >>> shown([1])
    'a list ([1])'
    """
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    text = repr(value)
    return f"{kinds.get(type(value), 'a ' + type(value).__name__)} ({text[:40]}{'...' if len(text) > 40 else ''})"
