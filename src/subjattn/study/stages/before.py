"""Stage `before`: what the study's model, untrained, answers to facts that an arm learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.facts import draw
from subjattn.measures.accuracy import PREDICTING
from subjattn.measures.answers import predict
from subjattn.prompts import Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded


CHECKED = 150
"""Training facts of a draw that are asked."""


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `predictions.parquet`."""
    facts = pd.read_parquet(inputs["facts"])
    some = draw(facts, min(CHECKED, len(facts)), settings["seed"])
    model = loaded(settings, inputs)
    prompts = make_prompts(some, model.tokenizer, Style.model_validate(settings["style"]))
    predict(model, prompts, settings["scorer"]).to_parquet(out / "predictions.parquet", index=False)
    context.tell(len(some) * PREDICTING)
