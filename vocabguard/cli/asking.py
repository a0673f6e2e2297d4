"""Asking models of two checkpoints, or of one, as `probe` and ``scan --probe`` do: options, order, progress."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TimeRemainingColumn

from vocabguard.cli import common
from vocabguard.cli.app import InputError
from vocabguard.compare.options import Bars, Loading
from vocabguard.config import ConfigError, ProbeConfig, ReferenceConfig
from vocabguard.files import one_line, read_text
from vocabguard.results import NotApplicable, Preflight
from vocabguard.text import percent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vocabguard.compare.probing import Answered, ProbePlan, Tell
    from vocabguard.compare.scan import Scan
    from vocabguard.vocabulary.table import VocabTable

_SAY_EVERY = 30.0
_DEFAULT = ProbeConfig()
_TEXT = ReferenceConfig()
# The most that is taken.
_SAMPLE, _ASKS, _BATCH, _SEEDS, _WORDS = 10_000_000, 100, 2**24, 2**63 - 1, 10_000

Sample = Annotated[int, typer.Option(min=1, help="Live tokens to probe, drawn by script group (and exposure class).")]
Whole = Annotated[bool, typer.Option("--all", help="Probe every live token instead of a sample.")]
Watch = Annotated[Path | None, typer.Option(help="Words to probe too, a line each; a lost one is a finding.")]
Texts = Annotated[
    Path | None,
    typer.Option(
        help="Natural text to read: text with blank lines between, or JSON lines. Packaged text if not given."
    ),
]
TextTokens = Annotated[int, typer.Option(min=0, help="Tokens of the text to read; 0 reads none.")]
Asks = Annotated[int, typer.Option(min=1, help="Prompts for each token, among different neighbours.")]
Batch = Annotated[int, typer.Option(min=1, help="Tokens in one forward pass.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sample and of the lists.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, xpu.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto: spread each model over all devices (accelerate).")]
Dtype = Annotated[
    str, common.one_of(("auto", "float32", "bfloat16", "float16"), "Numbers of the weights; auto: as they are saved.")
]


@dataclass(frozen=True)
class Asking:
    """What is asked, and how.

    Attributes:
        sample: live tokens.
        whole: every live token instead.
        watch: file of words.
        texts: file of natural text; None takes the packaged one.
        text_tokens: of it; 0 reads none.
        batch: tokens in one forward pass.

    Raises:
        InputError: for a number that is too large, or a device that is not there.
    """

    sample: int = _DEFAULT.sample
    whole: bool = False
    watch: Path | None = None
    texts: Path | None = None
    text_tokens: int = _TEXT.max_tokens
    asks: int = _DEFAULT.asks
    batch: int = _DEFAULT.batch_tokens
    seed: int = 0
    loading: Loading = field(default_factory=Loading)

    def __post_init__(self) -> None:
        common.check_most(
            ("--sample", self.sample, _SAMPLE), ("--asks", self.asks, _ASKS), ("--batch", self.batch, _BATCH),
            ("--text-tokens", self.text_tokens, _SAMPLE), ("--seed", self.seed, _SEEDS),
        )  # fmt: skip

    @property
    def given(self) -> dict[str, Any]:
        """All of it as a file keeps it."""
        names = ("sample", "whole", "watch", "texts", "text_tokens", "asks", "batch", "seed")
        loading = {name: getattr(self.loading, name) for name in ("device", "device_map", "dtype")}
        return {name: getattr(self, name) for name in names} | loading

    @property
    def words(self) -> list[str]:
        """The watched words.

        Raises:
            InputError: for a file that cannot be read or holds none.
        """
        if self.watch is None:
            return []
        try:
            found = [line for line in read_text(self.watch).splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InputError(f"--watch {self.watch}: cannot be read as UTF-8 text ({error})") from error
        if not 0 < len(found) <= _WORDS:
            raise InputError(f"--watch {self.watch}: holds {len(found)} words; allowed: 1 to {_WORDS:,}, a line each")
        return found


@dataclass(frozen=True)
class Interview:
    """What both models said; without a base, the one.

    Attributes:
        table: of the tuned vocabulary.
        live: (V,) bool, what the sample was drawn from.
        where: what brings lost tokens back; None where nothing is lost or rows are not at hand.
        device: that the numbers depend on, in words.
    """

    plan: ProbePlan
    base: Answered | None
    now: Answered
    table: VocabTable
    live: Tensor
    data_target: Tensor | None
    device: str
    where: Mapping[str, int] | None = None

    def told(self, bars: Bars, top: int) -> dict[str, Any]:
        """Everything as JSON holds it, the verdict too."""
        from vocabguard.compare.probing import plan_as_json, summarise_answers
        from vocabguard.compare.verdicts import probe_verdict

        found = summarise_answers(
            self.plan, self.base, self.now, self.table, self.live, self.data_target, top=top,
            least_targets=_TEXT.least_targets,
        )  # fmt: skip
        found["where"] = None if self.where is None else dict(self.where)
        found["plan"] = plan_as_json(self.plan)
        return found | {"verdict": probe_verdict(found, bars)}

    def vectors(self) -> dict[str, Tensor]:
        """What a file keeps, ``lost`` and ``asked`` (V,) bool too."""
        import torch

        from vocabguard.compare.probing import answer_vectors, plan_vectors
        from vocabguard.measure.retention import lost

        found = plan_vectors(self.plan) | answer_vectors(self.now)
        asked = torch.zeros(len(self.table), dtype=torch.bool)
        asked[self.plan.ids] = True
        found["asked"] = asked
        if self.base is not None:
            missing = torch.zeros_like(asked)
            missing[self.plan.ids] = lost(self.base.result, self.now.result)
            found |= answer_vectors(self.base, "base_") | {"lost": missing}
        return found


def ask_both(pair: common.Pair, found: Scan, asking: Asking) -> Interview:
    """Ask the base, then the tuned model, one after the other, so that only one is in memory.

    Raises:
        InputError: for models that cannot be loaded or asked alike, or words that are none.
    """
    if pair.tokenizer is None:
        raise InputError("a probe needs a tokenizer, and neither folder has one; allowed: --tokenizer FOLDER")
    if not found.match.in_order:
        raise InputError(
            "the two models number their tokens differently, so they cannot be probed alike; allowed: `vocabguard "
            "probe` of each alone"
        )
    return _refusing(lambda: _ask_both(pair, found, asking))


def ask_one(pair: common.Pair, found: Scan, asking: Asking) -> Interview:
    """Ask a model alone; the pair holds it twice.

    Raises:
        InputError: for a model that cannot be loaded or asked, or words that are none.
    """
    if pair.tokenizer is None:
        raise InputError(f"{pair.tuned.path}: a probe needs a tokenizer; allowed: --tokenizer FOLDER")
    return _refusing(lambda: _ask_one(pair, found, asking))


def ask_again(pair: common.Pair, found: Scan, asking: Asking, plan: ProbePlan, base: Answered) -> Interview:
    """Ask a model what another one was asked earlier.

    Raises:
        InputError: for a model that cannot be loaded or asked.
    """
    return _refusing(lambda: _ask_again(pair, found, asking, plan, base))


def _refusing(work: Callable[[], Interview]) -> Interview:
    from vocabguard.compare.models import out_of_memory

    try:
        with out_of_memory("for the probe"):
            return work()
    except (ConfigError, ValueError, OSError) as error:
        # The guard's parts name its settings, which are options here.
        raise InputError(str(error).replace("probe.watch", "--watch").replace("reference.texts", "--texts")) from error
    except (IndexError, RuntimeError) as error:  # a model whose vocabulary is not the tokenizer's
        raise InputError(f"the model cannot be probed ({type(error).__name__}: {one_line(error)})") from error
    except MemoryError as error:
        raise InputError("not enough memory for the probe; allowed: a smaller --batch, --dtype bfloat16") from error


def _ask_both(pair: common.Pair, found: Scan, asking: Asking) -> Interview:
    from vocabguard.compare.models import load_model
    from vocabguard.compare.probing import ask_model

    prompts = pair.tokenizer if pair.base_tokenizer is None else pair.base_tokenizer
    with telling() as tell:
        model = _loaded("base", tell, lambda: load_model(pair.base.path, asking.loading))
        plan = plan_for(model, prompts, pair.tokenizer, found, asking, tell)
        base = ask_model(model, plan, batch_tokens=asking.batch, name="base", tell=tell)
        del model
        gc.collect()
        model = _loaded("tuned", tell, lambda: load_model(pair.tuned.path, asking.loading, base=pair.base.path))
        now = ask_model(model, plan, batch_tokens=asking.batch, name="tuned", tell=tell)
        where = _where(model, found, plan, base, now, asking)
    device = _device_of(model)
    return Interview(plan, base, now, found.table, found.live, found.data_target, device, where)


def _ask_one(pair: common.Pair, found: Scan, asking: Asking) -> Interview:
    from vocabguard.compare.models import load_model
    from vocabguard.compare.probing import ask_model

    with telling() as tell:
        model = _loaded("model", tell, lambda: load_model(pair.tuned.path, asking.loading))
        plan = plan_for(model, pair.tokenizer, pair.tokenizer, found, asking, tell)
        now = ask_model(model, plan, batch_tokens=asking.batch, name="model", tell=tell)
    return Interview(plan, None, now, found.table, found.live, found.data_target, _device_of(model))


def _ask_again(pair: common.Pair, found: Scan, asking: Asking, plan: ProbePlan, base: Answered) -> Interview:
    from vocabguard.compare.models import load_model
    from vocabguard.compare.probing import ask_model

    if int(plan.ids.max()) >= len(found.table):
        raise ValueError(f"the earlier probe has token {int(plan.ids.max())}; the model has {len(found.table)} rows")
    with telling() as tell:
        model = _loaded("model", tell, lambda: load_model(pair.tuned.path, asking.loading))
        now = ask_model(model, plan, batch_tokens=asking.batch, name="model", tell=tell)
    return Interview(plan, base, now, found.table, found.live, found.data_target, _device_of(model))


def _loaded(name: str, tell: Tell, load: Callable[[], nn.Module]) -> nn.Module:
    """A model, and a bar for the time that loading it takes."""
    tell(f"load {name}", 0, 1)
    model = load()
    tell(f"load {name}", 1, 1)
    return model


def plan_for(model: nn.Module, prompts: Any, tokenizer: Any, found: Scan, asking: Asking, tell: Tell) -> ProbePlan:
    """What to ask: tokens drawn as the guard draws them, in contexts that the base follows best.

    Args:
        model: the base.
        prompts: the tokenizer whose template asks.
        tokenizer: that of the tuned vocabulary.

    Raises:
        ConfigError: for words that are none, or texts that cannot be read.
        ValueError: if prompts are longer than the model takes.
    """
    import torch

    from vocabguard.compare.probing import ProbePlan
    from vocabguard.guard.probe import build_prober
    from vocabguard.guard.reference import reference_texts, windows_of
    from vocabguard.measure.contexts import choose_asks

    counts = found.data_target
    flight = NotApplicable("no counts") if counts is None else Preflight(counts, 0, 0, complete=True, seconds=0.0)
    config = replace(
        _DEFAULT, sample=asking.sample, whole_vocabulary=asking.whole, watch=asking.words, asks=asking.asks,
        batch_tokens=asking.batch,
    )  # fmt: skip
    # Rows without a base row are as if never trained: nobody could have lost them.
    table = found.table.with_trained(found.table.trained & found.match.mask)
    prober = build_prober(config, tokenizer, table, flight, asking.seed)
    _require_base_rows(found, prober.words)
    pool = common.ways_of_asking(prompts)
    tell("ways of asking", 0, 1)
    asks = choose_asks(
        model, pool, _beside(prober.population.live, prober.ids, asking.seed), asking.asks, seed=asking.seed + 1,
        batch_tokens=asking.batch,
    )  # fmt: skip
    tell("ways of asking", 1, 1)
    windows = None
    if asking.text_tokens:
        config_text = replace(
            _TEXT, texts=None if asking.texts is None else str(asking.texts), max_tokens=asking.text_tokens
        )
        windows = windows_of(model, prompts, reference_texts(config_text), config_text)
    frequent = torch.isin(prober.ids, prober.population.frequent)
    words = tuple((word.text, tuple(word.ids)) for word in prober.words)
    return ProbePlan(
        asks.contexts, prober.ids, prober.weights, frequent, asking.seed, words, windows, dict(asks.shares)
    )


def _beside(live: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Live tokens outside the sample, by which ways of asking are chosen; of the sample where that is all."""
    import torch

    from vocabguard.guard.probe import CHOOSING
    from vocabguard.measure.sampling import stratified_sample

    others = live.clone()
    others[ids] = False
    others = others if bool(others.any()) else live
    return stratified_sample(torch.zeros(len(live), dtype=torch.int64), others, CHOOSING, seed)


def _require_base_rows(found: Scan, words: tuple[Any, ...]) -> None:
    known = found.match.mask
    for word in words:
        if not bool(known[list(word.ids)].all()):
            raise ConfigError(f"--watch holds {word.text!r}, of which the base has no row, so it cannot be lost")


def _where(
    model: nn.Module, found: Scan, plan: ProbePlan, base: Answered, now: Answered, asking: Asking
) -> dict[str, int] | None:
    """How many lost tokens the base's rows bring back.

    Returns:
        See `vocabguard.measure.localize.HeadOrBody.counts`; None where nothing is lost, or the base's rows are not at
        hand.
    """
    from vocabguard.compare.scan import fitted
    from vocabguard.measure.localize import End, head_or_body
    from vocabguard.measure.retention import lost

    missing, ids = lost(base.result, now.result), found.match.base_ids
    rows, inputs = (fitted(matrix, ids) for matrix in (found.base.head, found.base.embedding))
    if isinstance(rows, NotApplicable) or not bool(missing.any()):
        return None
    core: Any = model
    head = End(core.get_output_embeddings(), rows)
    embedding = None if isinstance(inputs, NotApplicable) else End(core.get_input_embeddings(), inputs)
    where = head_or_body(
        model, base.result, now.result, plan.contexts, head, embedding, seed=plan.seed, batch_tokens=asking.batch
    )  # fmt: skip
    return None if isinstance(where, NotApplicable) else where.counts


def _device_of(model: nn.Module) -> str:
    """Where and in which numbers a model computes: another device rounds otherwise."""
    import torch

    weight = next(model.parameters())
    name = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
    return f"{name}, {str(weight.dtype).removeprefix('torch.')}"


@contextmanager
def telling() -> Iterator[Tell]:
    """A bar a name on a terminal; elsewhere a line on standard error every half minute, with the time left."""
    if sys.stderr.isatty():
        with common.progress_bars(TimeRemainingColumn()) as tell:
            yield tell
        return
    began: dict[str, float] = {}
    told = [time.monotonic()]

    def line(name: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(name, now)
        if now - told[0] >= _SAY_EVERY and 0 < done < total:
            told[0] = now
            left = (now - start) * (total - done) / done
            print(f"{name}: {percent(done / total)}, about {_minutes(left)} left", file=sys.stderr, flush=True)

    yield line


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
