"""The types of settings by keyword say what the schema says."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from vocabguard.config import options, schema

SECTIONS = [kind for kind in vars(schema).values() if is_dataclass(kind)]


def typed(section: Any) -> Any:
    """The `TypedDict` of a section."""
    name = "Options" if section is schema.GuardConfig else section.__name__.replace("Config", "Options")
    return getattr(options, name)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_same_names(section: Any) -> None:
    assert list(get_type_hints(typed(section))) == [field.name for field in fields(section)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_same_kinds(section: Any) -> None:
    wanted, found = get_type_hints(section), get_type_hints(typed(section))
    for field in fields(section):
        kind, said = wanted[field.name], found[field.name]
        choices = [
            choice for part in (said, *get_args(said)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        if "choices" in field.metadata:
            assert tuple(choices) == field.metadata["choices"]
            assert (type(None) in get_args(said)) == (type(None) in get_args(kind))
        elif is_dataclass(kind):
            assert set(get_args(said)) == {typed(kind), kind}
        elif kind is not Any and get_origin(kind) not in (dict, list):
            assert said == kind
