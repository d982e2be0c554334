"""Answers that stand in the name, and facts that a model knows."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import draw, load_facts
from subjattn.facts.given import answer_in_subject, without_given
from subjattn.measures.answers import predict
from subjattn.models import LoadedModel, identity
from subjattn.prompts import PromptSet, make_prompts
from subjattn.study.checking import check_study
from subjattn.study.plan import plan_study
from subjattn.study.read import parse_study
from subjattn.study.registration import registration_of
from subjattn.study.stages.pool import load_pool


WORD = st.text(st.sampled_from("abéÉßñ"), min_size=1, max_size=4)
WORDS = st.lists(WORD, min_size=1, max_size=4)


def asked(subject: str, *answers: str) -> pd.DataFrame:
    return load_facts(pd.DataFrame({"subject": [subject], "answer": [list(answers)]}))


def plain(text: str) -> str:
    """Another way to fold: decompose what is upper case."""
    return "".join(c for c in unicodedata.normalize("NFD", text.upper()) if unicodedata.category(c) != "Mn")


@settings(deadline=None)
@given(subject=WORDS, answer=WORDS, between=st.sampled_from([" ", "-", ", ", "’"]), loud=st.booleans())
def test_an_answer_in_the_name_is_found(subject: list[str], answer: list[str], between: str, loud: bool) -> None:
    """The slow way: fold both, and look for the answer between spaces."""
    name = between.join(subject).upper() if loud else between.join(subject)
    found = answer_in_subject(asked(name, "x", " ".join(answer)))
    spaced = f" {' '.join(map(plain, subject))} "
    assert found.tolist() == [f" {' '.join(map(plain, answer))} " in spaced]


@pytest.mark.parametrize(
    ("subject", "answers", "held"),
    [
        ("Guinea-Bissau", ["Bissau"], True),
        ("Mexico City", ["Mexico"], True),
        ("Nigeria", ["Niger"], False),
        ("San José", ["Costa Rica", "SAN JOSE"], True),
        ("Gambia River", ["The Gambia"], True),
        ("New York", ["York", "x"], True),
        ("York", ["New York"], False),
        ("東京都", ["東京"], True),
        ("दिल्ली", ["द"], False),
        ("नई दिल्ली", ["दिल्ली"], True),
        ("C++", ["+x"], False),
    ],
)
def test_names_that_give_the_answer_away(subject: str, answers: list[str], held: bool) -> None:
    assert answer_in_subject(asked(subject, *answers)).tolist() == [held]


def test_cities_give_no_country_away(cities: pd.DataFrame) -> None:
    """The built-in source leaves them out by a rule of its own; what is left are aliases such as 'US'."""
    found = answer_in_subject(cities)
    assert found.mean() < 0.001 and without_given(cities)["fact_id"].tolist() == cities["fact_id"][~found].tolist()
    with pytest.raises(BadInput, match="all 1 facts have their answer in the subject's name: none is left"):
        without_given(asked("Mexico City", "Mexico"))


def test_multiple_choice_gives_nothing_away() -> None:
    facts = asked("A", "A").assign(choices=[["x", "y"]])
    assert answer_in_subject(facts).tolist() == [False]


def test_a_study_leaves_them_out(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """And a study that does not ask for it is what it was: the same stage, the same registration."""
    path = tmp_path / "facts.csv"
    path.write_text("subject,answer\nMexico City,Mexico\nLima,Peru\nGuinea-Bissau,Bissau\n")
    raw = {"name": "s", "model": str(tiny_folders["llama"]), "styles": {"a": "{subject} is in"}, "arms": {"base": {}}}
    study, without = (
        parse_study(raw | {"facts": {"source": str(path), "n_test": 1, **more}}, "test")
        for more in ({}, {"leave_out_given": True})
    )
    assert load_pool(without.facts, without.model, 0)["subject"].tolist() == ["Lima"]
    assert ", 3 in 1 relation, 2 with their answer in the name (see facts.leave_out_given)" in check_study(study)[1]
    plain, other = (next(iter(plan_study(one))) for one in (study, without))
    assert set(plain.settings["facts"]) == {"columns", "relations", "pool"} and plain.recipe(1) != other.recipe(1)
    arms = {"base": {}, "same": {"model": str(tiny_folders["llama"])}}
    compared = raw | {"arms": arms, "contrasts": [["same", "base"]]}
    stated = (
        registration_of(parse_study(compared | {"facts": {"source": str(path), **more}}, "test"))
        for more in ({}, {"leave_out_given": False}, {"leave_out_given": True})
    )
    first, same, third = (one.digest for one in stated)
    assert first == same != third


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def prompts(model: LoadedModel, cities: pd.DataFrame) -> PromptSet:
    """Half of the facts ask for what the model says anyway, so that half is right."""
    facts = draw(cities, 12, seed=4)
    said = predict(model, make_prompts(facts, model.tokenizer, "City: {subject}\nCountry:"), "containment")
    right = np.arange(12) % 2 == 0
    answers = [[text or "?x"] if own else ["zzz"] for text, own in zip(said["prediction"], right, strict=True)]
    return make_prompts(facts.assign(answers=answers), model.tokenizer, "City: {subject}\nCountry:")


def test_only_facts_that_are_answered_rightly(
    model: LoadedModel, prompts: PromptSet, caplog: pytest.LogCaptureFixture
) -> None:
    found = predict(model, prompts, "containment")
    right = found["fact_id"][found["correct"]].tolist()
    assert 0 < len(right) < len(prompts)
    left = sa.where(prompts, "correct", model=model, scorer="containment")
    assert [prompt.fact_id for prompt in left] == right and left.style == prompts.style
    said = f"where correct: {len(right)} of 12 facts are left: answered rightly (containment)"
    assert [record.getMessage() for record in caplog.records] == [said]
    dataset = sa.measure("accuracy", model, prompts, {"scorer": "containment"}, where="correct")
    assert dataset["accuracy"].values.tolist() == [1.0] * len(right) and dataset["fact"].values.tolist() == right
    assert dataset.attrs["where"] == f"correct: {len(right)} of 12 facts"


def labels(prompts: PromptSet, model: LoadedModel, **changed: object) -> pd.DataFrame:
    rows = [
        {"fact_id": prompt.fact_id, "subject": prompt.subject, "answers": [*prompt.answers], "category": category}
        for prompt, category in zip(prompts, ["HighlyKnown", "WeaklyKnown", "Unknown"] * 3, strict=False)
    ]
    who = {"model": model.name, "model_identity": identity(model.name), "adapter": None, "adapter_identity": None}
    return pd.DataFrame(rows).assign(**who).assign(**changed)


@pytest.mark.parametrize(
    ("condition", "kept"), [("known", {0, 1, 3, 4, 6, 7}), ("HighlyKnown", {0, 3, 6}), ("Unknown", {2, 5, 8})]
)
def test_only_facts_of_a_category(
    model: LoadedModel,
    prompts: PromptSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    condition: str,
    kept: set[int],
) -> None:
    """Three of twelve facts have no label, and count for nothing."""
    path = tmp_path / "knowledge.parquet"
    labels(prompts, model).sample(frac=1, random_state=1).to_parquet(path)
    left = sa.where(prompts, condition, model=model, knowledge=path)
    assert [prompt.fact_id for prompt in left] == [prompts[i].fact_id for i in sorted(kept)]
    said = f"where {condition}: {len(kept)} of 12 facts are left: {condition} by {path}, 3 have no label"
    assert caplog.records[-1].getMessage() == said


def test_a_label_never_lands_on_another_fact(model: LoadedModel, prompts: PromptSet, tmp_path: Path) -> None:
    path, good = tmp_path / "knowledge.parquet", labels(prompts, model)
    wrong = good.assign(subject=good["subject"].where(good.index != 1, "Atlantis"))
    answers = good["answers"].where(good.index != 1, pd.Series([["shilling"]] * len(good)))
    for table, condition, message in [
        (good.assign(answers=answers), "known", f"{path}: labels 'shilling' as {prompts[1].fact_id}, and here that is"),
        (wrong, "known", f"{path}: labels 'Atlantis' as {prompts[1].fact_id}, and here that is"),
        (pd.concat([good, good[:1]]), "known", f"{path}: labels a fact twice: it is not as"),
        (good.drop(columns="category"), "known", f"{path}: has no column 'category': give the knowledge.parquet of"),
        (good.assign(fact_id=range(9)), "known", f"{path}: labels none of these 12 facts, by their ids (0 there"),
        (good.assign(model_identity="x", model="gpt2"), "known", f"{path}: says what 'gpt2' knows, and the model here"),
        (good.assign(adapter="a", adapter_identity="b"), "known", f"says what '{model.name}' with the adapter 'a' kn"),
        (good, "MaybeKnown", "where 'MaybeKnown': none of 12 facts is left: MaybeKnown by"),
        (good, "sure", "where 'sure' is not one of correct, known, HighlyKnown, MaybeKnown, WeaklyKnown, Unknown"),
        (good, "correct", "where 'correct' asks the model, and no labels: leave out the knowledge"),
    ]:
        table.to_parquet(path)
        with pytest.raises(BadInput, match=re.escape(message)):
            sa.where(prompts, condition, model=model, knowledge=path)
    with pytest.raises(BadInput, match="where 'known' needs the labels of a model: give knowledge"):
        sa.where(prompts, "known", model=model)
    with pytest.raises(BadInput, match="where 'correct' asks the model: give model="):
        sa.where(prompts, "correct")
    with pytest.raises(BadInput, match="no such file of labels: 'no.parquet'"):
        sa.where(prompts, "known", knowledge="no.parquet")
    with pytest.raises(BadInput, match="knowledge labels facts: say which are wanted, such as where 'HighlyKnown'"):
        sa.measure("accuracy", model, prompts, knowledge=path)
