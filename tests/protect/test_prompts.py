"""Rendered prompts against what encoding the whole rendered text gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vocabguard.config import GuardConfig
from vocabguard.protect.prompts import render_context, render_echo

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
DEFAULTS = {name: (context.text, context.k) for name, context in GuardConfig().probe.contexts.items()}


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS)


def word_tokenizer(template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """Words and signs with a space mark put before the first of them, as older SentencePiece models do."""
    pieces = ["<unk>", "<s>", "</s>", "<u>", "<a>", "▁Say", "▁this", "this", ":", "▁", "\n", ".", "▁more", "more", '"']
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: index for index, piece in enumerate(pieces + byte_pieces)}
    core = Tokenizer(models.Unigram([(p, -float(i)) for p, i in vocabulary.items()], unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>", chat_template=template)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("word", ["▁computer", "▁the", "で"])
def test_chat_prompt_is_the_encoded_conversation(chat_tokenizer: PreTrainedTokenizerBase, name: str, word: str) -> None:
    text, k = DEFAULTS[name]
    context = render_context(chat_tokenizer, name, text, k)
    assert (context.name, context.k) == (name, k)
    control = chat_tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert [context.before[0], *context.after[-2:]] == control
    before, after = text.split("{tokens}")
    assert chat_tokenizer.decode(list(context.before)) == f"<|user|>{before}"
    assert chat_tokenizer.decode(list(context.after)) == f"{after}<|end|><|assistant|>"
    # A control token instead of the list never merges with its neighbours, so here the whole text can be encoded.
    stop = chat_tokenizer.convert_tokens_to_ids("<|fim|>")
    turns = [{"role": "user", "content": text.replace("{tokens}", "<|fim|>")}]
    whole = chat_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert [*context.before, stop, *context.after] == whole
    id_ = chat_tokenizer.convert_tokens_to_ids(word)
    spliced = [*context.before, id_, *context.after]
    assert chat_tokenizer.decode([id_]) in chat_tokenizer.decode(spliced)


@pytest.mark.parametrize("bos", [True, False])
def test_plain_prompt_begins_a_document(bos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos)
    context = render_context(tokenizer, "plain", "Say this:{tokens}.", 4)
    pieces = tokenizer.convert_ids_to_tokens(list(context.before))
    assert pieces == (["<s>"] if bos else []) + ["▁Say", "▁this", ":"]
    assert tokenizer.convert_ids_to_tokens(list(context.after)) == [".", "\n"]


def test_no_space_is_invented_after_the_list() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("more", add_special_tokens=False)) == ["▁more"]
    context = render_context(tokenizer, "plain", '"{tokens}more', 1)
    assert tokenizer.convert_ids_to_tokens(list(context.after)) == ["more", "\n"]


def test_a_bare_place_has_nothing_around_it() -> None:
    context = render_context(word_tokenizer(bos=False), "bare", "{tokens}", 2)
    assert (context.before, len(context.after)) == ((), 1)


def test_special_tokens_of_a_template_become_their_ids() -> None:
    template = "{{ bos_token }}{% for m in messages %}<u>{{ m.content | trim }}</s>{% endfor %}<a>"
    tokenizer = word_tokenizer(template)
    tokenizer.split_special_tokens = True
    context = render_context(tokenizer, "chat", "Say this:{tokens} ", 4)
    assert context.before[:2] == (1, 3)
    assert context.after == (2, 4)


@pytest.mark.parametrize("text", ["nothing", "{tokens} and {tokens}", "{token}"])
def test_text_needs_one_place(text: str) -> None:
    with pytest.raises(ValueError, match=r"probe\.contexts\.mine: .*exactly one '\{tokens\}'"):
        render_context(word_tokenizer(), "mine", text, 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<u><a>", "renders the user's text 0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "renders the user's text 2 times"),
        ("{{ raise_exception('system first') }}", "fails on a user's turn: system first"),
    ],
)
def test_template_must_render_the_users_text(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"probe\.contexts\.mine: the chat template {message}"):
        render_context(word_tokenizer(template), "mine", "{tokens}", 1)


# -- echo rows -------------------------------------------------------------------------------------------------------

INSTRUCTIONS = GuardConfig().echo.instructions


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_echo_prompt_is_the_encoded_conversation(chat_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    prompt = render_echo(chat_tokenizer, "echo.instructions[0]", text)
    stop = chat_tokenizer.convert_tokens_to_ids("<|fim|>")
    turns = [
        {"role": "user", "content": text.replace("{tokens}", "<|fim|>")},
        {"role": "assistant", "content": "<|fim|>"},
    ]
    # A control token instead of the list never merges with its neighbours, so here the whole text can be encoded.
    whole = chat_tokenizer.apply_chat_template(turns)["input_ids"]
    assert [*prompt.before, stop, *prompt.after, stop, *prompt.close] == whole
    assert prompt.close[0] == chat_tokenizer.convert_tokens_to_ids("<|end|>")


def test_every_default_instruction_is_another_one() -> None:
    assert len(set(INSTRUCTIONS)) == len(INSTRUCTIONS) >= 10


def test_echo_takes_what_a_template_puts_before_an_answer_in_training() -> None:
    template = (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>this:' }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    tokenizer = word_tokenizer(template)
    prompt = render_echo(tokenizer, "key", "Say this:{tokens}.")
    assert tokenizer.convert_ids_to_tokens(list(prompt.before))[0] == "<u>"
    assert tokenizer.convert_ids_to_tokens(list(prompt.after))[:3] == [".", "</s>", "<a>"]
    assert tokenizer.convert_ids_to_tokens(list(prompt.after))[-2:] in (["this", ":"], ["▁this", ":"])
    assert tokenizer.convert_ids_to_tokens(list(prompt.close)) == ["</s>"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_plain_echo_is_a_document(bos: bool, eos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos)
    if eos:
        tokenizer.eos_token = "</s>"
    prompt = render_echo(tokenizer, "key", "Say this:{tokens}.")
    before = tokenizer.convert_ids_to_tokens(list(prompt.before))
    assert before == (["<s>"] if bos else []) + ["▁Say", "▁this", ":"]
    assert tokenizer.convert_ids_to_tokens(list(prompt.after)) == [".", "\n"]
    assert tokenizer.convert_ids_to_tokens(list(prompt.close)) == (["</s>"] if eos else [])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "renders the user's text 2 times"),
        ("<u>{{ messages[0].content }}<a>", "renders the assistant's text 0 times"),
        ("{{ messages[1].content }}<u>{{ messages[0].content }}", "renders the assistant's text 0 times"),
        ("{% if messages[1] %}{{ raise_exception('no') }}{% endif %}", "fails on a user's turn: no"),
    ],
)
def test_template_must_render_both_turns_in_their_order(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"echo\.instructions\[2\]: the chat template {message}"):
        render_echo(word_tokenizer(template), "echo.instructions[2]", "{tokens}")


def test_an_instruction_needs_one_place() -> None:
    with pytest.raises(ValueError, match=r"echo\.instructions\[2\]: .*exactly one '\{tokens\}'"):
        render_echo(word_tokenizer(), "echo.instructions[2]", "nothing")
