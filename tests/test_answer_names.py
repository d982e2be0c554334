"""Names as answers, in many scripts: what of their spelling counts, where they end, and what a scorer says of it."""

from __future__ import annotations

import unicodedata

import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from subjattn.measures import answers as module
from subjattn.measures.answer_names import folded, goes_on, is_settled, plain
from subjattn.measures.answers import longest_answers, predict
from subjattn.measures.scoring import SCORERS, Named, contains_alias, exact_match, is_correct, start_is_decided
from subjattn.models import LoadedModel
from subjattn.prompts import make_prompts


ANOTHER_NAME = [
    # marks that make another letter
    ("バリ", "パリ"), ("ハハ", "パパ"), ("भारती", "भारत"), ("Май", "Маи"), ("Київ", "Киів"),
    # a capital of any script goes on with a name
    ("Нижний Новгород", "Нижний"), ("Гвинея Бисау", "Гвинея"), ("Νέα Υόρκη", "Νέα"), ("Émile Zola", "Émile"),
    ("Նոր Երևան", "Նոր"), ("New York", "New"),
    # a word goes on
    ("Nigeria", "Niger"), ("Guinea-Bissau", "Guinea"), ("Guinea‑Bissau", "Guinea"),
    ("Guinea–Bissau", "Guinea"),
    ("几内亚比绍", "几内亚"), ("パリス", "パリ"),
    ("東京タワー", "東京"), ("ギニア・ビサウ", "ギニア"), ("乔治·华盛顿", "乔治"),
    ("인도네시아", "인도"), ("さくらんぼ", "さくら"), ("O'Brien", "O"), ("AT&T", "AT"), ("J.R.R. Tolkien", "J"),
    ("Amazon.com", "Amazon"), ("C++", "C"), ("C#", "C"),
    # a number goes on
    ("3.5 million", "3"), ("3 million", "3"), ("1,000", "1"), ("1984.5", "1984"), ("10:30", "10"), ("10 000", "10"),
    ("−40", "40"), ("-40", "40"), ("40", "-40"), (".5", "5"), ("1/2", "1"), ("3½", "3"), ("3²", "32"), ("1e5", "1"),
    ("1984–85", "1984"), ("–40", "40"), ("3 bn", "3"), ("2nd", "2"), ("3百万", "3"), ("3 тысячи", "3"),
]  # fmt: skip
SAME_NAME = [
    ("東京です", "東京"), ("北京是中国的首都", "北京"), ("東京。", "東京"), ("上海位于中国东部", "上海"),
    ("北京市", "北京"),
    ("「東京」です", "東京"), ("パリです", "パリ"), ("ちばです", "ちば"), ("서울입니다", "서울"),
    ("서울은 한국의 수도", "서울"),
    ("กรุงเทพเป็นเมืองหลวง", "กรุงเทพ"), ("Nairobiは", "Nairobi"), ("1984年", "1984"), ("القاهرة، مصر", "القاهرة"),
    ("القَاهِرَة", "القاهرة"), ("दिल्ली।", "दिल्ली"), ("Киев - столица", "Киев"), ("Орёл", "Орел"), ("Αθήνα είναι", "ΑΘΗΝΑ"),
    ("Lodz", "Łódź"), ("Tromso", "Tromsø"), ("Giessen", "Gießen"), ("Diyarbakir", "Diyarbakır"), ("Da Nang", "Đà Nẵng"),
    ("Aland", "Åland"), ("Reykjavik", "Reykjavík"), ("Istanbul", "İstanbul"), ("Kenya, in", "Kenya"),
    ("Kenya's capital", "Kenya"), ("Kenya—a country", "Kenya"), ("the Gambia", "Gambia"), ("**Kenya**", "Kenya"),
    ("«Paris»", "Paris"), ("Nairobi\u200b", "Nairobi"), ("Sa\u0303o Paulo", "São Paulo"), ("-40", "−40"),
    ("$40", "40"),
    ("- 40", "40"), ("3.", "3"), ("3. It", "3"), ("3 cats", "3"), ("July 4 1776", "July 4"), ("–40", "−40"), ("10%",
    "10"), ("10, in", "10"), ("1,000", "1,000"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "accepted"), ANOTHER_NAME)
def test_a_name_that_goes_on_is_another(said: str, accepted: str) -> None:
    assert not is_correct(said, [accepted])
    assert is_correct(said, [said]), "itself it is"


@pytest.mark.parametrize(("said", "accepted"), SAME_NAME)
def test_what_does_not_count(said: str, accepted: str) -> None:
    assert is_correct(said, [accepted])
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert is_correct(unicodedata.normalize(form, said), [unicodedata.normalize(form, accepted)]), form


@pytest.mark.parametrize(
    ("said", "accepted", "right"),
    [
        ("東京。", "東京", True), ("«Paris».", "Paris", True), ("Paris!", "Paris", True), ("U.S.A.", "USA", True),
        ("1,000", "1000", True), ("-40", "−40", True), ("(-40)", "-40", True), ("$40", "40", True),
        ("C++", "C", False), ("C#", "C", False), ("3.5", "35", False), ("1,5", "15", False), ("10:30", "1030", False),
        ("−40", "40", False), ("1984-85", "198485", False), ("バリ", "パリ", False),
    ],
)  # fmt: skip
def test_an_exact_match_keeps_what_makes_another_name(said: str, accepted: str, right: bool) -> None:
    assert exact_match(said, [accepted]) is right


def test_forms_of_a_letter_are_one_where_a_text_contains_a_name() -> None:
    assert contains_alias("It is Sa\u0303o Paulo", ["São Paulo"]) and not contains_alias("バリ", ["パリ"])


LETTERS = {
    "Latin": "abcdefgzéñłøß", "Cyrillic": "абвгдеёжзий", "Greek": "αβγδεζήθικ", "Arabic": "ابتثجحخدر",
    "Hebrew": "אבגדהוזחט", "Devanagari": "कखगघचजटडतनपम", "Thai": "กขคงจชซญดต", "Hangul": "가나다라마바사아",
    "Han": "東京北南西山川田中大", "Katakana": "アイウエオカキクケコ",
}  # fmt: skip
names = st.sampled_from(list(LETTERS)).flatmap(lambda script: st.text(LETTERS[script], min_size=2, max_size=6))
ends = st.sampled_from(["", ".", ",", "!", "\n", "。", ")", " (", "\u200b", "\u00ad", "\ufeff"])


@given(names, ends, st.sampled_from(["NFC", "NFD", "NFKD"]), st.sampled_from(["", " ", "the ", '"', "«", "\u200e"]))
def test_a_name_is_an_answer_to_itself(name: str, end: str, form: str, lead: str) -> None:
    said = unicodedata.normalize(form, lead + name + end)
    assert is_correct(said, [name]) and is_correct(name, [unicodedata.normalize(form, name)])
    assert plain(plain(name)) == plain(name) and folded(folded(said)) == folded(said)


@given(names, st.text("abcабв12 -.,'°", min_size=1, max_size=4), names)
def test_what_is_settled_stays_so(name: str, rest: str, more: str) -> None:
    own, following = plain(name), folded(rest)
    assume(is_settled(own, following))
    assert goes_on(own, following) == goes_on(own, following + folded(more))


PIECES = [
    *"ab-. ,'1",
    "Niger",
    "ia",
    "東京",
    "です",
    "パ",
    "\u309a",
    "\u0301",
    " B",
    "а",
    "Гвинея",
    " Бисау",
    "은",
    "\n",
]


@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), st.sampled_from(["Niger", "東京", "Гвинея", "パ", "1"])
)
def test_a_decided_start_stays_decided(pieces: list[str], name: str) -> None:
    texts = ["".join(pieces[:n]).lstrip() for n in range(1, len(pieces) + 1)]
    begun = next((text for text in texts if start_is_decided(text, [name])), None)
    assume(begun is not None and "\n" not in texts[-1].strip())
    assert is_correct(str(begun), [name]) == is_correct(texts[-1].strip(), [name])


def test_an_answer_has_the_room_that_it_takes(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact copies of long answers are right under every scorer; short ones are generated no further than before."""
    long = "The Hitchhiker's Guide to the Galaxy and the Restaurant at the End of the Universe, in five volumes"
    facts = pd.DataFrame({"fact_id": ["a", "b"], "subject": ["Adams", "Nairobi"], "answers": [[long], ["Kenya"]]})
    prompts = make_prompts(facts.assign(relation="r"), smollm2.tokenizer, "{subject} wrote")
    written = [smollm2.tokenizer.encode(f" {answer[0]}.\n") for answer in facts["answers"]]
    given: list[int] = []

    def copied(_hf: object, some: list[object], _eos: object, _lines: object, most: list[int]) -> list[list[int]]:
        given.extend(most)
        return [written[0 if prompt.fact_id == "a" else 1][:n] for prompt, n in zip(some, most, strict=True)]  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "_greedy", copied)
    for name, rule in SCORERS.items():
        given.clear()
        assert predict(smollm2, prompts, name)["correct"].tolist() == [True, True], name  # type: ignore[arg-type]
        assert sorted(given) == sorted(longest_answers(rule, smollm2.tokenizer, list(prompts)))
        assert min(given) == rule.new_tokens and max(given) > len(written[0]) - 2


@torch.inference_mode()
def test_a_row_leaves_its_batch_at_its_own_length(smollm2: LoadedModel) -> None:
    """Prompts of one length with answers of other lengths: each text is what the model writes for it alone."""
    facts = pd.DataFrame({"fact_id": list("abc"), "subject": ["Nairobi", "Nairobi", "Nairobi"]})
    answers = [["Kenya"], ["one two three four five six seven eight nine ten eleven twelve"], ["Kenya, in the east"]]
    prompts = make_prompts(
        facts.assign(relation="r", answers=answers), smollm2.tokenizer, "Once upon a time in {subject},"
    )
    together = predict(smollm2, prompts)["prediction"].tolist()
    alone = [predict(smollm2, [prompt])["prediction"].item() for prompt in prompts]
    assert together == alone and len(together[1]) > len(together[0]) and together[1].startswith(together[0])


def test_an_alias_that_two_facts_share_is_neithers() -> None:
    """Whichever stands first; a text that is right for the fact asked is its own right answer."""
    facts = [["Republic of the Congo", "Congo"], ["DR Congo", "Congo"], ["Kenya"]]
    for order in (facts, facts[::-1]):
        named = Named(order, SCORERS["answer_start"])
        assert named("Congo.") == "dr congo / republic of the congo"
        assert named.given("Congo.", facts[0]) == "republic of the congo" != named.given("Congo.", facts[1])
        assert named.given("Congo.", facts[2]) == named("Congo.") and named("Kenya, in") == "kenya"
        assert named.of_alias("congo") == named("Congo") and named.of_alias("Peru") == "peru"
    burma = [["Burma", "Myanmar"], ["Myanmar", "Burma"]]
    assert {Named(order, SCORERS["answer_start"])("Myanmar") for order in (burma, burma[::-1])} == {"burma"}
