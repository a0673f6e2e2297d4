"""Targets that training data made of each token, from a coverage file or a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabguard.files import one_line, read_json, require_regular
from vocabguard.runlog import RunLog, evidence_in
from vocabguard.vocabulary.table import fit_rows

_NAMES = ("data_target", "exposure/data_target")


def read_counts(path: str | Path, rows: int) -> Tensor:
    """(V,) int64 data targets of each token.

    Args:
        path: a safetensors file with ``data_target`` (or a run's ``exposure/data_target``), a JSON object with
            ``data_target`` as a list, or as an object of counts by id; or a run folder.
        rows: V. Shorter counts are filled up with zeros: rows without a token are no targets.

    Raises:
        ValueError: if there are no counts in it, or they are longer than V.
    """
    path = Path(path)
    if path.is_dir():
        found = _of_run(path)
    elif path.suffix == ".safetensors":
        found = _of_safetensors(path)
    elif path.is_file():
        found = _of_json(path, rows)
    else:
        raise ValueError(f"{path}: not found")
    if found.ndim != 1 or len(found) > rows or found.is_floating_point() or bool((found < 0).any()):
        raise ValueError(
            f"{path}: data_target is {list(found.shape)} {found.dtype}; allowed: whole counts of at most {rows} rows"
        )
    return fit_rows(found.to(torch.int64), rows)


def vocabulary_in(path: str | Path) -> str | None:
    """SHA-256 of the vocabulary that a file of coverage, scan or probe, or a run folder, is about; None: it tells none.

    See `vocabguard.data.coverage.vocabulary_hash`.
    """
    if Path(path).is_dir():
        words = (evidence_in(path) or {}).get("tokenizer")
        told = words.get("vocabulary") if isinstance(words, dict) else None
        return told if isinstance(told, str) else None
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        counted = json.loads(header.get("coverage", "{}")).get("vocabulary")
        measured = ((json.loads(header.get("summary", "{}")).get("evidence") or {}).get("tokenizer") or {}).get(
            "vocabulary"
        )
    except (OSError, SafetensorError, ValueError, AttributeError, RecursionError):
        return None
    return next((one for one in (counted, measured) if isinstance(one, str)), None)


def _of_run(folder: Path) -> Tensor:
    try:
        vectors = RunLog.open(folder).rows()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: {one_line(error)}") from error
    except (LookupError, TypeError, AttributeError) as error:  # lines of other shapes than a run's
        raise ValueError(f"{folder}: is a damaged run folder ({type(error).__name__}: {one_line(error)})") from error
    if "exposure/data_target" not in vectors:
        raise ValueError(f"{folder}: the run counted no data targets")
    return vectors["exposure/data_target"]


def _of_safetensors(path: Path) -> Tensor:
    try:
        with safe_open(str(require_regular(path)), framework="pt", device="cpu") as file:
            names = list(file.keys())
            name = next((name for name in _NAMES if name in names), None)
            if name is None:
                raise ValueError(f"{path}: no {_NAMES[0]!r} in it; it holds {names[:8]}")
            found: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({one_line(error)})") from error
    return found


def _of_json(path: Path, rows: int) -> Tensor:
    counts: Any = read_json(path).get("data_target")
    try:
        if isinstance(counts, dict):
            found = torch.zeros(rows, dtype=torch.int64)
            for token, count in counts.items():
                if not 0 <= int(token) < rows:
                    raise ValueError(f"id {token} is out of range; allowed: 0 to {rows - 1}")
                found[int(token)] = int(count)
            return found
        if isinstance(counts, list):
            return torch.tensor(counts)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: data_target cannot be read ({one_line(error)})") from error
    raise ValueError(f"{path}: no 'data_target' in it, as a list or an object of counts by id")
