"""What a model sees, on one line that a person can read: breaks as ⏎, and each character once, whole."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from subjattn.prompts.prompt import Prompt
from subjattn.prompts.style import Style


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FRAGMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 16
"""Tokens that may share characters in a row."""
_SIGNS = {"\n": "⏎", "\t": "⇥"}


class Piece(NamedTuple):
    """Tokens that only together are whole characters, or a single token; `text` as it is shown."""

    text: str
    start: int
    stop: int
    inside: bool
    """Whether it belongs to the subject."""


def on_line(text: str) -> str:
    """A text on one line: ⏎ for a line break, ⇥ for a tab, an escape for what cannot be seen."""
    return "".join(_SIGNS.get(char, char if char.isprintable() else repr(char)[1:-1]) for char in text)


def example(style: str | Style, facts: pd.DataFrame) -> str:
    """The first fact as a style asks it, its answer, and what else the style puts around it."""
    style = Style.of(style)
    fact: dict[str, Any] = facts.iloc[0].to_dict()  # type: ignore[assignment]
    around = style.model_dump(mode="json", exclude_defaults=True, exclude={"template"})
    more = f" ({', '.join(f'{name} {value}' for name, value in around.items())})" if around else ""
    return f"{on_line(style.body(fact)[0])} → {on_line(fact['answers'][0])}{more}"


def notice_relations(style: str | Style, facts: pd.DataFrame) -> None:
    """Say once where one template with `{subject}` asks facts of several relations, of which it can fit one."""
    style = Style.of(style)
    relations = tuple(facts["relation"].value_counts().index) if "relation" in facts else ()
    if "{subject}" in style.template and len(relations) > 1:
        other = facts[facts["relation"] != relations[0]].iloc[[0]]
        _say_once(style.template, relations, on_line(style.body(other.iloc[0].to_dict())[0]))  # type: ignore[arg-type]


def notice_first(style: str | Style, facts: pd.DataFrame) -> None:
    """Say once where the subject stands first, where attention rests whatever the name is."""
    style = Style.of(style)
    start = style.body(facts.iloc[0].to_dict())[1]  # type: ignore[arg-type]
    if start == 0 and not (style.prefix or style.shots or style.chat) and style.template not in _said_first:
        _said_first.add(style.template)
        log.warning(
            "note: the subject stands first, where attention rests whatever the name is: attention and knock-out are "
            "confounded there; put words before it, or use the style 'late' or a prefix"
        )


_said: set[str] = set()
_said_first: set[str] = set()


def _say_once(template: str, relations: tuple[str, ...], asked: str) -> None:
    if template not in _said:
        _said.add(template)
        named = ", ".join(relations[:3]) + (", …" if len(relations) > 3 else "")
        log.warning(
            'note: one template asks %d relations (%s): "%s"; give {question}, or facts of one relation',
            *(len(relations), named, asked),
        )


def pieces(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A prompt's tokens, its answer's among them, to be shown one after the other.

    Tokens that are fragments of a character are shown as one, with their number (`東×3`); a combining character that
    begins a token of the subject stands on a dotted circle (`◌̉`).
    """
    found: list[Piece] = []
    edges = {*(prompt.span or ()), prompt.prediction + 1}
    start = 0
    while start < len(prompt.ids):
        text, stop = _whole(prompt, tokenizer, start, edges)
        inside = prompt.span is not None and prompt.span[0] <= start < prompt.span[1]
        parted = inside or (found and (found[-1].inside or found[-1].stop - found[-1].start > 1))
        circle = "◌" if parted and text[:1] and unicodedata.category(text[0]).startswith("M") else ""
        number = f"×{stop - start}" if stop - start > 1 else ""
        found.append(Piece(f"{circle}{on_line(text)}{number}", start, stop, inside))
        start = stop
    return found


def _whole(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, start: int, edges: Collection[int]) -> tuple[str, int]:
    """The shortest text from a token on that is no fragment, and where it stops; else the token's own."""
    for stop in range(start + 1, min(start + _LONGEST, len(prompt.ids)) + 1):
        text = prompt.tokens[start] if stop == start + 1 else str(tokenizer.decode(list(prompt.ids[start:stop])))
        if _FRAGMENT not in text:
            return text, stop
        if stop in edges:
            break
    return prompt.tokens[start], start + 1
