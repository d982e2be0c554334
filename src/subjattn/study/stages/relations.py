"""Stage `relations`: how far each relation is from the others, by the model's own input embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.facts.distance import relation_distances
from subjattn.measures.embeddings import prompt_embeddings
from subjattn.prompts import Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded


EMBEDDED = 200
"""Facts of each relation that its place among the others is found from."""


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `distances.json`: relations with their distance, the farthest first."""
    pool = pd.read_parquet(inputs["pool"])
    some = pool.sort_values("fact_id").groupby("relation").head(EMBEDDED)
    model = loaded(settings, inputs)
    vectors = prompt_embeddings(model, make_prompts(some, model.tokenizer, Style.model_validate(settings["style"])))
    distances = relation_distances(some, vectors.values)
    (out / "distances.json").write_text(json.dumps(distances.to_dict(), indent=1))
