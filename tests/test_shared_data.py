"""The public data sets the papers use, whole, where they are at hand: counts, spans, traps."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from subjattn.facts import draw, read_facts
from subjattn.facts.mmlu import HISTORY
from subjattn.facts.templates import TEMPLATES
from subjattn.models import LoadedModel
from subjattn.prompts import make_prompts, subject_spans


DATA = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the fact data of ../shared/data is absent")


@pytest.mark.parametrize(
    ("source", "loaded", "rejected", "asked"),
    [
        ("popqa:popqa/popQA.sample.tsv", 1_000, 0, 998),
        ("popqa:popqa", 1_000, 0, 998),
        ("popqa:popqa/questions_14267.json", 14_264, 3, 12_502),
        ("entityquestions:entityquestions", 220_703, 0, 216_675),
        ("entityquestions:entityquestions/train", 176_560, 0, None),
        ("entityquestions:entityquestions/dev", 22_068, 0, None),
        ("entityquestions:entityquestions/test", 22_075, 0, None),
        ("mmlu:mmlu/canonical/dev", 285, 0, 284),
        ("mmlu:mmlu/canonical/val", 1_531, 0, None),
        ("mmlu:mmlu/canonical/test_header", 14_042, 0, 14_014),
        ("mmlu-history:mmlu/canonical/test_header", 930, 0, 930),
        ("counterfact:counterfact", 11_919, 0, 11_711),
        ("known_1000:counterfact", 1_209, 0, 1_209),
        ("lre:lre_relations", 9_696, 0, 9_620),
        ("world-places:world_models", 39_581, 4, 39_576),
        ("world-works:world_models", 31_318, 3, 23_027),
    ],
)
def test_every_row_is_loaded_or_listed(source: str, loaded: int, rejected: int, asked: int | None) -> None:
    name, _, path = source.partition(":")
    raw = read_facts(f"{name}:{DATA / path}", merge=False)
    assert (len(raw.facts), len(raw.rejected)) == (loaded, rejected)
    facts, listed = read_facts(f"{name}:{DATA / path}")
    assert len(facts) + len(listed) == loaded + rejected
    assert asked is None or len(facts) == asked
    assert facts["fact_id"].is_unique
    if facts["subject"].notna().any():
        assert not (facts["relation"] + "\n" + facts["subject"].str.casefold()).duplicated().any()


def test_every_entityquestions_span_decodes_to_its_subject(smollm2: LoadedModel) -> None:
    facts, _ = read_facts(f"entityquestions:{DATA / 'entityquestions'}", merge=False)
    spans = subject_spans(facts, smollm2.tokenizer)
    assert len(spans) == 220_703
    assert int(spans["shared_edge"].sum()) == 919
    tokenizer, wrong = smollm2.tokenizer, []
    for start in range(0, len(facts), 20_000):
        part, places = facts.iloc[start : start + 20_000], spans.iloc[start : start + 20_000]
        texts = [q.format(subject=s) for q, s in zip(part["question"], part["subject"], strict=True)]
        cut = [
            ids[a:b] for ids, a, b in zip(tokenizer(texts)["input_ids"], places["start"], places["stop"], strict=True)
        ]
        for decoded, subject, edge in zip(
            tokenizer.batch_decode(cut), part["subject"], places["shared_edge"], strict=True
        ):
            if (decoded.strip() != subject) != edge or subject not in decoded:
                wrong.append((decoded, subject, edge))
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_spans_of_a_sample_in_other_tokenizers(kinds: dict[str, Any], kind: str) -> None:
    """2,000 EntityQuestions rows of all relations."""
    facts = draw(read_facts(f"entityquestions:{DATA / 'entityquestions' / 'dev'}", merge=False).facts, 2_000, 3)
    tokenizer, spans = kinds[kind], subject_spans(facts, kinds[kind])
    compared = 0
    for question, subject, start, stop, edge in zip(
        facts["question"], facts["subject"], spans["start"], spans["stop"], spans["shared_edge"], strict=True
    ):
        ids = tokenizer(question.format(subject=subject))["input_ids"]
        decoded = tokenizer.decode(ids[start:stop]).strip()
        if "<unk>" in decoded or "\N{REPLACEMENT CHARACTER}" in decoded:
            continue
        plain, name = (unicodedata.normalize("NFKC", text) for text in (decoded, subject))
        assert name in plain if edge else plain == name
        compared += 1
    assert compared > 1_700


def test_the_published_templates_are_ours() -> None:
    published = json.loads((DATA / "entityquestions" / "relation_query_templates.json").read_text())
    relations = {file.name.partition(".")[0] for file in (DATA / "entityquestions" / "dev").iterdir()}
    assert len(relations) == 24
    for relation in relations:
        assert TEMPLATES[relation]["question"] == published[relation].replace("[X]", "{subject}")


def test_questions_are_the_published_texts() -> None:
    """Templates with the subject filled in give every row's question back, whatever its braces and quotes."""
    for name, path, field in [
        ("popqa", "popqa/questions_14267.json", "question"),
        ("known_1000", "counterfact/known_1000.json", "prompt"),
        ("counterfact", "counterfact/counterfact-val.json", "prompt"),
        ("entityquestions", "entityquestions/dev/P800.dev.json", "question"),
    ]:
        raw = read_facts(f"{name}:{DATA / path}", merge=False)
        rows: list[dict[str, Any]] = json.loads((DATA / path).read_text())
        left_out = set(raw.rejected["row"])
        texts = [q.format(subject=s) for q, s in zip(raw.facts["question"], raw.facts["subject"], strict=True)]
        published = [" ".join(row[field].split()) for i, row in enumerate(rows) if i not in left_out]
        assert [" ".join(text.split()) for text in texts] == published


def test_spans_of_known_facts_decode_to_their_subjects(smollm2: LoadedModel) -> None:
    """All 1,209 of ROME's known facts, each with its own prompt."""
    facts, _ = read_facts(f"known_1000:{DATA / 'counterfact'}")
    for prompt in make_prompts(facts, smollm2.tokenizer, "question"):
        decoded = smollm2.tokenizer.decode(prompt.ids[slice(*prompt.subject_span)]).strip()
        assert prompt.subject in decoded if prompt.shared_edge else prompt.subject == decoded


def test_mmlu_answers_are_letters_of_their_choices() -> None:
    facts, _ = read_facts(f"mmlu:{DATA / 'mmlu' / 'canonical'}", merge=False)
    assert facts["relation"].nunique() == 57
    assert set(HISTORY) <= set(facts["relation"])
    assert facts["subject"].isna().all()
    assert facts["answers"].str[0].isin(list("ABCD")).all() and (facts["choices"].str.len() == 4).all()
    anatomy = facts[facts["fact_id"] == "mmlu-test-anatomy-0"].iloc[0]
    assert anatomy["choices"][0] == "paralysis of the facial muscles." and anatomy["answers"] == ["A"]


def test_traps_of_the_data() -> None:
    lre, _ = read_facts(f"lre:{DATA / 'lre_relations'}", merge=False)
    assert "Brasília" in {answers[0] for answers in lre["answers"]}
    assert not lre["subject"].str.contains(r"\\u", regex=True).any()
    places, _ = read_facts(f"world-places:{DATA / 'world_models'}")
    answers = {answer for answers in places["answers"] for answer in answers}
    assert "Georgia" in answers and "United States" in answers and not any("_" in answer for answer in answers)
    assert places["popularity"].notna().all()
    works, listed = read_facts(f"world-works:{DATA / 'world_models'}")
    assert set(works["relation"]) == {"performer", "director", "author"}
    assert "It" in set(works["subject"]), "a title may be a common word"
    assert listed["reason"].str.contains("dropped|merged|no name").all()


def test_places_load_as_a_users_own_file() -> None:
    """All 39,585 places with page views, by a column map."""
    columns = {"subject": "name", "answer": "country", "popularity": "page_views"}
    facts, rejected = read_facts(str(DATA / "world_models" / "world_place.csv"), columns, merge=False)
    places = pd.read_csv(DATA / "world_models" / "world_place.csv", dtype=str, keep_default_na=False)
    assert len(facts) == 39_585 and rejected.empty
    assert facts["subject"].tolist() == places["name"].tolist()
    assert facts["popularity"].tolist() == places["page_views"].astype(float).tolist()
