"""Tables of facts and a user's own file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from subjattn.errors import BadInput
from subjattn.facts import draw, load_facts
from subjattn.facts.table import COLUMNS


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
        (
            "name,answer\nA,B\n",
            "own.csv:1: no column 'subject' among name, answer: name the columns",
        ),
        ("subject,answer\n", "no facts"),
        ("subject,answer\n ,B\n", "own.csv:2: there is no subject"),
        ("subject,answer\nA,\n", "own.csv:2: there is an empty answer"),
        ("subject,answer\nA,...\n", "is punctuation alone"),
        ('subject,answer,popularity\nA,B,"1,000"\n', "own.csv:2: popularity '1,000' is not a number"),
        ("fact_id,subject,answer\nx,A,B\nx,C,D\n", "'x' occurs more than once"),
        ('subject,answer\n"A,B\n', "own.csv:2: cannot be read as a row of a table"),
        (b"subject,answer\n\xff\xfe,B\n", "is not UTF-8 text"),
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
    with pytest.raises(BadInput, match="there is no answer"):
        load_facts(str(tmp_path / "own.jsonl"))
