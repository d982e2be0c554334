"""The public data sets the papers use, where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from subjattn.facts import load_facts
from subjattn.models import LoadedModel
from subjattn.prompts import make_prompts


DATA = Path(__file__).parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the fact data of ../shared/data is absent")


@needs_data
def test_spans_of_known_facts_decode_to_their_subjects(smollm2: LoadedModel) -> None:
    """All 1,209 of ROME's known facts, each with its own template."""
    rows = json.loads((DATA / "counterfact" / "known_1000.json").read_text())
    assert len(rows) == 1209
    for row in rows:
        template = row["template"].replace("{}", "{subject}").rstrip()
        fact = pd.DataFrame(
            {"fact_id": [row["known_id"]], "subject": [row["subject"]], "answers": [[row["attribute"]]]}
        )
        (prompt,) = make_prompts(fact, smollm2.tokenizer, template)
        decoded = smollm2.tokenizer.decode(prompt.ids[slice(*prompt.subject_span)])
        assert row["subject"].strip() in decoded
        assert len(decoded.strip()) <= len(row["subject"].strip()) + 2


@needs_data
def test_places_load_as_a_users_own_file(tmp_path: Path) -> None:
    """All 39,585 places with page views, under the column names of a user's own file."""
    places = pd.read_csv(DATA / "world_models" / "world_place.csv", dtype=str, keep_default_na=False)
    assert len(places) == 39_585
    own = places.rename(columns={"name": "subject", "country": "answer", "page_views": "popularity"})
    own.to_csv(tmp_path / "places.csv", index=False)
    facts = load_facts(str(tmp_path / "places.csv"))
    assert facts["subject"].tolist() == places["name"].tolist()
    assert facts["popularity"].notna().all()
