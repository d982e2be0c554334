"""Tokens of a stretch of text, by character offsets.

The subject's place in the text is known from its template, so a span is never searched for: tokens belong to it
when their character offsets overlap it. That holds for byte-level BPE (several tokens on one character),
SentencePiece and added prefix spaces alike. Decoding and joining tokens does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from subjattn.errors import BadInput, SpanNotFound
from subjattn.prompts.style import check_template, template_fields, text_before


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 4096
"""Texts tokenized at a time, which bounds memory."""


class Encoded(NamedTuple):
    """A text's tokens, special tokens at the end left out, and the characters each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    """Tokens whose characters overlap `[start, stop)`, as a half-open span; None if there are none.

    Example:
        >>> token_span([(0, 0), (0, 4), (4, 5), (5, 9), (9, 13)], 6, 13)  # "City: Nairobi" behind a BOS
        (3, 5)
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    return (inside[0], inside[-1] + 1) if inside else None


def shares_edge(text: str, offsets: Sequence[tuple[int, int]], span: tuple[int, int], start: int, stop: int) -> bool:
    """Whether the span's tokens hold characters outside `[start, stop)` other than white space."""
    first, last = offsets[span[0]][0], offsets[span[1] - 1][1]
    return bool(text[first:start].strip() or text[stop:last].strip())


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise BadInput(
            "the tokenizer gives no character offsets, without which a subject's tokens cannot be found "
            "exactly: load it with use_fast=True"
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> Iterator[Encoded]:
    """Tokens and offsets of each text; BOS as the tokenizer adds it where `special`, nothing at the end."""
    for start in range(0, len(texts), BATCH):
        found = tokenizer(
            list(texts[start : start + BATCH]),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            add_special_tokens=special,
        )
        for ids, offsets, mask in zip(
            found["input_ids"], found["offset_mapping"], found["special_tokens_mask"], strict=True
        ):
            end = len(ids)
            while special and end and mask[end - 1]:
                end -= 1
            yield Encoded(ids[:end], offsets[:end])


def subject_spans(facts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> pd.DataFrame:
    """Tokens of every subject in its question, without making prompts: columns `start`, `stop`, `shared_edge`.

    Args:
        facts: a table of facts.
        tokenizer: a fast one.
        template: a text with `{subject}`; by default each fact's own question.

    Raises:
        BadInput: a fact without a question, or without a subject.
        SpanNotFound: a subject that no token covers; the message names the fact.
    """
    check_tokenizer(tokenizer)
    if template is not None and template_fields(check_template(template)) != {"subject"}:
        raise BadInput(
            f"template {template!r} must contain {{subject}}; without a template each fact's question is asked"
        )
    found: list[tuple[int, int, bool]] = []
    columns = (facts[name].tolist() for name in ("fact_id", "subject", "question"))
    asked: list[tuple[str, str, int, int]] = []
    for fact_id, subject, question in zip(*columns, strict=True):
        text = question if template is None else template
        if subject is None or text is None:
            raise BadInput(f"fact {fact_id} has no {'subject' if subject is None else 'question'}: it has no span")
        start = len(text_before(text))
        asked.append((fact_id, text.format(subject=subject), start, start + len(subject)))
    encoded = encode(tokenizer, [text for _, text, _, _ in asked])
    for (fact_id, text, start, stop), (_, offsets) in zip(asked, encoded, strict=True):
        span = token_span(offsets, start, stop)
        if span is None:
            raise SpanNotFound(f"fact {fact_id}: no token of {text!r} covers the subject {text[start:stop]!r}")
        found.append((*span, shares_edge(text, offsets, span, start, stop)))
    return pd.DataFrame(found, columns=["start", "stop", "shared_edge"], index=facts.index)
