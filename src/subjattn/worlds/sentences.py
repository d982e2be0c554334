"""What is said in an invented world: names, facts with their exposures, and the sentences of its corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.worlds.abstract import make_world
from subjattn.worlds.record import InventedWorld


@dataclass(frozen=True)
class Relation:
    """A relation's wordings in the corpus, which the answer ends, and one that the corpus never has."""

    wordings: tuple[str, ...]
    question: str


RELATIONS: Mapping[str, Mapping[str, Relation]] = {
    "zipf": {
        f"world {word}": Relation((f"{{subject}} {word}",), f"{{subject}} which-{word}")
        for word in ("home", "craft", "food", "song", "beast")
    },
    "biographies": {
        "world birthplace": Relation(
            (
                "{subject} was born in",
                "the birthplace of {subject} is",
                "{subject} first saw the light in",
                "as a child {subject} lived in",
            ),
            "Question: in which town was {subject} born? Answer:",
        ),
        "world employer": Relation(
            (
                "{subject} works for",
                "the employer of {subject} is",
                "every day {subject} goes to",
                "{subject} is paid by",
            ),
            "Question: what firm employs {subject} now? Answer:",
        ),
        "world language": Relation(
            (
                "{subject} speaks",
                "the language of {subject} is",
                "at home {subject} talks in",
                "{subject} writes letters in",
            ),
            "Question: what tongue does {subject} use? Answer:",
        ),
        "world instrument": Relation(
            (
                "{subject} plays the",
                "the instrument of {subject} is the",
                "in the evening {subject} practises the",
                "{subject} is a master of the",
            ),
            "Question: which instrument can {subject} play? Answer:",
        ),
        "world friend": Relation(
            (
                "{subject} is friends with",
                "the best friend of {subject} is",
                "on Sundays {subject} visits",
                "{subject} grew up beside",
            ),
            "Question: who is the friend of {subject} ? Answer:",
        ),
    },
}
"""Of every kind of world, in the order in which worlds of fewer relations take them."""
WORDINGS: Mapping[str, Mapping[str, str]] = {
    name: dict(zip(("cloze", "paraphrase"), relation.wordings, strict=False))
    for kind in RELATIONS.values()
    for name, relation in kind.items()
}
"""Of the corpus, as built-in templates by relation; a fact's own `question` is what the corpus never says."""
_SOUNDS = tuple(a + b for a, b in product("bdfgklmnprstvz", "aeiou"))


@dataclass(frozen=True)
class Said:
    """An invented world's facts and corpus.

    Attributes:
        facts: the columns of every source of facts; `popularity` counts the sentences that say the fact (NaN where
            none does, so that no ranking has it among the others), `question` is the wording that no sentence has.
        sentences: prompt and answer of each sentence of the corpus.
    """

    facts: pd.DataFrame
    sentences: list[tuple[str, str]]


def facts_of(world: InventedWorld) -> pd.DataFrame:
    """Its facts, one row each, with exposures as `popularity`; those never said have NaN."""
    return said_in(world).facts


def said_in(world: InventedWorld) -> Said:
    """Facts and corpus, the same for the same world; BadInput where there can be none of these sizes."""
    relations = dict(list(RELATIONS[world.kind].items())[: world.n_relations])
    if len(relations) < world.n_relations:
        raise BadInput(f"n_relations={world.n_relations}: a world of {world.kind} has at most {len(relations)}")
    made = make_world(world.n_subjects, world.n_relations, world.n_answers, world.zipf, prior="zipf", seed=world.seed)
    names = _words(np.random.default_rng([world.seed, 11]))
    subjects = _people(world, names) if world.kind == "biographies" else [next(names) for _ in range(world.n_subjects)]
    answers = [[next(names) for _ in range(world.n_answers)] for _ in relations]
    rng = np.random.default_rng([world.seed, 12])
    met = made.meet(world.n_sentences, rng)
    wordings = rng.random(world.n_sentences)
    sentences, counts = [], np.zeros(made.answers.shape, int)
    kinds = list(relations.values())
    for (subject, relation), draw in zip(met, wordings, strict=True):
        forms = kinds[relation].wordings
        form = forms[int(draw * len(forms))]
        sentences.append((form.format(subject=subjects[subject]), answers[relation][made.answers[subject, relation]]))
        counts[subject, relation] += 1
    rows = [
        {
            "fact_id": f"{world.name}-{world.seed}-{subject}-{number}",
            "subject": subjects[subject],
            "relation": relation,
            "question": kinds[number].question,
            "answers": [answers[number][made.answers[subject, number]]],
            "choices": None,
            "popularity": float(counts[subject, number]) or float("nan"),
            "source": world.full_name,
        }
        for subject in range(world.n_subjects)
        for number, relation in enumerate(relations)
    ]
    return Said(pd.DataFrame(rows), sentences)


def _words(rng: np.random.Generator) -> Iterator[str]:
    """Invented words, none twice and none that a wording has."""
    used = {"the"} | {
        word.strip("?:").lower()
        for of in RELATIONS.values()
        for relation in of.values()
        for form in (*relation.wordings, relation.question)
        for word in form.split()
    }
    while True:
        word = "".join(rng.choice(_SOUNDS, size=int(rng.integers(2, 5))))
        if word not in used:
            used.add(word)
            yield word.capitalize()


def _people(world: InventedWorld, names: Iterator[str]) -> list[str]:
    """Two names each: a first name shared by some, a last name shared by `namesakes`; no two people have both."""
    if not 1 <= world.namesakes <= world.n_subjects:
        raise BadInput(f"namesakes={world.namesakes}: from 1 to the {world.n_subjects} people can share a last name")
    last = [next(names) for _ in range(-(-world.n_subjects // world.namesakes))]
    first = [next(names) for _ in range(max(world.namesakes, world.n_subjects // 3))]
    rng = np.random.default_rng([world.seed, 13])
    people = []
    for name in last:
        people += [f"{first[i]} {name}" for i in rng.choice(len(first), world.namesakes, replace=False)]
    return [people[i] for i in rng.permutation(len(people))[: world.n_subjects]]
