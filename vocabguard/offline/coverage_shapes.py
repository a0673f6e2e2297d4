"""Where the assistant speaks in conversations of one shape, learned once and checked against each of them.

Most chat templates put constant text around what the messages say. For conversations with the same roles in the same
order that text is learned from one whose messages are words of ours; another one's turns are then where they have to
be if its rendering is exactly that text around its own messages. If it is not, nothing is said about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vocabguard.offline.coverage_examples import Turn

Span = tuple[int, int]
"""Characters from the first to before the second."""

Find = Callable[[Sequence[Turn]], tuple[str, list[Span]]]
"""A conversation's rendering, and the spans of the assistant in it, found the long way."""

_EDGE = "\n\t"


@dataclass(frozen=True)
class Shape:
    """A template's text for conversations of n messages.

    Attributes:
        gaps: n + 1 texts before, between and after the messages' own.
        kept: whether white space before and after each message's text is kept.
        spans: for each span, the gap in which it begins and how far from that gap's start, and the same of its end.
    """

    gaps: tuple[str, ...]
    kept: tuple[tuple[bool, bool], ...]
    spans: tuple[tuple[int, int, int, int], ...]

    def spans_in(self, whole: str, turns: Sequence[Turn]) -> list[Span] | None:
        """The spans in a rendering; None if it is not the one that the shape gives."""
        pieces, starts, place = [], [], 0
        for gap, (left, right), turn in zip(self.gaps, self.kept, turns, strict=False):
            text: str = turn["content"]
            text = text if left else text.lstrip()
            text = text if right else text.rstrip()
            pieces += [gap, text]
            starts.append(place)
            place += len(gap) + len(text)
        starts.append(place)
        if "".join([*pieces, self.gaps[-1]]) != whole:
            return None
        return [(starts[gap] + at, starts[end_gap] + end) for gap, at, end_gap, end in self.spans]


def shape_of(turns: Sequence[Turn]) -> tuple[str, ...] | None:
    """What conversations of one shape have in common: their roles; None if messages hold more than a text."""
    plain = all(
        turn.keys() == {"role", "content"} and isinstance(turn["content"], str) and turn["content"].strip()
        for turn in turns
    )
    return tuple(turn["role"] for turn in turns) if plain else None


def learn_shape(roles: Sequence[str], find: Find) -> Shape | None:
    """The shape that a conversation of our own words has; None if its words are not all there, once and in order.

    Args:
        roles: of its messages.
        find: may raise what a template raises.
    """
    words = [f"vocabguard{number}x" for number in range(len(roles))]
    turns = [{"role": role, "content": f"{_EDGE}{word}{_EDGE[::-1]}"} for role, word in zip(roles, words, strict=True)]
    whole, spans = find(turns)
    gaps, kept, starts, place = [], [], [], 0
    for word in words:
        at = whole.find(word)
        if at < place or whole.count(word) != 1:
            return None
        end = at + len(word)
        left, right = whole[:at].endswith(_EDGE), whole.startswith(_EDGE[::-1], end)
        at, end = at - len(_EDGE) * left, end + len(_EDGE) * right
        gaps.append(whole[place:at])
        kept.append((left, right))
        starts.append(place)
        place = end
    gaps.append(whole[place:])
    starts.append(place)

    def in_gap(character: int) -> tuple[int, int] | None:
        for number, (start, gap) in enumerate(zip(starts, gaps, strict=True)):
            if start <= character <= start + len(gap):
                return number, character - start
        return None

    edges = [(in_gap(begin), in_gap(end)) for begin, end in spans]
    found = tuple((*begin, *end) for begin, end in edges if begin is not None and end is not None)
    return Shape(tuple(gaps), tuple(kept), found) if len(found) == len(edges) else None
