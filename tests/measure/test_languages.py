"""Scripts, line and word pass rates and the matrix, against counts by Unicode names; real answers in 25 languages."""

from __future__ import annotations

import importlib.util
import math
import unicodedata
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vocabguard import LanguageConfusion
from vocabguard.measure.languages import (
    LANGUAGES,
    SCRIPTS,
    confusion_matrix,
    count_answers,
    count_letters,
    judge_answer,
    prose_of,
    summarise_confusion,
)

# Language, a text in its own script, and what it looks like with a word of another one.
SAMPLES = {
    "ja": ("私は毎朝コーヒーを飲みます。", "私は毎朝 кофе を飲みます。"),
    "ko": ("오늘은 날씨가 정말 좋네요.", "오늘은 天氣 정말 좋네요."),
    "zh": ("我明天早上去图书馆看书。", "我明天早上去としょかん看书。"),
    "ru": ("Завтра утром я пойду в библиотеку.", "Завтра утром я пойду в مكتبة сегодня."),
    "ar": ("سأذهب غدا إلى المكتبة في الصباح.", "سأذهب غدا إلى ספרייה في الصباح."),
    "he": ("מחר בבוקר אני הולך לספרייה.", "מחר בבוקר אני הולך ל библиотека."),
    "hi": ("मैं कल सुबह पुस्तकालय जाऊँगा।", "मैं कल सुबह ห้องสมุด जाऊँगा।"),
    "th": ("พรุ่งนี้เช้าฉันจะไปห้องสมุด", "พรุ่งนี้เช้าฉันจะไป도서관"),
    "el": ("Αύριο το πρωί θα πάω στη βιβλιοθήκη.", "Αύριο το πρωί θα πάω στη 図書館."),
    "en": ("I will go to the library tomorrow morning.", "I will go to the पुस्तकालय tomorrow morning."),
    "ka": ("ხვალ დილით ბიბლიოთეკაში წავალ.", "ხვალ დილით գրադարան წავალ."),
}
BY_NAME = {
    "HIRAGANA": "ja", "KATAKANA": "ja", "KATAKANA-HIRAGANA": "ja", "HANGUL": "ko", "CJK": "zh", "IDEOGRAPHIC": "zh",
    "CYRILLIC": "cyrillic", "ARABIC": "arabic", "HEBREW": "hebrew", "DEVANAGARI": "devanagari", "THAI": "thai",
    "GREEK": "greek", "LATIN": "latin", "GEORGIAN": "georgian", "ARMENIAN": "armenian",
}  # fmt: skip


def naive_letters(text: str) -> Counter[str]:
    """Letters and marks by the first word of their Unicode names."""
    letters = (char for char in text if unicodedata.category(char)[0] in "LM")
    return Counter(BY_NAME[unicodedata.name(char).split()[0]] for char in letters)


@pytest.mark.parametrize("language", SAMPLES)
def test_letters_are_those_of_the_unicode_names(language: str) -> None:
    for text in SAMPLES[language]:
        assert count_letters(text) == dict(naive_letters(text))


def test_what_is_foreign_equals_naive_counts() -> None:
    answers = [(language, text) for language, texts in SAMPLES.items() for text in texts]
    found = count_answers(answers, tuple(SAMPLES))
    into: dict[str, Counter[str]] = {language: Counter() for language in SAMPLES}
    for language, text in answers:
        into[language].update(set(naive_letters(text)) - {*LANGUAGES[language], "latin"})
    assert confusion_matrix(found) == {language: dict(counts) for language, counts in into.items()}
    assert all(into.values()), "every language is confused once"
    shares = summarise_confusion(found)
    assert {language: shares[language] for language in SAMPLES} == dict.fromkeys(SAMPLES, 0.5)
    assert shares["foreign"] == 0.5
    assert found.counts[:, 0].tolist() == [2] * len(SAMPLES)


def test_every_letter_of_unicode_has_one_script_or_none() -> None:
    letters = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code))[0] in "LM"]
    by_name = {char: BY_NAME.get(unicodedata.name(char, "?").split()[0]) for char in letters}
    for char, expected in by_name.items():
        # A lone Greek letter is a symbol, so two of each.
        found = set(count_letters(char * 2))
        assert len(found) <= 1
        if found and expected and char.isalpha():
            assert found == {expected}, (char, unicodedata.name(char))
    assert {script for char in letters for script in count_letters(char * 2)} == set(SCRIPTS)


@pytest.mark.parametrize(
    "text",
    [
        "答えは42です。😀 ① ½ ℃ → ¥100",
        "角度はπで、Δは差です。",
        "コードは `привет` です。",
        "例:\n```python\nprint('привет мир')\n```\n終わり。",
        "途中で切れた例:\n```\nпривет мир",
        "https://пример.рф/путь を見てください。",
        "連絡は почта@example.com までお願いします。",
        "<b>東京</b>は\\frac{1}{2}の大きさです。&nbsp;",
        "NASAとiPhoneの話です。",
        "人々はｶﾞｷﾞｸﾞと言った。ー・。",
    ],
)
def test_what_never_counts_in_a_japanese_answer(text: str) -> None:
    assert judge_answer(text, "ja").foreign == {}


def test_what_does_count() -> None:
    assert judge_answer("これは и です。", "ja").foreign == {"cyrillic": 1}, "one Cyrillic letter is a Russian word"
    assert judge_answer("これは πολύ です。", "ja").foreign == {"greek": 4}
    assert judge_answer("學校에 가요.", "ko").foreign == {"zh": 2}
    assert judge_answer("ฉันชอบ ভাত", "th").foreign == {"bengali": 3}
    assert judge_answer("ᏣᎳᎩ is Cherokee.", "en").foreign == {"other": 3}
    assert judge_answer("Здраво, zdravo.", "sr").foreign == {}


def test_allow_replaces_the_default() -> None:
    assert judge_answer("NASAの話です。", "ja", allow=()).foreign == {"latin": 4}
    assert judge_answer("學校에 가요.", "ko", allow=("zh",)).foreign == {}
    strict = count_answers([("ja", "NASAの話"), ("ko", "學校 NASA")], ("ja", "ko"), allow={"ja": ()})
    assert confusion_matrix(strict) == {"ja": {"latin": 1}, "ko": {"zh": 1}}


@pytest.mark.parametrize(
    ("language", "line", "judged", "right"),
    [
        ("ja", "今日はとても良い天気ですね。", True, True),
        ("ja", "はい。", False, True),
        ("ja", "今天的天气非常好我们去公园", True, False),
        ("ja", "The weather is very nice today.", True, False),
        ("ja", "今日はニューヨークのHarvard大学で話しました。", True, True),
        ("zh", "今天的天气非常好我们去公园", True, True),
        ("zh", "今日はとても良い天気ですね。", True, False),
        ("zh", "我们去の公园今天的天气非常好", True, True),
        ("ko", "오늘은 날씨가 정말 좋네요 그렇죠", True, True),
        ("ko", "오늘은 날씨가 좋네요", False, True),
        ("ko", "오늘은 the weather is very nice", True, False),
        ("ru", "Сегодня очень хорошая погода, правда?", True, True),
        ("ru", "今日はとても良い天気ですね。", True, False),
        ("en", "Il fait très beau aujourd'hui, non ?", True, True),
        ("en", "Сегодня очень хорошая погода, правда?", True, False),
    ],
)  # fmt: skip
def test_a_line_is_judged_by_most_of_its_letters(language: str, line: str, judged: bool, right: bool) -> None:
    answer = judge_answer(line, language)
    assert (answer.judged_lines, answer.wrong_lines) == (int(judged), int(not right))


def test_line_and_word_pass_rates_by_hand() -> None:
    good = "Сегодня очень хорошая погода, правда?"
    answers = [
        good,  # passes both
        f"{good}\nНет.",  # the short line is not judged
        f"{good}\nThe weather is very nice today.",  # one line wrong
        "Сегодня очень хорошая weather, правда?",  # passes the lines, not the words
        "Сегодня очень хорошая погода в Paris и NASA, правда?",  # names are no English words
        "Да.",  # not judged
        "",  # not judged
    ]
    found = count_answers([("ru", text) for text in answers], ("ru",))
    shares = summarise_confusion(found)
    assert shares["ru/line_pass"] == 4 / 5
    assert shares["ru/word_pass"] == 3 / 4
    assert shares["ru/latin"] == 3 / 7
    assert shares["ru"] == 0.0
    assert summarise_confusion(count_answers([("en", "I am fine, thank you very much.")], ("en",))) == {
        "en": 0.0, "en/line_pass": 1.0, "foreign": 0.0, "line_pass": 1.0,
    }  # fmt: skip


def test_a_dictionary_of_english_words() -> None:
    text = "Сегодня очень хорошая weather или merci, правда?"
    assert judge_answer(text, "ru").english == ("weather", "merci")
    assert judge_answer(text, "ru", english={"weather"}).english == ("weather",)


def test_languages_without_answers_have_no_share() -> None:
    found = count_answers([("ja", "はい。")], ("ja", "ko"))
    assert summarise_confusion(found) == {"ja": 0.0, "ja/latin": 0.0, "foreign": 0.0}
    assert confusion_matrix(found) == {}


def test_prose_keeps_its_lines() -> None:
    assert prose_of("one\ntwo `x` three").splitlines() == ["one", "two   three"]
    assert "<" in prose_of("1 < 2 and 3 > 2")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: judge_answer("a", "klingon"), "language is 'klingon'; allowed: .*ja"),
        (lambda: judge_answer("a", "ja", allow=("kanji",)), r"allow has \['kanji'\]; allowed: .*zh"),
        (lambda: count_answers([("ru", "a")], ("ja",)), "language is 'ru'; allowed: ja"),
        (lambda: LanguageConfusion(["ja", "xx"]), "language is 'xx'; allowed"),
        (lambda: LanguageConfusion(["ja"], {"xx": ()}), "language is 'xx'; allowed"),
        (lambda: LanguageConfusion(["ja"], {"ja": ["kanji"]}), r"allow has \['kanji'\]; allowed: .*zh"),
        (lambda: LanguageConfusion(["ja", "ja"]), r"\['ja', 'ja'\]; allowed: each once"),
        (lambda: LanguageConfusion(["ja"]).update(["a"], ["ja", "ja"]), "2 languages for 1 answers"),
    ],
)
def test_wrong_arguments(wrong: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrong()  # type: ignore[operator]


def test_the_metric_adds_up_as_one_count() -> None:
    answers = [(language, text) for language, texts in SAMPLES.items() for text in texts]
    languages = tuple(SAMPLES)
    whole = summarise_confusion(count_answers(answers, languages))
    metric, other = LanguageConfusion(languages), LanguageConfusion(languages)
    for language, texts in SAMPLES.items():
        metric.update([texts[0]], language)
    other.update([texts[1] for texts in SAMPLES.values()], list(SAMPLES))
    # What a sum over two processes does.
    metric.counts += other.counts
    metric.into += other.into
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(whole)
    assert metric.matrix() == confusion_matrix(count_answers(answers, languages))
    assert metric._reductions["counts"] is metric._reductions["into"] is not None
    metric.reset()
    assert not metric.counts.any()
    assert LanguageConfusion().languages == tuple(LANGUAGES)


def test_forward_gives_the_batch_and_keeps_the_sum() -> None:
    metric = LanguageConfusion(["ja"])
    assert metric(["これは хорошо です。"], "ja")["ja"] == 1.0
    assert metric(["これは良いです。"], "ja")["ja"] == 0.0
    assert torch.equal(metric.compute()["ja"], torch.tensor(0.5))


# -- real answers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats() -> dict[str, list[str]]:
    """Distinct answers of ``chatterbot-corpus`` by language."""
    return _corpus_module().answers_by_language()


def _corpus_module() -> ModuleType:
    import sys

    path = Path(__file__).parents[2] / "examples" / "corpus.py"
    spec = importlib.util.spec_from_file_location("chat_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat_corpus"] = module
    spec.loader.exec_module(module)
    return module


def test_real_answers_pass_in_their_own_language(chats: dict[str, list[str]]) -> None:
    codes = _corpus_module().CODES
    assert len(chats) == len(codes) == 25
    for language, answers in chats.items():
        code = codes[language]
        shares = summarise_confusion(count_answers([(code, text) for text in answers], (code,)))
        assert shares[code] <= 0.02, language
        assert shares[f"{code}/line_pass"] >= 0.98, language
        assert shares.get(f"{code}/word_pass", 1.0) >= 0.98, language


def test_real_answers_fail_as_another_language(chats: dict[str, list[str]]) -> None:
    """Chinese answers where Japanese ones are wanted, and so on: the same answers are told by their lines."""
    for language, wanted in (("chinese", "ja"), ("japanese", "zh"), ("english", "ko"), ("russian", "ja")):
        answers = [(wanted, text) for text in chats[language]]
        assert summarise_confusion(count_answers(answers, (wanted,)))[f"{wanted}/line_pass"] < 0.03, language
    mixed = [("ja", f"{text} да") for text in chats["japanese"][:100]]
    assert summarise_confusion(count_answers(mixed, ("ja",)))["ja"] == 1.0
    assert math.isclose(summarise_confusion(count_answers(mixed, ("ja",)))["ja/line_pass"], 1.0, abs_tol=0.03)
