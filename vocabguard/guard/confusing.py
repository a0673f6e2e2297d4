"""Answers to everyday questions in many languages, at evaluations: do they stay in the language asked in?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard.config import ConfigError, load_questions
from vocabguard.measure.confusion import ConfusionCounts, count_answers, scripts_of
from vocabguard.measure.probe import probe_applicable, undisturbed
from vocabguard.models import core_of, text_config_of, unwrapped
from vocabguard.prompts import PLACE, render_context, render_echo
from vocabguard.results import NotApplicable
from vocabguard.settings import ConfusionConfig


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        language: ISO 639 code.
        ids: the prompt: a user's turn up to where the answer begins.
    """

    language: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Confuser:
    """Asks a model questions in many languages.

    Attributes:
        tokenizer: reads the answers.
        questions: in the order in which they are asked.
        stops: ids that end an answer.
        max_new_tokens: longest answer.
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
        # By length, so that little of a batch is padding.
        order = sorted(range(len(self.questions)), key=lambda place: len(self.questions[place].ids))
        asked = [self.questions[place] for place in order]
        answers: list[tuple[str, str]] = []
        generator = unwrapped(model)
        with undisturbed(generator), torch.no_grad():
            for start in range(0, len(asked), self.batch):
                part = asked[start : start + self.batch]
                said = greedy_answers(generator, [one.ids for one in part], self.stops, self.max_new_tokens)
                texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in said)
                answers += [(one.language, text) for one, text in zip(part, texts, strict=True)]
        return count_answers(answers, self.languages, allow=self.allow)


def greedy_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], stops: Sequence[int], max_new_tokens: int
) -> Iterator[list[int]]:
    """What a model answers to each prompt, greedily, up to the first stop.

    Args:
        model: has Hugging Face's ``generate``.
        prompts: ids; shorter ones are padded on the left and masked.
        stops: ids that end an answer; at least one.
        max_new_tokens: longest answer.
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

    Args:
        model: the model to be asked.
        config: what to ask.
        tokenizer: its tokenizer, or None.

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
            yield Question(language, (*context.before, *inner, *context.after))


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
    most = getattr(text_config_of(model), "max_position_embeddings", None)
    longest = max(len(question.ids) for question in questions)
    if isinstance(most, int) and 0 < most < longest + max_new_tokens:
        raise ConfigError(
            f"confusion.max_new_tokens is {max_new_tokens}; allowed: {max(0, most - longest)}, since the model takes "
            f"{most} tokens and a question has {longest}"
        )
