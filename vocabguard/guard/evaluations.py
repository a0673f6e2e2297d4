"""What is looked at beside the checks: answers at evaluations, neighbours, and where forgotten tokens were lost.

Each part disables itself where it fails, on all processes together; the guard and the training go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.config import ConfigError, ConfusionConfig, GuardConfig, load_questions
from vocabguard.guard import summary
from vocabguard.guard.probe import Prober
from vocabguard.guard.watched import Watched
from vocabguard.measure.copying import copies_prompt
from vocabguard.measure.languages import ConfusionCounts, count_answers, scripts_of
from vocabguard.measure.localize import End, head_or_body
from vocabguard.measure.neighbors import compare_neighbors
from vocabguard.measure.probe import probe_applicable, undisturbed
from vocabguard.protect.prompts import PLACE, render_context, render_echo
from vocabguard.results import EVERYDAY_QUESTIONS, CheckResult, Finding, MatrixName, NotApplicable, RowDrift
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.rows.models import core_of, longest_prompt, unwrapped
from vocabguard.views.findings import body_finding, confusion_finding, neighbors_finding
from vocabguard.vocabulary.table import fit_rows


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        language: ISO 639 code.
        ids: the prompt: a user's turn up to where the answer begins.
        inner: the question itself.
    """

    language: str
    ids: tuple[int, ...]
    inner: tuple[int, ...]


@dataclass(frozen=True)
class Confuser:
    """Asks a model questions in many languages.

    Attributes:
        tokenizer: reads the answers.
        questions: in the order in which they are asked.
        stops: ids that end an answer.
        batch: questions in one forward pass.
        allow: language -> scripts that belong beside its own, where it is not Latin letters.
    """

    tokenizer: Any
    questions: tuple[Question, ...]
    stops: tuple[int, ...]
    max_new_tokens: int
    batch: int
    allow: Mapping[str, Sequence[str]]

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages asked in."""
        return tuple(dict.fromkeys(question.language for question in self.questions))

    def ask(self, model: nn.Module) -> ConfusionCounts:
        """Let the model answer every question, and count the answers by script.

        The model is asked as the probe asks it: in evaluation mode, without gradients, outside of compiled code, with
        generators and modes left as they were.
        """
        texts = (
            (one.language, self.tokenizer.decode(ids, skip_special_tokens=True)) for one, ids in self._answers(model)
        )
        return count_answers(texts, self.languages, allow=self.allow)

    def copies(self, model: nn.Module) -> float:
        """Share in [0, 1] of the answers that copy their question; asked as `ask` does."""
        copied = [copies_prompt(one.inner, ids) for one, ids in self._answers(model)]
        return sum(copied) / len(copied)

    def _answers(self, model: nn.Module) -> list[tuple[Question, list[int]]]:
        # By length, so that little of a batch is padding.
        order = sorted(range(len(self.questions)), key=lambda place: len(self.questions[place].ids))
        asked = [self.questions[place] for place in order]
        answers: list[tuple[Question, list[int]]] = []
        generator = unwrapped(model)
        with undisturbed(generator), torch.no_grad():
            for start in range(0, len(asked), self.batch):
                part = asked[start : start + self.batch]
                said = greedy_answers(generator, [one.ids for one in part], self.stops, self.max_new_tokens)
                answers += zip(part, said, strict=True)
        return answers


def greedy_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], stops: Sequence[int], max_new_tokens: int
) -> Iterator[list[int]]:
    """What a model answers to each prompt, greedily, up to the first stop.

    Args:
        model: has Hugging Face's ``generate``.
        prompts: ids; shorter ones are padded on the left and masked.
        stops: ids that end an answer; at least one.
    """
    from transformers import GenerationConfig

    longest = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    padded = [[stops[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    # Neutral values, so that the model's own settings of sampling say nothing.
    plain = GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=1.0, top_k=50,
        top_p=1.0, eos_token_id=list(stops), pad_token_id=stops[0], return_dict_in_generate=False,
    )  # fmt: skip
    generate: Any = model.generate
    said: Tensor = generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=plain,
    )
    for ids in said[:, longest:].tolist():
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        yield ids[:end]


def choose_confuser(model: nn.Module, config: ConfusionConfig, tokenizer: Any) -> Confuser | NotApplicable:
    """What asks the questions of a configuration, or why nothing does.

    Raises:
        ConfigError: for questions in a language that is not known, that the chat template does not render, or that
            leave no room for an answer; and for a language or script in ``allow`` that is not known.
    """
    if not config.enabled:
        return NotApplicable("confusion is off")
    if tokenizer is None:
        return NotApplicable("answers in many languages need a tokenizer")
    if (reason := probe_applicable(model)) is not None:
        return reason
    if not callable(getattr(core_of(model), "generate", None)):
        return NotApplicable(f"{type(core_of(model)).__name__} has no generate(), so it gives no answers")
    stops = _stops(core_of(model), tokenizer)
    if not stops:
        return NotApplicable("neither tokenizer nor model names a token that ends an answer")
    questions = tuple(_questions(config, tokenizer))
    _require_room(core_of(model), questions, config.max_new_tokens)
    confuser = Confuser(tokenizer, questions, stops, config.max_new_tokens, config.batch_prompts, config.allow)
    try:
        count_answers((), confuser.languages, allow=config.allow)
    except ValueError as error:
        raise ConfigError(f"confusion.allow: {error}") from error
    return confuser


def _questions(config: ConfusionConfig, tokenizer: Any) -> Iterator[Question]:
    try:
        context = render_context(tokenizer, "confusion", PLACE, 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for language, texts in load_questions(config).items():
        try:
            scripts_of(language)
        except ValueError as error:
            raise ConfigError(f"confusion.prompts: {error}") from error
        for text in texts:
            inner = tokenizer.encode(text, add_special_tokens=False)
            yield Question(language, (*context.before, *inner, *context.after), tuple(inner))


def _stops(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's and the model's, and the marker that closes an assistant's turn."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, (list, tuple)) else [named])]
    if getattr(tokenizer, "chat_template", None):
        try:
            close = render_echo(tokenizer, "confusion", PLACE).close[:1]
        except ValueError:
            close = ()
        found += [token for token in close if token in tokenizer.all_special_ids]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _require_room(model: nn.Module, questions: Sequence[Question], max_new_tokens: int) -> None:
    most = longest_prompt(model)
    longest = max(len(question.ids) for question in questions)
    if most is not None and most < longest + max_new_tokens:
        raise ConfigError(
            f"confusion.max_new_tokens is {max_new_tokens}; allowed: {max(0, most - longest)}, since the model takes "
            f"{most} tokens and a question has {longest}"
        )


logger = logging.getLogger("vocabguard")

Drifts = Mapping[MatrixName, RowDrift | NotApplicable]

_SHARDED = NotApplicable("the rows are spread over processes")
_EVERYDAY, _SHORT = ("en", "de", "fr", "es"), 24
"""Languages and longest answers by which copying of prompts is seen."""

T = TypeVar("T")


class Evaluations:
    """The parts that a configuration asks for. All methods are for all processes to call.

    Args:
        watched: its matrices, baselines and table; the tokenizer asks the questions.
        prober: whose probes say which tokens are forgotten; None where nothing probes.

    Raises:
        ConfigError: for questions that cannot be asked.
    """

    def __init__(self, config: GuardConfig, model: nn.Module, watched: Watched, prober: Prober | None) -> None:
        self._config, self._model, self._watched, self._prober = config, model, watched, prober
        self._confuser: Confuser | NotApplicable = NotApplicable("sequences are split over processes")
        if watched.replicas.split != "sequence":
            self._confuser = choose_confuser(model, config.confusion, watched.tokenizer)
        self._raise = config.on_error == "raise"
        self._everyday: Confuser | NotApplicable | None = None
        self._down: set[str] = set()
        self._checks = 0
        self._last_look: int | None = None

    def notes(self) -> tuple[str, ...]:
        """What was asked for and cannot be done, in words."""
        if self._config.confusion.enabled and isinstance(self._confuser, NotApplicable):
            return (f"no answers in many languages: {self._confuser.reason}",)
        return ()

    def at_evaluation(self, step: int) -> tuple[Finding, ...]:
        """Answers in many languages, if asked for."""
        confuser = self._confuser
        if not isinstance(confuser, Confuser):
            return ()
        return self._part("confusion", lambda: confusion_finding(step, confuser.ask(self._model)))

    def at_check(self, step: int, drifts: Drifts) -> tuple[Finding, ...]:
        """Neighbours, at checks at which they are due; at the first check nothing has moved yet."""
        every, number = self._config.neighbors.every_n_checks, self._checks
        self._checks += 1
        return self._neighbors(step, drifts) if every and number and number % every == 0 else ()

    def at_end(self, last: CheckResult) -> tuple[Finding, ...]:
        """Neighbours, and where forgotten tokens were lost. `last`: the last check; the weights are still those."""
        found: tuple[Finding, ...] = ()
        if self._last_look != last.step:
            found = self._neighbors(last.step, {"head": last.head, "embedding": last.embedding})
        prober = self._prober
        if self._config.probe.head_or_body and prober is not None and bool(prober.lost().any()):
            found += self._part("head_or_body", lambda: _body(self._model, self._watched, prober, last.step))
        return found

    def _neighbors(self, step: int, drifts: Drifts) -> tuple[Finding, ...]:
        if not self._config.neighbors.k:
            return ()
        self._last_look = step
        watch = self._prober.watched if self._prober else torch.empty(0, dtype=torch.int64)
        return self._part("neighbors", lambda: _beside(self._watched, watch, step, drifts, self._config))

    def copies(self, *, sharded: bool) -> dict[str, float]:
        """``echo/copies``, the share in [0, 1] of answers to everyday questions that copy the question.

        Args:
            sharded: whether the matrices are spread over processes: nothing is asked then.
        """
        if sharded or self._watched.tokenizer is None:
            return {}
        found = self._contained("echo/copies", self._share_of_copies)
        return {} if found is None else {f"{summary.PREFIX}echo/copies": found}

    def _share_of_copies(self) -> float | None:
        if self._everyday is None:
            each = EVERYDAY_QUESTIONS // len(_EVERYDAY)
            config = ConfusionConfig(enabled=True, languages=list(_EVERYDAY), per_language=each, max_new_tokens=_SHORT)
            self._everyday = choose_confuser(self._model, config, self._watched.tokenizer)
        return self._everyday.copies(self._model) if isinstance(self._everyday, Confuser) else None

    def _part(self, name: str, look: Callable[[], Finding | NotApplicable | None]) -> tuple[Finding, ...]:
        """One part's finding; none where it is not applicable, or has disabled itself."""
        found = self._contained(name, look)
        if isinstance(found, NotApplicable):
            # Neighbours were asked for; head or body is looked at by itself.
            level = logging.WARNING if name == "neighbors" else logging.INFO
            logger.log(level, "vocabguard: no %s: %s", name, found.reason)
            self._down.add(name)
        return (found,) if isinstance(found, Finding) else ()

    def _contained(self, name: str, look: Callable[[], T]) -> T | None:
        """What a part finds; None where it fails on any process, from then on."""
        found: T | None = None
        failed = name in self._down
        if not failed:
            try:
                found = look()
            except Exception as error:
                if self._raise:
                    raise
                failed = True
                logger.warning(
                    "vocabguard: %s disabled itself; the guard continues: %s: %s", name, type(error).__name__, error
                )
        if bool(collective.any_of(torch.tensor(failed))):
            self._down.add(name)
            return None
        return found


def _beside(
    watched: Watched, watch: Tensor, step: int, drifts: Drifts, config: GuardConfig
) -> Finding | NotApplicable | None:
    """Neighbours of the worst and the watched tokens."""
    name: MatrixName = "head" if isinstance(drifts["head"], RowDrift) else "embedding"
    matrix, table = watched.matrices[name], watched.table
    if isinstance(matrix, NotApplicable):
        return matrix
    if matrix.shard is not None:
        return _SHARDED
    worst = summary.worst_ids(drifts[name], table.live, config.neighbors.rows)
    ids = torch.tensor(list(dict.fromkeys([*worst.tolist(), *watch.tolist()])), dtype=torch.int64)
    if not len(ids):
        return None
    baseline = watched.baseline_of(name)
    found = compare_neighbors(matrix, baseline, ids, config.neighbors.k, fit_rows(table.padded, matrix.rows, True))
    return neighbors_finding(step, name, found, table)


def _body(model: nn.Module, watched: Watched, prober: Prober, step: int) -> Finding | NotApplicable | None:
    """Where the tokens were lost that the last probe no longer found."""
    assert prober.base is not None
    assert prober.last is not None
    ends: dict[str, End] = {}
    for name, matrix in watched.matrices.items():
        if isinstance(matrix, VocabMatrix) and matrix.shard is not None:
            return _SHARDED
        if isinstance(matrix, VocabMatrix):
            ends[name] = End(matrix.wrapped, watched.baseline_of(name), matrix)
    if "head" not in ends:
        return NotApplicable("the head does not move by itself, so there is no row to put back")
    with prober.timed():
        found = head_or_body(
            model, prober.base, prober.last, prober.contexts, ends["head"], ends.get("embedding"),
            seed=prober.seed, batch_tokens=prober.batch_tokens,
        )  # fmt: skip
    if isinstance(found, NotApplicable):
        return found
    return body_finding(step, found) if len(found.ids) else None
