"""Every setting of the guard, with its default and its range. `loading` merges sources into these and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def limited(default: Any, **limits: Any) -> Any:
    """A field with its limits, or its items': ``at_least``, ``at_most``, ``choices``, ``holds`` (a text's one mark).

    >>> @dataclass
    ... class Section:
    ...     share: float = limited(0.5, at_least=0.0, at_most=1.0)
    >>> Section().share, dict(Section.__dataclass_fields__["share"].metadata)
    (0.5, {'at_least': 0.0, 'at_most': 1.0})
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class AutoDoseConfig:
    """A dose that follows the probe: up by half while recall suffers, down by a fifth while it does not.

    Attributes:
        enabled: whether to adjust the dose at each probe, starting from `echo.dose`.
        tolerated: rise of the probe's loss over the base's, in nats, up to which the dose is not raised.
        least: smallest dose.
        most: largest dose.
    """

    enabled: bool = False
    tolerated: float = limited(0.05, at_least=0.0)
    least: float = limited(0.01, at_least=0.0)
    most: float = limited(0.5, at_least=0.0)


_INSTRUCTIONS = [
    "Repeat this: {tokens}",
    "Please repeat the following text exactly as it is:\n{tokens}",
    "{tokens}\nPlease repeat the above.",
    "{tokens}\n\nCopy the text above, word for word.",
    "Copy exactly: {tokens}",
    "Say this once more: {tokens}",
    "Write {tokens} again, without changing anything.",
    "Echo the following back to me: {tokens}",
    "I wrote {tokens}. What did I write?",
    "Here is a list: {tokens}\nWrite the same list again.",
    "Wiederhole den folgenden Text genau: {tokens}",
    "Répète exactement ce texte : {tokens}",
    "Repite esto: {tokens}",
    "Повтори: {tokens}",
    "请重复：{tokens}",
    "繰り返してください: {tokens}",
    "다음 텍스트를 그대로 반복하세요: {tokens}",
    "كرر النص التالي كما هو: {tokens}",
]


@dataclass
class EchoConfig:
    """Echo rows: lists of live tokens that the model is asked to repeat, added to training batches.

    Attributes:
        enabled: whether echo rows come from the first batch on; false waits for a rule with the action ``echo``.
        armed: whether `VocabGuard.switch` may switch it on though no rule names it.
        mode: ``uniform`` takes every live token in turn; ``balanced`` too, but those that were a target 1 to 19
            times `boost` times as often: hold does not cover them, and the data alone does not keep them;
            ``least_exposed`` takes those first that were a target least often; ``recall`` draws the quarter of lowest
            estimated recall `boost` times as often; ``watch`` takes the tokens of `probe.watch`.
        boost: turns of such a token for one of any other, with ``balanced`` and ``recall``.
        dose: echo targets per data target.
        targets_per_live_token: echo targets that each live token gets over the planned run, instead of `dose`.
        dose_limit: most echo targets per data target in any batch: a short run over a large vocabulary would be nothing
            but echo. (A dose of less than a list a batch gives whole lists now and then.)
        list_tokens: tokens in a list.
        fill: share of the batch's length from which an echo row gets no further list; 1 packs as many as fit.
        exclude: tokens never echoed: ids, texts that are one token, ``re:`` patterns searched for in a token's text.
        instructions: instructions, each with one ``{tokens}``.
        prefetch: batches that a dataloader may have made beyond the one in training; null asks the dataloader.
    """

    enabled: bool = False
    armed: bool = False
    mode: str = limited("uniform", choices=("uniform", "balanced", "least_exposed", "recall", "watch"))
    boost: float = limited(3.0, at_least=0.0)
    dose: float = limited(0.1, at_least=0.0, at_most=100.0)
    targets_per_live_token: float | None = limited(None, at_least=0.0, at_most=1e6)
    dose_limit: float = limited(1.0, at_least=0.0)
    auto: AutoDoseConfig = field(default_factory=AutoDoseConfig)
    list_tokens: int = limited(16, at_least=1)
    fill: float = limited(0.4, at_least=0.0, at_most=1.0)
    exclude: list[Any] = limited([])
    instructions: list[str] = limited(_INSTRUCTIONS, holds="{tokens}")
    prefetch: int | None = limited(None, at_least=0)


@dataclass
class HoldConfig:
    """Output rows of tokens that were never a target keep still. Needs no data of its own.

    Attributes:
        enabled: whether rows are held from the first step on; false waits for a rule with the action ``hold``.
        armed: whether `VocabGuard.switch` may switch it on though no rule names it.
        mode: ``freeze`` puts such rows back after each step, ``shared`` moves them by their common mean only.
        window_steps: hold rows that were no data target for this many steps; null holds those that never were one.
        anchor: where the rows before a step are kept: ``device`` (beside the weights: the memory of one more output
            matrix), or ``host`` (each step moves the matrix there and back).
    """

    enabled: bool = False
    armed: bool = False
    mode: str = limited("shared", choices=("freeze", "shared"))
    window_steps: int | None = limited(None, at_least=1)
    anchor: str = limited("device", choices=("device", "host"))


@dataclass
class RuleConfig:
    """One alert rule; its name is its key. See `vocabguard.alerts.AlertRule` for every field.

    Among the `actions`, ``log`` tells the logger, ``echo`` and ``hold`` switch these on while the rule fires,
    ``checkpoint`` and ``stop`` are asked of the trainer once, when it begins to fire; other names stand for callables.
    """

    metric: str = "???"
    op: str = limited(">", choices=(">", ">=", "<", "<=", "absent", "unchanged"))
    threshold: float = 0.0
    for_checks: int = limited(1, at_least=1)
    resolve_at: float | None = None
    cooldown_steps: int = limited(0, at_least=0)
    level: str = limited("warning", choices=("info", "warning", "critical"))
    actions: list[str] = limited(["log"])
    enabled: bool = True
    change: str | None = limited(None, choices=("ratio", "difference"))
    over_checks: int = limited(1, at_least=1)
    floor: float | None = None
    min_rows: int = limited(0, at_least=0)
    retell_steps: int = limited(0, at_least=0)
    remind_steps: int = limited(0, at_least=0)
    latch: bool = False


def default_rules() -> dict[str, RuleConfig]:
    """The rules of every run; each can be changed or switched off by its name.

    A `resolve_at` some way back from the threshold keeps a value that wavers about it from flapping.

    >>> {name: rule.threshold for name, rule in default_rules().items() if rule.level == "critical"}
    {'head_severe': 0.02, 'tokens_forgotten': 0.98, 'watched_forgotten': 1.0, 'broken_rows': 0.0}
    """
    return {
        "at_risk": RuleConfig("forecast/below_0.95", ">", 0.02, resolve_at=0.016),
        "head_degraded": RuleConfig("head/below_0.95", ">", 0.01, resolve_at=0.008),
        "head_severe": RuleConfig("head/below_0.90", ">", 0.02, resolve_at=0.016, level="critical"),
        "group_degraded": RuleConfig("head/*/below_0.95", ">", 0.1, resolve_at=0.08, min_rows=20, retell_steps=100),
        "tokens_forgotten": RuleConfig("probe/tokens_retained_high", "<", 0.98, resolve_at=0.99, level="critical"),
        "skill_lost": RuleConfig("probe/skill_high", "<", 0.8, resolve_at=0.9),
        "watched_forgotten": RuleConfig("probe/watch", "<", 1.0, level="critical"),
        # SmolLM2 at 20, 50 and 100 % of its runs (tests/benchmarks/real/reference.json): 0.3 to 2.7 in fine-tunes at
        # 1e-3 that lose tokens, -0.1 to 0.3 with `protect` and a falling rate, 0 and less at 1e-4 and with LoRA.
        "rare_loss": RuleConfig("reference/rare_rise_low", ">", 0.4, resolve_at=0.3),
        "broken_rows": RuleConfig("head/nonfinite_rows", ">", 0.0, level="critical"),
        "no_targets": RuleConfig("exposure/targets", "unchanged"),
    }


@dataclass
class WebhookConfig:
    """Alert notifications as JSON, by HTTP POST.

    Attributes:
        url: receiver; null sends none. Only its host is written to the run folder.
        url_env: name of the environment variable that holds the URL, instead.
        timeout: most seconds for connecting, and for each answer.
        retries: times that a notification is sent again after no answer, or after 408, 425, 429 or 5xx.
        backoff: seconds before the first retry, doubled each time.
        format: ``json`` has every field, and all of it as ``text``; ``slack`` and ``discord`` are what these take;
            ``auto`` goes by the address.
    """

    url: str | None = None
    url_env: str | None = None
    timeout: float = limited(5.0, at_least=0.01)
    retries: int = limited(4, at_least=0, at_most=20)
    backoff: float = limited(1.0, at_least=0.0)
    format: str = limited("auto", choices=("auto", "json", "slack", "discord"))


@dataclass
class SinksConfig:
    """Where alert notifications go besides the log, the console, TensorBoard and the run folder.

    A thread of its own sends it, from the main process only: a receiver that is slow or gone slows no step.

    Attributes:
        least_level: lowest level of a rule whose notifications are sent.
        wandb: whether `wandb.alert` is called, if the script has an active Weights & Biases run.
        trackio: whether `trackio.alert` is called, if the script has an active Trackio run.
        waiting: most notifications waiting to be sent; further ones are dropped, and their number is logged.
        finish_seconds: most seconds that the end of a run waits for notifications not sent yet.
    """

    least_level: str = limited("warning", choices=("info", "warning", "critical"))
    webhook: WebhookConfig = field(default_factory=WebhookConfig)
    wandb: bool = True
    trackio: bool = True
    waiting: int = limited(100, at_least=1)
    finish_seconds: float = limited(10.0, at_least=0.0)


@dataclass
class MatricesConfig:
    """Where the matrices are, for models without ``get_output_embeddings`` / ``get_input_embeddings``.

    Attributes:
        head: dotted name of the module whose ``weight`` holds the output rows; null asks the model.
        embedding: the same for the input rows.
    """

    head: str | None = None
    embedding: str | None = None


@dataclass
class DriftConfig:
    """Row drift.

    Attributes:
        every_n_steps: optimizer steps between checks; null chooses it after `cadence.settle_steps` from the budget.
        chunk_rows: rows read at a time; 256 to 1,024 are equally quick on a CPU.
    """

    every_n_steps: int | None = limited(None, at_least=1)
    chunk_rows: int = limited(1024, at_least=1)


@dataclass
class SnapshotConfig:
    """The baseline rows.

    Attributes:
        source: a checkpoint of the base model (safetensors, ``.bin``, ``.pt``, ``.ckpt``, sharded or not, or a PEFT
            adapter's folder), read by memory map; null copies the model's rows at the start.
    """

    source: str | None = None


@dataclass
class ExposureConfig:
    """Target and input counts, and row gradients.

    Attributes:
        enabled: whether targets are counted.
        prior: a file of ``vocabguard coverage --out`` about the training data, in the place of preflight's sample.
        push_every_n_steps: optimizer steps between reads of the whole gradient; 0 never.
        shift_labels: whether the model predicts ``labels[:, 1:]`` from ``inputs[:, :-1]``; null asks the model's type.
    """

    enabled: bool = True
    prior: str | None = None
    push_every_n_steps: int = limited(10, at_least=0)
    shift_labels: bool | None = None


@dataclass
class PreflightConfig:
    """Counting targets before step 1.

    Attributes:
        enabled: whether targets are counted beforehand.
        max_batches: most batches of the training data that are counted.
        max_seconds: most seconds that counting may take.
    """

    enabled: bool = True
    max_batches: int = limited(4000, at_least=1)
    max_seconds: float = limited(20.0, at_least=0.0)


@dataclass
class UntrainedConfig:
    """Rows that were never trained at the base.

    Attributes:
        enabled: whether they are detected and left out of live tokens, so that they raise no alarm.
    """

    enabled: bool = True


@dataclass
class ContextConfig:
    """One way of asking for tokens back.

    Attributes:
        text: a user's turn that shows the list at each ``{tokens}``, as in ``Repeat exactly: {tokens}``; or plain text
            with a line for each token, as in ``{token} -> {token}``.
        k: shuffled tokens in a list.
        turns: what user and assistant say in turn, up to the user's last turn, in the place of `text`.
        chat: whether `text` is a user's turn of the chat template; false: plain text, which the copy follows at once.
    """

    text: str = "{tokens}"
    k: int = limited(16, at_least=1, at_most=4096)
    turns: list[str] = limited([])
    chat: bool = True


def _again(separator: str, lead: str = "") -> ContextConfig:
    """A list, and the list again: what needs no instruction is followed by base models too."""
    return ContextConfig(lead + f"{{tokens}}{separator}" * 4, chat=False)


def _default_contexts() -> dict[str, ContextConfig]:
    """A pool: which of these a model follows differs much, and no instruction is followed by all."""
    return {
        "turns": ContextConfig(turns=["{tokens}"] * 3),
        "more_turns": ContextConfig(turns=["{tokens}"] * 5),
        "asked_turns": ContextConfig(turns=["Say this back: {tokens}", "{tokens}", "Say this back: {tokens}"]),
        "lines": _again("\n"),
        "items": _again("\n* ", "* "),
        "semicolons": _again(" ; "),
        "quotation": ContextConfig('She said: "{tokens}". He said: "{tokens}". They all said: "', chat=False),
        "pairs": ContextConfig("{token} -> {token}\n"),
        "shown": ContextConfig("{tokens}\n{tokens}\n{tokens}"),
        "list": ContextConfig("Repeat exactly: {tokens}"),
        "copy": ContextConfig("Copy the text between the lines.\n---\n{tokens}\n---"),
        "german": ContextConfig("Gib diesen Text unverändert wieder: {tokens}"),
        "spanish": ContextConfig("Vuelve a escribir este texto: {tokens}"),
        "russian": ContextConfig("Напиши этот текст ещё раз: {tokens}"),
        "chinese": ContextConfig("请原样写出以下内容：{tokens}"),
        "arabic": ContextConfig("اكتب هذا النص مرة أخرى: {tokens}"),
    }


@dataclass
class ProbeConfig:
    """Asking the model to repeat tokens.

    Attributes:
        enabled: whether the probe runs.
        every_n_steps: optimizer steps between probes; null chooses it from the budget. A probe falls on a check.
        sample: live tokens probed, stratified by group (and by preflight's class); fewer, but 128 or more, where a
            probe at the base and one at the end would take more than `budget` of the run.
        whole_vocabulary: probe every live token instead.
        watch: words probed besides, and reported by name: token ids, or texts of one or several tokens.
        contexts: name -> a way of asking. Those that the base model follows best are used; given ones replace the pool.
        asks: prompts that ask for each token in a probe, in different contexts and among different neighbours.
        batch_tokens: tokens in one forward pass of the probe.
        budget: largest share of the run's time that probes may take when the cadence is chosen.
        head_or_body: whether tokens that are lost at the end are probed once more with the base's rows.
    """

    enabled: bool = True
    every_n_steps: int | None = limited(None, at_least=1)
    sample: int = limited(512, at_least=0)
    whole_vocabulary: bool = False
    watch: list[Any] = limited([])
    contexts: dict[str, ContextConfig] = field(default_factory=_default_contexts)
    asks: int = limited(4, at_least=1, at_most=100)
    batch_tokens: int = limited(4096, at_least=1)
    budget: float = limited(0.005, at_least=0.0, at_most=1.0)
    head_or_body: bool = True


@dataclass
class ReferenceConfig:
    """Natural text that the model reads beside each probe: how likely are its tokens, now and at the base?

    Sees the body of the model too, and needs no skill of repeating.

    Attributes:
        enabled: whether it is read; null reads it where `probe.enabled`.
        texts: a file (plain text with a blank line between texts, or JSON lines with ``text``), or a list of texts;
            null takes the packaged ``reference.txt``: everyday prose in 27 languages, and code, written for this
            project and under its licence.
        max_tokens: target tokens at most; of more text, windows are taken evenly from all of it.
        window: tokens that are read together. Less where the model takes fewer.
        batch_tokens: tokens in one forward pass.
        least_targets: target tokens below which an exposure class, a script group or the watch list counts as not
            measured.
    """

    enabled: bool | None = None
    texts: Any = None
    max_tokens: int = limited(4096, at_least=1)
    window: int = limited(128, at_least=4)
    batch_tokens: int = limited(4096, at_least=1)
    least_targets: int = limited(200, at_least=1)


@dataclass
class ConfusionConfig:
    """Answers to everyday questions in many languages, generated greedily at evaluations.

    Attributes:
        enabled: whether the questions are asked.
        prompts: a YAML file of questions by language (ISO 639 codes); null takes the packaged ``prompts.yaml``.
        languages: languages to ask in; empty: all of the file.
        per_language: most questions in each language.
        allow: language -> scripts that belong in its answers beside its own, e.g. ``{ja: [], ko: [latin, zh]}``; where
            a language is not named, Latin letters do (names and loanwords).
        max_new_tokens: longest answer.
        batch_prompts: questions in one forward pass.
    """

    enabled: bool = False
    prompts: str | None = None
    languages: list[str] = limited([])
    per_language: int = limited(4, at_least=1)
    allow: dict[str, list[str]] = field(default_factory=dict)
    max_new_tokens: int = limited(32, at_least=1, at_most=4096)
    batch_prompts: int = limited(16, at_least=1)


@dataclass
class NeighborsConfig:
    """Nearest rows of the worst and the watched tokens, then and now.

    Attributes:
        k: how many rows; 0 looks at none.
        rows: worst tokens looked at, beside the watch list.
        every_n_checks: look at every n-th check; 0 only at the end.
    """

    k: int = limited(0, at_least=0, at_most=100)
    rows: int = limited(10, at_least=0, at_most=1000)
    every_n_checks: int = limited(0, at_least=0)


@dataclass
class ForecastConfig:
    """Where rows will end if nothing is done, from step 0 on.

    Attributes:
        enabled: whether each check computes it.
    """

    enabled: bool = True


@dataclass
class CadenceConfig:
    """How the cadence is chosen where it is null.

    Attributes:
        budget: largest share of the run's time that checks may take.
        settle_steps: optimizer steps timed before choosing.
        max_checks: a run is never checked more often than this many times in its planned steps.
    """

    budget: float = limited(0.005, at_least=0.0, at_most=1.0)
    settle_steps: int = limited(20, at_least=1)
    max_checks: int = limited(200, at_least=1)


def _chosen_keys() -> list[str]:
    """Logged keys that answer first questions: how far, how many, what is lost, what protects, what fires."""
    return [
        "head/below_0.95",
        "head/cosine_p01",
        "embedding/below_0.95",
        "exposure/never",
        "exposure/targets",
        "probe/retained",
        "probe/watch",
        "reference/nll_rise",
        "forecast/below_0.95",
        "echo/dose",
        "confusion/foreign",
        "alerts/firing",
    ]


@dataclass
class LogConfig:
    """Where results go.

    Attributes:
        keys: logged keys, without ``vocabguard/``, that the trackers of a Hugging Face run get and that TensorBoard
            shows under ``vocabguard/`` (the others under ``vocabguard-detail/``); ``*`` stands for any characters,
            as in ``head/*/below_0.95``, and ``all`` for every key. The run folder always has all.
        console: one line a check, tables at the start and the end (main process only).
        tensorboard: scalars, histogram, tables and alerts as text.
        histogram: the cosine histogram at checks.
        top_k: worst tokens in tables.
        rows_every_n_checks: write every row's numbers at every n-th check; 0 only at the end.
        report: write ``report.html`` into the run folder at the end.
    """

    keys: Any = field(default_factory=_chosen_keys)
    console: bool = True
    tensorboard: bool = True
    histogram: bool = True
    top_k: int = limited(20, at_least=0, at_most=1000)
    rows_every_n_checks: int = limited(0, at_least=0)
    report: bool = True


@dataclass
class GuardConfig:
    """All settings; each section's class describes its own.

    Attributes:
        alerts: rules by name.
        on_error: ``warn`` reports an internal error once, and vocabguard disables itself while training continues;
            ``raise`` raises it.
        run_dir: folder of the run log; null puts it beside the trainer's logs.
        seed: seed of the probe's and the preflight's own generators.

    Example:
        >>> config = GuardConfig(drift=DriftConfig(every_n_steps=50))
        >>> config.drift.every_n_steps, config.probe.sample, config.alerts["head_degraded"].threshold
        (50, 512, 0.01)
    """

    matrices: MatricesConfig = field(default_factory=MatricesConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    untrained: UntrainedConfig = field(default_factory=UntrainedConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    confusion: ConfusionConfig = field(default_factory=ConfusionConfig)
    neighbors: NeighborsConfig = field(default_factory=NeighborsConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    cadence: CadenceConfig = field(default_factory=CadenceConfig)
    echo: EchoConfig = field(default_factory=EchoConfig)
    hold: HoldConfig = field(default_factory=HoldConfig)
    alerts: dict[str, RuleConfig] = field(default_factory=default_rules)
    sinks: SinksConfig = field(default_factory=SinksConfig)
    log: LogConfig = field(default_factory=LogConfig)
    on_error: str = limited("warn", choices=("warn", "raise"))
    run_dir: str | None = None
    seed: int = 0
