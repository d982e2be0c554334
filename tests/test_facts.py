"""Tables of facts, splits, and a user's own file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subjattn.errors import BadInput
from subjattn.facts import draw, load_facts
from subjattn.facts.splits import THIRDS, popularity_thirds, split
from subjattn.facts.table import COLUMNS


ARMS = ["known", "unknown", "random"]


def some_facts(n: int, n_answers: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "fact_id": [f"f{i:04d}" for i in range(n)],
            "subject": [f"s{i}" for i in range(n)],
            "relation": "r",
            "answers": [[f"a{rng.integers(n_answers)}"] for _ in range(n)],
            "popularity": rng.integers(1, 50, n).astype(float),
            "source": "test",
        }
    )


def test_cities_are_unambiguous(cities: pd.DataFrame) -> None:
    assert list(cities.columns) == COLUMNS
    assert len(cities) > 25_000
    assert cities["fact_id"].is_unique
    names = cities["subject"].str.casefold()
    assert names.is_unique
    assert not {"mexico city", "singapore", "springfield", "london"} & set(names), "London is also in Ontario"
    assert dict(zip(cities["subject"], cities["answers"].str[0], strict=True))["Nairobi"] == "Kenya"
    assert cities["popularity"].dropna().between(15_000, 50_000_000).mean() > 0.98
    assert 0 < cities["popularity"].isna().sum() < 200, "GeoNames gives 0 where it knows no population"


def test_draw_does_not_depend_on_row_order(cities: pd.DataFrame) -> None:
    turned = cities.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(draw(cities, 20, 7), draw(turned, 20, 7))
    assert set(draw(cities, 20, 7)["fact_id"]) != set(draw(cities, 20, 8)["fact_id"])


def test_thirds_are_by_popularity_within_answers(cities: pd.DataFrame) -> None:
    facts = cities.assign(third=popularity_thirds(cities), answer=cities["answers"].str[0])
    for _, group in facts[facts["third"].notna()].groupby("answer"):
        by_third = [group.loc[group["third"] == third, "popularity"] for third in THIRDS]
        assert by_third[0].max() <= by_third[1].min()
        assert by_third[1].max() <= by_third[2].min()
        assert max(map(len, by_third)) - min(map(len, by_third)) <= 1
    assert (facts[facts["third"].isna()].groupby("answer").size() < 3).all()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(60, 300),
    n_answers=st.integers(1, 6),
    seed=st.integers(0, 5),
    n_test=st.integers(3, 12),
    n_train=st.integers(1, 10),
)
def test_split_guarantees(n: int, n_answers: int, seed: int, n_test: int, n_train: int) -> None:
    facts = some_facts(n, n_answers, seed)
    lengths = [1 + i % 2 for i in range(n)]
    try:
        table = split(facts, lengths, ARMS, n_train, n_test, seed)
    except BadInput:
        return
    arms = {arm: table[table[f"train_{arm}"]] for arm in ARMS}
    assert all(len(arm) == n_train for arm in arms.values())
    assert table["test"].sum() == n_test
    for arm in arms.values():
        assert not arm["test"].any()
    assert set(arms["known"]["third"]) <= {"top"}
    assert set(arms["unknown"]["third"]) <= {"bottom"}
    cells = [Counter(zip(arm["answer"], arm["n_tokens"], strict=True)) for arm in arms.values()]
    assert cells[0] == cells[1] == cells[2], "same answers and lengths in the same numbers"
    shuffled = facts.assign(n=lengths).sample(frac=1, random_state=seed)
    again = split(shuffled.drop(columns="n"), shuffled["n"].tolist(), ARMS, n_train, n_test, seed)
    pd.testing.assert_frame_equal(table, again)


def test_test_facts_share_answers_across_thirds(cities: pd.DataFrame) -> None:
    table = split(cities, [1] * len(cities), ARMS, 100, 90, 0)
    shares = [Counter(table[table["test"] & (table["third"] == third)]["answer"]) for third in THIRDS]
    assert shares[0] == shares[1] == shares[2]


@pytest.mark.parametrize(("n_train", "n_test", "message"), [(10_000, 3, "n_train=10000"), (3, 10_000, "n_test=10000")])
def test_split_says_what_is_short(n_train: int, n_test: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        split(some_facts(200, 3), [1] * 200, ARMS, n_train, n_test)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_own_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    table = pd.DataFrame({"subject": ["Ada", "NA"], "answer": ["London|England", "1,5"], "popularity": ["3", ""]})
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")))
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    facts = load_facts(str(path))
    assert list(facts.columns) == COLUMNS
    assert facts["subject"].tolist() == ["Ada", "NA"], "no name is read as a missing value"
    assert facts["answers"].tolist() == [["London", "England"], ["1,5"]]
    assert facts["popularity"].iloc[0] == 3 and np.isnan(facts["popularity"].iloc[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,answer\nA,B\n", "needs the columns 'subject' and 'answer'"),
        ("subject,answer\n", "no facts"),
        ("subject,answer\n ,B\n", "fact own-0 .row 0. has no subject"),
        ("subject,answer\nA,\n", "has no answer, or an empty one"),
        ("subject,answer\nA,...\n", "has no answer, or an empty one"),
        ('subject,answer,popularity\nA,B,"1,000"\n', "popularity '1,000' in row 0 is not a number"),
        ("fact_id,subject,answer\nx,A,B\nx,C,D\n", "'x' occurs more than once"),
        ('subject,answer\n"A,B\n', "cannot be read as csv"),
        (b"subject,answer\n\xff\xfe,B\n", "cannot be read as csv"),
    ],
)
def test_bad_file(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BadInput, match=message):
        load_facts(str(path))


@pytest.mark.parametrize(("name", "message"), [("nope", "unknown facts 'nope'"), ("no/such.csv", "no such file")])
def test_unknown_facts(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_facts(name)


def test_n_larger_than_the_data() -> None:
    with pytest.raises(BadInput, match="n=99999 is not between 1 and the"):
        load_facts("cities", n=99_999)


@pytest.mark.parametrize("row", [{"subject": "Bonn", "answer": None}, {"subject": "Bonn", "answer": {"a": 1}}])
def test_a_missing_answer_is_not_nan(tmp_path: Path, row: dict) -> None:
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, [{"subject": "Rome", "answer": "Italy"}, row])))
    with pytest.raises(BadInput, match="has no answer"):
        load_facts(str(tmp_path / "own.jsonl"))


def test_a_repeated_subject_is_not_split() -> None:
    """Planted: the same name under two ids could be learnt and tested."""
    facts = some_facts(200, 3)
    facts.loc[7, "subject"] = "S8"
    with pytest.raises(BadInput, match="is in several facts and could be learnt and tested"):
        split(facts, [1] * 200, ARMS, 10, 12)
