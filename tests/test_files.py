"""Files as people have them: lists in cells, quotes behind spaces, normal forms, invisible and broken characters."""

from __future__ import annotations

import json
import logging
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_names import FORMS, INVISIBLE, NAMES

from subjattn.errors import BadInput
from subjattn.facts import join_popularity, load_facts, read_facts
from subjattn.facts.splits import split
from subjattn.prompts import Style, make_prompts, subject_lengths
from subjattn.study.config import FactsConfig
from subjattn.study.stages.pool import source_of, without_subjects


FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def written(folder: Path, content: str | bytes, name: str = "facts.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('["Nairobi", "Nairobi City"]', ["Nairobi", "Nairobi City"]),
        ("['Tokyo', 'Tōkyō']", ["Tokyo", "Tōkyō"]),
        ("('Tokyo', 'Tōkyō')", ["Tokyo", "Tōkyō"]),
        ("('Tokyo',)", ["Tokyo"]),
        (" ['Tokyo'] ", ["Tokyo"]),
        ('["N\'Djamena", "a|b", "a, b"]', ["N'Djamena", "a|b", "a, b"]),
        ('["\\u0141\\u00f3d\\u017a"]', ["Łódź"]),
        ("[1949, 1950]", ["1949", "1950"]),
        ('["[REC]"]', ["[REC]"]),
        ("Tokyo|Tōkyō", ["Tokyo", "Tōkyō"]),
        ("Tokyo (city)", ["Tokyo (city)"]),
        ("(Tokyo)", ["(Tokyo)"]),
        ("Tokyo [a]", ["Tokyo [a]"]),
    ],
)
def test_a_list_in_a_cell_is_a_list(tmp_path: Path, cell: str, answers: list[str]) -> None:
    frame = pd.DataFrame({"subject": ["X"], "answer": [cell]})
    assert load_facts(frame)["answers"].tolist() == [answers]
    for name in ("f.csv", "f.tsv", "f.jsonl", "f.parquet"):
        path = tmp_path / name
        if name == "f.jsonl":
            path.write_text(json.dumps({"subject": "X", "answer": cell}))
        elif name == "f.parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False, sep="\t" if name == "f.tsv" else ",")
        assert load_facts(path)["answers"].tolist() == [answers]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("['Tokyo' 'Tōkyō']", "looks like a list and cannot be read as one"),
        ("['Tokyo''s']", "looks like a list"),
        ("[Nairobi, Nairobi City]", "looks like a list"),
        ("[REC]", "looks like a list"),
        ("{'Nairobi', 'Mombasa'}", "looks like a list"),
        ('{"text": ["Paris"]}', "looks like a list"),
        ("{Nairobi,Mombasa}", "looks like a list"),
        ("['a', ['b']]", "looks like a list"),
        ("['a', None]", "looks like a list"),
        ("['a', 1.5]", "looks like a list"),
        ("array(['a'], dtype=object)", "looks like a list"),
        ("('a'", "looks like a list"),
        ("['a']|['b']", "looks like a list"),
        ("[]", "there is no answer"),
        ("['']", "there is an empty answer"),
    ],
)
def test_what_is_nearly_a_list_is_refused_by_line(tmp_path: Path, cell: str, message: str) -> None:
    path = tmp_path / "f.csv"
    pd.DataFrame({"subject": ["X", "Y"], "answer": ["x", cell]}).to_csv(path, index=False)
    with pytest.raises(BadInput, match=message) as caught:
        load_facts(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_list_of_subjects_is_refused() -> None:
    with pytest.raises(BadInput, match=r"DataFrame: row 0: the subject \"\['X'\]\" is a list: give one name a row"):
        load_facts(pd.DataFrame({"subject": ["['X']"], "answer": ["x"]}))
    assert load_facts(pd.DataFrame({"subject": ["[REC]"], "answer": ["x"]}))["subject"].tolist() == ["[REC]"]


@given(st.lists(st.text(min_size=1).map(str.strip).filter(bool), min_size=1, max_size=4, unique=True))
def test_lists_as_python_and_json_write_them(answers: list[str]) -> None:
    read = [load_facts_or_reason(text) for text in (json.dumps(answers), repr(answers), repr(tuple(answers)))]
    assert read[0] == read[1] == read[2] == load_facts_or_reason(answers)


def load_facts_or_reason(answer: object) -> object:
    try:
        return load_facts(pd.DataFrame({"subject": ["X"], "answer": [answer]}))["answers"].tolist()
    except BadInput as error:
        return str(error)


@pytest.mark.parametrize(
    "text",
    [
        'subject, answer\nFrance, "Paris"\n',
        '"subject", "answer"\n"France",   "Paris"\n',
        ' "subject", "answer"\n "France", "Paris"\n',
        'sep=;\nsubject; answer\nFrance; "Paris"\n',
        "sep=;\r\nsubject;answer\r\nFrance;Paris\r\n",
        "\ufeffsep=;\nsubject;answer\nFrance;Paris\n",
        '"sep=|"\nsubject|answer\nFrance|Paris\n',
        "SEP=\t\nsubject\tanswer\nFrance\tParis\n",
        "sep=,\nsubject,answer\nFrance,Paris\n",
        "sep=;;\nsubject;answer\nFrance;Paris\n",
        "\ufeff\ufeffsubject,\u200banswer\nFrance,Paris\n",
    ],
)
def test_quotes_behind_spaces_and_excels_first_line(tmp_path: Path, text: str) -> None:
    facts = load_facts(written(tmp_path, text))
    assert facts[["subject", "answers"]].to_numpy().tolist() == [["France", ["Paris"]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'subject,answer\nFrance,\t"Paris"\n',
            "facts.csv:2: the cell '\\\\t\"Paris\"' has white space before its quote",
        ),
        ('subject,answer\n\u00a0"France",Paris\n', "facts.csv:2: the cell .* has white space before its quote"),
        ('subject,answer\nPeru,Lima\nFrance,"Paris" \n', "facts.csv:3: .* or for spaces behind one"),
        ("sep=;\nsubject;answer\nFrance;Paris;x\n", "facts.csv:3: 3 cells, and the header has 2"),
        ("sep=;\n", "facts.csv: holds nothing but its first line"),
    ],
)
def test_what_may_stand_around_a_quote(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_facts(written(tmp_path, text))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_behind_excels_first(tmp_path: Path, end: str) -> None:
    _, rejected = read_facts(written(tmp_path, end.join(["sep=;", "subject;answer", "Peru;Lima", "", "PERU;Lima"])))
    assert rejected["row"].tolist() == [5] and "line 3" in rejected["reason"][0]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"subject": "Chad", "answer": "x", "answer": "y"}', "answer"),
        ('{"subject": "Chad", "answer": "x", "more": {"a": 1, "a": 1}}', "a"),
        ('{"subject": "Chad", "answer": "x", "more": [[{"b": 1, "b": {}}]]}', "b"),
        ('{"subject": "Chad", "answer": "x", "\\u0061nswer": "y"}', "answer"),
    ],
)
def test_a_key_twice_is_refused_by_line(tmp_path: Path, line: str, key: str) -> None:
    path = written(tmp_path, '{"subject": "Peru", "answer": "Lima"}\n' + line, "f.jsonl")
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    assert str(caught.value) == f"{path}:2: an object holds the key {key!r} twice: leave one"


def test_a_key_twice_in_published_files(tmp_path: Path) -> None:
    path = written(tmp_path, '[{"known_id": 1, "subject": "a", "subject": "b"}]', "known_1000.json")
    with pytest.raises(BadInput, match="an object holds the key 'subject' twice"):
        load_facts(f"known_1000:{path}")


HALF = '"\\ud83d"'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f'{{"subject": {HALF}, "answer": "x"}}', "subject"),
        (f'{{"subject": "X", "answer": {HALF}}}', "answer"),
        (f'{{"subject": "X", "answer": ["a", {HALF}]}}', "answer"),
        (f'{{"subject": "X", "answer": "x", "relation": {HALF}}}', "relation"),
        (f'{{"subject": "X", "answer": "x", "fact_id": {HALF}}}', "fact_id"),
        ('{"subject": "X", "answer": "x", "question": "X is \\ude00"}', "question"),
        ('{"subject": "S\\ufffdo", "answer": "x"}', "subject"),
        ('{"subject": "S\\u0000o", "answer": "x"}', "subject"),
    ],
)
def test_what_is_no_character_is_refused_by_line(tmp_path: Path, line: str, what: str) -> None:
    path = written(tmp_path, f'\n{{"subject": "Y", "answer": "y \\ud83d\\ude00"}}\n{line}', "f.jsonl")
    with pytest.raises(BadInput, match=":3: .*holds ") as caught:
        load_facts(path)
    str(caught.value).encode()
    row = pd.DataFrame([json.loads(line)], dtype=object)
    with pytest.raises(BadInput, match=f"DataFrame: row 0: the {what} .* holds "):
        load_facts(row)


def test_half_a_pair_elsewhere(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(BadInput, match="facts.csv:2: is not UTF-8 text"):
        load_facts(written(tmp_path, b"subject,answer\n\xed\xa0\xbd,x\n"))
    with pytest.raises(BadInput, match="f.jsonl:1: holds half of a surrogate pair"):
        load_facts(written(tmp_path, '{"subject": "X", "answer": "x", "a\\ud83d": 1}', "f.jsonl"))
    made = pd.DataFrame({"fact_id": ["f"], "subject": ["\ud83d"], "answers": [["x"]]}, dtype=object)
    with pytest.raises(BadInput, match="holds half of a surrogate pair"):
        make_prompts(made, tokenizer, "{subject} is")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="holds half of a surrogate pair"):
        Style.of("{subject} \ud83d is")


@given(name=st.sampled_from(NAMES), marks=st.text(st.sampled_from(INVISIBLE.replace("\ufe0f", "")), max_size=2))
@FIXTURE
def test_invisible_characters_are_taken_off_everywhere(tmp_path: Path, name: str, marks: str) -> None:
    row = {
        "subject": f"{marks}{name}{marks}",
        "answer": [f"Lima{marks}"],
        "question": f"Is {marks}{name}{marks} {marks}?",
    }
    path = written(tmp_path, json.dumps(row | {"relation": f"rel{marks}"}), "f.jsonl")
    (fact,) = load_facts(path).to_dict("records")
    assert (fact["subject"], fact["answers"], fact["relation"]) == (name, ["Lima"], "rel")
    assert fact["question"] == "Is {subject} ?"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("Nairobi\u200b", "ZERO WIDTH SPACE"),
        ("\ufeffNairobi", "ZERO WIDTH NO-BREAK SPACE"),
        ("Nai\u00adrobi", "SOFT HYPHEN"),
        ("Nairobi\u200f", "RIGHT-TO-LEFT MARK"),
        ("Nairobi", None),
    ],
)
def test_what_was_taken_off_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cell: str, said: str | None
) -> None:
    path = written(tmp_path, f"subject,answer\nPeru,Lima\nKenya,{cell}\n")
    with caplog.at_level(logging.WARNING):
        assert load_facts(path)["answers"].tolist() == [["Lima"], ["Nairobi"]]
    note = f"note: {path}: invisible characters are taken off ({said}), first in line 3"
    assert [record.getMessage() for record in caplog.records] == ([note] if said else [])


def test_a_name_of_nothing_visible_is_none() -> None:
    with pytest.raises(BadInput, match="row 0: there is no subject"):
        load_facts(pd.DataFrame({"subject": ["\u200b\u3164"], "answer": ["x"]}))


def forms(name: str) -> list[str]:
    return list(dict.fromkeys([*(unicodedata.normalize(form, name) for form in FORMS), name.upper()]))


SPELLINGS = ["São Paulo", "Ｋｙｏｔｏ", "ﾄｳｷｮｳ", "Hà Nội", "서울", "ﬁn", "Żory"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_subject_however_it_is_spelled(tmp_path: Path, name: str) -> None:
    spelled = forms(name)
    assert len(spelled) > 1
    same = pd.DataFrame({"subject": spelled, "answer": spelled})
    facts, rejected = read_facts(same)
    assert facts["subject"].tolist() == [spelled[0]], "the text stays as it was written"
    assert rejected["reason"].tolist() == ["the same fact as row 0: merged"] * (len(spelled) - 1)
    other = pd.DataFrame({"subject": [spelled[0], spelled[1], "Z"], "answer": ["a", "b", "c"]})
    assert load_facts(other)["subject"].tolist() == ["Z"]
    learnt = tmp_path / "learnt.csv"
    pd.DataFrame({"subject": spelled[1:2], "answer": "x"}).to_csv(learnt, index=False)
    assert without_subjects(load_facts(other.drop(1)), str(learnt))["subject"].tolist() == ["Z"]
    counts = tmp_path / "counts.csv"
    pd.DataFrame({"subject": [spelled[1]], "popularity": [7]}).to_csv(counts, index=False)
    assert join_popularity(facts, counts)["popularity"].tolist() == [7.0]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_subject_asked_is_never_shown(tokenizer: object, name: str) -> None:
    spelled = forms(name)
    facts = load_facts(pd.DataFrame({"subject": [spelled[0]], "answer": ["Brazil"], "relation": "country"}))
    shown = pd.DataFrame(
        {"subject": [*spelled[1:], "Z"], "answer": "Peru", "relation": "country", "fact_id": range(len(spelled))}
    )
    pool = pd.concat([load_facts(shown.iloc[[i]]) for i in range(len(shown))])
    style = Style(template="{subject} is in", shots=1)
    (prompt,) = make_prompts(facts, tokenizer, style, demonstrations=pool)  # type: ignore[arg-type]
    assert prompt.text.startswith("Z is in Peru")


def test_a_question_without_a_subject_is_not_shown_in_another_form(tokenizer: object) -> None:
    question = "Où est São Paulo?"
    rows = [
        {"fact_id": f"q{i}", "subject": None, "relation": "r", "answers": ["A"], "choices": ["x", "y"]}
        for i in range(3)
    ]
    for row, form in zip(rows, ("NFC", "NFD", "NFC"), strict=True):
        row["question"] = unicodedata.normalize(form, question)
    rows[2]["question"] = "Où?"
    facts = pd.DataFrame(rows)
    style = Style(template="{question}\n{choices}\nA:", shots=1)
    prompts = make_prompts(facts[:1], tokenizer, style, demonstrations=facts)  # type: ignore[arg-type]
    assert prompts[0].text.startswith("Où?")


def test_splits_see_one_subject_and_one_answer() -> None:
    """Half of the subjects are tested; those of another form and relation are then in no arm."""
    names = [f"{name} {i}" for i, name in enumerate(["São", "Köln", "Žory", "Łódź", "Ångström", "Évian"] * 10)]
    rows = [
        {"subject": unicodedata.normalize(form, name), "relation": form, "answer": answer, "popularity": i}
        for form in ("NFC", "NFD")
        for i, name in enumerate(names)
        for answer in [unicodedata.normalize(form, "Österreich")]
    ]
    table = split(load_facts(pd.DataFrame(rows)), ["known"], None, 12, match=["answer"], within=["answer"])
    plain = table["subject"].map(lambda name: unicodedata.normalize("NFC", name))
    assert not set(plain[table["train_known"]]) & set(plain[table["test"]])
    assert table["answer"].nunique() == 1, "one answer, in two spellings"
    assert table["answers"].str[0].nunique() == 2


def test_a_question_in_another_form_than_its_subject(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "São Paulo") for form in ("NFC", "NFD"))
    for a, b in ((nfc, nfd), (nfd, nfc)):
        facts = load_facts(pd.DataFrame({"subject": [a], "answer": ["x"], "question": [f"Where is {b}?"]}))
        assert facts["question"].tolist() == ["Where is {subject}?"] and facts["subject"].tolist() == [a]


def test_relations_are_one_in_every_form() -> None:
    relations = [unicodedata.normalize(form, "Länder") for form in ("NFC", "NFD")]
    facts = load_facts(pd.DataFrame({"subject": ["A", "B"], "answer": ["x", "y"], "relation": relations}))
    assert facts["relation"].nunique() == 1


def test_arrays_stay_lists() -> None:
    frame = pd.DataFrame({"subject": ["X"], "answer": [np.array(["['a']", "b|c"])]})
    assert load_facts(frame)["answers"].tolist() == [["['a']", "b|c"]]


@pytest.mark.parametrize("kind", ["frame", "csv", "jsonl", "parquet"])
def test_other_columns_of_a_table_stay(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    frame = pd.DataFrame(
        {
            "name": ["Kenya", "Peru", "kenya", "Chad"],
            "answer": ["Nairobi", "Lima", "Nairobi", "N'Djamena"],
            "river": ["Tana", "Amazon", "x", ""],
            "third": ["a", "b", "c", "d"],
            "choices": ["a", "b", "c", "d"],
        },
        index=[3, 5, 7, 9],
    )
    source: pd.DataFrame | Path = frame
    if kind != "frame":
        source = tmp_path / f"f.{kind}"
        if kind == "csv":
            frame.to_csv(source, index=False)
        elif kind == "jsonl":
            frame.to_json(source, orient="records", lines=True)
        else:
            frame.to_parquet(source)
    with caplog.at_level(logging.WARNING):
        facts = load_facts(source, columns={"subject": "name"})
    assert facts["river"].tolist()[:2] == ["Tana", "Amazon"] and facts["river"].isna().tolist() == [False, False, True]
    assert "third" not in facts and facts["choices"].isna().all() and "name" not in facts
    said = [record.getMessage() for record in caplog.records]
    assert any("the columns third, choices are left out" in one for one in said)
    drawn = load_facts(source, n=2, columns={"subject": "name"})
    rivers = dict(zip(facts["subject"], facts["river"].fillna(""), strict=True))
    assert drawn["river"].fillna("").tolist() == [rivers[name] for name in drawn["subject"]]


FACTS = pd.DataFrame({"fact_id": ["f"], "subject": ["Kenya"], "answers": [["Nairobi"]], "relation": ["capital"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["France"], "facts are a list and no table of facts: give what load_facts returns"),
        ({"subject": ["France"]}, "facts are a dict and no table"),
        ("cities", "facts are a str and no table"),
        (None, "facts are a NoneType and no table"),
        (pd.Series(["France"]), "facts are a Series and no table"),
        (pd.DataFrame({"subject": ["France"], "answer": ["Paris"]}), "has no column 'fact_id', it has subject, answer"),
        (FACTS.drop(columns="answers"), "has no column 'answers'"),
        (FACTS.assign(answers=["Nairobi"]), "the column 'answers' of the table of facts holds text and no lists"),
    ],
)
def test_what_is_no_table_of_facts(tokenizer: object, given: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_prompts(given, tokenizer, "{subject} is")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=message):
        subject_lengths(given, tokenizer, "{subject} is")  # type: ignore[arg-type]
    style = Style(template="{subject} is", shots=1)
    with pytest.raises(BadInput, match=message if given is not None else "give the facts they are drawn from"):
        make_prompts(FACTS, tokenizer, style, demonstrations=given)  # type: ignore[arg-type]


def test_no_source_of_facts() -> None:
    with pytest.raises(BadInput, match="facts are a list: give a name, a file or a DataFrame"):
        load_facts(["France"])  # type: ignore[arg-type]


def test_columns_are_named_in_the_callers_own_language(tmp_path: Path) -> None:
    path = written(tmp_path, "Subject,answer\nFrance,Paris\n")
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    python = f"{path}:1: no column 'subject' among Subject, answer: name the columns, columns={{'subject': 'Subject'}}"
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value))) == python
    with pytest.raises(BadInput, match="name the columns, facts.columns: {subject: Subject}") as in_study:
        source_of(FactsConfig(source=str(path)))
    assert in_study.value.field == "facts.columns"
