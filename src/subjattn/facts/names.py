"""Names: the characters that belong to them, and how they are compared.

What nobody can see makes tokens of its own, so it is taken off: zero-width spaces, byte-order marks, soft hyphens,
marks of direction. It stays where it means something: joiners in Arabic, Persian and Indic words and in emoji,
variation selectors of emoji and ideographs, zero-width spaces between letters of Thai, Lao, Khmer and Myanmar. Spaces
that look like one (no-break, thin, …) become one.

Two spellings are one name where they differ in case, white space, invisible characters, normal form (NFC, NFD, full
width and other compatibility forms) or the shape of apostrophes and hyphens. The text itself keeps its normal form: a
prompt has the characters that the user wrote.
"""

from __future__ import annotations

import re
import unicodedata


_DENSE = r"CJK|IDEOGRAPHIC|BOPOMOFO|HIRAGANA|KATAKANA|KATAKANA-HIRAGANA|HALFWIDTH KATAKANA|YI|NUSHU|TANGUT|KHITAN"
_LOOSE = r"THAI|LAO|KHMER|MYANMAR|TIBETAN|TAI|NEW TAI|JAVANESE|BALINESE"
_DENSE_NAME, _LOOSE_NAME = re.compile(rf"(?:{_DENSE})\b"), re.compile(rf"(?:{_LOOSE})\b")
_ZWSP, _ZWNJ, _ZWJ, _BLACK_FLAG = "\u200b", "\u200c", "\u200d", "\U0001f3f4"
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_BROKEN = re.compile("[\ud800-\udfff\ufffd]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_SHAPES = {ord(char): "'" for char in "’‘‛ʼ`′ʹ"} | {ord(char): "-" for char in "‐‑‒–−"}


def plain_name(name: str) -> str:
    """A name as names are compared; see the module."""
    seen = _INVISIBLE.sub("", name).translate(_SHAPES)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", seen).casefold())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", folded).casefold())
    return " ".join(_INVISIBLE.sub("", folded).translate(_SHAPES).split())


def visible(text: str) -> str:
    """A text without invisible characters, but for those that mean something where they stand.

    Example:
        >>> visible("Nairobi\\u200b"), visible("\\ufeffLima"), visible("Os\\u00adlo")
        ('Nairobi', 'Lima', 'Oslo')
    """
    if not _INVISIBLE.search(text):
        return text
    return "".join(char for at, char in enumerate(text) if not _INVISIBLE.match(char) or _means(text, at))


def spaced(text: str) -> str:
    """A text whose spaces are all the usual one (an ideographic space stays)."""
    return _SPACE.sub(" ", text)


def taken_off(text: str) -> list[str]:
    """Names of the characters that `visible` and `spaced` change."""
    kept = visible(text)
    gone = [] if kept == text else [char for char in dict.fromkeys(text) if text.count(char) != kept.count(char)]
    return [unicodedata.name(char, f"U+{ord(char):04X}") for char in [*gone, *dict.fromkeys(_SPACE.findall(kept))]]


def broken(text: str) -> str | None:
    """What makes a text no text: half of a surrogate pair, a lost character, a control character; else None."""
    if found := _BROKEN.search(text):
        if found[0] == "\N{REPLACEMENT CHARACTER}":
            return "U+FFFD, where a character was lost: read the file in its own encoding and save it as UTF-8"
        return f"half of a surrogate pair (U+{ord(found[0]):04X}), which is no character: write it whole"
    if found := _CONTROL.search(text):
        return f"the control character U+{ord(found[0]):04X}: take it out"
    return None


def is_dense(char: str) -> bool:
    """Whether a character is of a script without any spaces: Chinese, Japanese and a few others."""
    return _DENSE_NAME.match(unicodedata.name(char, "")) is not None


def is_unspaced(char: str) -> bool:
    """Whether a character is of a script written without spaces between words; some part phrases by spaces."""
    return is_dense(char) or _LOOSE_NAME.match(unicodedata.name(char, "")) is not None


def _means(text: str, at: int) -> bool:
    """Whether the invisible character at a place changes what is read."""
    char, before = text[at], text[at - 1 : at] if at else ""
    after = next((one for one in text[at + 1 :] if not _INVISIBLE.match(one)), "")
    base = next((one for one in reversed(text[:at]) if not _INVISIBLE.match(one)), "")
    if not base:
        return False
    if char == _ZWSP:
        return bool(after) and all(_LOOSE_NAME.match(unicodedata.name(one, "")) for one in (base, after))
    if char in (_ZWNJ, _ZWJ):
        virama = unicodedata.combining(before or " ") == 9
        arabic = bool(after) and all(_joins_letters(one) for one in (base, after))
        emoji = char == _ZWJ and bool(after) and all(unicodedata.category(one) in ("So", "Sk") for one in (base, after))
        return virama or arabic or emoji
    if "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef":
        return before == base and unicodedata.category(base) not in ("Lu", "Ll", "Lt", "Lm", "Zs")
    if "\U000e0020" <= char <= "\U000e007f":
        return base == _BLACK_FLAG
    if "\u180b" <= char <= "\u180f":
        return unicodedata.name(base, "").startswith("MONGOLIAN")
    if char in "\u115f\u1160":
        return any("\u1100" <= one <= "\u11ff" for one in (base, after) if one)
    return False


def _joins_letters(char: str) -> bool:
    """Whether a character is of a script whose letters join: Arabic and its like, or Mongolian."""
    if unicodedata.category(char)[0] == "M":
        return unicodedata.name(char, "").startswith(("ARABIC", "SYRIAC", "MONGOLIAN", "NKO"))
    return unicodedata.bidirectional(char) == "AL" or unicodedata.name(char, "").startswith(("NKO", "MONGOLIAN"))
