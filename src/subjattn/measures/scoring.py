"""When an answer counts as right. Each scorer has a name, which every result carries."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from subjattn.measures.answer_names import folded, goes_on, is_settled, plain, starts_with, without_lead


_ARTICLES = ("a", "an", "the")

ScorerName = Literal["answer_start", "exact_match", "containment", "letters"]


@dataclass(frozen=True)
class Scorer:
    """A rule for generated text."""

    definition: str
    new_tokens: int
    """The most that are generated, but for prompts whose accepted answers are longer (`answers.longest_answers`)."""
    one_line: bool
    """Whether the answer ends with its line."""
    correct: Callable[[str, Sequence[str]], bool]
    hopeless: Callable[[str, Sequence[str]], bool] = lambda _begun, _answers: False
    """Whether an answer that begins so is wrong whatever follows; False where that is not known."""
    decided: Callable[[str, Sequence[str]], bool] = lambda _begun, _answers: False
    """Whether an answer that begins so is right or wrong whatever follows; False where that is not known."""


def is_correct(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction starts with an accepted answer that ends where a name ends
    (`subjattn.measures.answer_names`).

    Case, accents, leading punctuation and a leading "the" do not count. A name that goes on is another name: "Nigeria"
    is no answer to "Niger", "Guinea-Bissau" and "Guinea Bissau" are none to "Guinea", "1,000" is none to "1".
    """
    text = plain(prediction)
    found = ((name, starts_with(text, name)) for name in map(plain, answers) if name)
    return any(rest is not None and not goes_on(name, rest) for name, rest in found)


def start_is_decided(begun: str, answers: Sequence[str]) -> bool:
    """Whether every text that begins so is correct, or none is.

    What follows may still make another character of the last one, and end a name or go on with it.
    """
    text = folded(begun).rstrip("\N{REPLACEMENT CHARACTER}")
    if re.fullmatch(r"\W*(t|th|the\s*)?.?", text, re.IGNORECASE):
        return False
    own, names = without_lead(text), [name for name in map(plain, answers) if name]
    behind = [(name, rest) for name in names if (rest := starts_with(own, name)) is not None]
    settled = [is_settled(name, rest) for name, rest in behind]
    if any(sure and not goes_on(name, rest) for sure, (name, rest) in zip(settled, behind, strict=True)):
        return True
    begins = any(starts_with(name, own[:-1]) is not None for name in names if len(name) >= len(own))
    return not begins and all(settled)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is an accepted answer once case, punctuation, articles and spaces are taken off.

    The normalisation of Rajpurkar et al. 2016 (SQuAD), with Unicode compatibility forms folded, the punctuation of
    every script, and what makes another number or name kept: a sign, what stands between digits, "+" and "#" behind a
    letter.
    """
    text = _normalised(prediction)
    return bool(text) and any(_normalised(answer) == text for answer in answers)


def no_exact_match(begun: str, answers: Sequence[str]) -> bool:
    """Whether no text that begins so can be an exact match.

    All words but the last stand; what follows may still change the last one, down to its last letter (an accent,
    a byte of a character), and in a number everything.
    """
    words = _words(begun)
    last = "" if begun[-1:].isspace() or not words else words.pop()[:-1]
    changing = "\N{REPLACEMENT CHARACTER}" in begun or unicodedata.normalize("NFKC", begun) != begun
    if changing or not last.isalpha() or any(article.startswith(last) for article in _ARTICLES):
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
    Composed and decomposed forms of a letter are one.
    """
    text = _lower(prediction)
    return any(alias in text for alias in map(_lower, answers) if alias)


def containment_is_decided(begun: str, answers: Sequence[str]) -> bool:
    """Whether a text that begins so contains an accepted answer, though its last character may become another."""
    return contains_alias(_lower(begun.rstrip("\N{REPLACEMENT CHARACTER}"))[:-1], answers)


SCORERS: Mapping[str, Scorer] = {
    "answer_start": Scorer(
        "greedy answer starts with an accepted answer that ends where a name ends; case, accents, leading "
        "punctuation and a leading 'the' do not count (subjattn.measures.answer_names)",
        8,
        True,
        is_correct,
        decided=start_is_decided,
    ),
    "exact_match": Scorer(
        "first line of the greedy answer is an accepted answer; case, articles, spaces and punctuation do not count, "
        "but for signs and what stands within a number",
        16,
        True,
        exact_match,
        no_exact_match,
        no_exact_match,
    ),
    "containment": Scorer(
        "an accepted answer is part of the first 10 tokens generated (of more where the answer is longer), both in "
        "lower case (Ghosal et al. 2024)",
        10,
        False,
        contains_alias,
        decided=containment_is_decided,
    ),
}
LETTERS_DEFINITION = "the right letter has the largest logit of the letters of the choices (Ghosal et al. 2024)"


class Named:
    """Which answer a generated text gives: the accepted answer that it fits, else its own first words.

    So that "Kenya. The city" and "Kenya, in the east" are one answer. Of several that fit the longest counts. A fact's
    right answer is called by the first that is accepted; facts that accept each other's first share a name. An alias
    that facts of several names accept is none of these: it is called by all of them together.
    """

    def __init__(self, accepted: Iterable[Sequence[str]], scorer: Scorer) -> None:
        self._scorer, self._found = scorer, dict[str, str]()
        each = [[_called(answer) for answer in answers] for answers in accepted]
        self._firsts: dict[str, set[str]] = {}
        for first, *others in each:
            self._firsts.setdefault(first, set()).update(others)
        owners: dict[str, set[str]] = {}
        for first, *others in each:
            for alias in (first, *others):
                owners.setdefault(alias, set()).add(self._canonical(first))
        self._names = {
            alias: self._canonical(alias) if alias in self._firsts else " / ".join(sorted(of))
            for alias, of in owners.items()
        }
        self._longest_first = sorted(self._names, key=lambda alias: (-len(alias), alias))

    def __call__(self, text: str) -> str:
        if text not in self._found:
            fit = (alias for alias in self._longest_first if alias and self._scorer.correct(text, [alias]))
            words = re.split(r"[.,;:(\n]", plain(text), maxsplit=1)[0].strip().casefold()
            self._found[text] = next((self._names[alias] for alias in fit), f"“{words}”")
        return self._found[text]

    def given(self, text: str, answers: Sequence[str]) -> str:
        """Which answer a text gives to a fact: its right one where that fits."""
        return self.canonical(answers) if self._scorer.correct(text, answers) else self(text)

    def canonical(self, answers: Sequence[str]) -> str:
        """What a fact's right answer is called."""
        return self._canonical(_called(answers[0]))

    def of_alias(self, answer: str) -> str:
        """What an answer of other facts is called here: itself where no fact accepts it."""
        return self._names.get(_called(answer), _called(answer))

    def _canonical(self, first: str) -> str:
        alike = [other for other in self._firsts.get(first, ()) if first in self._firsts.get(other, ())]
        return min([first, *alike])


def _called(answer: str) -> str:
    return plain(answer).casefold()


def definition_of(scorer: str) -> str:
    """What a scorer counts as right, in words."""
    return LETTERS_DEFINITION if scorer == "letters" else SCORERS[scorer].definition


def _normalised(text: str) -> str:
    """Text without articles, unless it is nothing else ("The The")."""
    words = [word for word in _words(text) if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _words(text: str) -> list[str]:
    """Words in their compatibility form and lower case, without punctuation that makes no other word."""
    lower = unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-")
    return ["".join(_kept(word)) for word in lower.split()]


def _kept(word: str) -> Iterator[str]:
    for i, char in enumerate(word):
        before, behind = word[:i], word[i + 1 :]
        if char in string.punctuation or unicodedata.category(char)[0] in "PC":
            thousands = char == "," and re.match(r"\d{3}(?!\d)", behind)
            number = behind[:1].isdigit() and not thousands and (before[-1:].isdigit() or _signs(char, before))
            if not number and not (char in "+#" and before.rstrip("+#")[-1:].isalpha()):
                continue
        yield char


def _signs(char: str, before: str) -> bool:
    """Whether punctuation before a digit makes another number of it: a minus or a point at the word's beginning."""
    return char in "-." and not any(map(str.isalnum, before))


def _lower(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().strip()
