"""Ask facts in a style: the exact text, its tokens, and the place of the subject and of the answer in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from subjattn.errors import BadInput, SpanNotFound
from subjattn.facts.table import check_table
from subjattn.prompts.chat import in_chat
from subjattn.prompts.prefix import neutral_prefix, prefix_tokens
from subjattn.prompts.prompt import Prompt, PromptSet
from subjattn.prompts.show import notice_relations
from subjattn.prompts.spacing import answered
from subjattn.prompts.spans import Encoded, check_tokenizer, encode, find_span, shares_edge
from subjattn.prompts.style import CONCLUSION, REASONING, Style, demonstrations_of, shown_to


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDED = ("fact_id", "subject", "answers")
"""Columns that every table of facts has which is asked."""


class _Asked(NamedTuple):
    """A prompt's text, where its subject begins, and what stands before an answer (None: see `spacing`)."""

    text: str
    start: int | None
    lead: str | None = None

    def within(self, before: str, after: str = "", lead: str | None = None) -> _Asked:
        return _Asked(before + self.text + after, None if self.start is None else self.start + len(before), lead)

    def answered(self, answer: str) -> str:
        return answered(self.text, answer, self.lead)


def make_prompts(
    facts: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    style: str | Style,
    *,
    demonstrations: pd.DataFrame | None = None,
    reasoning: Mapping[str, str] | None = None,
) -> PromptSet:
    """Ask every fact in one style, e.g. ``"City: {subject}\\nCountry:"``, ``"late"`` or ``Style(…)``.

    The first of a fact's `answers` is the one whose tokens are scored. It follows the prompt after a space or at
    once, as its script and the characters before it ask for (see `subjattn.prompts.spacing`); in a chat as the
    template writes it. Where the subject occurs several times, as in demonstrations, its span is its place in the
    question that is asked.

    Args:
        facts: a table of facts: `fact_id`, `subject`, `answers`, and `relation` and `question` where the style
            needs them.
        tokenizer: a fast one.
        style: a template, the name of a built-in one, or a `Style`.
        demonstrations: the facts that a style with shots draws from.
        reasoning: by fact id, what the model thought (see `subjattn.measures.answers.reason`); a style with
            chain of thought then asks for the conclusion. Without it, its prompts end where the thinking begins.

    Raises:
        BadInput: the style does not fit the facts, or the tokenizer gives no character offsets.
        SpanNotFound: a subject or answer does not map onto tokens; the message names the fact.
    """
    check_table(facts, *NEEDED)
    if demonstrations is not None:
        check_table(demonstrations, *NEEDED, "relation")
    style = Style.of(style)
    check_tokenizer(tokenizer)
    notice_relations(style, facts)
    records: list[dict[str, Any]] = facts.to_dict("records")  # type: ignore[assignment]
    if style.chain_of_thought and reasoning is not None:
        missing = [fact["fact_id"] for fact in records if fact["fact_id"] not in reasoning]
        if missing:
            raise BadInput(f"fact {missing[0]}: there is no reasoning for it")
    asked = _ask(records, tokenizer, style, demonstrations, reasoning)
    special = not style.chat
    texts = [one.text for one in asked]
    answers = [one.answered(str(fact["answers"][0])) for one, fact in zip(asked, records, strict=True)]
    n_letters = [0 if fact.get("choices") is None else len(fact["choices"]) for fact in records]
    lettered = [one.answered(ascii_uppercase[i]) for one, n in zip(asked, n_letters, strict=True) for i in range(n)]
    letters = encode(tokenizer, lettered, special)
    decoded: dict[int, str] = {}
    prompts = []
    for fact, one, prompt, whole, n in zip(
        records, asked, encode(tokenizer, texts, special), encode(tokenizer, answers, special), n_letters, strict=True
    ):
        choices = [_own_tokens(tokenizer, one, prompt.ids, next(letters).ids, ascii_uppercase[i]) for i in range(n)]
        whole = Encoded(_own_tokens(tokenizer, one, prompt.ids, whole.ids, str(fact["answers"][0])), whole.offsets)
        for token in {*prompt.ids, *whole.ids} - decoded.keys():
            decoded[token] = str(tokenizer.decode([token]))
        prompts.append(_prompt(fact, one, prompt, whole.ids, choices, decoded, tokenizer))
        if style.prefix and prefix_tokens(one.text, prompt.offsets) != style.prefix:
            raise SpanNotFound(
                f"fact {fact['fact_id']}: the last of {style.prefix} tokens of neutral text merges with what follows"
            )
    return PromptSet(str(style), tuple(prompts))


def _own_tokens(
    tokenizer: PreTrainedTokenizerBase, asked: _Asked | Prompt, prompt: list[int], whole: list[int], answer: str
) -> list[int]:
    """Tokens of a prompt and its answer; in a chat that ends in white space those of each, as a model writes them.

    Together, the line breaks that end the prompt may be other tokens than the ones that it is given.
    """
    if not asked.text[-1:].isspace() or whole[: len(prompt)] == prompt:
        return whole
    (own,) = encode(tokenizer, [(asked.lead or "") + answer], False)
    return [*prompt, *own.ids]


def subject_lengths(facts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, style: str | Style) -> list[int]:
    """Tokens of each subject where the style's template puts it; 0 where there is none."""
    check_table(facts, *NEEDED)
    plain = Style.of(style).model_copy(update={"shots": 0, "prefix": 0, "chat": False, "chain_of_thought": False})
    asked = _ask(facts.to_dict("records"), tokenizer, plain, None, None)  # type: ignore[arg-type]
    lengths = []
    for one, fact_id, subject, encoded in zip(
        asked, facts["fact_id"], facts["subject"], encode(tokenizer, [one.text for one in asked]), strict=True
    ):
        if one.start is None:
            lengths.append(0)
            continue
        start, stop = find_span(tokenizer, one.text, encoded.offsets, one.start, one.start + len(subject), fact_id)
        lengths.append(stop - start)
    return lengths


def with_answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> Prompt:
    """The prompt with any other answer behind it, the only one that is accepted.

    Raises:
        SpanNotFound: the answer's tokens merge with the prompt's.
    """
    asked = prompt.ids[: prompt.prediction + 1]
    for special in (True, False):
        (encoded,) = encode(tokenizer, [answered(prompt.text, answer, prompt.lead)], special)
        whole = tuple(_own_tokens(tokenizer, prompt, list(asked), encoded.ids, answer))
        if whole[: len(asked)] == asked and len(whole) > len(asked):
            tokens = tuple(str(tokenizer.decode([token])) for token in whole[len(asked) :])
            before = prompt.tokens[: len(asked)]
            return replace(prompt, ids=whole, tokens=before + tokens, answers=(answer,))
    raise SpanNotFound(f"fact {prompt.fact_id}: the tokens of the answer {answer!r} merge with those of the prompt")


def first_token(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> int:
    """The first token of any answer behind a prompt; SpanNotFound where their tokens merge."""
    return with_answer(tokenizer, prompt, answer).answer_ids[0]


def _ask(
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    pool: pd.DataFrame | None,
    reasoning: Mapping[str, str] | None,
) -> list[_Asked]:
    candidates = {
        relation: demonstrations_of(style, relation, pool)
        for relation in sorted({fact["relation"] for fact in records} if style.shots else ())
    }
    prefix = neutral_prefix(tokenizer, style.prefix) if style.prefix else ""
    asked = []
    for fact in records:
        shown = shown_to(fact, candidates[fact["relation"]], style.shots) if style.shots else []
        turns = [style.demonstration(one) for one in shown]
        body = _Asked(*style.body(fact))
        if style.chat:
            one = body.within(*in_chat(tokenizer, style, turns, body.text, str(fact["fact_id"])))
        else:
            one = body.within(prefix + "".join(f"{answered(*turn)}\n\n" for turn in turns))
        if style.chain_of_thought:
            thought = REASONING
            if reasoning is not None:
                written = reasoning[fact["fact_id"]].strip()
                thought = reduce(answered, [part for part in (REASONING, written, CONCLUSION) if part])
            one = _Asked(one.answered(thought), one.start)
        asked.append(one)
    return asked


def _prompt(
    fact: Mapping[str, Any],
    asked: _Asked,
    prompt: Encoded,
    ids: list[int],
    choices: list[list[int]],
    decoded: Mapping[int, str],
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt:
    fact_id, text = str(fact["fact_id"]), asked.text
    subject, answers = fact["subject"], tuple(str(answer) for answer in fact["answers"])
    length, span, edge = len(prompt.ids), None, False
    if asked.start is not None:
        stop = asked.start + len(subject)
        span = find_span(tokenizer, text, prompt.offsets, asked.start, stop, fact_id)
        edge = shares_edge(text, prompt.offsets, span, asked.start, stop)
    for answer, whole in [(answers[0], ids), *zip(ascii_uppercase, choices, strict=False)]:
        if whole[:length] != prompt.ids or len(whole) == length:
            raise SpanNotFound(
                f"fact {fact_id}: the tokens of the answer {answer!r} merge with those of {text!r}; "
                "end the template where a word ends, or in punctuation"
            )
    letters = tuple(one[length] for one in choices)
    if len(set(letters)) < len(letters) or any(len(one) != length + 1 for one in choices):
        raise SpanNotFound(f"fact {fact_id}: the letters of its choices are not one token each")
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise BadInput(f"fact {fact_id}: the prompt starts with two BOS tokens; leave BOS out of the template")
    return Prompt(
        fact_id=fact_id,
        subject="" if subject is None else subject,
        text=text,
        answers=answers,
        ids=tuple(ids),
        tokens=tuple(decoded[token] for token in ids),
        span=span,
        prediction=length - 1,
        shared_edge=edge,
        choice_ids=letters,
        lead=asked.lead,
    )
