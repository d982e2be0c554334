"""A user's own table: a DataFrame is as good as a file, rows are named by where they stand."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjattn.errors import BadInput
from subjattn.facts import load_facts, read_facts
from subjattn.facts.files import _say_once, read_table
from subjattn.prompts import default_styles


CELL = st.text(st.sampled_from('ab ",|\n\r\té\u2028;'), max_size=6)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8)


@given(rows=ROWS, blank=st.integers(0, 2), end=st.sampled_from(["\n", "\r\n", "\r"]), bom=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_row_is_named_by_the_line_an_editor_shows(
    tmp_path: Path, rows: list[tuple[str, str]], blank: int, end: str, bom: bool
) -> None:
    """Cells may hold line breaks; the slow way is to count line ends before the row in the text itself."""
    text, lines = "", []
    for row in [("subject", "answer"), *rows]:
        lines.append(text.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1)
        cells = io.StringIO(newline="")
        csv.writer(cells, lineterminator=end, quoting=csv.QUOTE_ALL).writerow(row)
        text += cells.getvalue() + end * blank
    path = tmp_path / "facts.csv"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    table = read_table(path)
    assert table.places == lines[1:]
    assert list(table.cells.itertuples(index=False, name=None)) == rows, "nothing of a cell is lost"


def test_a_frame_is_as_good_as_its_file(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "city": ["Bonn", "Lima", "Bern"],
            "land": [["Germany", "BRD"], "Peru|Perú", ("Switzerland",)],
            "year": [2, None, 5],
        },
        index=["x", "y", "z"],
    )
    columns = {"subject": "city", "answer": "land", "popularity": "year"}
    facts = load_facts(frame, columns=columns)
    assert facts["answers"].tolist() == [["Germany", "BRD"], ["Peru", "Perú"], ["Switzerland"]]
    assert facts["source"].unique().tolist() == ["DataFrame"] and facts["fact_id"].tolist() == [
        "row-x",
        "row-y",
        "row-z",
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")).replace("NaN", "null"))
    same = ["subject", "answers", "relation", "question", "popularity"]
    pd.testing.assert_frame_equal(load_facts(path, columns=columns)[same], facts[same])
    turned = load_facts(frame.iloc[::-1], n=2, columns=columns)
    pd.testing.assert_frame_equal(turned, load_facts(frame, n=2, columns=columns)), "labels, not the order, are drawn"


def test_a_frame_of_odd_types() -> None:
    frame = pd.DataFrame({"subject": pd.array(["A", "B"], "string"), "answer": [np.array([1949, 1950]), 7], 3: [1, 2]})
    assert load_facts(frame)["answers"].tolist() == [["1949", "1950"], ["7"]]
    for column, values, message in [
        ("subject", pd.array(["A", None], "string"), "DataFrame: row 8: there is no subject"),
        ("answer", ["A", float("nan")], "DataFrame: row 8: there is no answer"),
        ("answer", ["A", pd.NA], "DataFrame: row 8: there is no answer"),
        ("answer", ["A", []], "DataFrame: row 8: there is no answer"),
        ("subject", [None, 1.5], "DataFrame: row 4: there is no subject"),
    ]:
        with pytest.raises(BadInput) as caught:
            load_facts(pd.DataFrame({"subject": ["A", "B"], "answer": ["C", "D"]} | {column: values}, index=[4, 8]))
        assert str(caught.value) == message
    with pytest.raises(BadInput) as caught:
        load_facts(pd.DataFrame({"Subject": ["A"], "answer": ["B"]}))
    assert str(caught.value) == (
        "DataFrame: no column 'subject' among Subject, answer: name the columns, columns={'subject': 'Subject'}"
    )
    with pytest.raises(BadInput, match="n=3 is not between 1 and the 2 facts there are"):
        load_facts(frame, n=3)


def test_rows_whose_labels_are_not_unique_are_numbered() -> None:
    frame = pd.DataFrame({"subject": ["A", "B", "b"], "answer": ["x", "y", "z"]}, index=[0, 0, 0])
    facts, rejected = read_facts(frame)
    assert facts["fact_id"].tolist() == ["row-0"] and rejected["row"].tolist() == [1, 2]


def test_duplicates_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('subject,answer\n"Peru","Lima"\n\nPERU,Lima\nChad,A\nChad,B\nMali,Bamako\n')
    facts, rejected = read_facts(path)
    assert facts["subject"].tolist() == ["Peru", "Mali"]
    assert rejected.to_dict("split")["data"] == [
        [str(path), 4, "the same fact as line 2: merged"],
        [str(path), 5, "asked with another answer in line 6: dropped"],
        [str(path), 6, "asked with another answer in line 5: dropped"],
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("f.csv", "subject;answer\nPeru;Lima, by the sea\n", "semicolons: its header holds no commas"),
        ("f.csv", "subject\tanswer\nPeru\tLima, by the sea\n", "tabs: its header holds no commas"),
        ("f.tsv", 'subject,answer\nPeru,"Lima, by the sea"\n', "commas: its header holds no tabs"),
        ("f.csv", '\ufeffsubject,answer\nPeru,"Lima, by the sea"\n', None),
    ],
)
def test_other_separators_are_read_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str, said: str | None
) -> None:
    _say_once.cache_clear()
    path = tmp_path / name
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert [load_facts(path)["answers"].tolist() for _ in range(2)] == [[["Lima, by the sea"]]] * 2
    assert [record.getMessage() for record in caplog.records] == (
        [f"note: {path} is read as parted by {said}"] if said else []
    )


@pytest.mark.parametrize(
    ("relation", "question", "styles"),
    [
        ("capital", "What city leads {subject}?", {"question": "{question}"}),
        ("seat", "What city leads {subject}?", {"question": "{question}"}),
        (None, "What city leads {subject}?", {"question": "{question}"}),
        ("capital", None, {"question": "What is the capital of {subject}?"}),
    ],
)
def test_a_table_brings_its_own_way_to_ask(relation: str | None, question: str | None, styles: dict[str, str]) -> None:
    given = {"subject": ["Peru"], "answer": ["Lima"], "relation": [relation], "question": [question]}
    found = default_styles(load_facts(pd.DataFrame(given)))
    assert {name: found[name] for name in styles} == styles and (question is None or found == styles)
