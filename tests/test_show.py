"""What a model sees, as it is shown: one line, every character once, tokens marked."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from conftest import TRICKY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjattn.cli.app import decoded
from subjattn.facts import load_facts
from subjattn.prompts import Style, example, make_prompts, notice_relations, on_line, pieces
from subjattn.prompts.show import _said


NAMES = [*TRICKY, "Phở", "Pho\u031b\u0309", "नई दिल्ली", "กรุงเทพ", "👩‍👩‍👧", "Ünder\u0308"]
ALPHABET = st.text(st.sampled_from("aé\u0309\u031b東ि्न👩 -"), min_size=1, max_size=8)


def facts_of(*names: str, relation: str = "country") -> pd.DataFrame:
    given = {"subject": names, "answer": ["x"] * len(names), "relation": relation}
    return load_facts(pd.DataFrame(given))


@given(name=ALPHABET.filter(str.strip))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_nothing_is_lost_or_shown_twice(tokenizer: Any, name: str) -> None:
    """Marks taken off, the pieces of a prompt are its text; each token is in one of them."""
    for subject in (name, *NAMES[:1]):
        (prompt,) = make_prompts(facts_of(subject), tokenizer, "City: {subject}\nCountry:")
        shown = pieces(prompt, tokenizer)
        assert [at for piece in shown for at in range(piece.start, piece.stop)] == list(range(len(prompt)))
        text = "".join(re.sub(r"^◌|×\d+$", "", piece.text) for piece in shown)
        assert text == on_line(f"{prompt.text} x") and "\ufffd" not in text
        inside = [at for piece in shown if piece.inside for at in range(piece.start, piece.stop)]
        assert inside == list(prompt.subject_positions)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_names_read_right_by_every_tokenizer(kinds: dict[str, Any], kind: str) -> None:
    """Tokens that do not decode to their own text (a leading space of SentencePiece) lose spaces at most."""
    prompts = make_prompts(facts_of(*NAMES[:10]), kinds[kind], "In what country is {subject}?")
    for prompt in prompts:
        text = "".join(re.sub(r"^◌|×\d+$", "", piece.text) for piece in pieces(prompt, kinds[kind]))
        if "<unk>" not in text:
            assert text.replace(" ", "") == f"{prompt.text} x".replace(" ", "")


def test_combining_characters_do_not_land_on_brackets(tokenizer: Any) -> None:
    (prompt,) = make_prompts(facts_of("Pho\u031b\u0309"), tokenizer, "City: {subject}\nCountry:")
    inside = [piece.text for piece in pieces(prompt, tokenizer) if piece.inside]
    assert inside[-2:] == ["◌\u031b×2", "◌\u0309×2"]


def test_a_line_is_one_line() -> None:
    assert on_line("City: A\n\tB\r\u2028\\é\u0301") == "City: A⏎⇥B\\r\\u2028\\é\u0301"
    style = Style(template="City: {subject}\nCountry:", shots=2)
    assert example(style, facts_of("Bonn")) == "City: Bonn⏎Country: → x (shots 2)"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"City: {subject}\nCountry:", "City: {subject}\nCountry:"),
        (r"a\tb\\n\q", "a\tb\\n\\q"),
        ("City: {subject}\nCountry:", "City: {subject}\nCountry:"),
        ("ends in \\", "ends in \\"),
    ],
)
def test_breaks_written_in_a_shell(typed: str, meant: str) -> None:
    assert decoded(typed) == meant


def test_one_template_for_several_relations_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    _said.clear()
    facts = pd.concat(
        [facts_of("Kenya", "Peru", relation="capital"), facts_of("the light bulb", relation="inventor")],
        ignore_index=True,
    )
    for style in ("The capital of {subject} is", "The capital of {subject} is", "{question}", "question"):
        notice_relations(style, facts)
    notice_relations("The capital of {subject} is", facts[:2])
    assert [record.getMessage() for record in caplog.records] == [
        'note: one template asks 2 relations (capital, inventor): "The capital of the light bulb is"; give {question}, '
        "or facts of one relation"
    ]
