"""Common mistakes, each answered in one line: where it is, why it cannot be, what to do. Messages word for word."""

# ruff: noqa: E501

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from subjattn import cli


TEMPLATES = (
    "author, capital, capital of, color, composer, country, director, father, genre, mother, occupation, performer, "
    "place of birth, producer, religion, screenwriter, sport"
)
FACTS = [
    ("", "facts.csv: the file is empty: write a header such as 'subject,answer', and a line for each fact"),
    ("subject,answer\n", "facts.csv:1: there are no facts below the header: write a row for each"),
    (
        "Subject,Answer\nFrance,Paris\n",
        "facts.csv:1: no column 'subject' among Subject, Answer: name the columns, "
        "--columns subject=Subject,answer=Answer",
    ),
    (
        "France,Paris\nPeru,Lima\n",
        "facts.csv:1: no column 'subject' among France, Paris: name the columns, "
        "--columns subject=COLUMN,answer=COLUMN",
    ),
    (
        "subject,answer,answer\nPeru,Lima,La Lima\n",
        "facts.csv:1: two columns have the same name, 'answer': rename one",
    ),
    (
        "subject,answer\nFrance,Paris\nPeru,Lima,Cusco\n",
        "facts.csv:3: 3 cells, and the header has 2: put a cell that holds the separator in quotes",
    ),
    (
        'subject,answer\n"Korea,\nSouth",Seoul\n\nPeru,\n',
        "facts.csv:2: the subject 'Korea,\\nSouth' holds a line break or tab",
    ),
    ('subject,answer\nPeru,"Lima\n|La Lima"\n\nChad,\n', "facts.csv:5: there is an empty answer"),
    ("subject,answer\nPeru,Lima\n,Paris\n", "facts.csv:3: there is no subject"),
    (
        'subject,answer\nPeru,Lima\n"Chad,N\n',
        "facts.csv:3: cannot be read as a row of a table (unexpected end of data): look for a quote that is open or "
        "not doubled",
    ),
    (
        "subject;answer;popularity\nPeru;Lima;1,5\n",
        "facts.csv:2: popularity '1,5' is not a number",
    ),
    (
        "subject,answer\nCôte,Abidjan\n".encode("latin-1"),
        "facts.csv:2: is not UTF-8 text (byte 0xf4): save it as UTF-8",
    ),
    (
        "subject,answer\nPeru,Lima\n".encode("utf-16"),
        "facts.csv: is UTF-16 text, as Excel's 'Unicode text' is: save it as UTF-8",
    ),
    (
        "subject,answer,question\nPeru,Lima,Capital of Chad?\n",
        "facts.csv:2: the subject 'Peru' is absent from its question 'Capital of Chad?'",
    ),
    ("fact_id,subject,answer\n1,Peru,Lima\n1,Chad,N\n", "facts.csv:3: fact_id '1' occurs more than once"),
    (
        "subject,answer\nPeru,Lima\nPERU,Cusco\n",
        "facts.csv holds no fact that can be asked, such as row 2: asked with another answer in line 3: dropped",
    ),
    (
        "subject,answer\nPeru,Lima\n",
        "no template is known for these facts: give a template (--template in a shell), such as "
        f"'The capital of {{subject}} is', or a column 'question', or a column 'relation' with one of {TEMPLATES}",
    ),
    (
        "subject,answer,relation\nPeru,Lima,seat\nChad,N,capital\n",
        "no template is known for relation 'seat': give a template (--template in a shell), such as "
        f"'The capital of {{subject}} is', or a column 'question', or a column 'relation' with one of {TEMPLATES}",
    ),
]


def errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, *arguments: str
) -> list[str]:
    """The lines on standard error that a command of the command line ends with."""
    monkeypatch.setattr(sys, "argv", ["subjattn", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == status
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(("content", "message"), FACTS, ids=[message[:40] for _, message in FACTS])
def test_facts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("facts.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    assert errors(monkeypatch, capsys, 2, "facts", "facts.csv") == [f"error: {message}"]


COMMANDS = [
    ("facts facts.csv --rejected out/left.csv", "--rejected 'out/left.csv': there is no folder 'out': make it first"),
    ("measure accuracy --json out/a.json", "--json 'out/a.json': there is no folder 'out': make it first"),
    ("verify --json .", "--json '.' is a folder: name a file in it"),
    ("facts facts.csv --columns subject", "--columns: 'subject' is not FIELD=COLUMN, such as subject=name"),
    (
        "facts facts.csv --columns subjct=name",
        "columns maps 'subjct', which is none of fact_id, subject, relation, question, answer, popularity",
    ),
    ("facts nofile.csv", "no such file of facts: 'nofile.csv'"),
    (
        "facts facts.csv --template 'The capital is'",
        "template 'The capital is' must contain {subject} or {question}, or be one of cloze, late, list, paraphrase, "
        "question, sentence",
    ),
    (
        "facts facts.csv --template '{question}'",
        "fact facts-0 has no question of its own: ask it with {subject}",
    ),
    (
        "measure accuracy --facts facts.csv --where knwon",
        "where 'knwon' is not one of correct, known, HighlyKnown, MaybeKnown, WeaklyKnown, Unknown",
    ),
    (
        "measure accuracy --facts facts.csv --where known",
        "where 'known' needs the labels of a model: give knowledge, from `subjattn knowledge`",
    ),
    (
        "measure accuracy --facts facts.csv --knowledge labels.parquet",
        "knowledge labels facts: say which are wanted, such as where 'HighlyKnown'",
    ),
    ("check study.yml", "no such study: 'study.yml'"),
    (
        "init facts.csv --template '{subject} is'",
        "2 facts are too few to train two arms on: give more facts of a relation, or --adapter for a study without "
        "training",
    ),
]


@pytest.mark.parametrize(("command", "message"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("facts.csv").write_text("subject,answer\nPeru,Lima\nChad,N'Djamena\n")
    assert errors(monkeypatch, capsys, 2, *shlex.split(command)) == [f"error: {message}"]
    assert not Path("out").exists()


STUDY = """\
name: mine
facts:
  source: facts.csv
  n_test: 6
styles:
  list: "The capital of {subject} is"
arms:
  base: {}
"""
SPLIT = "facts.split: none of the 30 facts"
STUDIES = [
    ("n_test: 6", "n_test: 0", ["study.yaml:4: facts.n_test: Input should be greater than 0, not '0'"]),
    ("n_test: 6", "ntest: 6", ["study.yaml:4: facts.ntest: no such field; did you mean 'n_test'?"]),
    ("styles:", "style:", ["study.yaml:5: style: no such field, and 'styles' is missing: did you mean that?"]),
    (
        "styles:",
        "n_styles: 1\nmodels:",
        [
            "study.yaml:5: n_styles: no such field, and 'styles' is missing: did you mean that?",
            "study.yaml:6: models: no such field; did you mean 'model'?",
        ],
    ),
    ("name: mine\n", "", ["study.yaml: name: it is needed, and missing"]),
    ("base: {}", "base: {train: knwon}", None),
    (
        "base: {}",
        "base: {}\n  base: {train: known}",
        ["study.yaml:9: arms.base: stands on line 8 already: keep one of them"],
    ),
    (
        "base: {}",
        "base: {",
        ["study.yaml:9: is not readable YAML: expected the node content, but found '<stream end>'"],
    ),
    (
        "{subject} is",
        "{subjct} is",
        [
            "study.yaml:6: styles.list: template 'The capital of {subjct} is' must contain {subject} exactly once, or {question} (and {choices}), and no other field"
        ],
    ),
    (
        "{subject} is",
        "{subject} is ",
        [
            "study.yaml:6: styles.list: template 'The capital of {subject} is ' ends in white space: leave it out, the answer brings its own space"
        ],
    ),
    ("n_test: 6", "n_test: 60", ["study.yaml:4: facts.n_test: n=60 is not between 1 and the 30 facts there are"]),
    (
        "base: {}",
        "base: {}\n  tuned: {adapter: nosuch}",
        ["study.yaml:9: arms.tuned.adapter: no such adapter folder: 'nosuch'"],
    ),
    (
        "base: {}",
        "base: {train: top}",
        [
            "study.yaml:2: facts.split.by: none of the 30 facts has a popularity: rank by another column, such as answer_logprob"
        ],
    ),
    (
        "base: {}",
        "base: {}\ncontrasts:\n  - [tuned, base]",
        ["study.yaml:10: contrasts.0: arm 'tuned' is compared but not defined; the arms are base"],
    ),
    (
        "  source: facts.csv",
        "  source: facts.csv\n  columns: {subject: city}",
        [
            "study.yaml:4: facts.csv:1: no column 'city' among subject, answer: name the columns, facts.columns: {subject: COLUMN}"
        ],
    ),
]


@pytest.mark.parametrize(("old", "new", "messages"), STUDIES, ids=[new[:30] for _, new, _ in STUDIES])
def test_studies(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    old: str,
    new: str,
    messages: list[str] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("facts.csv").write_text("subject,answer\n" + "".join(f"Land{i},Town{i}\n" for i in range(30)))
    assert old in STUDY
    Path("study.yaml").write_text(STUDY.replace(old, new))
    found = errors(monkeypatch, capsys, 2, "check", "study.yaml")
    if messages is None:
        assert len(found) == 1 and found[0].startswith(
            "error: study.yaml:8: arms.base: arm 'knwon' is no arm: use known"
        )
    else:
        assert found == [f"error: {message}" for message in messages]
