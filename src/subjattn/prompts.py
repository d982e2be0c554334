"""Prompts: one fact asked in one way, with the exact tokens of its subject and answer.

Positions are token indices counted from 0 at the first token of the prompt, the BOS token included
where the tokenizer adds one; batching never changes them. A span is half-open: `(start, stop)`.

The subject's place in the text is known from the template, so a span is never searched for: tokens
belong to it when their character offsets overlap it. That holds for byte-level BPE (several tokens
on one character), SentencePiece and added prefix spaces alike. Decoding and joining tokens does not.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import pandas as pd

from subjattn.errors import BadInput, SpanNotFound


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("before_subject", "subject_first", "subject_middle", "subject_last", "after_subject", "prediction")

TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "country": {
        "list": "City: {subject}\nCountry:",
        "sentence": "The city of {subject} is located in the country of",
    },
}
"""Built-in styles by relation."""


@dataclass(frozen=True)
class Prompt:
    """One fact asked in one way.

    `ids` holds the prompt followed by the answer; `prediction` is the position that predicts the
    answer's first token, so the prompt is `ids[: prediction + 1]`.
    """

    fact_id: str
    subject: str
    text: str
    answers: tuple[str, ...]
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    prediction: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.ids[self.prediction + 1 :]

    @property
    def predicting(self) -> range:
        """Positions that predict an answer token, the prediction position first."""
        return range(self.prediction, len(self.ids) - 1)

    @property
    def subject_positions(self) -> range:
        return range(*self.subject_span)

    def role(self, name: str) -> range:
        """Positions of a role in the prompt; empty where the prompt has none.

        A subject of one token is `subject_last` alone, one of two tokens has no `subject_middle`.
        """
        start, stop = self.subject_span
        return {
            "before_subject": range(start),
            "subject_first": range(start, min(start + 1, stop - 1)),
            "subject_middle": range(start + 1, stop - 1),
            "subject_last": range(stop - 1, stop),
            "after_subject": range(stop, self.prediction),
            "prediction": range(max(stop, self.prediction), self.prediction + 1),
        }[name]


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts that ask different facts with one template."""

    template: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return PromptSet(self.template, self.prompts[index])
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def make_prompts(facts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, template: str) -> PromptSet:
    """Ask every fact with one template, e.g. ``"City: {subject}\\nCountry:"``.

    The first of a fact's `answers` is the one whose tokens are scored; it follows the prompt after
    one space.

    Raises:
        BadInput: the template has not exactly one `{subject}`, ends in white space, or the tokenizer
            gives no character offsets.
        SpanNotFound: a subject or answer does not map onto tokens; the message names the fact.
    """
    check_template(template)
    if not tokenizer.is_fast:
        raise BadInput(
            "the tokenizer gives no character offsets, without which a subject's tokens cannot be found "
            "exactly: load it with use_fast=True"
        )
    return PromptSet(template, tuple(_make_prompt(fact, tokenizer, template) for fact in facts.to_dict("records")))  # type: ignore[arg-type]


def few_shot(template: str, demonstrations: Sequence[tuple[str, str]]) -> str:
    """A template behind demonstrations (subject, answer), each asked with the same template."""
    asked = "".join(f"{template.format(subject=subject)} {answer}\n\n" for subject, answer in demonstrations)
    return asked.replace("{", "{{").replace("}", "}}") + template


def subject_lengths(subjects: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Tokens of each subject where the template puts it."""
    start = len(_text_before_subject(template))
    encoded = tokenizer([template.format(subject=subject) for subject in subjects], return_offsets_mapping=True)
    spans = [
        token_span(offsets, start, start + len(subject))
        for offsets, subject in zip(encoded["offset_mapping"], subjects, strict=True)
    ]
    return [0 if span is None else span[1] - span[0] for span in spans]


def check_template(template: str) -> str:
    """The template itself, if it can be asked; BadInput otherwise."""
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise BadInput(f"template {template!r} cannot be read ({error}): write a literal brace as '{{{{'") from None
    if fields != [("subject", "", None)]:
        raise BadInput(f"template {template!r} must contain {{subject}} exactly once and no other field")
    if template != template.rstrip():
        raise BadInput(f"template {template!r} ends in white space: leave it out, the answer brings its own space")
    return template


def _make_prompt(fact: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, template: str) -> Prompt:
    subject, fact_id = str(fact["subject"]), str(fact["fact_id"])
    answers = tuple(str(answer) for answer in fact["answers"])  # type: ignore[attr-defined]
    before = _text_before_subject(template)
    text = template.format(subject=subject)

    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    prompt_ids = _without_trailing_special(encoded["input_ids"], encoded["special_tokens_mask"])
    whole = tokenizer(f"{text} {answers[0]}", return_special_tokens_mask=True)
    ids = _without_trailing_special(whole["input_ids"], whole["special_tokens_mask"])

    span = token_span(encoded["offset_mapping"], len(before), len(before) + len(subject))
    if span is None:
        raise SpanNotFound(f"fact {fact_id}: no token of {text!r} covers the subject {subject!r}")
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise SpanNotFound(
            f"fact {fact_id}: the tokens of the answer {answers[0]!r} merge with those of {text!r}; "
            "end the template where a word ends"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise BadInput(f"fact {fact_id}: the prompt starts with two BOS tokens; leave BOS out of the template")
    return Prompt(
        fact_id=fact_id,
        subject=subject,
        text=text,
        answers=answers,
        ids=tuple(ids),
        tokens=tuple(str(tokenizer.decode([token])) for token in ids),
        subject_span=span,
        prediction=len(prompt_ids) - 1,
    )


def token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    """Tokens whose characters overlap `[start, stop)`, as a half-open span; None if there are none.

    Example:
        >>> token_span([(0, 0), (0, 4), (4, 5), (5, 9), (9, 13)], 6, 13)  # "City: Nairobi" behind a BOS
        (3, 5)
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    return (inside[0], inside[-1] + 1) if inside else None


def _text_before_subject(template: str) -> str:
    before = ""
    for literal, field, _, _ in string.Formatter().parse(template):
        before += literal
        if field is not None:
            break
    return before


def _without_trailing_special(ids: list[int], special: list[int]) -> list[int]:
    end = len(ids)
    while end and special[end - 1]:
        end -= 1
    return ids[:end]


def swap_subjects(prompts: Sequence[Prompt], rng: np.random.Generator) -> list[tuple[Prompt, Prompt]]:
    """Pair each prompt (clean) with one that names another subject in its place (corrupt).

    Both have the same number of tokens in every part of the prompt and different first answer
    tokens, so that positions align and a logit difference exists (symmetric token replacement,
    Zhang & Nanda 2023). Prompts without a partner are left out; each prompt is clean at most once.
    """
    pairs = []
    for clean in prompts:
        partners = [
            other
            for other in prompts
            if aligned(clean, other)
            and other.subject.casefold() != clean.subject.casefold()
            and other.answer_ids[0] != clean.answer_ids[0]
            and not {answer.casefold() for answer in other.answers} & {answer.casefold() for answer in clean.answers}
        ]
        if partners:
            pairs.append((clean, partners[int(rng.integers(len(partners)))]))
    return pairs


def aligned(a: Prompt, b: Prompt) -> bool:
    """Whether two prompts have the same tokens outside their subjects, at the same positions."""
    start, stop = a.subject_span
    end = a.prediction + 1
    return (b.subject_span, b.prediction) == (a.subject_span, a.prediction) and (
        a.ids[:start] + a.ids[stop:end] == b.ids[:start] + b.ids[stop:end]
    )
