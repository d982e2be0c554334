"""How names are compared, and which characters of them nobody can see."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjattn.facts.names import broken, plain_name, spaced, taken_off, visible


NAMES = [
    "São Paulo",
    "Kraków",
    "Łódź",
    "Ταϊβάν",
    "Санкт-Петербург",
    "القاهرة",
    "ירושלים",
    "नई दिल्ली",
    "กรุงเทพ",
    "서울",
    "東京",
    "トウキョウ",
    "パリ",
    "Côte d'Ivoire",
    "Hà Nội",
]
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
INVISIBLE = "\u200b\ufeff\u00ad\u200e\u200f\u2060\u061c\u202a\u202c\u2066\u2069\u034f\u180e\u3164\U000e0041\ufe0f"
MEANT = [
    "می\u200cخواهم",
    "نامه\u200cای",
    "क\u094d\u200dष",
    "ශ්\u200dරී",
    "അവന\u0d4d\u200d",
    "👩\u200d🚀",
    "👩🏽\u200d🚀",
    "❤\ufe0f",
    "1\ufe0f\u20e3",
    "葛\U000e0100城",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "ភ្នំ\u200bពេញ",
    "ᠮᠣᠩᠭᠣᠯ\u180eᠠ",
]


@given(st.sampled_from(NAMES), st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_a_name_is_one_in_every_normal_form(name: str, a: str, b: str) -> None:
    assert plain_name(unicodedata.normalize(a, name)) == plain_name(unicodedata.normalize(b, name.upper()))


@given(st.text())
def test_comparing_is_stable(text: str) -> None:
    plain = plain_name(text)
    assert plain_name(plain) == plain
    assert {plain_name(unicodedata.normalize(form, text)) for form in FORMS} == {plain}
    assert plain == " ".join(plain.split())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Ｔｏｋｙｏ", "Tokyo"),
        ("ﾄｳｷｮｳ", "トウキョウ"),
        ("ﬁnland", "Finland"),
        ("Giessen", "Gießen"),
        ("Côte d’Ivoire", "Côte d'Ivoire"),
        ("Guinea‑Bissau", "Guinea-Bissau"),
        ("New\u00a0York", "new  york"),
        ("東\u3000京", "東 京"),
        ("Nai\u200brobi\ufeff", "Nairobi"),
        ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
    ],
)
def test_one_name(a: str, b: str) -> None:
    assert plain_name(a) == plain_name(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [("バリ", "パリ"), ("Łódź", "Lodz"), ("São Paulo", "Sao Paulo"), ("कि", "की"), ("Guinea-Bissau", "Guinea Bissau")],
)
def test_two_names(a: str, b: str) -> None:
    assert plain_name(a) != plain_name(b)


@given(st.sampled_from(NAMES), st.text(st.sampled_from(INVISIBLE), max_size=3), st.data())
def test_what_nobody_sees_is_taken_off(name: str, marks: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name)))
    marked = name[:at] + marks.replace("\ufe0f", "\u200b" if not name[:at].isascii() else "\ufe0f") + name[at:]
    if not any("\u0e00" <= char <= "\u0e7f" for char in name):
        assert visible(marked) == name
        assert bool(taken_off(marked)) == bool(marks)
    assert visible(f"{marks}{name}\u200b\u200c\u200d") == name or unicodedata.combining(name[-1]) == 9


@given(st.text())
def test_what_is_visible_stays_visible(text: str) -> None:
    once = visible(text)
    assert visible(once) == once
    assert plain_name(once) == plain_name(text)
    assert (taken_off(text) == []) == (spaced(once) == text)


@pytest.mark.parametrize("text", MEANT)
def test_what_means_something_stays(text: str) -> None:
    assert visible(text) == text and taken_off(text) == []
    assert visible(f"\u200d{text}\u200b") == text


@pytest.mark.parametrize("text", ["Auf\u200clage", "Nai\u200drobi", "東\u200c京", "کتاب\u200c", "Nairobi\ufe0f"])
def test_joiners_that_join_nothing_go(text: str) -> None:
    assert len(visible(text)) == len(text) - 1


def test_other_spaces_become_spaces() -> None:
    assert spaced("São\u00a0Paulo\u202f!\u3000山") == "São Paulo !\u3000山"
    assert taken_off("São\u00a0Pau\u200blo") == ["ZERO WIDTH SPACE", "NO-BREAK SPACE"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("\ud83d", "half of a surrogate"), ("S\ufffdo", "a character was lost"), ("a\x00", "U+0000"), ("a\nb", None)],
)
def test_what_is_no_text(text: str, said: str | None) -> None:
    found = broken(text)
    assert found is None if said is None else found is not None and said in found
