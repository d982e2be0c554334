"""When an answer counts as right. Each scorer has a name, which every result carries."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


_ARTICLES = ("a", "an", "the")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

ScorerName = Literal["answer_start", "exact_match", "containment", "letters"]


@dataclass(frozen=True)
class Scorer:
    """A rule for generated text."""

    definition: str
    new_tokens: int
    one_line: bool
    """Whether the answer ends with its line."""
    correct: Callable[[str, Sequence[str]], bool]
    hopeless: Callable[[str, Sequence[str]], bool] = lambda _begun, _answers: False
    """Whether an answer that begins so is wrong whatever follows; False where that is not known."""
    decided: Callable[[str, Sequence[str]], bool] = lambda _begun, _answers: False
    """Whether an answer that begins so is right or wrong whatever follows; False where that is not known."""


def is_correct(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction starts with an accepted answer that ends where a name ends.

    Case, accents, leading punctuation and a leading "the" do not count. A name that goes on is another
    name: "Nigeria" is no answer to "Niger", "Guinea-Bissau" and "Guinea Bissau" are none to "Guinea".
    """
    text = _plain(prediction)
    ends = r"(?![\w-])(?!\s+(?-i:[A-Z]))"
    return any(re.match(re.escape(plain) + ends, text, re.IGNORECASE) for plain in map(_plain, answers) if plain)


def start_is_decided(begun: str, answers: Sequence[str]) -> bool:
    """Whether every text that begins so is correct, or none is.

    What follows may still make a character of its last bytes, and end a name or go on with it.
    """
    text = _bare(begun).rstrip("\N{REPLACEMENT CHARACTER}")
    if re.fullmatch(r"\W*(t|th|the\s*)?", text, re.IGNORECASE):
        return False
    own, names = _without_lead(text), [plain for plain in map(_plain, answers) if plain]
    behind = [own[len(name) :] for name in names if re.match(re.escape(name), own, re.IGNORECASE)]
    if any(re.match(r"[^\w\s-]|\s+[^\sA-Z]", rest) for rest in behind):
        return True
    begins = any(re.match(re.escape(own), name, re.IGNORECASE) for name in names)
    return not begins and not any(rest.isspace() for rest in behind)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is an accepted answer once case, punctuation, articles and spaces are taken off.

    The normalisation of Rajpurkar et al. 2016 (SQuAD), with Unicode compatibility forms folded.
    """
    text = _normalised(prediction)
    return bool(text) and any(_normalised(answer) == text for answer in answers)


def no_exact_match(begun: str, answers: Sequence[str]) -> bool:
    """Whether no text that begins so can be an exact match.

    All words but the last stand; what follows may still change the last one, down to its last letter (an accent,
    a byte of a character).
    """
    words = _words(begun)
    last = "" if begun[-1:].isspace() or not words else words.pop()[:-1]
    changing = "\N{REPLACEMENT CHARACTER}" in begun or unicodedata.normalize("NFKC", begun) != begun
    if changing or any(article.startswith(last) for article in _ARTICLES):
        last = ""
    stand = [word for word in words if word and word not in _ARTICLES]
    only_articles = [word for word in words if word]
    return not any(
        _begins(_normalised(answer).split(), own, last)
        for answer in answers
        for own in ([only_articles, []] if not stand else [stand])
    )


def _begins(accepted: list[str], stand: list[str], last: str) -> bool:
    """Whether an answer's words begin with those that stand and a beginning of the next."""
    following = accepted[len(stand)] if len(stand) < len(accepted) else ""
    return accepted[: len(stand)] == stand and following.startswith(last)


def contains_alias(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer is part of the prediction, both in lower case (Ghosal et al. 2024, app. B.2).

    Lenient: "Nigeria" contains "Niger". The paper lower-cases the prediction; whether the answers too is not said.
    """
    text = prediction.lower().strip()
    return any(answer.lower().strip() in text for answer in answers if answer.strip())


SCORERS: Mapping[str, Scorer] = {
    "answer_start": Scorer(
        "greedy answer starts with an accepted answer that ends where a name ends; case, accents, leading "
        "punctuation and a leading 'the' do not count",
        8,
        True,
        is_correct,
        decided=start_is_decided,
    ),
    "exact_match": Scorer(
        "first line of the greedy answer is an accepted answer; case, punctuation, articles and spaces do not count",
        16,
        True,
        exact_match,
        no_exact_match,
        no_exact_match,
    ),
    "containment": Scorer(
        "an accepted answer is part of the first 10 tokens generated, both in lower case (Ghosal et al. 2024)",
        10,
        False,
        contains_alias,
        decided=contains_alias,
    ),
}
LETTERS_DEFINITION = "the right letter has the largest logit of the letters of the choices (Ghosal et al. 2024)"


class Named:
    """Which answer a generated text gives: the accepted answer that it fits, else its own first words.

    So that "Kenya. The city" and "Kenya, in the east" are one answer. Of several that fit the longest counts.
    """

    def __init__(self, accepted: Iterable[Sequence[str]], scorer: Scorer) -> None:
        self._scorer, self._found = scorer, dict[str, str]()
        self._canonical: dict[str, str] = {}
        for answers in accepted:
            for answer in answers:
                self._canonical.setdefault(_plain(answer).casefold(), _plain(answers[0]).casefold())
        self._longest_first = sorted(self._canonical, key=lambda answer: (-len(answer), answer))

    def __call__(self, text: str) -> str:
        if text not in self._found:
            fit = (answer for answer in self._longest_first if answer and self._scorer.correct(text, [answer]))
            words = re.split(r"[.,;:(\n]", _plain(text), maxsplit=1)[0].strip().casefold()
            self._found[text] = next((self._canonical[answer] for answer in fit), f"“{words}”")
        return self._found[text]

    def canonical(self, answers: Sequence[str]) -> str:
        """What a fact's right answer is called."""
        return self._canonical[_plain(answers[0]).casefold()]


def definition_of(scorer: str) -> str:
    """What a scorer counts as right, in words."""
    return LETTERS_DEFINITION if scorer == "letters" else SCORERS[scorer].definition


def _plain(text: str) -> str:
    return _without_lead(_bare(text)).rstrip(" .,:;")


def _bare(text: str) -> str:
    """Text without accents, with one space for any."""
    decomposed = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return re.sub(r"\s+", " ", "".join(char for char in decomposed if not unicodedata.combining(char)))


def _without_lead(text: str) -> str:
    """Text without the punctuation and the "the" before a name."""
    return re.sub(r"^\W*(the\s+)?", "", text, flags=re.IGNORECASE)


def _normalised(text: str) -> str:
    """Text without articles, unless it is nothing else ("The The")."""
    words = [word for word in _words(text) if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _words(text: str) -> list[str]:
    """Words in their compatibility form and lower case, without ASCII punctuation."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [word.translate(_NO_PUNCTUATION) for word in plain.split()]
