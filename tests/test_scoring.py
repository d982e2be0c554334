"""When an answer counts as right, by hand; and predictions under every scorer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.measures.answers import choice_logprobs, generate, longest_answers, predict, reason
from subjattn.measures.scoring import SCORERS, contains_alias, definition_of, exact_match
from subjattn.models import LoadedModel
from subjattn.prompts import Style, make_prompts


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "contained"),
    [
        ("Niger", ["Niger"], True, True),
        (" the niger. ", ["Niger"], True, True),
        ("Nigeria", ["Niger"], False, True),
        ("It is Niger", ["Niger"], False, True),
        ("Ni", ["Niger"], False, False),
        ("U.S.A.", ["USA", "America"], True, False),
        ("united   states", ["United States of America", "United States"], True, False),
        ("", ["A"], False, False),
        ("...", ["A"], False, False),
    ],
)
def test_exact_match_and_containment(prediction: str, answers: list[str], exact: bool, contained: bool) -> None:
    assert exact_match(prediction, answers) is exact
    assert contains_alias(prediction, answers) is contained


def test_every_prediction_names_its_scorer(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 6, 1), tiny.tokenizer, "list")
    for name, rule in SCORERS.items():
        found = predict(tiny, prompts, name)  # type: ignore[arg-type]
        assert set(found["scorer"]) == {name} and definition_of(name) == rule.definition
        most = longest_answers(rule, tiny.tokenizer, prompts)
        texts = generate(tiny.model, tiny.tokenizer, prompts, most, one_line=rule.one_line)
        assert found["prediction"].tolist() == texts
        own = [rule.correct(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)]
        assert found["correct"].tolist() == own
    plain = predict(tiny.model, prompts, tokenizer=tiny.tokenizer)
    pd.testing.assert_frame_equal(plain, predict(tiny, prompts))
    with pytest.raises(BadInput, match="brings no tokenizer: give tokenizer="):
        predict(tiny.model, prompts)
    with pytest.raises(BadInput, match="scorer 'best' is not one of answer_start"):
        predict(tiny, prompts, "best")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has no choices"):
        choice_logprobs(tiny, prompts)


def test_reasoning_is_one_line_that_ends_before_the_conclusion(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    facts = draw(cities, 3, 1)
    style = Style(template="Q: {question}\nA:", chain_of_thought=True)
    prompts = make_prompts(facts, smollm2.tokenizer, style)
    thoughts = reason(smollm2, prompts, 12)
    assert list(thoughts) == facts["fact_id"].tolist()
    assert reason(smollm2.model, prompts, 12, smollm2.tokenizer) == thoughts
    with pytest.raises(BadInput, match="brings no tokenizer"):
        reason(smollm2.model, prompts, 12)
    assert all("\n" not in text and "So the answer is" not in text for text in thoughts.values())
    ended = make_prompts(facts, smollm2.tokenizer, style, reasoning=thoughts)
    for prompt, begun in zip(ended, prompts, strict=True):
        assert prompt.text == " ".join(
            part for part in (begun.text, thoughts[prompt.fact_id], "So the answer is") if part
        )
        assert prompt.subject_span == begun.subject_span


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_verdict_that_is_decided_stands(scorer: str) -> None:
    """Texts put together at random from what decides: the whole is judged as the beginning that was enough."""
    rng, rule, decided = np.random.default_rng(0), SCORERS[scorer], set()
    names = [
        "Niger",
        "Nigeria",
        "Guinea",
        "Guinea-Bissau",
        "Côte d’Ivoire",
        "The Gambia",
        "Thailand",
        "U.S.",
        "St. Lucia",
    ]
    pieces = [
        " ",
        "the ",
        "The ",
        "Niger",
        "ia",
        "-",
        "Guinea",
        " Bissau",
        ",",
        ".",
        "\u0301",
        "'s",
        " in",
        " Republic",
    ]
    pieces += [
        "t",
        "th",
        "e ",
        "Gambia",
        "T",
        "hailand",
        "(",
        "Côte d'",
        "Ivoire",
        "é",
        "\n",
        "U",
        ".S",
        "St. ",
        "Lucia",
    ]
    tokens = [*(piece.encode() for piece in pieces), b"\xe2\x80", b"\x99", b"\xc3", b"\xa9"]
    for _ in range(20_000):
        answers = rng.choice(names, 2).tolist()
        said = [tokens[i] for i in rng.integers(len(tokens), size=6)]
        texts = [b"".join(said[:n]).decode(errors="replace") for n in range(1, 7)]
        begun = next((text.lstrip() for text in texts if rule.decided(text.lstrip(), answers)), None)
        if begun is None or len(begun.splitlines()) > 1:
            continue
        whole = texts[-1].strip().splitlines()[0].strip() if rule.one_line else texts[-1].strip()
        assert rule.correct(begun.strip(), answers) == rule.correct(whole, answers), (said, answers)
        decided.add((rule.correct(whole, answers), len(begun) < len(texts[-1])))
    assert (False, True) in decided or scorer == "containment"
    assert (True, True) in decided or scorer == "exact_match"


@pytest.mark.parametrize(
    ("begun", "decided"),
    [
        *((text, False) for text in ("Niger", "Niger ", "Nige", "Nig\N{REPLACEMENT CHARACTER}", "the ", "th", "")),
        *((text, True) for text in ("Niger,", "Niger in", "Nigeria", "Niger Re", "than", "Chad")),
    ],
)
def test_what_is_enough_of_an_answer(begun: str, decided: bool) -> None:
    assert SCORERS["answer_start"].decided(begun, ["Niger"]) == decided
