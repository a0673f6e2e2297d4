"""What the guard finds, as frozen dataclasses of CPU tensors. No logic lives here.

``V`` is the number of rows of a vocabulary matrix, which may exceed the tokenizer's length (padded rows).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


class VocabGuardError(Exception):
    """Base of the errors that this package raises on purpose, for callers that catch them all.

    Each is a `ValueError` or a `RuntimeError` too.

    >>> from vocabguard import VocabGuardError, load_config
    >>> try:
    ...     load_config({"drift": {"every_n_steps": 0}})
    ... except VocabGuardError as error:
    ...     print(error)
    drift.every_n_steps is 0; allowed: at least 1
    """


TELLING = (
    "probe/retained", "head/below_0.95", "head/cosine_mean", "exposure/never", "reference/rare_rise",
    "forecast/below_0.95",
)  # fmt: skip
"""Logged keys that a notebook shows of a check, as far as it has them."""


def printable(text: str) -> str:
    """A token's text without what a page cannot hold: halves of surrogate pairs and control characters are escapes.

    >>> printable("a\\n"), printable("\\udc80")
    ('a\\\\n', '\\\\udc80')
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def facts_html(title: str, facts: Mapping[str, str], scalars: Mapping[str, float | None]) -> str:
    """A small table for a notebook: facts, then the telling ones of the logged keys. All of it is escaped.

    >>> facts_html("RunLog", {"folder": "a<b"}, {})
    '<table><caption>RunLog</caption><tr><th>folder</th><td>a&lt;b</td></tr></table>'
    """
    known = {key: scalars.get(f"vocabguard/{key}") for key in TELLING}
    shown = {**facts, **{key: f"{value:.4g}" for key, value in known.items() if value is not None}}
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in shown.items())
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


@dataclass(frozen=True)
class AlertStory:
    """What a person needs to know about an alert, with numbers; a sentence that has nothing to say is empty.

    Attributes:
        what: what is happening.
        where: in which parts and how much of each, worst first.
        rows: live rows concerned; None where the alert is not about rows.
        share: the same as a share in [0, 1] of the live rows that the rule looks at; None as `rows`.
        tokens: the worst tokens by text, at most five, worst first.
        since: when it began.
        outlook: what the end of the run will bring if nothing is done.
        advice: what to do about it, a sentence each.
    """

    what: str = ""
    where: str = ""
    rows: int | None = None
    share: float | None = None
    tokens: tuple[str, ...] = ()
    since: str = ""
    outlook: str = ""
    advice: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """All that is said, a line each."""
        worst = f"Worst: {'  '.join(self.tokens)}" if self.tokens else ""
        said = (self.what, self.where, worst, self.since, self.outlook)
        return tuple(line for line in (*said, *(f"To do: {advice}" for advice in self.advice)) if line)


@dataclass(frozen=True)
class Transition:
    """One change of an alert's state, or news of one that fires on.

    Attributes:
        rule: the rule's name.
        state: the state entered.
        level: ``info``, ``warning`` or ``critical``.
        metric: the logged key; of a rule over parts, with ``*`` in the part's place.
        value: what the rule compares: the key's value, its change, or that of the worst part; NaN where it is missing.
        step: the optimizer step.
        message: one sentence for a person.
        since: optimizer step at which the trouble began.
        again: whether the rule has fired before and is told once more: parts have joined, or a reminder was due.
        parts: of a rule over parts, the value of each part that fires, worst first.
        story: the whole of it for a person; None in runs of earlier versions and where a rule resolves.
    """

    rule: str
    state: Literal["firing", "resolved"]
    level: str
    metric: str
    value: float
    step: int
    message: str
    since: int | None = None
    again: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)
    story: AlertStory | None = None


def as_transition(line: Mapping[str, Any]) -> Transition:
    """A line of a log as a transition; earlier versions wrote fewer fields, later ones may write more.

    Args:
        line: a JSON object of ``alerts.jsonl``; None stands for NaN.

    Raises:
        KeyError: without a ``value``.
        TypeError: without a field that has always been written.
    """
    values: dict[str, Any] = {spec.name: line[spec.name] for spec in fields(Transition) if spec.name in line}
    values["value"] = math.nan if line["value"] is None else line["value"]
    parts = line.get("parts") or {}
    values["parts"] = {part: math.nan if value is None else value for part, value in parts.items()}
    if told := line.get("story"):
        known = {spec.name: told[spec.name] for spec in fields(AlertStory) if spec.name in told}
        lists: dict[str, Any] = {key: tuple(known.pop(key)) for key in ("tokens", "advice") if key in known}
        values["story"] = AlertStory(**known, **lists)
    return Transition(**values)


DEGRADED = 0.95
"""Cosine below which a row counts as degraded."""

AT_RISK = 0.5
"""Chance of ending degraded from which on a row counts as at risk."""


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run so far and to come.

    Attributes:
        step: optimizer steps done.
        total: planned optimizer steps.
        sum_past: learning rates of the steps done, summed.
        square_past: their squares, summed.
        sum_left: the same of the steps to come.
        square_left: the same of the steps to come.
        optimizer: ``adam`` for those that divide by the root of a second moment, ``sgd`` for those that do not.
        memory: steps over which the second moment is averaged, 1 / (1 - beta2); 0 for ``sgd``.
    """

    step: int
    total: int
    sum_past: float
    square_past: float
    sum_left: float
    square_left: float
    optimizer: str
    memory: float


@dataclass(frozen=True)
class Forecast:
    """Where the rows will be at the end of the run, if nothing is done. NaN for bad rows.

    Attributes:
        step: the optimizer step at which it was made; 0 is before the first.
        total: planned optimizer steps.
        cosine: (V,) float32 in [-1, 1], the median.
        low: (V,) float32, 5 % quantile.
        high: (V,) float32, 95 % quantile.
        chance: (V,) float32 in [0, 1], that the cosine ends below `DEGRADED`.
    """

    step: int
    total: int
    cosine: Tensor
    low: Tensor
    high: Tensor
    chance: Tensor

    @property
    def at_risk(self) -> Tensor:
        """(V,) bool, chance of at least `AT_RISK`."""
        return self.chance >= AT_RISK


EXPOSURE_CLASSES = ("never", "1-4", "5-19", "20+")
"""Exposure classes of a token, by its data targets so far; the index is the value in ``classes`` vectors."""
EVERYDAY_QUESTIONS = 16
"""How many answers ``echo/copies`` is a share of."""

MatrixName = Literal["head", "embedding"]


@dataclass(frozen=True)
class NotApplicable:
    """A measurement that has no meaning here.

    Attributes:
        reason: one sentence for the user.
    """

    reason: str


@dataclass(frozen=True)
class RowProducts:
    """Inner products of every row with its baseline row.

    Attributes:
        base_sq: (V,) float32, squared norm of the baseline row.
        dot: (V,) float32, baseline row times row.
        now_sq: (V,) float32, squared norm of the row.
        bad: (V,) bool, the row or its baseline holds NaN or Inf, or has no baseline.
    """

    base_sq: Tensor
    dot: Tensor
    now_sq: Tensor
    bad: Tensor


@dataclass(frozen=True)
class RowDrift:
    """How far each row has moved from its baseline. NaN where the row is bad or, for the ratios, of zero norm.

    Attributes:
        cosine: (V,) float32 in [-1, 1].
        residual: (V,) float32 in [-1, 1], cosine after taking off the mean displacement of the unexposed rows.
        l2: (V,) float32 >= 0, length of the displacement.
        norm_ratio: (V,) float32 >= 0, norm now over norm at the baseline.
        bad: (V,) bool, NaN or Inf in the row or its baseline, or no baseline row.
        zero: (V,) bool, the row or its baseline has zero norm.
    """

    cosine: Tensor
    residual: Tensor
    l2: Tensor
    norm_ratio: Tensor
    bad: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Exposure:
    """What the training data and the gradient did to each row so far.

    Attributes:
        inputs: (V,) int64, times the token was an input of the data.
        data_target: (V,) int64, times the token was a target of the data.
        echo_target: (V,) int64, times the token was a target of an echo row.
        last_target: (V,) int64, optimizer step in which it last was a target, data or echo; -1 if never.
        pull: (V,) float32, sum over all steps in which the row was a target of its gradient's L2 norm. NaN, as push and
            input_only, where the head's rows have no gradient: a frozen head, or one whose rows an adapter makes.
        push: (V,) float32, sum over the sampled steps in which it was neither target nor, with tied weights, input.
        input_only: (V,) float32, the same for sampled steps in which it was an input and no target (tied weights only).
        push_samples: number of steps at which push was sampled.
        push_share: share in [0, 1] of the last sampled step's row-gradient norms that is push; NaN before the first.
        steps: optimizer steps observed.
    """

    inputs: Tensor
    data_target: Tensor
    echo_target: Tensor
    last_target: Tensor
    pull: Tensor
    push: Tensor
    input_only: Tensor
    push_samples: int
    push_share: float
    steps: int


@dataclass(frozen=True)
class ProbeResult:
    """What a model says when asked to repeat tokens, teacher-forced, in C asks.

    An ask is a context, or one that was used before, among other neighbours.

    Attributes:
        contexts: the C asks' names.
        ids: (n,) int64, the probed tokens.
        emitted: (n, C) bool, the token was the most likely one.
        probability: (n, C) float32 in [0, 1], of the token.
        rank: (n, C) int64 >= 0, of the token's logit; 0 is the most likely.
        instead: (n, C) int64, the most likely token (equal to the id where it was emitted).
    """

    contexts: tuple[str, ...]
    ids: Tensor
    emitted: Tensor
    probability: Tensor
    rank: Tensor
    instead: Tensor


AGREEMENT = 0.3
"""Correlation with what the probe measured from which on a `Recall` ranks tokens."""


@dataclass(frozen=True)
class Recall:
    """How likely every token would be repeated, estimated from what the probe measured on some.

    Attributes:
        nats: (V,) float32 <= 0, estimated mean log-probability where the token is the target; NaN where unknown.
        agreement: correlation in [-1, 1] of the estimate with what the probe measured, of tokens left out of the fit.
        taught: probed tokens that it was fitted on.
    """

    nats: Tensor
    agreement: float
    taught: int

    @property
    def ranks(self) -> bool:
        """Whether it holds for tokens that were left out, and so may say which are worst."""
        return self.agreement >= AGREEMENT


@dataclass(frozen=True)
class Preflight:
    """Targets counted over a sample of the training data before step 1.

    Attributes:
        data_target: (V,) int64.
        batches: batches read.
        rows: examples read.
        complete: whether that was all of the data (one epoch).
        seconds: how long it took.
        tokens: inputs read, padding too; 0 where that is not known.
    """

    data_target: Tensor
    batches: int
    rows: int
    complete: bool
    seconds: float
    tokens: int = 0


@dataclass(frozen=True)
class TokenReport:
    """One line of the table of worst tokens.

    Attributes:
        id: token id.
        text: what the token decodes to, or its piece.
        group: its script group.
        exposure_class: one of `EXPOSURE_CLASSES`.
        cosine: head row against its baseline (of the embedding row where there is no head).
        residual: residual cosine of the same row.
        data_target: data targets so far.
        inputs: data inputs so far.
        steps_since_target: optimizer steps since it last was a target; None if it never was.
        probability: mean over contexts of the last probe; None if not probed.
        said_instead: text the model says in its place; None if not probed or said right.
        recall: estimated mean log-probability where it is the target, in nats; None where nothing is estimated.
    """

    id: int
    text: str
    group: str
    exposure_class: str
    cosine: float
    residual: float
    data_target: int
    inputs: int
    steps_since_target: int | None
    probability: float | None
    said_instead: str | None
    recall: float | None = None


@dataclass(frozen=True)
class EchoPlan:
    """Which tokens are echoed, and how many a batch, until the next plan holds.

    Attributes:
        version: 0, 1, 2, ... in the order in which plans were made.
        first_batch: number of the first training batch that it holds for, counted over the run from 0.
        mode: ``uniform``, ``balanced``, ``least_exposed``, ``recall`` or ``watch``.
        dose: echo targets per data target that it aims at; 0 is off.
        rate: echo targets a batch and process.
        list_tokens: tokens that a batch gets together: a list, or as many as fill a row of the batch.
        ids: (m,) int64, taken in turn: shuffled anew at each pass, or in the order of their need.
        cycle: version of the plan that brought `ids`; a part of the shuffles' seed.
        offset: place in the stream of passes at `first_batch`.
        owed: echo targets, at most `list_tokens`, that the plan before still owed each process.
        seed: of the shuffles and of the ways of asking.
    """

    version: int
    first_batch: int
    mode: Literal["uniform", "balanced", "least_exposed", "recall", "watch"]
    dose: float
    rate: float
    list_tokens: int
    ids: Tensor
    cycle: int
    offset: int
    owed: float
    seed: int


@dataclass(frozen=True)
class EchoReport:
    """What echo has done so far.

    Attributes:
        plan: the newest plan; None before the first.
        on: whether echo is switched on.
        targets: echo targets so far, all processes.
        by_group: the same by script group.
        by_class: the same by exposure class.
        seconds: time that making rows has taken, in this process and its workers.
    """

    plan: EchoPlan | None
    on: bool
    targets: int
    by_group: Mapping[str, int]
    by_class: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Finding:
    """Something found beside the checks.

    Attributes:
        kind: ``confusion``, ``neighbors`` or ``head_or_body``.
        step: the optimizer step.
        lines: what the run log keeps, a line each.
        sentence: for a person.
        table: the same in Markdown; empty where the sentence says it all.
        scalars: flat logged keys (``vocabguard/...``) and values.
        transitions: alerts that changed state by it.
    """

    kind: str
    step: int
    lines: tuple[Mapping[str, object], ...]
    sentence: str
    table: str = ""
    scalars: Mapping[str, float] = field(default_factory=dict)
    transitions: tuple[Transition, ...] = ()


@dataclass(frozen=True)
class CheckResult:
    """Everything one check found.

    Attributes:
        step: the optimizer step.
        head: drift of the output rows, or why there is none.
        embedding: drift of the input rows, or why there is none.
        exposure: counts and gradients so far, or why there are none.
        classes: (V,) uint8, index into `EXPOSURE_CLASSES`.
        probe: the probe run at this check, if one was due.
        base_probe: the probe at the base that it is held against; None where there is no probe.
        scalars: flat logged keys (``vocabguard/...``) and values.
        transitions: alerts that changed state.
        firing: names of the rules that fire after this check.
        requests: what rules that began to fire ask of the trainer: ``checkpoint``, ``stop``.
        worst: the worst live tokens, worst first.
        watched: the tokens of the watch list.
        seconds: what the check took.
        probe_seconds: the part of them that the probe took.
        recall: the estimate of the latest probe, which may be of an earlier check; None where there is none.
        echo: what echo has done so far; None where it is not configured.
        findings: what was found beside, where that is due at checks.
        forecast: where the head's rows will end, or why nothing is said.

    Example:
        >>> import torch
        >>> off = NotApplicable("the head is frozen")
        >>> found = CheckResult(20, off, off, off, torch.zeros(4).byte(), None, {"vocabguard/overhead": 0.01})
        >>> found.scalars["vocabguard/overhead"], found.firing, found.head.reason
        (0.01, (), 'the head is frozen')
    """

    step: int
    head: RowDrift | NotApplicable
    embedding: RowDrift | NotApplicable
    exposure: Exposure | NotApplicable
    classes: Tensor
    probe: ProbeResult | None
    scalars: Mapping[str, float]
    transitions: tuple[Transition, ...] = ()
    firing: tuple[str, ...] = ()
    worst: tuple[TokenReport, ...] = ()
    watched: tuple[TokenReport, ...] = ()
    seconds: float = 0.0
    echo: EchoReport | None = None
    base_probe: ProbeResult | None = None
    findings: tuple[Finding, ...] = ()
    requests: tuple[str, ...] = ()
    forecast: Forecast | NotApplicable = NotApplicable("nothing was forecast")
    probe_seconds: float = 0.0
    recall: Recall | None = None

    def _repr_html_(self) -> str:
        """What a notebook shows: step, alerts, worst tokens and the telling keys."""
        facts = {"step": f"{self.step:,}", "firing": ", ".join(self.firing) or "none"}
        if self.worst:
            facts["worst tokens"] = "  ".join(printable(token.text) for token in self.worst[:10])
        return facts_html("CheckResult", facts, self.scalars)


@dataclass(frozen=True)
class Timings:
    """What the guard's own work has taken so far, in this process, in seconds.

    Attributes:
        total: all of it.
        check: the last check, without its probe; 0 before the first.
        probe: the last probe; 0 before the first.
        step: median training step without the guard's work; NaN before the first.
        probes: how often the model was asked.
        probing: time that asking took.
        probing_cpu: the same by the process's own clock, in which other programs do not count.
    """

    total: float
    check: float
    probe: float
    step: float
    probes: int
    probing: float
    probing_cpu: float


@dataclass(frozen=True)
class WatchedMatrix:
    """What is known about one matrix at the start.

    Attributes:
        name: ``head`` or ``embedding``.
        rows: V.
        width: elements a row.
        dtype: of the parameter, e.g. ``bfloat16``.
        tied: whether head and embedding are one parameter.
        bias: whether the head adds a bias (it is not part of a row's cosine).
        baseline: where the baseline rows are kept, in words.
    """

    name: MatrixName
    rows: int
    width: int
    dtype: str
    tied: bool
    bias: bool
    baseline: str


@dataclass(frozen=True)
class Watch:
    """What `VocabGuard.attach` set up.

    Attributes:
        head: the watched output matrix, or why it is not watched.
        embedding: the watched input matrix, or why it is not watched.
        probe: None if the probe runs, else why not.
        preflight: the counts before step 1, or why there are none.
        live: live tokens.
        never_trained: tokens told apart as never trained at the base.
        run_dir: folder of the run log, or None.
        notes: anything else the user should know.
    """

    head: WatchedMatrix | NotApplicable
    embedding: WatchedMatrix | NotApplicable
    probe: NotApplicable | None
    preflight: Preflight | NotApplicable
    live: int
    never_trained: int
    run_dir: str | None
    notes: tuple[str, ...] = field(default=())
