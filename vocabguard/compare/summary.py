"""A scan as plain numbers: what ``--json`` prints, what ``--out`` writes, what the tables show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabguard.compare.scan import Scan
from vocabguard.files import one_line, plain, require_regular, tensor_file, write_file
from vocabguard.measure.drift import summarise
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.unused import not_measured
from vocabguard.results import EXPOSURE_CLASSES, MatrixName, NotApplicable, RowDrift
from vocabguard.rows.baselines import one_torch_thread
from vocabguard.rows.tensors import MATRICES
from vocabguard.vocabulary.table import VocabTable

SCHEMA = 1
"""Version of the file that `save_scan` writes."""

KINDS = ("vocabguard.scan", "vocabguard.probe")
"""What such a file says of itself."""

VECTORS = ("cosine", "residual", "l2", "norm_ratio")
"""(V,) float32 of each matrix in that file, as ``head/cosine`` and so on."""

_BINS = 24
# Odd rows that are named, of those that are listed by id.
_NAMED = 8
# A row's norm is out of line from so many robust standard deviations on, and from so large a factor on.
_FAR, _FACTOR = 8.0, 1.1
# From here on a row that grew drowns others, and one that shrank is drowned: a verdict names it. Less a rounding.
_TWOFOLD = 1.99
_TEMPLATE = regex.compile(
    r"""
      \{\{ | \}\} | \[\[ | \]\] | \{\| | \|\}                                 # wiki braces, links and tables
    | ^\ ?(?:thumb|nowrap|cite|infobox|wikitable|accessdate|access-date|archiveurl|redirect|colspan|rowspan)$
    | https?:? | \bwww\b | \.(?:com|org|net|html?|php|aspx?|jpe?g|png|gif|css)\b | \butm_ | \bhref\b | \bnbsp\b
    """,
    regex.VERBOSE | regex.IGNORECASE,
)


def category_of(table: VocabTable, token_id: int) -> str:
    """``control``, ``byte``, ``wiki/web template``, ``code and markup``, or the token's script group."""
    group = table.group_of(token_id)
    if group in ("control", "padded"):
        return group
    if group == "bytes":
        return "byte"
    if _TEMPLATE.search(table.text(token_id)):
        return "wiki/web template"
    return "code and markup" if group == "code" else group


@one_torch_thread()
def summarise_scan(scan: Scan, *, top: int = 30) -> dict[str, Any]:
    """Everything that a scan tells, as JSON-able values; NaN becomes None.

    Args:
        top: tokens in each list.

    Returns:
        ``head`` and ``embedding``: the keys of `vocabguard.measure.drift.summarise` with ``groups`` and, where targets
        are known, ``classes``; ``l2_histogram`` (``edges``, ``counts``), ``norm_outliers`` and ``zeroed_rows``; or
        ``not_applicable``. ``worst``: live tokens by cosine; ``control_moved``: control tokens by L2; ``untrained``;
        ``tokens``: counts; ``matched``; ``base`` and ``tuned``; ``residual_over``; ``seconds``.
    """
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "base": str(scan.base.path),
        "tuned": str(scan.tuned.path),
        "tied": {"base": scan.base.tied, "tuned": scan.tuned.tied},
        "matched": {
            "by": scan.match.by,
            "rows": int(scan.match.mask.sum()),
            "added": scan.match.added,
            "removed": scan.match.removed,
        },
        "tokens": _sizes(scan),
        "untrained": _untrained(scan),
        "residual_over": "live rows" if scan.data_target is None else "rows that are never a target of the data",
        "judged": scan.judged,
        **{name: matrix_summary(scan, name) for name in MATRICES},
        "worst": [_row_line(scan, i) for i in _worst(scan, top)],
        "control_moved": [_row_line(scan, i) for i in _control_moved(scan, top)],
        "seconds": scan.seconds,
    }
    told: dict[str, Any] = plain(found)
    return told


def matrix_summary(scan: Scan, name: MatrixName) -> dict[str, Any]:
    """One matrix's part of `summarise_scan`."""
    drift = scan.drift(name)
    if isinstance(drift, NotApplicable):
        return {"not_applicable": drift.reason}
    parts = {"groups": _groups(scan)}
    if scan.data_target is not None:
        classes = exposure_classes(scan.data_target)
        parts["classes"] = {label: classes == place for place, label in enumerate(EXPOSURE_CLASSES)}
    flat = summarise(
        drift, scan.live, {f"{kind}/{key}": mask for kind, of in parts.items() for key, mask in of.items()}
    )
    nested: dict[str, Any] = {key: value for key, value in flat.items() if "/" not in key}
    for kind, masks in parts.items():
        nested[kind] = {
            label: {key.rsplit("/", 1)[1]: value for key, value in flat.items() if key.startswith(f"{kind}/{label}/")}
            for label in masks
        }
    usable = scan.live & ~drift.bad & ~drift.zero
    nested["l2_histogram"] = _histogram(drift.l2[usable])
    outliers = _norm_outliers(drift, usable)
    zeroed = _zeroed(scan, name)
    nested["zeroed_rows"] = {"count": len(zeroed), "texts": [scan.table.text(i) for i in zeroed[:_NAMED]]}
    nested["norm_outliers"] = outliers | {"texts": [scan.table.text(i) for i in outliers["ids"][:_NAMED]]}
    far = [(token, float(drift.norm_ratio[token])) for token in outliers["ids"][: min(outliers["twofold"], _NAMED)]]
    nested["norm_outliers"]["twofold"] = {
        "count": outliers["twofold"], "texts": [scan.table.text(token) for token, _ in far],
        "ratios": [ratio for _, ratio in far],
    }  # fmt: skip
    return nested


def _zeroed(scan: Scan, name: MatrixName) -> list[int]:
    """Ids of the live rows that are zero now and were not at the base."""
    found = scan.zeroed.get(name)
    return [] if found is None else [int(token) for token in found.nonzero().flatten()]


def _worst(scan: Scan, top: int) -> list[int]:
    """The live rows of lowest cosine, lowest first."""
    if scan.judged is None or top < 1:
        return []
    drift = scan.drift(scan.judged)
    assert isinstance(drift, RowDrift)
    zeroed = _zeroed(scan, scan.judged)[:top]
    return zeroed + _lowest(drift.cosine, scan.live, top)[: top - len(zeroed)]


def _row_line(scan: Scan, token_id: int) -> dict[str, Any]:
    """One token of the tables; NaN where a value was not measured, no base row is -1.

    But for ``embedding_cosine`` the numbers are those of the judged matrix.
    """
    drift = scan.drift(scan.judged) if scan.judged else None
    inputs = scan.embedding
    return {
        "id": token_id,
        "base_id": int(scan.match.base_ids[token_id]),
        "text": scan.table.text(token_id),
        "category": category_of(scan.table, token_id),
        **{name: float(getattr(drift, name)[token_id]) if drift is not None else math.nan for name in VECTORS},
        "embedding_cosine": float(inputs.cosine[token_id]) if isinstance(inputs, RowDrift) else math.nan,
        "data_target": None if scan.data_target is None else int(scan.data_target[token_id]),
    }


def save_scan(
    scan: Scan, path: Path, found: Mapping[str, Any], more: Mapping[str, Tensor] | None = None, kind: str = KINDS[0]
) -> None:
    """Write every row's numbers and, as JSON in the header's ``summary``, the whole `summarise_scan`.

    The time that it took is left out: the same measurement makes the same bytes.

    Tensors, all (V,): ``group`` uint8, ``live``, ``control`` and ``trained`` bool, ``base_ids`` int64, ``data_target``
    int64 where known; ``head/`` and ``embedding/`` ``cosine``, ``residual``, ``l2``, ``norm_ratio`` float32, as far as
    they apply. Texts are JSON in the header's ``texts``, group names in ``groups``.

    Args:
        found: what `summarise_scan` gave, and what else is to be kept with it, such as ``probe`` and ``evidence``.
        more: other tensors, such as a probe's.
        kind: one of `KINDS`.

    Raises:
        OSError: if it cannot be written.
    """
    table = scan.table
    vectors = {
        "group": table.group,
        "live": scan.live,
        "control": table.control,
        "trained": table.trained,
        "base_ids": scan.match.base_ids,
    }
    if scan.data_target is not None:
        vectors["data_target"] = scan.data_target
    for name in MATRICES:
        drift = scan.drift(name)
        if isinstance(drift, RowDrift):
            vectors |= {f"{name}/{key}": getattr(drift, key) for key in VECTORS}
    header = {
        "kind": kind,
        "summary": json.dumps({key: value for key, value in found.items() if key != "seconds"}, allow_nan=False),
        "groups": json.dumps(table.names),
        "texts": json.dumps(table.texts),
    }
    whole = {name: vector.contiguous().clone() for name, vector in {**vectors, **(more or {})}.items()}
    write_file(path, tensor_file(whole, header))


def load_scan(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """What `save_scan` wrote: the (V,) vectors, the summary, the V texts.

    Raises:
        ValueError: if the file is none, or of a newer schema.
    """
    path = Path(path)
    try:
        with safe_open(str(require_regular(path)), framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if "coverage" in header:
                raise ValueError("`vocabguard coverage` wrote it; use a run folder, or a file of `scan --out`")
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        found, texts = json.loads(header["summary"]), json.loads(header["texts"])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no file of `vocabguard scan --out` ({one_line(error)})") from error
    if not isinstance(found, dict) or not isinstance(texts, list):
        raise ValueError(
            f"{path}: is no file of `vocabguard scan --out` (its summary is no object, or its texts are no list)"
        )
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: has schema {found.get('schema')}; this version of vocabguard reads {SCHEMA}")
    return vectors, found, texts


def _groups(scan: Scan) -> dict[str, Tensor]:
    counts = scan.table.group[scan.live].bincount(minlength=len(scan.table.names)).tolist()
    return {name: scan.table.mask(name) for name, count in zip(scan.table.names, counts, strict=True) if count}


def _sizes(scan: Scan) -> dict[str, Any]:
    table, live = scan.table, scan.live
    return {
        "rows": len(table),
        "live": int(live.sum()),
        "control": int(table.control.sum()),
        "unreachable": int((~table.reachable & ~table.padded & ~table.control).sum()),
        "padded": int(table.padded.sum()),
        "never_trained": int((~table.trained).sum()),
        "groups": {name: int((mask & live).sum()) for name, mask in _groups(scan).items()},
    }


def _untrained(scan: Scan) -> dict[str, Any]:
    ids = (~scan.table.trained).nonzero().flatten()
    return {
        "count": len(ids),
        "ids": ids.tolist(),
        "texts": [scan.table.text(i) for i in ids[:_NAMED].tolist()],
        "known_unused": int(scan.unused.sum()),
        "not_measured": not_measured(scan.unused),
    }


def _control_moved(scan: Scan, top: int) -> list[int]:
    drift = scan.drift(scan.judged) if scan.judged else None
    return [] if not isinstance(drift, RowDrift) else _lowest(-drift.l2, scan.table.control & scan.match.mask, top)


def _lowest(values: Tensor, mask: Tensor, top: int) -> list[int]:
    ids = (mask & values.isfinite()).nonzero().flatten()
    if 0 < top < len(ids):  # only those that can be among them need sorting
        ids = ids[values[ids] <= values[ids].kthvalue(top).values]
    order = torch.sort(values[ids], stable=True).indices[:top]
    return [int(i) for i in ids[order]]


def _histogram(values: Tensor) -> dict[str, Any]:
    values = values[values.isfinite()]
    if len(values) == 0:
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(values.double().numpy(), bins=_BINS, range=(0.0, float(values.max()) or 1.0))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _norm_outliers(drift: RowDrift, usable: Tensor) -> dict[str, Any]:
    """Rows whose norm changed quite unlike the others'."""
    logs = torch.where(usable, drift.norm_ratio.log(), torch.nan)
    bulk = logs[logs.isfinite()]
    if len(bulk) == 0:
        return {"count": 0, "median_ratio": None, "ids": [], "twofold": 0}
    middle = bulk.median()
    spread = 1.4826 * (bulk - middle).abs().median()
    far = (logs - middle).abs()
    limit = max(_FAR * float(spread), math.log(_FACTOR))
    ids = _lowest(-far, far > limit, 100)
    twofold = int((far >= max(limit, math.log(_TWOFOLD))).sum())
    return {"count": int((far > limit).sum()), "median_ratio": float(middle.exp()), "ids": ids, "twofold": twofold}
