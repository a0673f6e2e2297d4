"""``vocabguard scan BASE TUNED``: which rows and layers drifted, from two checkpoints on disk; what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from vocabguard.cli import asking, common
from vocabguard.cli.answers import probe_parts
from vocabguard.cli.app import InputError
from vocabguard.cli.asking import Asking
from vocabguard.cli.common import Column, Grid
from vocabguard.cli.models import model_path
from vocabguard.compare.options import Bars
from vocabguard.files import one_line, plain
from vocabguard.report.commands import Next, after_scan
from vocabguard.text import listed, number, percent, visible
from vocabguard.vocabulary.labels import ROW_KINDS, label_of

if TYPE_CHECKING:
    from torch import Tensor

    from vocabguard.compare.scan import Scan

_BARS = " ▁▂▃▄▅▆▇█"
_UNMOVED = 0.9999
_LABELS = {"head": "head", "embedding": "input embedding"}


def _verdict(found: Mapping[str, Any]) -> str:
    """One sentence: how many live rows of which matrix drifted how far."""
    judged = found["judged"]
    if judged is None:
        return f"Not applicable: {found['head']['not_applicable']}."
    numbers, live = found[judged], found["tokens"]["live"]
    if "cosine_mean" not in numbers:
        return f"No live {ROW_KINDS[judged]} row could be measured."
    return (
        f"{percent(numbers['below_0.95'])} of {live:,} live {ROW_KINDS[judged]} rows are below cosine 0.95, "
        f"{percent(numbers['below_0.90'])} below 0.90; mean {number(numbers['cosine_mean'])}, "
        f"min {number(numbers['cosine_min'])}."
    )


def _tied(found: Mapping[str, Any]) -> bool:
    return all(found["tied"][side] for side in ("base", "tuned"))


def _parts(found: Mapping[str, Any], top: int) -> list[RenderableType]:
    verdict = found["verdict"]
    parts: list[RenderableType] = [Text(verdict["rows"], "bold")]
    parts += [Text(verdict["behaviour"], "bold")] if verdict["behaviour"] else []
    parts.append(Text(f"Not measured: {'; '.join(verdict['not_measured'])}."))
    parts += [Text(f"over the threshold: {one}", "red") for one in verdict["findings"]]
    parts += map(Text, _sentences(found))
    same = _tied(found)
    for name in ("head",) if same else ("head", "embedding"):
        parts += _matrix(found, name)
    if found["worst"]:
        parts += ["", Text("worst live tokens, by cosine", "bold"), _tokens(found["worst"][:top], same)]
    if found["body"] and found["body"].get("blocks"):
        parts += _block_table(found["body"], top)
    if found["probe"]:
        parts += ["", Text("what both models say", "bold"), *probe_parts(found["probe"], top, verdict=False)]
    if found["control_moved"]:
        parts += [Text("control tokens that moved most, by L2", "bold"), _tokens(found["control_moved"][:5], same)]
    return parts


def _sentences(found: Mapping[str, Any]) -> list[str]:
    tokens, matched = found["tokens"], found["matched"]
    said = [f"base {found['base']}", f"tuned {found['tuned']}"]
    line = f"{tokens['rows']:,} rows matched by {matched['by']}"
    if matched["added"] or matched["removed"]:
        line += f"; {matched['added']:,} have no base row, {matched['removed']:,} of the base are gone"
    set_apart = [f"{tokens[key]:,} {key}" for key in ("control", "unreachable", "padded") if tokens[key]]
    if tokens["never_trained"]:
        set_apart.append(f"{tokens['never_trained']:,} never trained at the base")
    if set_apart:
        line += f"; set apart: {', '.join(set_apart)}"
    said.append(f"{line}.")
    tied = [side for side in ("base", "tuned") if found["tied"][side]]
    if tied:
        said.append(f"Tied in the {' and the '.join(tied)}: the embedding is the head.")
    if tokens["never_trained"]:
        names = [visible(text, 24) for text in found["untrained"]["texts"]]
        said.append(f"Never trained at the base: {listed(names, found['untrained']['count'])}.")
    if found["untrained"]["not_measured"]:
        reason = found["untrained"]["not_measured"]
        said.append(f"Under-trained tokens not measured: {reason}; only rows of tiny norm are set apart.")
    if found["judged"]:
        said.append(f"Residual: without the mean displacement of the {found['residual_over']}.")
    return said


def _block_table(body: Mapping[str, Any], top: int) -> list[RenderableType]:
    """Blocks of the body in their order; none where nothing moved."""
    if body["identical"] or not top:
        return []
    from vocabguard.compare.blocks import ROUNDING
    from vocabguard.compare.body_text import block_runs, range_of

    grid = Grid([Column("block", words=True), Column("change"), Column("cosine"), Column("tensors changed", spare=2),
                 Column("most changed", words=True, spare=3)])  # fmt: skip
    blocks = body["blocks"]
    shown = [percent(one["relative"]) for one in blocks]
    # Where all layers moved alike, a line each would say one thing as often as there are layers.
    for run in block_runs([one["block"] for one in blocks], lambda first, other: shown[first] == shown[other]):
        alike = [blocks[place] for place in run]
        moved = f"{sum(one['changed'] for one in alike)} of {sum(one['tensors'] for one in alike)}"
        cosines = [one["cosine"] for one in alike if one["cosine"] is not None]
        worst = max(alike, key=lambda one: one["worst"]["relative"] or 0.0)
        name = f"{worst['worst']['tensor']} ({percent(worst['worst']['relative'])})" if worst["changed"] else ""
        label = range_of([one["block"] for one in alike])
        grid.add(label, shown[run[0]], number(min(cosines, default=None)), moved, name)
    title = "body, by block: norm of the change over the norm at the base"
    yardstick = f" (rounding to bfloat16 makes at most {percent(ROUNDING['bfloat16'])})"
    return [Text(f"\n{title}{yardstick}", "bold"), grid]


def _matrix(found: Mapping[str, Any], name: str) -> list[RenderableType]:
    numbers = found[name]
    title = Text(f"\n{'head = input embedding (tied)' if _tied(found) else _LABELS[name]}", "bold")
    if "not_applicable" in numbers:
        return [] if found["judged"] is None else [title, Text(f"not applicable: {numbers['not_applicable']}")]
    odd = (numbers["nonfinite_rows"], numbers["zeroed_rows"]["count"], numbers["norm_outliers"]["count"])
    measurable = not any(odd)
    if numbers.get("cosine_min", 0.0) >= _UNMOVED and measurable:
        return [title, Text("every live row is where it was (cosine above 0.9999)")]
    counts = found["tokens"]["groups"]
    table = Grid([
        Column("", words=True), Column("tokens", spare=3), Column("mean"), Column("min", spare=1),
        Column("residual p01", spare=4), Column("< 0.95"), Column("< 0.90", spare=2),
    ])  # fmt: skip
    table.add(*_cells(label_of("all"), found["tokens"]["live"], numbers), end=True)
    groups = sorted(numbers["groups"].items(), key=lambda item: -item[1].get("below_0.95", -1.0))
    for place, (label, part) in enumerate(groups):
        table.add(*_cells(label_of(label), counts.get(label), part), end=place == len(groups) - 1)
    for label, part in numbers.get("classes", {}).items():
        table.add(*_cells(label_of(label), None, part))
    return [title, Group(table, *map(Text, _asides(numbers)))]


def _asides(numbers: Mapping[str, Any]) -> list[str]:
    said = []
    counts, edges = numbers["l2_histogram"]["counts"], numbers["l2_histogram"]["edges"]
    if counts:
        most = max(counts)
        bars = "".join(_BARS[0 if not n else 1 + round((len(_BARS) - 2) * n / most)] for n in counts)
        said.append(f"L2 0 |{bars}| {edges[-1]:.3g}")
    outliers = numbers["norm_outliers"]
    if outliers["count"]:
        names = listed([visible(text, 24) for text in outliers["texts"]], outliers["count"])
        ratio = number(outliers["median_ratio"], 3)
        said.append(
            f"{outliers['count']:,} live rows with a norm out of line (the median row's is {ratio} times what it was): "
            f"{names}"
        )
    said += [
        f"{int(numbers[key]):,} live rows {what}"
        for key, what in (("nonfinite_rows", "with NaN or Inf"), ("zero_rows", "of zeros"))
        if numbers[key]
    ]
    return said


def _cells(label: str, count: int | None, part: Mapping[str, Any]) -> list[str]:
    return [
        label,
        "" if count is None else f"{count:,}",
        number(part.get("cosine_mean")),
        number(part.get("cosine_min")),
        number(part.get("residual_p01")),
        percent(part.get("below_0.95")),
        percent(part.get("below_0.90")),
    ]


def _tokens(tokens: Sequence[Mapping[str, Any]], tied: bool) -> Grid:
    counted = any(token["data_target"] is not None for token in tokens)
    columns = [
        Column("id"), Column("token", words=True), Column("category", words=True, spare=1), Column("cosine"),
        Column("residual", spare=2), Column("L2", spare=4), Column("norm ratio", spare=5),
    ]  # fmt: skip
    # In a tied pair it is the same row.
    columns += [] if tied else [Column("embedding", spare=3)]
    columns += [Column("targets")] if counted else []
    keys = ("cosine", "residual", "l2", "norm_ratio", *(() if tied else ("embedding_cosine",)))
    table = Grid(columns)
    for token in tokens:
        cells = [str(token["id"]), visible(token["text"], 24), label_of(token["category"])]
        cells += [number(token[key]) for key in keys]
        cells += ["-" if token["data_target"] is None else f"{token['data_target']:,}"] if counted else []
        table.add(*cells)
    return table


def scan(
    base: common.Base,
    tuned: common.Tuned,
    tokenizer: common.Tokenizer = None,
    head: common.HeadKey = None,
    embedding: common.EmbeddingKey = None,
    coverage: common.Coverage = None,
    run: common.Run = None,
    threshold: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of live rows below cosine 0.95 from which the exit code is 1."),
    ] = 0.01,
    body: Annotated[
        bool, typer.Option(help="Compare the layers between the rows, too; reads both models whole.")
    ] = True,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load both models and ask them, as `vocabguard probe` does.")
    ] = False,
    sample: asking.Sample = Asking.sample,
    whole: asking.Whole = False,
    watch: asking.Watch = None,
    texts: asking.Texts = None,
    seed: asking.Seed = 0,
    batch: asking.Batch = Asking.batch,
    device: asking.Device = None,
    device_map: asking.DeviceMap = None,
    dtype: asking.Dtype = "auto",
    top: Annotated[int, typer.Option(min=0, help="Tokens in the list of the worst.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write every row's numbers to this .safetensors file.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Compare every vocabulary row of TUNED with BASE, and the layers between them; with --probe what both can say.

    Exit code 0: fine; 1: more live rows below cosine 0.95 than the threshold allows, or NaN or Inf in the body, or a
    finding of the probe; 2: bad input.
    """
    from vocabguard.compare.evidence import evidence_of
    from vocabguard.compare.summary import summarise_scan

    common.check_most(("--threshold", threshold, 1), ("--top", top, 10**7))
    options = Asking(
        sample=sample, whole=whole, watch=watch, texts=texts, seed=seed, batch=batch,
        loading=common.loading(device, device_map, dtype),
    )  # fmt: skip
    _check_asking(options, probe=probe)
    if out is not None:
        base, tuned = model_path(base), model_path(tuned)  # whose files `--out` must not replace
        common.check_new_file("--out", out, common.checkpoint_files(base, tuned))
    pair = common.open_pair(base, tuned, tokenizer, head, embedding, coverage, run)
    found = common.measured(pair)
    told = summarise_scan(found, top=top)
    told["body"] = _body(pair) if body else None
    asked = asking.ask_both(pair, found, options) if probe else None
    told["probe"] = None if asked is None else asked.told(Bars(), top)
    told |= _judged(told, threshold)
    if out is not None:
        given = {"base": base, "tuned": tuned, "tokenizer": tokenizer, "head": head, "embedding": embedding,
                 "coverage": coverage, "run": run, "threshold": threshold, "top": top, "body": body,
                 "probe": probe}  # fmt: skip
        given |= options.given if probe else {}
        beside = None if asked is None else {"device": asked.device}
        with common.working("hashing the weights"):
            told["evidence"] = evidence_of(pair.base, pair.tuned, pair.tokenizer, given, beside)
        _save(found, out, told, {} if asked is None else asked.vectors())
    if as_json:
        print(json.dumps(_without_plan(told), ensure_ascii=False, allow_nan=False))
    else:
        for part in _parts(told, top):
            Console().print(part, highlight=False, soft_wrap=isinstance(part, Text))
        common.show_next(_next(told, base, tuned, out))
    if told["findings"]:
        raise typer.Exit(1)


def _next(told: Mapping[str, Any], base: str, tuned: str, out: Path | None) -> tuple[Next, ...]:
    """What to do after a scan; nothing about single tokens where none drifted."""
    numbers = told[told["judged"]] if told["judged"] else {}
    worst = [token["id"] for token in told["worst"]] if numbers.get("below_0.95") else []
    found = after_scan(base, tuned, out, tokens=worst)
    return found[1:] if told["probe"] else found


def _check_asking(options: Asking, *, probe: bool) -> None:
    """Refuse options of the probe where none is asked for, and files that cannot be read before work is done."""
    _ = options.words
    if not probe and options != Asking():
        raise InputError(
            "--sample, --all, --watch, --texts, --seed, --batch, --device, --device-map and --dtype are of the probe; "
            "allowed: beside --probe"
        )
    if options.texts is not None and not options.texts.is_file():
        raise InputError(f"--texts {options.texts}: not found; allowed: a file of texts")


def _body(pair: common.Pair) -> dict[str, Any]:
    from vocabguard.compare.blocks import body_as_json, body_drift

    with common.progress_bars() as progress:
        told: dict[str, Any] = plain(body_as_json(body_drift(pair.base, pair.tuned, progress)))
    return told


def _judged(told: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The verdict over rows, body and behaviour, and whether anything is over its threshold."""
    from vocabguard.compare.verdicts import rows_sentence, unseen_by_scan

    numbers = told[told["judged"]] if told["judged"] else {}
    damage = _broken_rows(told)
    share, body, probe = numbers.get("below_0.95") or 0.0, told["body"], told["probe"]
    findings = (
        [f"{percent(share)} of live rows are below cosine 0.95; allowed: {percent(threshold)}"]
        if share > threshold
        else []
    )
    findings += damage
    broken = [one["block"] for one in (body or {}).get("blocks", []) if one["broken"]]
    findings += [f"NaN or Inf in the body: {listed(broken, len(broken))}"] if broken else []
    findings += probe["verdict"]["findings"] if probe else []
    unseen = unseen_by_scan(body, probe) + (probe["verdict"]["not_measured"] if probe else [])
    rows = "; ".join([_verdict(told).removesuffix("."), *damage, *_twofold_rows(told)])
    verdict = {"rows": rows_sentence(f"{rows}.", body), "behaviour": probe and probe["verdict"]["sentence"],
               "findings": findings, "not_measured": unseen}  # fmt: skip
    return {"threshold": threshold, "findings": bool(findings), "verdict": verdict}


def _broken_rows(told: Mapping[str, Any]) -> list[str]:
    """Rows that no share counts, since they have no cosine: a sentence for each kind and matrix."""
    said = []
    for name in ("head",) if _tied(told) else ("head", "embedding"):
        numbers = told[name]
        if zeroed := numbers.get("zeroed_rows", {}).get("count"):
            named = listed([visible(text, 24) for text in numbers["zeroed_rows"]["texts"]], zeroed)
            said.append(f"{zeroed:,} live {ROW_KINDS[name]} rows are zero now and were not at the base: {named}")
        if numbers.get("nonfinite_rows"):
            said.append(f"{int(numbers['nonfinite_rows']):,} live {ROW_KINDS[name]} rows hold NaN or Inf")
    return said


def _twofold_rows(told: Mapping[str, Any]) -> list[str]:
    """Rows of another length, which no cosine shows: a sentence for each matrix."""
    said = []
    for name in ("head",) if _tied(told) else ("head", "embedding"):
        found = told[name].get("norm_outliers", {}).get("twofold")
        if found and found["count"]:
            named = [f"{visible(text, 24)} ({ratio:.2g} times)"
                     for text, ratio in zip(found["texts"], found["ratios"], strict=True)]  # fmt: skip
            count = found["count"]
            rows = f"1 live {ROW_KINDS[name]} row" if count == 1 else f"{count:,} live {ROW_KINDS[name]} rows"
            said.append(f"the norm of {rows} doubled or halved: {listed(named, count)}")
    return said


def _without_plan(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed: the prompts in ids are for the file."""
    probe = told["probe"]
    return {**told, "probe": probe and {key: value for key, value in probe.items() if key != "plan"}}


def _save(found: Scan, out: Path, told: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> None:
    from vocabguard.compare.summary import save_scan

    try:
        save_scan(found, out, told, vectors)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise InputError(f"--out {out}: cannot be written ({one_line(error)})") from error
