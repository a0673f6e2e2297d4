"""Coverage of parts put together: what many machines counted becomes one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch

from vocabguard.data.coverage import Coverage, CoverageSource, WordCount

_RULES = ("loss", "eos", "max_length", "epochs", "trainer", "template", "groups")


def merge_coverages(parts: Sequence[Coverage], names: Sequence[str]) -> Coverage:
    """The counts of all parts together, as if one run had counted them.

    Args:
        parts: at least one.
        names: of the parts, for messages.

    Raises:
        ValueError: if they were counted with unequal tokenizers, rules or chat templates, or a part comes twice.
    """
    if not parts:
        raise ValueError("no coverage to merge; allowed: at least one file of `vocabguard coverage --out`")
    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        if part.source.vocabulary != first.source.vocabulary:
            raise ValueError(f"{name}: was counted with another tokenizer ({part.source.tokenizer}) than {names[0]} "
                             f"({first.source.tokenizer}): equal ids are other tokens there")  # fmt: skip
        for rule in _RULES:
            one, other = getattr(first.source, rule), getattr(part.source, rule)
            if one != other:
                raise ValueError(f"{name}: was counted with {rule} {other!r}, {names[0]} with {one!r}; allowed: parts "
                                 "counted alike")  # fmt: skip
        if not (torch.equal(part.live, first.live) and torch.equal(part.group, first.group)):
            raise ValueError(f"{name}: has other live tokens or groups than {names[0]}; allowed: parts of one version")
        if [word.word for word in part.words] != [word.word for word in first.words]:
            raise ValueError(f"{name}: other words were watched than in {names[0]}; allowed: the same --watch")
    _refuse_twice(parts, names)
    return Coverage(
        torch.stack([part.data_target for part in parts]).sum(0),
        torch.stack([part.inputs for part in parts]).sum(0),
        first.group,
        first.live,
        reduce(add, (part.tally for part in parts)),
        _sources([part.source for part in parts]),
        tuple(
            WordCount(of[0].word, sum(word.targets for word in of), sum(word.inputs for word in of))
            for of in zip(*(part.words for part in parts), strict=True)
        ),
    )


def _refuse_twice(parts: Sequence[Coverage], names: Sequence[str]) -> None:
    counted: Counter[str] = Counter()
    for part in parts:
        shards = part.source.shard.split(", ")
        counted.update({f"{file} (part {shard})" for file in part.source.files for shard in shards})
    twice = [file for file, count in counted.items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(names)}: {twice[0]} is in more than one of them, and would be counted twice")


def _sources(parts: Sequence[CoverageSource]) -> CoverageSource:
    def once(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item for part in parts for item in getattr(part, name)))

    shards = tuple(dict.fromkeys(part.shard for part in parts))
    example = next((part.example for part in parts if any(asked for _, asked in part.example)), parts[0].example)
    return replace(
        parts[0],
        files=once("files"),
        kinds=once("kinds"),
        notes=once("notes"),
        shard=", ".join(shards),
        example=example,
    )
