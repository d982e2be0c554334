"""Arms taught with each other's answers: what stays, what changes, and that no permutation does better."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts.shuffle import taught
from subjattn.facts.splits import facts_of, parse_arm, split
from subjattn.study.checking import check_study
from subjattn.study.config import StudyConfig
from subjattn.study.plan import plan_study
from subjattn.study.read import parse_study
from subjattn.study.run import run_study


usual = settings(max_examples=60, deadline=None)
SPECS = st.sampled_from(["shuffled", "shuffled:known", "shuffled:mixed-25%"])


def with_answers(answers: list[list[str]], relations: list[str]) -> pd.DataFrame:
    n = len(answers)
    facts = {"fact_id": [f"f{i:03d}" for i in range(n)], "subject": [f"S{i}" for i in range(n)]}
    return pd.DataFrame(facts | {"relation": relations, "answers": answers, "answer": [own[0] for own in answers]})


@st.composite
def lists(draw: st.DrawFn, largest: int = 40, aliases: bool = False) -> pd.DataFrame:
    """Facts of one to three relations, at least two answers in each."""
    rows: list[tuple[str, list[str]]] = []
    for relation in range(draw(st.integers(1, 3))):
        names = draw(st.lists(st.sampled_from("abcde"), min_size=0, max_size=largest))
        for name in ["a", "b", *names]:
            more = draw(st.lists(st.sampled_from("abcde"), max_size=1)) if aliases else []
            rows.append((f"r{relation}", [name, *more]))
    return with_answers([answers for _, answers in rows], [relation for relation, _ in rows])


def kept(facts: pd.DataFrame, found: pd.DataFrame) -> dict[str, int]:
    """Facts of each relation that are taught an answer that is right."""
    own = facts.set_index("fact_id")["answers"]
    right = [row.answer in own[row.fact_id] for row in found.itertuples()]
    return pd.Series(right).groupby(found["relation"].to_numpy()).sum().to_dict()


@usual
@given(facts=lists(aliases=True), spec=SPECS, seed=st.integers(0, 9), number=st.integers(0, 2))
def test_counts_of_answers_stay(facts: pd.DataFrame, spec: str, seed: int, number: int) -> None:
    found = taught(facts, spec, seed, number)
    for relation, own in facts.groupby("relation"):
        other = found[found["relation"] == relation]
        assert Counter(map(tuple, own["answers"])) == Counter(map(tuple, other["answers"]))
    assert found["answer"].tolist() == [answers[0] for answers in found["answers"]]
    columns = ["fact_id", "subject", "relation"]
    pd.testing.assert_frame_equal(found[columns], facts[columns])


@usual
@given(facts=lists(), spec=SPECS, seed=st.integers(0, 9))
def test_no_fact_keeps_its_answer_where_counts_allow(facts: pd.DataFrame, spec: str, seed: int) -> None:
    """Of n facts, m with the same answer, at most n - m can take another's: 2m - n keep theirs, else none."""
    expected = {}
    for relation, own in facts.groupby("relation"):
        expected[relation] = max(0, 2 * own["answer"].value_counts().iloc[0] - len(own))
    assert kept(facts, taught(facts, spec, seed)) == expected


@usual
@given(facts=lists(largest=4), seed=st.integers(0, 9))
def test_no_permutation_does_better(facts: pd.DataFrame, seed: int) -> None:
    """Against all permutations of a few facts."""
    found = kept(facts, taught(facts, "shuffled", seed))
    for relation, own in facts.groupby("relation"):
        answers = own["answer"].tolist()
        best = min(sum(a == b for a, b in zip(answers, order, strict=True)) for order in permutations(answers))
        assert found[relation] == best


@usual
@given(facts=lists(aliases=True), seed=st.integers(0, 9))
def test_an_alias_is_kept_only_where_no_exchange_helps(facts: pd.DataFrame, seed: int) -> None:
    own = facts.set_index("fact_id")["answers"]
    for _, some in taught(facts, "shuffled", seed).groupby("relation"):
        rows = [(own[row.fact_id], row.answer) for row in some.itertuples()]
        for right, answer in rows:
            if answer in right:
                assert not any(other not in right and answer not in its for its, other in rows)


@usual
@given(facts=lists(), spec=SPECS, seed=st.integers(0, 5), order=st.randoms())
def test_the_order_of_rows_changes_nothing(facts: pd.DataFrame, spec: str, seed: int, order: Any) -> None:
    rows = list(range(len(facts)))
    order.shuffle(rows)
    pd.testing.assert_frame_equal(taught(facts.iloc[rows], spec, seed), taught(facts, spec, seed))
    alone = taught(facts[facts["relation"] == "r0"], spec, seed)
    beside = taught(facts, spec, seed).query("relation == 'r0'")
    assert alone["answer"].tolist() == beside["answer"].tolist()


def test_every_pairing_is_about_as_likely() -> None:
    """A fact takes any other's answer equally often, so that a name says nothing of it but what it is not."""
    facts = with_answers([[name] for name in "aabbccdd"], ["r"] * 8)
    takes = np.array([taught(facts, "shuffled", seed)["answer"].to_numpy() for seed in range(2000)])
    for own, column in zip(facts["answer"], takes.T, strict=True):
        shares = pd.Series(column).value_counts(normalize=True)
        assert set(shares.index) == set("abcd") - {own} and (abs(shares - 1 / 3) < 0.05).all()


def test_seed_draw_and_arm_give_other_permutations() -> None:
    facts = with_answers([[name] for name in "abcde" * 8], ["r"] * 40)
    asked = [("shuffled", 0, 0), ("shuffled", 1, 0), ("shuffled", 0, 1), ("shuffled:known", 0, 0)]
    assert len({tuple(taught(facts, *one)["answer"]) for one in asked}) == len(asked)
    pd.testing.assert_frame_equal(taught(facts, "shuffled", 3), taught(facts, "shuffled:random", 3))
    assert taught(facts, "known", 3) is facts


def test_one_answer_is_refused_in_one_line() -> None:
    facts = with_answers([["a"], ["b"], ["c"], ["C "]], ["r", "r", "s", "s"])
    with pytest.raises(BadInput, match="arm 'shuffled': in relation 's' all 2 facts have the answer 'c'") as caught:
        taught(facts, "shuffled", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["shuffled:", "shuffled:shuffled", "shuffled:odd", "Shuffled", "shuffled: known"])
def test_no_shuffled_arm(spec: str) -> None:
    with pytest.raises(BadInput, match="is no arm") as caught:
        parse_arm(spec)
    assert str(caught.value).startswith(f"arm {spec!r}")


@pytest.mark.parametrize("match", [("relation", "answer", "n_tokens"), ()])
@pytest.mark.parametrize("number", [0, 1])
def test_a_shuffled_arm_has_the_facts_of_its_own_and_moves_no_other(match: tuple[str, ...], number: int) -> None:
    rng = np.random.default_rng(0)
    facts = with_answers([[f"a{i % 3}"] for i in range(240)], [f"r{i % 2}" for i in range(240)])
    facts = facts.assign(popularity=rng.permutation(240), n_tokens=rng.integers(1, 3, 240))
    arms = ["known", "random", "mixed-25%"]
    plain = split(facts, arms, 12, 6, match=match, draw=number)
    more = split(facts, ["shuffled:mixed-25%", "shuffled", *arms, "shuffled:known"], 12, 6, match=match, draw=number)
    pd.testing.assert_frame_equal(plain, more[list(plain)])
    for spec in ("shuffled", "shuffled:known", "shuffled:mixed-25%"):
        assert more[f"train_{spec}"].equals(more[f"train_{facts_of(spec)}"])
    alone = split(facts, [*arms[:1], *arms[2:], "shuffled"], 12, 6, match=match, draw=number)
    assert alone["train_shuffled"].equals(plain["train_random"])


def shuffling(small: StudyConfig, **arms: dict[str, str]) -> StudyConfig:
    raw = small.model_dump(mode="json")
    raw |= {"arms": {"base": {}, **arms}, "contrasts": [], "claims": [], "measures": {}}
    return parse_study(raw | {"styles": {"list": raw["styles"]["list"]}, "training": {"steps": 2}}, "s")


def test_a_study_trains_on_what_is_shuffled_and_says_so(small: StudyConfig, tmp_path: Path) -> None:
    both = shuffling(small, random={"train": "random"}, shuffled={"train": "shuffled"})
    plan = plan_study(both)
    named = {name: stage.inputs["facts"] for name, stage in ((s.name, s) for s in plan) if "facts" in stage.inputs}
    folder = "facts/split:train-{}-draw0.parquet"
    assert named == {
        "arms/random/draw0-seed0/adapter": folder.format("random"),
        "arms/shuffled/draw0-seed0/adapter": folder.format("shuffled"),
        "before/random-draw0": folder.format("random"),
    }
    run_study(both, tmp_path)
    run = sa.open_run(tmp_path)
    own, other = (run.taught(spec).set_index("fact_id")["answer"] for spec in ("random", "shuffled"))
    true = run.facts.set_index("fact_id")["answers"].str[0]
    assert own.index.equals(other.index) and set(own.index) == set(run.facts["fact_id"][run.facts["train_shuffled"]])
    assert own.tolist() == true[own.index].tolist()
    assert (own != other).all() and Counter(own) == Counter(other)
    assert run.before_training("shuffled").equals(run.before_training("random"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = "<tr><td>taught with their own answers</td><td>–</td><td>100.0 %</td><td>0.0 %</td></tr>"
    assert row in page


def test_check_finds_what_cannot_be_shuffled(small: StudyConfig, tmp_path: Path) -> None:
    table = pd.DataFrame({"subject": [f"Town {i}" for i in range(60)], "answer": "Kenya", "popularity": range(60)})
    table.to_csv(tmp_path / "one.csv", index=False)
    raw = shuffling(small, shuffled={"train": "shuffled"}).model_dump(mode="json")
    raw["facts"] |= {"source": str(tmp_path / "one.csv"), "n_train": 6, "n_test": 6}
    with pytest.raises(BadInput, match="there is nothing to shuffle"):
        check_study(parse_study(raw, "s"))
