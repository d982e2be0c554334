"""PopQA (Mallen et al. 2023): 14,267 questions in 16 relations, with Wikipedia page views as popularity.

Reads `popQA.tsv` (the hub's `test.tsv`), or a JSON list of `question`, `answer`, `aliases`, whose subjects
are told by the 16 published templates and whose popularity is unknown.
"""

from __future__ import annotations

import json
from pathlib import Path

from subjattn.errors import BadInput
from subjattn.facts.hub import only_file
from subjattn.facts.table import Read, Reader, Rejected, placed, read_json, read_records, subject_of
from subjattn.facts.templates import TEMPLATES


HUB = ("akariasai/PopQA", "test.tsv")
RELATIONS = (
    "occupation",
    "place of birth",
    "genre",
    "father",
    "country",
    "producer",
    "director",
    "capital of",
    "screenwriter",
    "composer",
    "color",
    "religion",
    "sport",
    "author",
    "mother",
    "capital",
)
_NEEDED = ("id", "subj", "prop", "obj", "s_pop", "question", "possible_answers")


def read(path: Path) -> Read:
    """Facts of a file, or of the one TSV in a folder."""
    file = only_file(path, "*.tsv")
    reader = Reader(f"PopQA {file.name}")
    if file.suffix == ".json":
        _read_questions(file, reader)
    else:
        _read_table(file, reader)
    return reader.read()


def _read_table(file: Path, reader: Reader) -> None:
    for row, cells in read_records(file, reader, _NEEDED, delimiter="\t"):
        relation, subject = cells["prop"], cells["subj"]
        template = TEMPLATES[relation]["question"] if relation in RELATIONS else None
        try:
            answers = json.loads(cells["possible_answers"])
            if not isinstance(answers, list):
                raise ValueError
            question = placed(cells["question"], subject, template)
        except (ValueError, RecursionError):
            reader.reject(str(file), row, f"possible_answers are no JSON list: {cells['possible_answers'][:80]!r}")
        except Rejected as reason:
            reader.reject(str(file), row, str(reason) if subject.strip() else "there is no subject")
        else:
            accepted = [cells["obj"], *answers]
            reader.add(
                str(file),
                row,
                f"popqa-{cells['id']}",
                subject,
                relation,
                question,
                accepted,
                popularity=cells["s_pop"],
            )


def _read_questions(file: Path, reader: Reader) -> None:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise BadInput(f"{file} is not a list of questions")
    for row, item in enumerate(rows):
        if not isinstance(item, dict) or not isinstance(item.get("question"), str):
            reader.reject(str(file), row, "there is no question")
            continue
        found = [
            (relation, subject)
            for relation in RELATIONS
            if (subject := subject_of(item["question"], TEMPLATES[relation]["question"])) is not None
        ]
        aliases = item.get("aliases")
        if len(found) != 1:
            reader.reject(str(file), row, f"{item['question'][:80]!r} is of {len(found)} published templates, not one")
        elif not isinstance(aliases, list):
            reader.reject(str(file), row, "there is no list of aliases")
        else:
            relation, subject = found[0]
            answers = [item.get("answer"), *aliases]
            reader.add(
                str(file), row, f"popqa-question-{row}", subject, relation, TEMPLATES[relation]["question"], answers
            )
