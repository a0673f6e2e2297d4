"""How a scan's file becomes what the report page shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vocabguard.measure.exposure import exposure_classes
from vocabguard.offline.scan_summary import load_scan
from vocabguard.offline.scan_view import listed
from vocabguard.results import CheckResult, MatrixName, NotApplicable
from vocabguard.views.html_data import TOP, PageData, Rows, choose_tokens, sizes_of, token_lines
from vocabguard.views.wording import ReportRow, number, report_rows, visible

_MATRICES: tuple[MatrixName, ...] = ("head", "embedding")


def scan_data(path: str | Path, top: int = TOP) -> PageData:
    """What a file of `vocabguard.offline.scan_summary.save_scan` says, as the page needs it.

    Args:
        path: of the file.
        top: tokens to list.

    Raises:
        ValueError: if it is no scan's file, or of another schema.
    """
    vectors, found, texts = load_scan(path)
    try:
        return _scan_data(str(path), vectors, found, texts, top)
    except OSError:
        raise
    except Exception as error:
        # A header that something else wrote can be wrong in any way.
        raise ValueError(f"{path}: is not a scan's file ({type(error).__name__}: {error})") from error


def _scan_data(
    path: str, vectors: Mapping[str, Tensor], found: Mapping[str, Any], texts: list[str], top: int
) -> PageData:
    names, matrix = _group_names(path), found["judged"]
    rows = _rows(vectors, matrix)
    scalars = {key: value for name in _MATRICES for key, value in _flat(name, found[name])}
    tied = found["tied"]["base"] and found["tied"]["tuned"]
    both = matrix == "head" and not tied and "embedding/cosine_mean" in scalars

    def text(token: int) -> str:
        return texts[token] or f"<row {token}>"

    return PageData(
        name=path,
        kind="scan",
        step=None,
        about=(*_about(found), *_odd_rows(found, matrix)),
        names=names,
        matrix=matrix,
        live=int(found["tokens"]["live"]),
        table=_table(scalars, names, matrix),
        embedding=_table(scalars, names, "embedding") if both else (),
        sizes=sizes_of(rows, names),
        scalars=scalars,
        rows=rows,
        tokens=token_lines(choose_tokens(rows, None, top), rows, None, names, text, 0),
        text=text,
    )


def _group_names(path: str) -> tuple[str, ...]:
    with safe_open(path, framework="pt") as file:
        return tuple(str(name) for name in json.loads(file.metadata()["groups"]))


def _rows(vectors: Mapping[str, Tensor], matrix: MatrixName | None) -> Rows:
    counts = vectors.get("data_target")
    shapes = {name: tuple(vector.shape) for name, vector in vectors.items() if vector.shape != vectors["live"].shape}
    if shapes:
        raise ValueError(f"vectors of other lengths than live's {tuple(vectors['live'].shape)}: {shapes}")

    def vector(name: str) -> Any:
        return vectors[name].numpy() if name in vectors else None

    return Rows(
        step=None,
        group=vectors["group"].numpy(),
        live=vectors["live"].numpy(),
        cosine=vector(f"{matrix}/cosine"),
        residual=vector(f"{matrix}/residual"),
        l2=vector(f"{matrix}/l2"),
        targets=vector("data_target"),
        classes=None if counts is None else exposure_classes(counts).numpy(),
    )


def _flat(name: str, numbers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """One matrix's numbers by the keys that a run logs."""
    parts = {"": numbers, **numbers.get("groups", {}), **numbers.get("classes", {})}
    for part, values in parts.items():
        for key, value in values.items():
            if isinstance(value, (int, float)):
                yield f"{name}/{part}/{key}" if part else f"{name}/{key}", float(value)


def _table(scalars: Mapping[str, float], names: tuple[str, ...], matrix: MatrixName | None) -> tuple[ReportRow, ...]:
    gone = NotApplicable("only the numbers are read")
    named = {f"vocabguard/{key}": value for key, value in scalars.items()}
    result = CheckResult(0, gone, gone, gone, torch.empty(0, dtype=torch.uint8), None, named)
    return report_rows(result, names, matrix)


def _about(found: Mapping[str, Any]) -> tuple[str, ...]:
    tokens, matched = found["tokens"], found["matched"]
    said = [f"Base: {found['base']}", f"Tuned: {found['tuned']}"]
    said += [
        f"{name.capitalize()} not applicable: {found[name]['not_applicable']}."
        for name in _MATRICES
        if "not_applicable" in found[name]
    ]
    added = f"; {matched['added']:,} have no base row, {matched['removed']:,} of the base are gone"
    said.append(f"{tokens['rows']:,} rows matched by {matched['by']}{added if matched['added'] else ''}.")
    said.append(f"Residual: without the mean displacement of the {found['residual_over']}.")
    apart = f"{tokens['control']:,} control, {tokens['unreachable']:,} unreachable, {tokens['padded']:,} padded"
    said.append(f"Set apart: {apart}, {tokens['never_trained']:,} never trained at the base.")
    return (*said, "A scan reads weights and asks the model nothing: whether a token can still be said is not known.")


def _odd_rows(found: Mapping[str, Any], matrix: MatrixName | None) -> list[str]:
    """Rows that were never trained, and those whose norm is out of line, by name."""
    said, untrained = [], found.get("untrained")
    if untrained and untrained["count"]:
        named = listed([visible(name, 24) for name in untrained["texts"]], untrained["count"])
        said.append(f"Never trained at the base: {named}.")
    outliers = found[matrix].get("norm_outliers") if matrix else None
    if outliers and outliers["count"]:
        named = listed([visible(name, 24) for name in outliers["texts"]], outliers["count"])
        said.append(
            f"{outliers['count']:,} live rows have a norm out of line (the median row's is "
            f"{number(outliers['median_ratio'], 3)} times what it was): {named}."
        )
    return said
