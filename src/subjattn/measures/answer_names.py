"""Names as answers: what of their spelling counts, and where a name ends in a text.

Definitions, because none is standard across scripts:

* Accents do not count where a plainer spelling of the same name is common: marks on Latin and Greek letters, Latin
  letters with a stroke and the like (Łódź is Lodz, Gießen is Giessen), stress and ё in Cyrillic, vowel points in Arabic
  and Hebrew. Marks that make another letter count: voicing marks in kana, й, and every mark of the scripts of India and
  South-East Asia.
* A name that goes on is another name. After a space, a capital letter of any script goes on with it; scripts without
  capitals do not show it there. Within a word everything goes on but Japanese particles, the commonest function words
  of Chinese and a 市 or 国, and Korean particles; in Thai, Lao, Khmer, Burmese and Tibetan, which are written without
  spaces, a name may end anywhere but before a mark. Numbers go on with a sign, digits, or the word for a thousand.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache


_HAN = "\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HIRAGANA, _KATAKANA = "\u3041-\u309f", "\u30a1-\u30fa\u30fc-\u30ff"
_HANGUL = "\u1100-\u11ff\uac00-\ud7a3"
_CJK = _HAN + _HIRAGANA + _KATAKANA + _HANGUL
_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
_SPELT_OUT = {
    **{"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"},
    **{"þ": "th", "Þ": "Th", "ð": "d", "Ð": "D", "ı": "i"},
    **dict.fromkeys("’‘ʼʻ´`", "'"),
    **dict.fromkeys("‐‑−﹣－", "-"),
}
_POINTS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670]")
_STRESSED = set("аеиоуыэюяіїєАЕИОУЫЭЮЯІЇЄ")

_JAPANESE = re.compile("です|でし|だ|は|が|を|に|の|で|と|も|から|まで|へ|や|か|よ|ね")
_CHINESE = re.compile(
    f"[市省县縣県都府国國]?(?:[是的在和與与及或位属屬為为也有這这那不就了吗嗎呢吧於于即之至到]|(?![{_HAN}{_KATAKANA}]))"
)
_KOREAN = re.compile(
    "(?:은|는|이|가|을|를|의|에|에서|에게|로|으로|와|과|도|만|부터|까지|이나|나|이란|란|라|년|월|일|시|"
    "입니다|이다|다|이에요|예요|이고|고|이며|며|이라|라고|이라고|이었다|였다|인|임){1,3}"
)
_MAGNITUDE = (
    r"(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|bn|mn|mln|mrd)s?\b|milli\w+|тысяч\w*|милли\w+|"
    "[百千万萬億亿兆백천만억조]"
)
_NUMBER_GOES_ON = re.compile(rf"[-.,:/^'·٫٬–]?\d|\s(?:\d{{3}}(?!\d)|\d+/\d)|\s?(?:{_MAGNITUDE})", re.IGNORECASE)
_WORD_GOES_ON = re.compile(r"[-+#♯♭]|[–·・&@]\w|'(?!s\b)\w|\.(?:com|org|net|io|js)\b")
_SIGN = r"(?:[-<>≤≥√][$€£¥]?\.?|(?<!\.)\.)\d"
_LEAD = re.compile(rf"^(?:(?!{_SIGN})\W)*(?:the\s+)?", re.IGNORECASE)


def plain(text: str) -> str:
    """A name without what does not count: accents, a leading "the", punctuation around it."""
    return without_lead(folded(text)).rstrip(" .,:;。．，：；、")


def folded(text: str) -> str:
    """Text in compatibility form without accents and invisible characters, with one space for any."""
    text = re.sub("[\u2070-\u2079\u00b2\u00b3\u00b9]+", lambda found: "^" + found[0], text)
    text = re.sub("(?<=\\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("(?<!\\w)–(?=\\d)", "-", text)
    kept, base = [], ""
    for char in unicodedata.normalize("NFKD", text):
        if unicodedata.category(char) == "Cf" or _POINTS.match(char):
            continue
        if unicodedata.combining(char) and "\u0300" <= char <= "\u036f":
            if not _is_accent(char, base):
                kept.append(char)
        else:
            base = char
            kept.append(_letter(char))
    joined = unicodedata.normalize("NFKC", "".join(kept)).replace("\u2044", "/")
    return re.sub(r"\s+", " ", joined)


def without_lead(text: str) -> str:
    """Text without the punctuation and the "the" before a name; the sign of a number stays."""
    return _LEAD.sub("", text, count=1)


def starts_with(text: str, name: str) -> str | None:
    """What follows a plain name at the start of a folded text, in any case; None where the text begins otherwise."""
    found = re.match(re.escape(name), text, re.IGNORECASE)
    return None if found is None else text[found.end() :]


def goes_on(name: str, rest: str) -> bool:
    """Whether what follows a plain name makes it another one."""
    if not rest:
        return False
    if name[-1].isdigit() and _NUMBER_GOES_ON.match(rest):
        return True
    if rest[0].isspace():
        following = rest.lstrip()[:1]
        return following.isupper() or following.istitle()
    if rest[0] == "_" or _of_a_word(rest[0]):
        return _within_a_word(name[-1], rest)
    initial = len(name) == 1 and rest[0] == "." and rest[1:2].isalnum()
    return initial or _WORD_GOES_ON.match(rest) is not None


def _within_a_word(last: str, rest: str) -> bool:
    first = rest[0]
    if unicodedata.category(first)[0] == "M" or _is(_KATAKANA, first):
        return True
    if _is(_UNSPACED, first + last):
        return False
    if _is(_HANGUL, first):
        run = re.match(f"[{_HANGUL}]+", rest)
        return run is not None and _KOREAN.fullmatch(run[0]) is None
    if _is(_HIRAGANA, first):
        return _is(_HIRAGANA, last) and _JAPANESE.match(rest) is None
    if _is(_HAN, first):
        return _is(_CJK, last) and _CHINESE.match(rest) is None
    return not (first.isalpha() and _is(_CJK, last))


def is_settled(name: str, rest: str) -> bool:
    """Whether nothing written behind it changes what `goes_on` says; False where that is not known."""
    if not rest or name[-1].isdigit() or _is(_CJK + _UNSPACED, name[-1] + rest[0]):
        return False
    return re.match(r"[^\W_]|[-,;:!?()]|\.\s|\s[^\W_]", rest) is not None


def _of_a_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char)[0] == "M"


def _is(kinds: str, text: str) -> bool:
    return re.search(f"[{kinds}]", text) is not None


def _is_accent(mark: str, base: str) -> bool:
    """Whether a combining mark of the general block is an accent on this letter, and does not make it another."""
    if "\u0400" <= base <= "\u04ff":
        return (mark in "\u0300\u0301" and base in _STRESSED) or (mark == "\u0308" and base in "еЕ")
    return True


@lru_cache(4096)
def _letter(char: str) -> str:
    """A letter as it is spelt without its stroke, hook or ligature."""
    if char in _SPELT_OUT:
        return _SPELT_OUT[char]
    found = re.match(r"LATIN (CAPITAL|SMALL) LETTER ([A-Z]) WITH ", unicodedata.name(char, ""))
    if found is None:
        return char
    return found[2] if found[1] == "CAPITAL" else found[2].lower()
