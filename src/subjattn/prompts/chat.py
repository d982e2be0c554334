"""A question in the chat template of an instruct model: its text, its place, and what stands before an answer.

What the template itself writes between its generation prompt and an assistant's answer is what stands there: nothing,
a space, or a line break, which then belongs to the prompt. Templates that ask for the time get the style's date.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, time
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from subjattn.errors import BadInput, SpanNotFound
from subjattn.prompts.style import Style


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for a text whose place in a chat is looked for."""
_CODES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf"
_THOUGHT = re.compile(r"[<\[][^<>\[\]]*(?:think|thought|reason)[^<>\[\]]*[>\]]", re.IGNORECASE)
_SWITCH = re.compile(
    r"(?:(?:if|not|and|or)\s+)(?!\w*content\b)(\w*(?:think|thought|reason)\w*)\b(?![.\[(])|"
    r"(?<![.\w])(?!\w*content\b)(\w*(?:think|thought|reason)\w*)\s+is\s+(?:not\s+)?(?:defined|false|true|none)\b"
)
"""Where a template asks one of its arguments whether to reason."""


class Chat(NamedTuple):
    """What stands before and behind a question in a chat, up to where the assistant answers.

    `lead` is what the template puts before an answer; None where it does not say.
    """

    before: str
    after: str
    lead: str | None


def in_chat(
    tokenizer: PreTrainedTokenizerBase, style: Style, turns: Sequence[tuple[str, str]], question: str, fact_id: str
) -> Chat:
    """A question in a chat, behind demonstrations as earlier turns.

    Says once where the template lets an answer begin with something else, such as reasoning.

    Raises:
        BadInput: no chat template, one that refuses the conversation, or arguments that it does not read.
        SpanNotFound: the template changes the question, so that its place is not known.
    """
    earlier = [
        {"role": role, "content": text}
        for asked, answer in turns
        for role, text in (("user", asked), ("assistant", answer))
    ]
    asked = [*earlier, {"role": "user", "content": question}]
    marked = render(tokenizer, style, [*earlier, {"role": "user", "content": PLACE}], answering=True)
    whole = render(tokenizer, style, asked, answering=True)
    before, found, after = marked.rpartition(PLACE)
    if not found or before + question + after != whole:
        raise SpanNotFound(f"fact {fact_id}: the chat template changes the question's text, so its place is not known")
    lead = _lead(tokenizer, style, asked, whole, after)
    if lead is not None and "\n" in lead:
        return Chat(before, after + lead, "")
    return Chat(before, after, lead)


def behind_answer(tokenizer: PreTrainedTokenizerBase, style: Style) -> str:
    """What a style's chat puts behind an assistant's answer."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACE}]
    return render(tokenizer, style, turns).rpartition(PLACE)[2]


def render(
    tokenizer: PreTrainedTokenizerBase, style: Style, messages: Sequence[Mapping[str, str]], *, answering: bool = False
) -> str:
    """A conversation as the template writes it at the style's date, up to the assistant's turn where `answering`."""
    source = _source(tokenizer)
    _check_arguments(tokenizer, style, source)
    midnight = datetime.combine(style.chat_date, time())
    arguments: dict[str, Any] = {"date_string": midnight.strftime("%d %b %Y")} | style.chat_template_kwargs
    if "strftime_now" in source:
        source = f"{_clock(midnight)}\n{source}"
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=answering,
                chat_template=source,
                **arguments,
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadInput(
            f"the chat template refuses this conversation ({reason}): change the style's shots or "
            "chat_template_kwargs, or leave chat out"
        ) from None


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise BadInput("the tokenizer has no chat template: use an instruct model, or a style without chat")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise BadInput(f"the tokenizer has several chat templates and no default: {str(error)[:200]}") from None


def _check_arguments(tokenizer: PreTrainedTokenizerBase, style: Style, source: str) -> None:
    taken = {"messages", "strftime_now", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in style.chat_template_kwargs:
        if name in taken:
            raise BadInput(f"chat_template_kwargs: {name!r} is set by subjattn itself: leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            there = f"; it reads {', '.join(_switches(source))}" if _switches(source) else ""
            raise BadInput(f"chat_template_kwargs: the chat template does not read {name!r}{there}: leave it out")


@cache
def _clock(now: datetime) -> str:
    """A macro in place of the function that templates ask for the time; the template's own scope goes first."""
    values = {f"%{flag}{code}": now.strftime(f"%{flag}{code}") for flag in ("-", "") for code in _CODES}
    replaced = "".join(f" | replace('{code}', '{text}')" for code, text in values.items() if text != code)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"


def _lead(
    tokenizer: PreTrainedTokenizerBase, style: Style, asked: list[dict[str, str]], head: str, after: str
) -> str | None:
    """White space that the template puts between its generation prompt and an answer; None where it does not say."""
    try:
        whole = render(tokenizer, style, [*asked, {"role": "assistant", "content": PLACE}])
    except BadInput:
        whole = head + PLACE
    before, source = whole.rpartition(PLACE)[0], _source(tokenizer)
    thoughts = _THOUGHT.findall(after)
    lead = before[len(head) :] if before.startswith(head) else None
    if thoughts and not re.search(r"/|end", thoughts[-1], re.IGNORECASE):
        _warn_once(source, f"ends its generation prompt in {thoughts[-1]!r}, so the model begins to reason")
    elif lead is not None and lead.strip():
        _warn_once(source, f"puts {lead.strip()[:80]!r} before an answer, which its generation prompt lacks")
    elif lead is None and not thoughts and head.rstrip() != before.rstrip():
        _warn_once(source, f"ends its generation prompt in {after.strip()[-80:]!r}, which it puts before no answer")
    elif not thoughts and (unset := _switches(source)) and not set(unset) & set(style.chat_template_kwargs):
        _warn_once(source, f"reads {unset[0]!r}, which the style does not set, so the model may reason first")
    return None if lead is None or lead.strip() else lead


def _switches(source: str) -> list[str]:
    return sorted({name for pair in _SWITCH.findall(source) for name in pair if name})


@cache
def _warn_once(source: str, what: str) -> None:
    switch = next((name for name in _switches(source) if "enable" in name or name == "thinking"), None)
    how = "an argument that the template reads" if switch is None else f"{{{switch}: false}}"
    log.warning(
        "note: the chat template %s: an answer may not be what the model writes next, and accuracy then is 0; set the "
        "style's chat_template_kwargs, such as %s",
        what,
        how,
    )
