"""``vocabguard probe MODEL [BASE]``: did it lose tokens? Asks the models themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vocabguard.cli import asking, common
from vocabguard.cli.answers import probe_parts
from vocabguard.cli.app import InputError
from vocabguard.cli.asking import Asking, Interview
from vocabguard.cli.models import model_path
from vocabguard.cli.served import Served, probe_served, save_served
from vocabguard.compare.options import Bars
from vocabguard.files import one_line
from vocabguard.report.commands import Next, after_probe
from vocabguard.results import NotApplicable
from vocabguard.served.modes import MODES

if TYPE_CHECKING:
    from vocabguard.compare.probing import Answered, ProbePlan
    from vocabguard.compare.scan import Scan

SCHEMA = 1
"""Version of the fields that ``--json`` prints."""

_BARS = Bars()

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="The model to ask: a folder, or a PEFT adapter's folder. With --url: a file of an earlier run, as base.",
    ),
]
Against = Annotated[
    str | None,
    typer.Argument(metavar="[BASE]", help="The model before training, or a file that `vocabguard probe --out` wrote."),
]
Lost = Annotated[
    float | None,
    typer.Option(
        "--threshold", min=0.0, max=1.0,
        help="Share of the tokens that the base repeats from which the exit code is 1, if the whole interval of what "
        f"is lost lies above it; {_BARS.lost:g} if not given. Without a base: of live tokens that are not repeated, "
        "and none if not given.",
    ),
]  # fmt: skip
Rise = Annotated[
    float,
    typer.Option(
        "--threshold-loss", min=0.0,
        help="Nats a token by which natural text may have become harder to predict; exit code 1 if the whole interval "
        "lies above.",
    ),
]  # fmt: skip


def probe(
    model: Model = None,
    base: Against = None,
    sample: asking.Sample = Asking.sample,
    whole: asking.Whole = False,
    watch: asking.Watch = None,
    texts: asking.Texts = None,
    text_tokens: asking.TextTokens = Asking.text_tokens,
    coverage: common.Coverage = None,
    run: common.Run = None,
    asks: asking.Asks = Asking.asks,
    batch: asking.Batch = Asking.batch,
    seed: asking.Seed = 0,
    device: asking.Device = None,
    device_map: asking.DeviceMap = None,
    dtype: asking.Dtype = "auto",
    tokenizer: common.Tokenizer = None,
    threshold: Lost = None,
    threshold_loss: Rise = _BARS.rise,
    top: Annotated[int, typer.Option(min=0, help="Tokens in each list.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write every answer to this .safetensors file, which report, echo, replay take; with --url a JSON "
            "file, which a later run takes as its base."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask a server instead, http://HOST/v1, for words.")] = None,
    served: Annotated[str | None, typer.Option("--model", help="--url: the model's name there.")] = None,
    base_url: Annotated[str | None, typer.Option(help="--url: server of the base; the same one if not given.")] = None,
    base_model: Annotated[str | None, typer.Option(help="--url: the base's name there.")] = None,
    key_env: Annotated[
        str, typer.Option(help="--url: environment variable with the key; NAME_BASE has that of another base server.")
    ] = Served.key_env,
    ask_by: Annotated[
        str | None, common.one_of(MODES, "--url: how to ask; echo, or what the base follows better, if not given.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="--url: requests at a time.")] = Served.concurrency,
    tries: Annotated[int, typer.Option(min=1, help="--url: tries of each request.")] = Served.tries,
    timeout: Annotated[float, typer.Option(min=0.1, help="--url: seconds that an answer may take.")] = Served.timeout,
    as_json: common.AsJson = False,
) -> None:
    """Ask MODEL to repeat its tokens and to read natural text, and compare its answers with those of BASE.

    A token is lost where BASE repeats it in more than half of the asks and MODEL in fewer than half. Without BASE
    you see what MODEL repeats, which is no loss by itself.

    Exit code 0: no loss over the thresholds for sure; 1: one over, or a watched word is lost; 2: bad input.
    """
    began = time.perf_counter()
    common.check_most(("--threshold", threshold, 1), ("--threshold-loss", threshold_loss, 1e6), ("--top", top, 10**7))
    loading = common.loading(device, device_map, dtype)
    options = Asking(sample, whole, watch, texts, text_tokens, asks, batch, seed, loading)
    _check_texts(options)
    if url is not None:
        if served is None or base is not None:
            raise InputError("--url takes --model NAME, and at most one argument: a file of an earlier run")
        remote = Served(
            url, served, base_url, base_model, None if model is None else Path(model), key_env, ask_by, concurrency,
            tries, timeout,
        )  # fmt: skip
        _ask_server(remote, options, tokenizer, threshold, top, out, as_json=as_json)
        return
    if model is None or served is not None or base_url is not None or base_model is not None:
        raise InputError("allowed: a MODEL, or --url http://HOST/v1 with --model NAME")
    bars = Bars(_BARS.lost if threshold is None and base is not None else threshold, threshold_loss)
    if out is not None:
        model = model_path(model)
        base = base if base is None or is_probe_file(base) else model_path(base)
        inputs = [one for one in (watch, texts, coverage) if one is not None]
        common.check_new_file("--out", out, [*common.checkpoint_files(model, *([base] if base else [])), *inputs])
    given = {"model": model, "base": base, "tokenizer": tokenizer, "coverage": coverage, "run": run,
             "threshold": threshold, "threshold_loss": threshold_loss, "top": top}  # fmt: skip
    pair, found, asked = _asked(model, base, options, tokenizer, coverage, run)
    told = asked.told(bars, top)
    if out is not None:
        _save(pair, found, asked, told, out, given | options.given, one_sided=base is None)
    verdict = told["verdict"]
    if as_json:
        shown = {"schema": SCHEMA, "model": str(pair.tuned.path), "base": base and str(pair.base.path)}
        shown |= {key: value for key, value in told.items() if key != "plan"}
        shown |= {"thresholds": {"lost": bars.lost, "rise": bars.rise, "rare": bars.rare}, "device": asked.device,
                  "findings": bool(verdict["findings"]), "seconds": time.perf_counter() - began}  # fmt: skip
        print(json.dumps(shown, ensure_ascii=False, allow_nan=False))
    else:
        for part in [*probe_parts(told, top), Text(f"Asked on {asked.device}.")]:
            Console().print(part, highlight=False, soft_wrap=isinstance(part, Text))
        if out is not None:
            Console(markup=False).print(f"Written: {out}", highlight=False, soft_wrap=True)
        common.show_next(_next(asked, model, base, out))
    if verdict["findings"]:
        raise typer.Exit(1)


def _next(asked: Interview, model: str, base: str | None, out: Path | None) -> tuple[Next, ...]:
    """What to do after a probe."""
    if base is not None and is_probe_file(base):
        return () if out is None else after_probe(model, None, out)
    missing = asked.vectors().get("lost")
    ids = [] if missing is None else missing.nonzero().flatten().tolist()
    return after_probe(model, base, out, tokens=ids, lost=bool(ids))


def _ask_server(
    remote: Served, options: Asking, tokenizer: str | None, threshold: float | None, top: int, out: Path | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Ask over HTTP, show and keep what was found."""
    began = time.perf_counter()
    two = remote.base_url is not None or remote.base_model is not None or remote.file is not None
    bars = Bars(_BARS.lost if threshold is None and two else threshold)
    if out is not None:
        common.check_new_file("--out", out, [one for one in (options.watch, options.texts, remote.file) if one])
    told = probe_served(remote, options, bars, tokenizer, top)
    if out is not None:
        save_served(told["kept"], out)
    if as_json:
        shown = {"schema": SCHEMA, **{key: value for key, value in told.items() if key != "kept"}}
        shown |= {"thresholds": {"lost": bars.lost}, "findings": bool(told["verdict"]["findings"]),
                  "seconds": time.perf_counter() - began}  # fmt: skip
        print(json.dumps(shown, ensure_ascii=False, allow_nan=False))
    else:
        for part in probe_parts(told, top):
            Console().print(part, highlight=False, soft_wrap=isinstance(part, Text))
        if out is not None:
            Console(markup=False).print(f"Written: {out}", highlight=False, soft_wrap=True)
    if told["verdict"]["findings"]:
        raise typer.Exit(1)


def _check_texts(options: Asking) -> None:
    """Read what is small before the models are: a wrong file is refused at once."""
    _ = options.words
    if options.texts is not None and not options.texts.is_file():
        raise InputError(f"--texts {options.texts}: not found; allowed: a file of texts")
    if options.texts is not None and not options.text_tokens:
        raise InputError("--texts is given and --text-tokens is 0; allowed: one of them")


def _asked(
    model: str, base: str | None, options: Asking, tokenizer: str | None, coverage: str | None, run: str | None
) -> tuple[common.Pair, Scan, Interview]:
    """Rows and answers of both sides, or of the one that there is."""
    if base is not None and is_probe_file(base):
        return _asked_again(model, Path(base), options, tokenizer, coverage, run)
    pair = common.open_pair(_below(model) if base is None else base, model, tokenizer, coverage=coverage, run=run)
    found = common.measured(pair)
    if base is None:
        found = _alone(found)
        return pair, found, asking.ask_one(pair, found, options)
    return pair, found, asking.ask_both(pair, found, options)


def _below(model: str) -> str:
    """Where the rows of a model alone come from: its own folder, or that of the model that an adapter sits on.

    Raises:
        InputError: for an adapter whose base is not on this machine.
    """
    from vocabguard.compare.adapted import is_adapter
    from vocabguard.compare.models import base_of_adapter

    folder = Path(model)
    if not is_adapter(folder):
        return model
    try:
        return str(base_of_adapter(folder))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def _alone(found: Scan) -> Scan:
    """A scan of a model against itself, which says nothing of drift."""
    reason = NotApplicable("there is no base to hold the rows against")
    return replace(found, head=reason, embedding=reason)


def is_probe_file(path: str) -> bool:
    """Whether a file is one that `vocabguard probe --out`, or ``scan --probe --out``, wrote."""
    from safetensors import SafetensorError, safe_open

    from vocabguard.compare.summary import KINDS

    if not path.endswith(".safetensors") or not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("kind") in KINDS and "probe/ids" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return False


def _asked_again(
    model: str, file: Path, options: Asking, tokenizer: str | None, coverage: str | None, run: str | None
) -> tuple[common.Pair, Scan, Interview]:
    """Ask a model what an earlier probe asked its own, whose answers are the base's."""
    pair = common.open_pair(_below(model), model, tokenizer, coverage=coverage, run=run)
    plan, base = earlier_probe(file, pair.tokenizer)
    defaults = Asking(loading=options.loading, batch=options.batch)
    if options != defaults:
        raise InputError(
            f"{file} fixes what is asked (tokens, asks, words, texts and seed); allowed beside it: --batch, --device, "
            "--device-map, --dtype"
        )
    found = _alone(common.measured(pair))
    return pair, found, asking.ask_again(pair, found, options, plan, base)


def earlier_probe(file: Path, tokenizer: Any) -> tuple[ProbePlan, Answered]:
    """What an earlier probe asked, and what its model said.

    Raises:
        InputError: for a file without a probe, or of another tokenizer.
    """
    from vocabguard.compare.evidence import tokenizer_of, unequal
    from vocabguard.compare.probing import answers_of, plan_of_json
    from vocabguard.compare.summary import load_scan

    try:
        vectors, summary, _ = load_scan(file)
        why = unequal(summary.get("evidence") or {}, {"tokenizer": tokenizer_of(tokenizer)}, "tokenizer")
        if why:
            raise InputError(f"{file}: was measured with {why} than the model has, so their answers cannot be compared")
        plan = plan_of_json(summary["probe"]["plan"], vectors)
        return plan, answers_of(vectors, plan)
    except InputError:
        raise
    except Exception as error:  # a damaged file may hold anything
        raise InputError(
            f"{file}: holds no probe that can be read ({type(error).__name__}: {one_line(error)})"
        ) from error


def _save(
    pair: common.Pair, found: Scan, asked: Interview, told: Mapping[str, Any], out: Path, given: Mapping[str, Any], *,
    one_sided: bool,
) -> None:  # fmt: skip
    from vocabguard.compare.evidence import evidence_of
    from vocabguard.compare.summary import KINDS, save_scan, summarise_scan

    base = None if one_sided else pair.base
    whole = summarise_scan(found, top=0) | {
        "probe": told,
        "evidence": evidence_of(base, pair.tuned, pair.tokenizer, given, {"device": asked.device}),
        "one_sided": one_sided,
    }
    try:
        save_scan(found, out, whole, asked.vectors(), KINDS[1])
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise InputError(f"--out {out}: cannot be written ({one_line(error)})") from error
