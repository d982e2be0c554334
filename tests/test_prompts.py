"""Spans, templates and subject swaps."""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from subjattn.errors import BadInput, SpanNotFound
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.models import LoadedModel
from subjattn.prompts import (
    ROLES,
    Style,
    check_template,
    make_prompts,
    subject_lengths,
    subject_spans,
    swap_subjects,
    token_span,
)
from subjattn.prompts.make import with_answer
from subjattn.prompts.spans import find_span


LIST = TEMPLATES["country"]["list"]
SENTENCE = TEMPLATES["country"]["sentence"]
NAMES = ["Nairobi", "São Paulo", "東京", "Kraków", "L'Aquila", 'St. "X"', "Beyoncé", "{odd}", "ʻEwa Beach", "a"]


def facts_of(subjects: list[str], answer: str = "Kenya") -> pd.DataFrame:
    return pd.DataFrame(
        {"fact_id": [f"f{i}" for i in range(len(subjects))], "subject": subjects, "answers": [[answer]] * len(subjects)}
    )


@pytest.mark.parametrize(
    "template", [LIST, SENTENCE, "{subject}: a city in", 'Of "{subject}" (city):', "{{x}} {subject} is in"]
)
def test_span_decodes_to_the_subject(smollm2: LoadedModel, template: str) -> None:
    for prompt in make_prompts(facts_of(NAMES), smollm2.tokenizer, template):
        start, stop = prompt.subject_span
        decoded = smollm2.tokenizer.decode(prompt.ids[start:stop])
        assert prompt.subject in decoded
        assert len(decoded.strip()) <= len(prompt.subject) + 2, "only punctuation that shares a token may be added"
        assert smollm2.tokenizer.decode(prompt.ids[: prompt.prediction + 1]) == prompt.text
        assert smollm2.tokenizer.decode(prompt.answer_ids) == " Kenya"


def test_subject_that_occurs_twice_is_the_templates(smollm2: LoadedModel) -> None:
    (prompt,) = make_prompts(facts_of(["City"]), smollm2.tokenizer, LIST)
    assert prompt.tokens[prompt.subject_span[0]] == " City"
    assert prompt.subject_span == (2, 3)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12))
def test_any_name_has_its_span(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Byte-level tokens: the span's text holds the name, and the tokens beside it hold none of it."""
    (prompt,) = make_prompts(facts_of([name]), tokenizer, LIST)
    start, stop = prompt.subject_span
    assert name in tokenizer.decode(prompt.ids[start:stop])
    assert tokenizer.decode(prompt.ids[:start]) in ("City:", "City: ")
    assert tokenizer.decode(prompt.ids[stop : prompt.prediction + 1]) == "\nCountry:"


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.integers(0, 20),
    st.integers(1, 10),
)
def test_token_span_is_what_overlaps(widths: list[int], start: int, length: int) -> None:
    edges = np.concatenate([[0], np.cumsum(widths)])
    offsets = [(int(a), int(b)) for a, b in pairwise(edges)]
    span = token_span(offsets, start, start + length)
    touching = {i for i, (a, b) in enumerate(offsets) if set(range(a, b)) & set(range(start, start + length))}
    assert touching == (set() if span is None else {i for i in range(*span) if widths[i]})
    empty = {i for i, (a, b) in enumerate(offsets) if a == b and start < a < start + length}
    assert empty <= (set() if span is None else set(range(*span)))


class Given:
    """A tokenizer of given offsets, the answer's token behind them."""

    is_fast, bos_token_id, name_or_path = True, 7, "some/tokenizer"

    def __init__(self, offsets: list[tuple[int, int]], bos: bool = False) -> None:
        self.offsets, self.bos = offsets, bos

    def __call__(self, texts: list[str], **kwargs: bool) -> dict[str, list]:
        found: dict[str, list] = {"input_ids": [], "offset_mapping": [], "special_tokens_mask": []}
        for text in texts:
            asked = [*[(0, 0)] * self.bos, *self.offsets]
            more = [(len(text) - 5, len(text))] if text.endswith("Kenya") else []
            ids = [7] * self.bos + list(range(10, 10 + len(self.offsets) + len(more)))
            found["input_ids"].append(ids)
            found["offset_mapping"].append([*asked, *more])
            found["special_tokens_mask"].append([1] * self.bos + [0] * (len(ids) - self.bos))
        return found

    def decode(self, ids: list[int]) -> str:
        return str(ids)


@pytest.mark.parametrize(
    ("template", "offsets", "bos", "span"),
    [
        ("xxxx{subject} is", [(0, 4), (5, 5), (5, 9), (9, 12)], False, (1, 3)),
        ("{subject} is", [(0, 5), (5, 8)], True, (1, 2)),
        ("of {subject} is", [(0, 2), (2, 3), (3, 8), (8, 11)], False, (2, 3)),
        ("of {subject} is", [(0, 2), (3, 3), (3, 8), (8, 11)], False, (2, 3)),
        ("of {subject} is", [(0, 2), (3, 3), (8, 11)], False, None),
        ("of {subject} is", [(0, 2), (2, 2), (8, 11)], False, None),
        ("of {subject} is", [(0, 2), (2, 2), (5, 8), (8, 11)], False, None),
        ("of {subject} is", [(0, 2), (3, 5), (8, 8), (8, 11)], False, None),
        ("{subject} is", [(0, 0), (5, 8)], True, None),
        ("of {subject} is", [(0, 0), (2, 2), (8, 8)], False, None),
    ],
)
def test_tokens_without_characters(
    template: str, offsets: list[tuple[int, int]], bos: bool, span: tuple[int, int] | None
) -> None:
    """The span holds every token of the name "Nairo", or the tokenizer is named and refused."""
    tokenizer, facts = Given(offsets, bos), facts_of(["Nairo"]).assign(question=template)
    if span is None:
        for ask in (make_prompts, subject_lengths, lambda *args: subject_spans(facts, tokenizer)):
            with pytest.raises(SpanNotFound, match="fact f0: the tokenizer 'some/tokenizer' gives tokens no char"):
                ask(facts, tokenizer, template)  # type: ignore[operator]
    else:
        (prompt,) = make_prompts(facts, tokenizer, template)  # type: ignore[arg-type]
        assert prompt.span == span
        assert subject_lengths(facts, tokenizer, template) == [span[1] - span[0]]  # type: ignore[arg-type]


def test_roles_partition_the_prompt(tokenizer: PreTrainedTokenizerFast, cities: pd.DataFrame) -> None:
    for template in (LIST, SENTENCE, "{subject} is in"):
        for prompt in make_prompts(draw(cities, 30), tokenizer, template):
            positions = [position for role in ROLES for position in prompt.role(role)]
            assert positions == list(range(prompt.prediction + 1))
            assert len(prompt.role("subject_last")) == len(prompt.role("prediction")) == 1
            inside = [p for role in ROLES if role.startswith("subject") for p in prompt.role(role)]
            assert inside == list(prompt.subject_positions)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("City:", "exactly once"),
        ("{subject} {subject}", "exactly once"),
        ("{subject} and {other} in", "exactly once"),
        ("{subject!r} is in", "exactly once"),
        ("{subject} is in ", "ends in white space"),
        ("{subject} is {", "cannot be read"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_template(template)


def test_answer_that_merges_with_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    class Merging:
        """A tokenizer whose last prompt token changes when an answer follows."""

        is_fast, bos_token_id = True, None

        def __call__(self, texts: list[str], **kwargs: bool) -> dict[str, list]:
            made = []
            for words in (text.split(" ") for text in texts):
                made.append([len(words) if i == len(words) - 1 else i for i in range(len(words))])
            return {
                "input_ids": made,
                "offset_mapping": [[(0, 99)] * len(ids) for ids in made],
                "special_tokens_mask": [[0] * len(ids) for ids in made],
            }

        def decode(self, ids: list[int]) -> str:
            return str(ids)

    with pytest.raises(SpanNotFound, match="fact f0: the tokens of the answer 'Kenya' merge"):
        make_prompts(facts_of(["Nairobi"]), Merging(), LIST)


def test_double_bos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadInput, match="two BOS tokens"):
        make_prompts(facts_of(["Nairobi"]), tokenizer, "<s><s>{subject} is in")


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="use_fast=True"):
        make_prompts(facts_of(["Nairobi"]), Slow(), LIST)


def test_lengths_are_those_of_the_spans(tokenizer: PreTrainedTokenizerFast, cities: pd.DataFrame) -> None:
    some = draw(cities, 100)
    lengths = subject_lengths(some, tokenizer, SENTENCE)
    assert lengths == [len(prompt.subject_positions) for prompt in make_prompts(some, tokenizer, SENTENCE)]


def test_a_subject_is_not_swapped_for_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    facts = facts_of(["Lyon", "lyon", "Lima"]).assign(answers=[["France"], ["Gaul"], ["Peru", "France"]])
    pairs = swap_subjects(make_prompts(facts, tokenizer, LIST), np.random.default_rng(0))
    assert {(clean.subject, corrupt.subject) for clean, corrupt in pairs} <= {("lyon", "Lima"), ("Lima", "lyon")}


def test_swapped_subjects_align(tokenizer: PreTrainedTokenizerFast, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 80), tokenizer, SENTENCE)
    pairs = swap_subjects(prompts, np.random.default_rng(0))
    assert len(pairs) > 20
    assert len({clean.fact_id for clean, _ in pairs}) == len(pairs)
    for clean, corrupt in pairs:
        assert clean.subject != corrupt.subject
        assert clean.subject_span == corrupt.subject_span
        assert clean.answer_ids[0] != corrupt.answer_ids[0]
        start, stop = clean.subject_span
        end = clean.prediction + 1
        assert (clean.ids[:start], clean.ids[stop:end]) == (corrupt.ids[:start], corrupt.ids[stop:end])


@pytest.mark.parametrize(
    ("offsets", "found"),
    [
        ([(0, 4), (4, 4), (4, 9)], (2, 3)),
        ([(0, 4), (5, 5), (5, 9)], (1, 3)),
        ([(-1, -1), (0, 4), (4, 9)], (2, 3)),
        ([(0, 4), (0, 0), (5, 9)], None),
        ([(0, 4), (4, 8), (0, 0)], None),
    ],
)
def test_a_token_without_a_place_is_in_a_name_or_refused(
    offsets: list[tuple[int, int]], found: tuple[int, int] | None, tokenizer: Any
) -> None:
    """The name stands at 4 to 9; tokenizers that write (0, 0) say nothing of where a token stands."""
    if found is None:
        with pytest.raises(SpanNotFound, match="gives tokens no characters of the subject 'efghi'"):
            find_span(tokenizer, "abcdefghi", offsets, 4, 9, "f")
    else:
        assert find_span(tokenizer, "abcdefghi", offsets, 4, 9, "f") == found


def test_a_chat_that_ends_in_line_breaks_is_followed_by_the_answers_own_tokens(smollm2: LoadedModel) -> None:
    """Together, the last line break would be another token than the one that the model is given."""
    tokenizer = deepcopy(smollm2.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    facts = pd.DataFrame({"fact_id": ["a"], "subject": ["Kenya"], "answers": [["Nairobi"]], "relation": ["r"]})
    style = Style(template="The capital of {subject}?", chat=True, chat_template_kwargs={"enable_thinking": False})
    (prompt,) = make_prompts(facts, tokenizer, style)
    alone = tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert list(prompt.ids[: prompt.prediction + 1]) == alone
    assert list(prompt.answer_ids) == tokenizer("Nairobi", add_special_tokens=False).input_ids
    assert with_answer(tokenizer, prompt, "Lima").ids[: len(alone)] == tuple(alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [[]]}, "fact a: its answers are [], and no texts in a list"),
        ({"answers": [None]}, "fact a: its answers are None, and no texts in a list"),
        ({"subject": [5]}, "fact a: its subject is 5, and no text"),
    ],
)
def test_facts_that_are_none_are_named(change: dict[str, Any], message: str, tokenizer: Any) -> None:
    facts = pd.DataFrame({"fact_id": ["a"], "subject": ["Kenya"], "answers": [["Nairobi"]], "relation": ["r"]})
    with pytest.raises(BadInput, match=re.escape(message)):
        make_prompts(facts.assign(**change), tokenizer, "{subject} is")
    with pytest.raises(BadInput, match=r"the tokenizer is a str: give the model's own, model\.tokenizer"):
        make_prompts(facts, "smollm2", "{subject} is")  # type: ignore[arg-type]
