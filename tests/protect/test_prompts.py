"""Rendered prompts against what encoding the whole rendered text gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vocabguard.config import GuardConfig
from vocabguard.measure.probe import PromptContext
from vocabguard.protect.prompts import render_context, render_echo, render_pool

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
DEFAULTS = GuardConfig().probe.contexts
CHATS = {name: way for name, way in DEFAULTS.items() if way.chat and "{token}" not in way.text.replace("{tokens}", "")}


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


def shown(context: PromptContext, ids: list[int]) -> list[int]:
    """The prompt of a list, up to where its copy begins."""
    found = [*context.before, *ids]
    for part in context.between:
        found += [*part, *ids]
    return [*found, *context.after]


@pytest.mark.parametrize("name", CHATS)
def test_chat_prompt_is_the_encoded_conversation(chat_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    way = CHATS[name]
    context = render_context(chat_tokenizer, name, way.text, way.k, turns=way.turns)
    assert (context.name, context.k, context.shots) == (name, way.k, None)
    control = chat_tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert [context.before[0], *context.after[-2:]] == control
    # A control token instead of the list never merges with its neighbours, so here the whole text can be encoded.
    stop = chat_tokenizer.convert_tokens_to_ids("<|fim|>")
    said = [text.replace("{tokens}", "<|fim|>") for text in way.turns or [way.text]]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    whole = chat_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert shown(context, [stop]) == whole
    assert whole.count(stop) == 1 + len(context.between)


@pytest.mark.parametrize("word", ["▁computer", "▁the", "で"])
def test_a_list_is_spliced_in_as_ids(chat_tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    context = render_context(chat_tokenizer, "list", "Repeat exactly: {tokens}", 16)
    id_ = chat_tokenizer.convert_tokens_to_ids(word)
    assert chat_tokenizer.decode([id_]) in chat_tokenizer.decode(shown(context, [id_]))


@pytest.mark.parametrize("name", [name for name, way in DEFAULTS.items() if not way.chat])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>"])
def test_plain_text_is_taken_as_it_is(name: str, template: str | None) -> None:
    """With and without a chat template: from a document's beginning, and the copy follows at once."""
    tokenizer, way = word_tokenizer(template), DEFAULTS[name]
    context = render_context(tokenizer, name, way.text, way.k, chat=False)
    assert context.before[:1] == (1,)
    assert len(context.between) == way.text.count("{tokens}") - 1
    end = "".join(tokenizer.convert_ids_to_tokens(list(context.after)))
    for byte in way.text.rpartition("{tokens}")[2].encode():
        end = end.replace(f"<0x{byte:02X}>", chr(byte))
    assert end.replace("▁", " ").strip() == way.text.rpartition("{tokens}")[2].strip()


def test_pairs_are_a_line_for_each_token() -> None:
    tokenizer = word_tokenizer()
    context = render_context(tokenizer, "pairs", "{token}:{token}\n", 8)
    assert (context.before, context.k, context.shots) == ((1,), 8, 4)
    assert tokenizer.convert_ids_to_tokens(list(context.after)) == [":"]
    assert tokenizer.convert_ids_to_tokens(list(context.between[0])) == ["\n"]
    with pytest.raises(ValueError, match=r"probe\.contexts\.pairs: the text is '\{token\}'"):
        render_context(tokenizer, "pairs", "{token}", 8)


def test_turns_without_a_chat_template_are_lines() -> None:
    tokenizer = word_tokenizer(bos=False)
    context = render_context(tokenizer, "turns", "{tokens}", 4, turns=["this:{tokens}", "{tokens}", "{tokens}"])
    assert tokenizer.convert_ids_to_tokens(list(context.before)) in (["this", ":"], ["▁this", ":"])
    assert [tokenizer.convert_ids_to_tokens(list(part)) for part in context.between] == [["\n"], ["\n"]]
    assert tokenizer.convert_ids_to_tokens(list(context.after)) == ["\n"]


def test_a_pool_holds_each_prompt_once_and_only_what_can_be_rendered(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert [one.name for one in render_pool(chat_tokenizer, DEFAULTS)] == list(DEFAULTS)
    plain = render_pool(word_tokenizer(), DEFAULTS)
    assert "turns" in {one.name for one in plain}
    assert "shown" not in {one.name for one in plain}, "without a template the same lines as turns"
    one_turn = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}<u>{{ messages[0].content }}<a>"
    names = {one.name for one in render_pool(word_tokenizer(one_turn), DEFAULTS)}
    assert names == {name for name, way in DEFAULTS.items() if not way.turns}
    with pytest.raises(ValueError, match="fails on a user's turn"):
        render_pool(word_tokenizer("{{ raise_exception('no') }}"), {"list": DEFAULTS["list"]})


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


def test_text_needs_a_place() -> None:
    with pytest.raises(ValueError, match=r"probe\.contexts\.mine: .*at least once"):
        render_context(word_tokenizer(), "mine", "nothing", 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<u><a>", "renders the 1 lists 0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "renders the 1 lists 2 times"),
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
