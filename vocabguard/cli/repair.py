"""``vocabguard repair BASE TUNED --out DIR``: puts lost rows right, without training or by a short echo fine-tune."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TimeRemainingColumn

from vocabguard.cli import common
from vocabguard.cli.answers import where_sentence
from vocabguard.cli.app import InputError
from vocabguard.cli.asking import Asking, Dtype, ask_both
from vocabguard.cli.repair_train import EchoRun, data_rows, train_echo, write_trained
from vocabguard.compare.options import METHODS, STRENGTH, Loading
from vocabguard.config import ReferenceConfig
from vocabguard.measure.intervals import wilson, z_of_look
from vocabguard.report.commands import Next, command
from vocabguard.text import number, percent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vocabguard.compare.repair import Plan
    from vocabguard.compare.scan import Scan
    from vocabguard.data.readers import Example
    from vocabguard.measure.reference import Windows

_ALLOWED = (*METHODS, "echo", "auto")
_RUN = EchoRun()
_BATCH = 4096
_CHOOSE = 512  # tokens that are probed where the method is chosen by what was lost


def repair(
    base: common.Base,
    tuned: common.Tuned,
    out: Annotated[Path, typer.Option(help="Folder for the repaired model; new or empty.")],
    method: Annotated[
        str,
        common.one_of(
            _ALLOWED,
            "shift: base rows plus a part of the mean shift of their class; rows: plain base rows; "
            "echo: shift, then a short fine-tune of body and head on --data and echo rows; auto: asks both models and "
            "takes shift where the base's rows bring most lost tokens back, else echo.",
        ),
    ] = "shift",
    strength: Annotated[float, typer.Option(min=0, max=1, help="Part of the mean shift that is added.")] = STRENGTH,
    cosine_below: Annotated[float, typer.Option(min=-1, max=1, help="Rows to repair, without counts.")] = 0.95,
    targets_below: Annotated[int, typer.Option(min=1, help="Rows to repair, by counts of data targets.")] = 20,
    tokenizer: common.Tokenizer = None,
    head: common.HeadKey = None,
    embedding: common.EmbeddingKey = None,
    coverage: common.Coverage = None,
    run: common.Run = None,
    data: Annotated[
        list[str] | None, typer.Option(help="echo: data files or folders to train beside, best those of the fine-tune.")
    ] = None,
    targets: Annotated[float, typer.Option(min=0.1, help="echo: times each lost token is a target.")] = _RUN.targets,
    learning_rate: Annotated[float, typer.Option(min=0, help="echo: AdamW's, linear to 0.")] = _RUN.learning_rate,
    batch: Annotated[int, typer.Option(min=1, help="echo: data rows a batch.")] = _RUN.batch,
    max_length: Annotated[int, typer.Option(min=8, help="echo: tokens of a data row.")] = _RUN.max_length,
    instruction: Annotated[
        list[str] | None, typer.Option(help="echo: a way of asking that the model knows, with one {tokens}.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text whose loss is measured before and after.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Live tokens to probe before and after; 0: all.")] = 2048,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the packaged natural text to read before and after; 0: none.")
    ] = 2048,
    ask: Annotated[bool, typer.Option(help="Load the models and measure recall and loss.")] = True,
    dtype: Dtype = "auto",
    as_json: common.AsJson = False,
) -> None:
    """Write a copy of TUNED in which lost tokens are repeated again; BASE and TUNED are only read.

    Of an adapter comes an adapter: rows are put back where it holds the whole head, else it is trained on (echo).

    Exit code 0: written; 2: bad input.
    """
    from vocabguard.compare.repair import check_out, rows_fixed, write_repaired

    _check_options(method, data, text)
    common.check_most(
        ("--strength", strength, 1), ("--cosine-below", cosine_below, 1), ("--targets", targets, common.MOST_TARGETS),
        ("--learning-rate", learning_rate, 1), ("--batch", batch, 2**16), ("--max-length", max_length, 2**20),
        ("--text-tokens", text_tokens, 10**7),
    )  # fmt: skip
    pair = common.open_pair(base, tuned, tokenizer, head, embedding, coverage, run)
    loading = common.loading(None, None, dtype)
    settings = EchoRun(
        targets, learning_rate, batch, max_length, instructions=tuple(instruction or ()), loading=loading
    )
    try:
        check_out(pair.tuned, out)
        examples, fixed = _readable(data), rows_fixed(pair.tuned)
        if fixed and method in METHODS:
            raise ValueError(f"{pair.tuned.path}: {fixed}; allowed: --method echo or auto, with --data FILE")
        found = common.measured(pair)
        choice, asked = None, None
        if method == "auto" or fixed:
            # Where no row shows what was lost, only the models themselves tell.
            choice, asked = _chosen(pair, found, sample, data, fixed, loading)
            method = choice["method"]
        plan, lost = _planned(found, asked if method == "echo" else None, method, fixed, cosine_below, targets_below,
                              strength)  # fmt: skip
        told: dict[str, Any] = {"out": str(out), "method": method, "rows": len(plan.ids), "chosen_by": plan.chosen_by}
        told |= {} if choice is None else {"choice": choice}
        if method == "echo":
            told["echo"] = _echoed(pair, found, plan, examples, settings, out)
        else:
            with common.working(f"writing {out}"):
                write_repaired(pair.tuned, plan, out)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    with common.working("asking the base, the tuned and the repaired model"):
        told |= (
            _measured(found, pair.tokenizer, lost, out, text, sample, text_tokens, loading)
            if ask
            else {"not_measured": "--no-ask was given"}
        )
    if as_json:
        print(json.dumps(told, ensure_ascii=False, allow_nan=False))
    else:
        _show(told)
        probe = command("vocabguard", "probe", out, base)
        common.show_next([Next("Ask the repaired model for its tokens", probe)])


def _check_options(method: str, data: list[str] | None, text: Path | None) -> None:
    if method not in _ALLOWED:
        raise InputError(f"--method is {method!r}; allowed: {', '.join(_ALLOWED)}")
    if method != "auto" and (method == "echo") != bool(data):
        raise InputError("--method echo needs --data FILE to train beside, and only echo takes it")
    if text is not None and not text.is_file():
        raise InputError(f"--text {text}: not found")


def _planned(
    found: Scan, asked: Tensor | None, method: str, fixed: str, cosine_below: float, targets_below: int,
    strength: float,
) -> tuple[Plan, Tensor]:  # fmt: skip
    """What is put right, and (V,) bool the tokens that it is about.

    Args:
        asked: (V,) bool, tokens that the probe found lost; None where it is not asked.
        fixed: why no row can be replaced, empty where one can.
    """
    from vocabguard.compare.repair import Plan, lost_rows, plan_repair

    if fixed and asked is not None:
        return Plan(asked.nonzero().flatten(), None, "tokens that the probe found lost"), asked
    lost, rule = lost_rows(found, cosine_below, targets_below)
    if asked is not None:
        # What was lost in the body has rows that stand still.
        lost, rule = lost | asked, f"{rule}, or lost by the probe"
    return plan_repair(found, lost, rule, "rows" if method == "rows" else "shift", strength), lost


def _chosen(
    pair: common.Pair, found: Scan, sample: int, data: list[str] | None, fixed: str, loading: Loading
) -> tuple[dict[str, Any], Tensor | None]:
    """The method that brings most back, by what the base's rows bring back of a sample of lost tokens, and why.

    Args:
        fixed: why no row can be replaced, empty where one can.

    Returns:
        ``method``, ``where``, ``rows_bring_back`` (share, low and high; None where nothing was asked again) and
        ``because``; and (V,) bool, the tokens that the probe found lost.

    Raises:
        ValueError: where it is echo, and there is no data to train beside; or where there is nothing to do.
    """
    options = Asking(sample=min(sample, _CHOOSE) or _CHOOSE, text_tokens=0, loading=loading)
    asked = ask_both(pair, found, options)
    counts, missing = asked.where, asked.vectors()["lost"]
    if fixed:
        if not bool(missing.any()):
            raise ValueError(f"{pair.tuned.path}: the probe found no lost token, of {len(asked.plan.ids):,}: {fixed}")
        told = _choice("echo", counts, f"{fixed}; it is trained on as an adapter")
    elif counts is None or not counts["forgotten"]:
        return _choice("shift", counts, "the probe found no lost token, so only rows are put right"), None
    elif 2 * (counts["head"] + counts["other_rows"]) >= counts["forgotten"]:
        return _choice("shift", counts, "output rows bring at least half of them back, which takes no training"), None
    else:
        told = _choice("echo", counts, "output rows bring fewer than half of them back: rows alone will not do")
    if not data:
        raise ValueError(f"{told['because']}: --method auto needs --data FILE here, to train beside")
    return told, missing


def _choice(method: str, where: Mapping[str, int] | None, because: str) -> dict[str, Any]:
    """Why a method was chosen. Of the tokens asked again, output rows bring back `head` and `other_rows`."""
    told: dict[str, Any] = {"method": method, "where": None if where is None else dict(where), "rows_bring_back": None}
    if where is None or not where["forgotten"]:
        return told | {"because": because}
    count, total = where["head"] + where["other_rows"], where["forgotten"]
    low, high = wilson(count, total, z_of_look(1))
    told["rows_bring_back"] = [count / total, low, high]
    by_rows = f"Output rows of the base bring back {percent(count / total)} ({percent(low)} to {percent(high)})"
    return told | {"because": f"{where_sentence(where)} {by_rows}: {because}"}


def _readable(data: list[str] | None) -> Iterator[Example]:
    """The examples; data that cannot be read is refused now, before the models are measured."""
    from vocabguard.data.readers import data_files, read_examples

    examples = read_examples(data_files(data)) if data else iter(())
    return chain(list(islice(examples, 1)), examples)


def _echoed(
    pair: common.Pair, found: Scan, plan: Plan, examples: Iterator[Example], run: EchoRun, out: Path
) -> dict[str, Any]:
    """Train and write; what was done.

    Raises:
        ValueError: if there is nothing to echo or no tokenizer, or for what the parts refuse.
    """
    if pair.tokenizer is None:
        raise ValueError("--method echo needs a tokenizer; allowed: --tokenizer FOLDER")
    if len(plan.ids) == 0:
        raise ValueError(f"there is nothing to repair: no {plan.chosen_by}")
    live = int(found.live.sum())
    rows = data_rows(examples, pair.tokenizer, run.targets * live, run.max_length)
    with common.progress_bars(TimeRemainingColumn()) as tell:
        model, told = train_echo(
            pair.tuned.path, plan, live, rows, pair.tokenizer, run, partial(tell, "echo"), pair.base.path
        )
    write_trained(model, pair.tuned.path, out)
    return told


def _measured(
    found: Scan,
    tokenizer: Any,
    lost: Tensor,
    out: Path,
    text: Path | None,
    sample: int,
    text_tokens: int,
    loading: Loading,
) -> dict[str, Any]:
    """Recall and loss of the base, the tuned and the repaired model, or why they were not measured."""
    from vocabguard.compare.models import load_model
    from vocabguard.compare.repair import recall_of, text_windows
    from vocabguard.guard.reference import reference_texts, windows_of

    if tokenizer is None:
        return {"not_measured": "there is no tokenizer to write prompts with"}
    paths = {"base": found.base.path, "tuned": found.tuned.path, "repaired": out}
    told: dict[str, Any] = {}
    try:
        models: dict[str, nn.Module] = {
            name: load_model(path, loading, base=found.base.path)
            for name, path in paths.items()
            if name != "base" or found.match.by == "id"
        }
        if "base" in models:
            told["recall"] = recall_of(models, found, common.ways_of_asking(tokenizer), lost, sample)
        if text is not None:
            windows = text_windows(tokenizer, text)
            told["loss"], told["loss_change"] = _losses(models, windows)
        if text_tokens:
            config = ReferenceConfig(max_tokens=text_tokens)
            windows = windows_of(models["tuned"], tokenizer, reference_texts(config), config)
            loss, change = _losses(models, windows)
            told["reference"] = {"tokens": int(windows.measured.sum()), "loss": loss, "loss_change": change}
    except ValueError as error:
        return told | {"not_measured": str(error)}
    return told if told else {"not_measured": "the base has another vocabulary, so both cannot be probed alike"}


def _losses(models: Mapping[str, nn.Module], windows: Windows) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean loss of each model, and how it changes from one to the next, with intervals."""
    from vocabguard.compare.repair import loss_changes, mean_loss
    from vocabguard.measure.reference import token_nll

    nll = {name: token_nll(model, windows, batch_tokens=_BATCH) for name, model in models.items()}
    return {name: mean_loss(windows, one) for name, one in nll.items()}, loss_changes(windows, nll)


def _show(told: Mapping[str, Any]) -> None:
    said = [f"method {told['method']}: {told['choice']['because']}"] if "choice" in told else []
    said += [f"{told['rows']:,} output rows replaced ({told['chosen_by']}; method {told['method']}): {told['out']}"]
    echo, recall, loss = told.get("echo"), told.get("recall"), told.get("loss")
    if echo:
        said.append(
            f"fine-tuned {echo['steps']:,} steps: {echo['echo_targets']:,} echo targets beside "
            f"{echo['data_targets']:,} of the data, {echo['seconds']:.0f} s; input embedding {echo['input_embedding']}"
        )
    if recall:
        said.append(
            f"recall of {recall['said_at_base']:,} tokens that the base says: tuned {_with_interval(recall, 'tuned')}, "
            f"repaired {_with_interval(recall, 'repaired')}; {_returned(recall)}"
        )
    if loss:
        change = loss["repaired"] / loss["tuned"] - 1
        said.append(
            f"loss on the text: tuned {number(loss['tuned'])}, repaired {number(loss['repaired'])} "
            f"({100 * change:+.2f} %, {_nats(told['loss_change'], 'repaired_from_tuned')})"
        )
    if "reference" in told:
        said.append(_reference_sentence(told["reference"]))
    if "not_measured" in told:
        said.append(f"Not measured: {told['not_measured']}.")
    for line in said:
        Console(highlight=False, markup=False, soft_wrap=True).print(line)


def _with_interval(recall: Mapping[str, Any], name: str) -> str:
    return f"{percent(recall[name])} ({percent(recall[f'{name}_low'])} to {percent(recall[f'{name}_high'])})"


def _returned(recall: Mapping[str, Any]) -> str:
    """The share of the loss that came back; with its interval, where something was lost."""
    said = f"{percent(recall['returned'])} of the loss returned"
    if recall["returned"] is None:
        return said
    return f"{said} ({percent(recall['returned_low'])} to {percent(recall['returned_high'])})"


def _reference_sentence(told: Mapping[str, Any]) -> str:
    steps = {"tuned_from_base": "tuned over base", "repaired_from_base": "repaired over base",
             "repaired_from_tuned": "repaired over tuned"}  # fmt: skip
    parts = [f"{words} {_nats(told['loss_change'], key)}" for key, words in steps.items() if key in told["loss_change"]]
    return f"loss of natural text ({told['tokens']:,} tokens): {', '.join(parts)}"


def _nats(changes: Mapping[str, Any], key: str) -> str:
    """A change in nats a token, with its interval where there are windows enough for one."""
    one = changes[key]
    ends = "" if one["low"] is None else f" ({one['low']:+.3f} to {one['high']:+.3f})"
    return f"{one['mean']:+.3f} nats a token{ends}"
