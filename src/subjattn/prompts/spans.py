"""Tokens of a stretch of text, by character offsets.

The subject's place in the text is known from its template, so a span is never searched for: tokens belong to it
when their character offsets overlap it. That holds for byte-level BPE (several tokens on one character),
SentencePiece and added prefix spaces alike. Decoding and joining tokens does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from subjattn.errors import BadInput, SpanNotFound
from subjattn.facts.names import broken
from subjattn.facts.table import check_table
from subjattn.prompts.style import check_template, template_fields, text_before


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 4096
"""Texts tokenized at a time, which bounds memory."""


NOWHERE = (-1, -1)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoded(NamedTuple):
    """A text's tokens, special tokens at the end left out, and the characters each stands for.

    A token that the tokenizer adds, such as BOS, stands for none, and is `NOWHERE`.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


def token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    """Tokens whose characters overlap `[start, stop)`, as a half-open span; None if there are none.

    A token without characters belongs to the span where it stands inside it.

    Example:
        >>> token_span([(0, 0), (0, 4), (4, 5), (5, 9), (9, 13)], 6, 13)  # "City: Nairobi" behind a BOS
        (3, 5)
        >>> token_span([(0, 4), (5, 5), (5, 9)], 4, 9)
        (1, 3)
    """
    inside = [i for i, (a, b) in enumerate(offsets) if (a < stop and b > start if b > a else start < a < stop)]
    return (inside[0], inside[-1] + 1) if inside else None


def find_span(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    offsets: Sequence[tuple[int, int]],
    start: int,
    stop: int,
    fact_id: object,
) -> tuple[int, int]:
    """Tokens of the subject that stands at `[start, stop)` of a text.

    Raises:
        SpanNotFound: no token covers the subject, or a token without characters may be a part of it or not: it
            stands at an edge of a subject whose characters the other tokens do not cover.
    """
    span, name = token_span(offsets, start, stop), text[start:stop]
    left = max((i for i, (a, b) in enumerate(offsets) if a < b <= start), default=-1)
    right = min((i for i, (a, b) in enumerate(offsets) if b > a >= stop), default=len(offsets))
    inside = range(*(span or (0, 0)))
    around = [i for i in range(left + 1, right) if i not in inside]
    at_edges = [offsets[i][0] for i in around if offsets[i][0] == offsets[i][1] and offsets[i] != NOWHERE]
    covered = {at for a, b in offsets for at in range(max(a, start), min(b, stop))}
    if at_edges and any(not char.isspace() for at, char in enumerate(name, start) if at not in covered):
        who = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        raise SpanNotFound(
            f"fact {fact_id}: the tokenizer {who!r} gives tokens no characters of the subject {name!r} "
            f"(offsets ({at_edges[0]}, {at_edges[0]})), so its tokens are not known: update 'tokenizers', or save the "
            "tokenizer without 'ignore_merges'"
        )
    if span is None:
        raise SpanNotFound(f"fact {fact_id}: no token of {text!r} covers the subject {name!r}")
    return span


def shares_edge(text: str, offsets: Sequence[tuple[int, int]], span: tuple[int, int], start: int, stop: int) -> bool:
    """Whether the span's tokens hold characters outside `[start, stop)` other than white space."""
    first, last = offsets[span[0]][0], offsets[span[1] - 1][1]
    return bool(text[first:start].strip() or text[stop:last].strip())


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not say which characters a token stands for."""
    if not hasattr(tokenizer, "is_fast"):
        raise BadInput(f"the tokenizer is a {type(tokenizer).__name__}: give the model's own, model.tokenizer")
    if not tokenizer.is_fast:
        raise BadInput(
            "the tokenizer gives no character offsets, without which a subject's tokens cannot be found "
            "exactly: load it with use_fast=True"
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> Iterator[Encoded]:
    """Tokens and offsets of each text; BOS as the tokenizer adds it where `special`, nothing at the end.

    Raises:
        BadInput: a text holds half of a surrogate pair.
    """
    for text in texts:
        if _SURROGATE.search(text):
            raise BadInput(f"the text {text[-200:]!r} holds {broken(text)}")
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
            places = [
                NOWHERE if added and place[0] == place[1] else place for place, added in zip(offsets, mask, strict=True)
            ]
            yield Encoded(ids[:end], places[:end])


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
    check_table(facts, "fact_id", "subject", "question")
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
        span = find_span(tokenizer, text, offsets, start, stop, fact_id)
        found.append((*span, shares_edge(text, offsets, span, start, stop)))
    return pd.DataFrame(found, columns=["start", "stop", "shared_edge"], index=facts.index)
