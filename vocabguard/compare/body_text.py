"""What became of the body of a checkpoint, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

CHANGED = 1e-3
"""Relative change from which on a block is named as changed."""


OUTSIDE = "outside"
"""Name of what lies in no block."""


def body_sentence(told: Mapping[str, Any]) -> str:
    """What became of the body, in one sentence without its full stop.

    Args:
        told: what `body_as_json` gave.

    >>> block = {"block": "3", "relative": 0.02, "cosine": 0.9998, "changed": 7, "tensors": 7, "broken": 0}
    >>> still = block | {"block": "4", "relative": 0.0, "cosine": 1.0, "changed": 0}
    >>> body = {"identical": False, "rounded": False, "blocks": [block, still], "unlike": {}}
    >>> body_sentence(body | {"only_base": [], "only_tuned": []})
    'body: block 3 changed by 2.0 % of its norm (cosine 0.9998); the other block is unchanged'
    """
    if "not_applicable" in told:
        return f"the body was not measured: {told['not_applicable']}"
    if told["identical"]:
        return "body: every weight is the base's"
    blocks = [one for one in told["blocks"] if one["block"] != OUTSIDE]
    beside = [one for one in told["blocks"] if one["block"] == OUTSIDE]
    said = []
    if told["rounded"]:
        said.append(f"changed by no more than rounding to its type makes (at most {_percent(_most(told['blocks']))})")
    else:
        said += _changed_parts(blocks, beside)
    said += _still_part(blocks, beside) if said else []
    broken = [one for one in told["blocks"] if one["broken"]]
    said += [f"NaN or Inf in {_named_blocks(broken)}"] if broken else []
    said += [_counted(len(told["unlike"]), "could not be compared")] if told["unlike"] else []
    other = len(told["only_base"]) + len(told["only_tuned"])
    said += [f"{_counted(other, 'is' if other == 1 else 'are')} on one side only"] if other else []
    return f"body: {'; '.join(said) if said else 'no tensor to compare'}"


def _counted(count: int, what: str) -> str:
    return f"{count} tensor{'s'[: count != 1]} {what}"


def _changed_parts(blocks: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changed: blocks, those that hardly did, and what lies outside them."""
    moved = [one for one in blocks if one["changed"] and not _small(one["relative"])]
    little = [one for one in blocks if one["changed"] and _small(one["relative"])]
    said = [_moved_part(moved, len(blocks))] if moved else []
    said += [f"{_named_blocks(little)} changed by less than {_percent(CHANGED)}"] if little else []
    for one in beside:
        if one["changed"]:
            small = _small(one["relative"])
            by = f"less than {_percent(CHANGED)}" if small else f"{_percent(one['relative'])} of their norm"
            said.append(f"weights outside the blocks changed by {by}{_worst_of(one)}")
    return said


def _worst_of(one: Mapping[str, Any]) -> str:
    worst = one.get("worst", {}).get("tensor")
    return f" ({'' if one['changed'] == 1 else 'most '}{worst})" if worst else ""


def _still_part(blocks: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]) -> list[str]:
    still = sum(not one["changed"] for one in blocks)
    parts = []
    if still:
        other = "the other " if still < len(blocks) else "the "
        parts.append(f"{other}block" if still == 1 else f"{other}{still} blocks")
    if any(not one["changed"] for one in beside):
        parts.append("the weights outside the blocks" if not still else "the weights outside them")
    single = still == 1 and len(parts) == 1
    return [f"{' and '.join(parts)} {'is' if single else 'are'} unchanged"] if parts else []


def _small(relative: float | None) -> bool:
    return relative is None or relative < CHANGED


def _moved_part(moved: Sequence[Mapping[str, Any]], every: int) -> str:
    least, most = min(one["relative"] for one in moved), _most(moved)
    cosines = [one["cosine"] for one in moved if one["cosine"] is not None]
    by = _percent(most) if _percent(least) == _percent(most) else f"{_percent(least)} to {_percent(most)}"
    whose = "its" if len(moved) == 1 else "their"
    lowest = f" ({'lowest ' if len(moved) > 1 else ''}cosine {min(cosines):.4f})" if cosines else ""
    names = f"all {every} blocks" if len(moved) == every > 1 else _named_blocks(moved)
    return f"{names} changed by {by} of {whose} norm{lowest}"


def _most(blocks: Sequence[Mapping[str, Any]]) -> float:
    return max((one["relative"] for one in blocks if one["relative"] is not None), default=0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def _named_blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Blocks by number, neighbours as a range.

    >>> _named_blocks([{"block": name} for name in ("3", "4", "5", "9", "outside")])
    'blocks 3-5, 9 and weights outside the blocks'
    """
    names = [one["block"] for one in blocks if one["block"] != OUTSIDE]
    shown = [range_of([names[place] for place in run]) for run in block_runs(names)]
    parts = [f"block{'s' if len(names) > 1 else ''} {', '.join(shown[:8])}{' ...' if len(shown) > 8 else ''}"]
    outside = ["weights outside the blocks"] if len(names) < len(blocks) else []
    return " and ".join([*(parts if names else []), *outside])


def block_runs(names: Sequence[str], alike: Callable[[int, int], bool] | None = None) -> list[list[int]]:
    """Places of neighbours, by number, as runs.

    Args:
        alike: whether a run that begins at one place may go on with another; None: always.

    >>> block_runs(["3", "4", "7", "outside"])
    [[0, 1], [2], [3]]
    """
    runs: list[list[int]] = []
    for place, name in enumerate(names):
        if runs and _next_to(names[runs[-1][-1]], name) and (alike is None or alike(runs[-1][0], place)):
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def range_of(names: Sequence[str]) -> str:
    """The name of neighbours.

    >>> range_of(["h.3", "h.4"]), range_of(["7"])
    ('h.3-4', '7')
    """
    return names[0] if len(names) == 1 else f"{names[0]}-{names[-1].rpartition('.')[2]}"


def _next_to(one: str, other: str) -> bool:
    left, right = one.rpartition("."), other.rpartition(".")
    return left[0] == right[0] and left[2].isdigit() and right[2].isdigit() and int(left[2]) + 1 == int(right[2])
