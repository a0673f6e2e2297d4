"""Lost rows put right without training: base rows, moved by what the tuned rows of their kind have in common.

A plain base row is foreign to the tuned body: all rows of a kind have shifted together, and softmax compares them, so
that it is said too often. With the whole shift on it, it stays as unlikely as training has made its kind. A part of the
shift lies between: it gives back the most for its price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vocabguard.compare.adapted import adapter_head, is_adapter, write_adapter
from vocabguard.compare.explain import asks_of
from vocabguard.compare.options import METHODS, STRENGTH, Method
from vocabguard.compare.scan import Scan, fitted
from vocabguard.files import copy_files, full_path, plain, read_text, replacing
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.intervals import paired_change, z_of_look
from vocabguard.measure.probe import PromptContext, probe
from vocabguard.measure.reference import Windows, cut_windows, paired_rise, token_nll
from vocabguard.measure.retention import lost as lost_now
from vocabguard.measure.retention import retained, said, share_of
from vocabguard.measure.sampling import stratified_sample
from vocabguard.results import EXPOSURE_CLASSES, NotApplicable, ProbeResult, RowDrift
from vocabguard.rows.baselines import Baseline
from vocabguard.rows.checkpoints import Checkpoint
from vocabguard.rows.tensors import INDEX, SINGLE, open_adapter_store, safetensors_files

_CHUNK = 2**20


@dataclass(frozen=True)
class Plan:
    """Which output rows are replaced, and by what.

    Attributes:
        ids: (n,) int64, in the tuned vocabulary, ascending.
        rows: (n, width) float32, the new rows; None leaves them as they are.
        chosen_by: the rule, in words.
    """

    ids: Tensor
    rows: Tensor | None
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


def rows_fixed(tuned: Checkpoint) -> str:
    """Why no row of a checkpoint's head can be replaced; empty where one can."""
    why = adapter_head(tuned) if is_adapter(tuned.path) else ""
    return why.reason if isinstance(why, NotApplicable) else ""


def write_repaired(tuned: Checkpoint, plan: Plan, out: Path) -> None:
    """Copy a tuned folder with its head's rows replaced; shards, dtypes and all other files stay as they are.

    Args:
        tuned: a folder of safetensors with a head of its own, or a tied one; or an adapter's that has the whole head.
        out: made if missing; must be empty.

    Raises:
        ValueError: if the tuned checkpoint is no such folder, or ``out`` is in use.
    """
    check_out(tuned, out)
    if plan.rows is None or rows_fixed(tuned):
        raise ValueError(f"{tuned.path}: {rows_fixed(tuned) or 'no rows to put back'}; allowed: --method echo or auto")
    if is_adapter(tuned.path):
        key = str(adapter_head(tuned))
        write_adapter(tuned.path, {key: _replaced(open_adapter_store(tuned.path).tensor(key), plan)}, out)
        return
    key = head_key(tuned)
    file = safetensors_files(tuned.path)[key]
    copy_files(tuned.path, out, but={file})
    with safe_open(str(file), framework="pt", device="cpu") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        header = opened.metadata()
    with replacing(out / file.name) as new:
        save_file(tensors | {key: _replaced(tensors[key], plan)}, str(new), metadata=header)


def _replaced(head: Tensor, plan: Plan) -> Tensor:
    """(V, width), new: a head with the plan's rows."""
    assert plan.rows is not None
    changed = head.clone()
    changed[plan.ids] = plan.rows.to(head.dtype)
    return changed


def weight_files(folder: Path) -> set[Path]:
    """The files of a model's folder that hold its weights, the shards' index among them.

    Raises:
        ValueError: for an index that cannot be read.
    """
    return {*safetensors_files(folder).values(), folder / INDEX}


def check_out(tuned: Checkpoint, out: Path) -> None:
    """Refuse a target before work is done.

    Raises:
        ValueError: if the tuned checkpoint is neither an adapter nor a folder of safetensors with a head, or ``out`` is
            in use.
    """
    adapter = is_adapter(tuned.path)
    if not adapter:
        if not any((tuned.path / name).is_file() for name in (SINGLE, INDEX)):
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


_ASKS, _BATCH = 4, 8192
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
        interval of the former; of ``tuned`` and ``repaired``, where both are there, ``change`` of the share with its
        paired interval, ``back`` and ``gone``, how many tokens came back and went, and ``returned``, the change as a
        share of what this sample had lost, with the change's interval; None where nothing was lost.

    Raises:
        ValueError: if a prompt is longer than a model takes.
    """
    strata = scan.table.group.long()
    size = sample or int(scan.live.sum())
    ids = stratified_sample(strata, scan.live, size, _SEED)
    contexts = asks_of(models["base"], scan, pool, _ASKS)
    asked = {name: probe(model, ids, contexts, seed=_SEED, batch_tokens=_BATCH) for name, model in models.items()}
    base = asked.pop("base")
    found: dict[str, float | int | None] = {"tokens": len(ids), "said_at_base": int(said(base).sum())}
    for name, result in asked.items():
        found[name] = plain(retained(base, result))
        # Taken evenly, as the share is: a sample by groups holds more of the small ones.
        kept = share_of(~lost_now(base, result), said(base), torch.ones(len(ids)), z_of_look(1))
        found |= {f"{name}_low": kept.low, f"{name}_high": kept.high}
        found[f"{name}_lost"] = plain(retained(base, result, lost[ids]))
    return found | (_change(base, asked["tuned"], asked["repaired"]) if {"tuned", "repaired"} <= asked.keys() else {})


def _change(base: ProbeResult, tuned: ProbeResult, repaired: ProbeResult) -> dict[str, float | int | None]:
    """What a repair changed, of the tokens that the base says: the same ones before and after."""
    knew = said(base)
    before, after = lost_now(base, tuned) & knew, lost_now(base, repaired) & knew
    back, gone, total = int((before & ~after).sum()), int((after & ~before).sum()), int(knew.sum())
    missing = int(before.sum())
    low, high = paired_change(back, gone, total, z_of_look(1))
    found: dict[str, float | int | None] = {"back": back, "gone": gone}
    ends = {"": (back - gone) / total if total else 0.0, "_low": low, "_high": high}
    for end, value in ends.items():
        found[f"change{end}"] = value
        found[f"returned{end}"] = min(1.0, value * total / missing) if missing else None
    return found


def text_loss(model: nn.Module, tokenizer: Any, file: Path, most: int = 2**16) -> float:
    """Mean cross entropy in nats of a text's tokens; see `text_windows`."""
    windows = text_windows(tokenizer, file, most)
    return mean_loss(windows, token_nll(model, windows, batch_tokens=_BATCH))


def text_windows(tokenizer: Any, file: Path, most: int = 2**16) -> Windows:
    """The beginning of a text, in windows.

    Args:
        file: UTF-8 text.
        most: tokens.

    Raises:
        ValueError: if the file cannot be read or has fewer than two tokens.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {file}: cannot be read as UTF-8 ({error})") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:most]
    if len(ids) < 2:
        raise ValueError(f"--text {file}: has {len(ids)} tokens; needed: at least 2")
    return cut_windows([ids], window=_WINDOW, max_tokens=most)


def mean_loss(windows: Windows, nll: Tensor) -> float:
    """Mean negative log-likelihood in nats of the targets that a model gave a number for."""
    return float(nll[windows.measured & nll.isfinite()].double().mean())


def loss_changes(windows: Windows, nll: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """How much harder a text became from one model to another, paired by token.

    Args:
        nll: of ``base``, ``tuned`` and ``repaired``, as `vocabguard.measure.reference.token_nll` gives it; ``base`` may
            be missing.

    Returns:
        ``<later>_from_<earlier>`` with ``mean`` in nats a token, > 0 where the later one finds it harder, ``low`` and
        ``high``, None of a single window.
    """
    pairs = (("base", "tuned"), ("base", "repaired"), ("tuned", "repaired"))
    found = {}
    for first, then in pairs:
        if first in nll and then in nll:
            rise = nll[then] - nll[first]
            told = paired_rise(rise.nan_to_num(), windows.measured & rise.isfinite(), z=z_of_look(1))
            found[f"{then}_from_{first}"] = plain({"mean": told.mean, "low": told.low, "high": told.high})
    return found
