"""What became of the body of a checkpoint, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHANGED = 1e-3
"""Relative change from which on a block is named as changed."""


def body_sentence(told: Mapping[str, Any]) -> str:
    """What became of the body, in one sentence without its full stop.

    Args:
        told: what `body_as_json` gave.

    >>> block = {"block": "3", "relative": 0.02, "cosine": 0.9998, "changed": 7, "tensors": 7, "broken": 0}
    >>> still = block | {"block": "4", "relative": 0.0, "cosine": 1.0, "changed": 0}
    >>> body = {"identical": False, "rounded": False, "blocks": [block, still], "unlike": {}}
    >>> body_sentence(body | {"only_base": [], "only_tuned": []})
    'body: block 3 changed by 2.0 % of its norm (cosine 0.9998); 1 other part is unchanged'
    """
    if "not_applicable" in told:
        return f"the body was not measured: {told['not_applicable']}"
    if told["identical"]:
        return "body: every weight is the base's"
    blocks = told["blocks"]
    moved = [one for one in blocks if one["changed"] and not _small(one["relative"])]
    little = [one for one in blocks if one["changed"] and _small(one["relative"])]
    said = []
    if told["rounded"]:
        said.append(f"changed by no more than rounding to its type makes (at most {_percent(_most(blocks))})")
    else:
        said += [_moved_part(moved)] if moved else []
        said += [f"{_named_blocks(little)} changed by less than {_percent(CHANGED)}"] if little else []
    still = sum(not one["changed"] for one in blocks)
    if still and said:
        said.append(f"{still} other part{'s are' if still > 1 else ' is'} unchanged")
    broken = [one for one in blocks if one["broken"]]
    said += [f"NaN or Inf in {_named_blocks(broken)}"] if broken else []
    said += [f"{len(told['unlike'])} tensors could not be compared"] if told["unlike"] else []
    other = len(told["only_base"]) + len(told["only_tuned"])
    said += [f"{other} tensors are on one side only"] if other else []
    return f"body: {'; '.join(said) if said else 'no tensor to compare'}"


def _small(relative: float | None) -> bool:
    return relative is None or relative < CHANGED


def _moved_part(moved: Sequence[Mapping[str, Any]]) -> str:
    least, most = min(one["relative"] for one in moved), _most(moved)
    cosines = [one["cosine"] for one in moved if one["cosine"] is not None]
    by = _percent(most) if _percent(least) == _percent(most) else f"{_percent(least)} to {_percent(most)}"
    whose = "its" if len(moved) == 1 else "their"
    lowest = f" ({'lowest ' if len(moved) > 1 else ''}cosine {min(cosines):.4f})" if cosines else ""
    return f"{_named_blocks(moved)} changed by {by} of {whose} norm{lowest}"


def _most(blocks: Sequence[Mapping[str, Any]]) -> float:
    return max((one["relative"] for one in blocks if one["relative"] is not None), default=0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def _named_blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Blocks by number, neighbours as a range.

    >>> _named_blocks([{"block": name} for name in ("3", "4", "5", "9", "outside")])
    'blocks 3-5, 9 and what is in no block'
    """
    names = [one["block"] for one in blocks if one["block"] != "outside"]
    runs: list[list[str]] = []
    for name in names:
        if runs and _next_to(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    shown = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs]
    parts = [f"block{'s' if len(names) > 1 else ''} {', '.join(shown[:8])}{' ...' if len(shown) > 8 else ''}"]
    outside = ["what is in no block"] if len(names) < len(blocks) else []
    return " and ".join([*(parts if names else []), *outside])


def _next_to(one: str, other: str) -> bool:
    left, right = one.rpartition("."), other.rpartition(".")
    return left[0] == right[0] and left[2].isdigit() and right[2].isdigit() and int(left[2]) + 1 == int(right[2])
