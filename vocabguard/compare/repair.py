"""Lost rows put right without training: base rows, moved by what the tuned rows of their kind have in common.

A plain base row is foreign to the tuned body: all rows of a kind have shifted together, and softmax compares them, so
that it is said too often. With the whole shift on it, it stays as unlikely as training has made its kind. A part of the
shift lies between: it gives back the most for its price.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vocabguard.compare.explain import asks_of
from vocabguard.compare.scan import Scan, fitted
from vocabguard.files import full_path, plain, replacing
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.intervals import z_of_look
from vocabguard.measure.probe import PromptContext, probe
from vocabguard.measure.retention import lost as lost_now
from vocabguard.measure.retention import retained, said, share_of
from vocabguard.measure.sampling import stratified_sample
from vocabguard.results import EXPOSURE_CLASSES, NotApplicable, RowDrift
from vocabguard.rows.baselines import Baseline
from vocabguard.rows.checkpoints import Checkpoint
from vocabguard.rows.tensors import INDEX, SINGLE, safetensors_files

Method = Literal["shift", "rows"]
METHODS: tuple[Method, ...] = ("shift", "rows")
STRENGTH = 0.6
"""Part of the mean shift that ``shift`` adds; measured by ``tests/benchmarks/repair_quality.py``."""

_CHUNK = 2**20


@dataclass(frozen=True)
class Plan:
    """Which output rows are replaced, and by what.

    Attributes:
        ids: (n,) int64, in the tuned vocabulary, ascending.
        rows: (n, width) float32, the new rows.
        chosen_by: the rule, in words.
    """

    ids: Tensor
    rows: Tensor
    chosen_by: str


def lost_rows(scan: Scan, cosine_below: float = 0.95, targets_below: int = 20) -> tuple[Tensor, str]:
    """Live rows to be repaired: those with few data targets where counts are known, else those of low cosine.

    Rows that are broken are among them: NaN or Inf, or zero now and not at the base.

    Args:
        cosine_below: the bar without counts.
        targets_below: the bar with counts.

    Returns:
        (V,) bool, and the rule in words.

    Raises:
        ValueError: if the head was not measured.
    """
    drift = scan.head
    if isinstance(drift, NotApplicable):
        raise ValueError(f"there is no head to repair: {drift.reason}")
    broken = scan.live & (drift.bad | scan.zeroed.get("head", torch.zeros_like(drift.bad)))
    usable, beside = scan.live & ~drift.bad & ~drift.zero, ", or broken" if bool(broken.any()) else ""
    if scan.data_target is not None:
        few = usable & (scan.data_target < targets_below)
        return few | broken, f"live rows with fewer than {targets_below} data targets{beside}"
    return usable & (drift.cosine < cosine_below) | broken, f"live rows with cosine below {cosine_below:g}{beside}"


def plan_repair(scan: Scan, lost: Tensor, chosen_by: str, method: Method, strength: float = STRENGTH) -> Plan:
    """The rows that are to stand in the place of the lost ones.

    With ``shift`` a new row is the base row plus a part of the mean displacement of the lost rows of its class: its
    exposure class where counts are known, else all lost rows are one class. With ``rows`` it is the base row.

    Args:
        lost: (V,) bool.
        chosen_by: in words, see `lost_rows`.
        strength: that part, from 0 (plain base rows) to 1 (the whole displacement).

    Raises:
        ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    base, now = _heads(scan)
    ids = lost.nonzero().flatten()
    before = _taken(base, ids)
    # A row that is broken at the base already cannot be put right by it.
    sound = _sound(before)
    ids, before = ids[sound], before[sound]
    after, new = _taken(now, ids), before.clone()
    if method == "shift":
        classes = torch.zeros(len(ids)) if scan.data_target is None else exposure_classes(scan.data_target[ids])
        for kind in range(len(EXPOSURE_CLASSES)):
            members = classes == kind
            moved = members & _sound(after)
            if moved.any():
                new[members] += strength * (after[moved] - before[moved]).double().mean(dim=0).float()
    return Plan(ids, new, chosen_by)


def _sound(rows: Tensor) -> Tensor:
    """(n,) bool: rows that are finite and not zero."""
    return rows.isfinite().all(1) & rows.any(1)


def write_repaired(tuned: Checkpoint, plan: Plan, out: Path) -> None:
    """Copy a tuned folder with its head's rows replaced; shards, dtypes and all other files stay as they are.

    Args:
        tuned: a folder of safetensors with a head of its own, or a tied one.
        out: made if missing; must be empty.

    Raises:
        ValueError: if the tuned checkpoint is no such folder, or ``out`` is in use.
    """
    check_out(tuned, out)
    key = head_key(tuned)
    file = safetensors_files(tuned.path)[key]
    copy_files(tuned.path, out, but={file})
    with safe_open(str(file), framework="pt", device="cpu") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        header = opened.metadata()
    head = tensors[key].clone()
    head[plan.ids] = plan.rows.to(head.dtype)
    with replacing(out / file.name) as new:
        save_file(tensors | {key: head}, str(new), metadata=header)


def copy_files(folder: Path, out: Path, but: Collection[Path]) -> None:
    """Copy the files of a folder, and nothing below it, into another one, which is made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    for item in sorted(folder.iterdir()):
        if item.is_file() and item not in but:
            shutil.copyfile(item, out / item.name)


def weight_files(folder: Path) -> set[Path]:
    """The files of a model's folder that hold its weights, the shards' index among them.

    Raises:
        ValueError: for an index that cannot be read.
    """
    return {*safetensors_files(folder).values(), folder / INDEX}


def check_out(tuned: Checkpoint, out: Path) -> None:
    """Refuse a target before work is done.

    Raises:
        ValueError: if the tuned checkpoint is not a folder of safetensors with a head, or ``out`` is in use.
    """
    if not tuned.path.is_dir() or not ((tuned.path / SINGLE).is_file() or (tuned.path / INDEX).is_file()):
        raise ValueError(f"{tuned.path}: allowed for repair: a model's folder with {SINGLE} or {INDEX}")
    head_key(tuned)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder")
    if tuned.path == full_path(out) or tuned.path in full_path(out).parents:
        raise ValueError(f"--out {out}: lies in the tuned model's folder; allowed: another place")


def head_key(tuned: Checkpoint) -> str:
    """The tensor that holds the output rows.

    Raises:
        ValueError: if there is none.
    """
    key = tuned.keys.get("head") or (tuned.keys.get("embedding") if tuned.tied else None)
    if key is None:
        raise ValueError(f"{tuned.path}: has no head of its own to repair")
    return key


def _heads(scan: Scan) -> tuple[Baseline, Baseline]:
    base = fitted(scan.base.head, scan.match.base_ids)
    now = fitted(scan.tuned.head, torch.arange(len(scan.table)))
    if isinstance(base, NotApplicable) or isinstance(now, NotApplicable) or not isinstance(scan.head, RowDrift):
        raise ValueError("there is no head to repair on both sides")
    return base, now


@torch.no_grad()
def _taken(rows: Baseline, ids: Tensor) -> Tensor:
    """(n, width) float32, new: some rows, read chunk by chunk."""
    found = torch.empty(len(ids), rows.width)
    for part, chunk in rows.chunks(max(1, _CHUNK // rows.width)):
        here = (ids >= part.start) & (ids < part.stop)
        if here.any():
            found[here] = chunk[ids[here] - part.start].float()
    return found


_ASKS = 4
_WINDOW = 256
_SEED = 7


def recall_of(
    models: Mapping[str, nn.Module], scan: Scan, pool: Sequence[PromptContext], lost: Tensor, sample: int
) -> dict[str, float | int | None]:
    """Ask models for live tokens and compare them with the base.

    Args:
        models: ``base``, and others such as ``tuned`` and ``repaired``, all of the tuned vocabulary's ids.
        pool: contexts, of which the base chooses.
        lost: (V,) bool, rows that were repaired.
        sample: tokens to ask for, stratified by group; 0 asks for all live ones.

    Returns:
        ``tokens``; for each other model ``<name>`` and ``<name>_lost``, the share in [0, 1] of tokens said at the
        base (of all, and of the repaired rows) that it has not lost, and ``<name>_low`` and ``<name>_high``, the
        interval of the former; ``returned``, the share of the loss that
        ``repaired`` gives back, where both are there and something was lost.

    Raises:
        ValueError: if a prompt is longer than a model takes.
    """
    strata = scan.table.group.long()
    size = sample or int(scan.live.sum())
    ids = stratified_sample(strata, scan.live, size, _SEED)
    contexts = asks_of(models["base"], scan, pool, _ASKS)
    asked = {name: probe(model, ids, contexts, seed=_SEED, batch_tokens=8192) for name, model in models.items()}
    base = asked.pop("base")
    found: dict[str, float | int | None] = {"tokens": len(ids), "said_at_base": int(said(base).sum())}
    for name, result in asked.items():
        found[name] = plain(retained(base, result))
        # Taken evenly, as the share is: a sample by groups holds more of the small ones.
        kept = share_of(~lost_now(base, result), said(base), torch.ones(len(ids)), z_of_look(1))
        found |= {f"{name}_low": kept.low, f"{name}_high": kept.high}
        found[f"{name}_lost"] = plain(retained(base, result, lost[ids]))
    before, after = found.get("tuned"), found.get("repaired")
    gone = None if before is None else 1 - before
    found["returned"] = (after - before) / gone if gone and after is not None and before is not None else None
    return found


@torch.no_grad()
def text_loss(model: nn.Module, tokenizer: Any, file: Path, most: int = 2**16) -> float:
    """Mean cross entropy in nats of a text's tokens.

    Args:
        file: UTF-8 text.

    Raises:
        ValueError: if the file cannot be read or has fewer than two tokens.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {file}: cannot be read as UTF-8 ({error})") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:most], dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(f"--text {file}: has {len(ids)} tokens; needed: at least 2")
    total, count = 0.0, 0
    for window in torch.split(ids, _WINDOW):
        if len(window) > 1:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return total / count
