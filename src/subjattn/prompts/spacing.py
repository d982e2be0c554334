"""Whether a space stands between a text and the answer behind it: one rule for all prompts.

| the text ends in | the answer follows |
|---|---|
| white space, an opening bracket or quote, `¿`, `¡`, an opening tag such as `<b>` | at once |
| a currency sign (not behind a number), `#` or `@` before a name, an apostrophe that elides (`l'`) | at once |
| a hyphen, dash, slash, `=`, `|` or arrow | after a space if one stands before the sign, else at once |
| full-width punctuation such as `：` or `。` | at once |
| Chinese or Japanese | at once |
| Thai, Lao, Khmer, Myanmar, Tibetan, … | at once if the answer is in such a script, else after a space |
| other punctuation, behind a script without spaces | the same: at once if the answer is in such a script |
| anything else: Latin, Cyrillic, Arabic, Hebrew, Devanagari, Hangul, … | after a space |

A quote opens unless it closes one that is open in the same paragraph, or stands right behind a word.
"""

from __future__ import annotations

import re
import unicodedata

from subjattn.facts.names import is_dense, is_unspaced


_QUOTES = ('"“”„‟״', "'‘’‚‛׳", "«»", "‹›", "*", "`")
_ALWAYS_OPEN = "¿¡<ـ"
_INFIX = frozenset("-‐‑‒–—―−־/\\⁄∕|=+~_&·‧>→←⇒⇨➔➜")
_SENTENCE_ENDS = ".!?…%)]}"
_TAG = re.compile(r"<(/?)[^\s<>/][^<>]*>\Z")
_BLANK = re.compile(r"_{3,}\Z")
_BULLET = re.compile(r"(?:\A|\n)[ \t]*[*#]+\Z")
_ELISION = re.compile(r"(?<!\w\ws)(?<=[^\W\d_])['’]\Z")


def answered(text: str, answer: str, lead: str | None = None) -> str:
    """A text with an answer behind it.

    Args:
        text: a prompt.
        answer: as it is accepted.
        lead: what stands between the two; None: a space or nothing, as the characters around ask for.

    Example:
        >>> answered("The capital of Kenya is", "Nairobi"), answered("答案是：", "日本"), answered('It is "', "Lima")
        ('The capital of Kenya is Nairobi', '答案是：日本', 'It is "Lima')
    """
    return text + (space_between(text, answer) if lead is None else lead) + answer


def space_between(text: str, answer: str) -> str:
    """A space, or nothing where the answer follows at once; see the module's table."""
    seen = text
    while seen and unicodedata.category(seen[-1]) == "Cf":
        seen = seen[:-1]
    if not seen or seen[-1].isspace() or _joins(seen):
        return ""
    last = next((char for char in reversed(seen) if unicodedata.category(char) not in ("Mn", "Me")), " ")
    first = next((char for char in answer if unicodedata.category(char) != "Cf"), " ")
    if _is_wide(last) or is_dense(last):
        return ""
    letter = next((char for char in reversed(seen) if unicodedata.category(char)[0] == "L"), " ")
    return "" if is_unspaced(letter) and (is_unspaced(first) or _is_wide(first)) else " "


def _is_wide(char: str) -> bool:
    """Full-width punctuation, signs and letters, which bring their own space; no emoji, no Hangul."""
    width, category = unicodedata.east_asian_width(char), unicodedata.category(char)
    return width == "F" or (width == "W" and category[0] in "PS" and category != "So")


def _joins(text: str) -> bool:
    """Whether the sign at a text's end takes what follows at once."""
    last, before = text[-1], text[:-1]
    category = unicodedata.category(last)
    if category == "Ps" or last in _ALWAYS_OPEN:
        return True
    if tag := _TAG.search(text):
        return not tag[1]
    if _BULLET.search(text) and not text.endswith("**"):
        return False
    if any(last in own for own in _QUOTES):
        return _quote_opens(text) or bool(_ELISION.search(text) and not _quote_closes(text))
    if category == "Sc":
        return not before.rstrip()[-1:].isdigit()
    if last in "#@":
        return last == "@" or not before[-1:].isalnum()
    if last in _INFIX and not _BLANK.search(text):
        before = text.rstrip("".join(_INFIX))
        return bool(before) and not before[-1].isspace()
    return False


def _quote_opens(text: str) -> bool:
    return _quotation(text) is True


def _quote_closes(text: str) -> bool:
    return _quotation(text) is False


def _quotation(text: str) -> bool | None:
    """Whether the quote at a text's end opens a quotation (True) or closes one (False); None where it does neither."""
    family = next(own for own in _QUOTES if text[-1] in own)
    line = re.sub(r"([*`])\1+", r"\1", text.rsplit("\n\n", 1)[-1])
    opened: tuple[str, bool] | None = None
    found: bool | None = None
    for at, mark in enumerate(line):
        if mark not in family:
            continue
        before, after = line[at - 1 : at], line[at + 1 : at + 2]
        if _is_word(before) and _is_word(after):  # an apostrophe
            continue
        free = not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi")
        if opened is not None and not (free and opened == (mark, False)):
            opened, found = None, False
        elif free or unicodedata.category(mark) == "Pi" or not (_is_word(before) or before in _SENTENCE_ENDS):
            opened, found = (mark, after.isspace()), True
        else:
            found = None
    return found


def _is_word(char: str) -> bool:
    return char.isalnum() and not is_unspaced(char)
