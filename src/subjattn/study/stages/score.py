"""Stage `scores`: how likely the right answer is to the model, for one share of the pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.measures.answers import answer_logprob
from subjattn.prompts import Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded


BATCH = 256
"""Facts that are asked between two reports."""


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `scores.parquet`: `fact_id` and `answer_logprob`, asked in the template that `template` names."""
    pool = pd.read_parquet(inputs["pool"]).iloc[settings["shard"] :: settings["shards"]]
    style, parts = Style.model_validate(settings["style"]), []
    for start in range(0, len(pool), BATCH):
        model = loaded(settings, inputs)
        some = pool.iloc[start : start + BATCH]
        values = answer_logprob(model, make_prompts(some, model.tokenizer, style)).values
        parts.append(pd.DataFrame({"fact_id": some["fact_id"], "answer_logprob": values}))
        context.tell(len(some))
    table = pd.concat(parts) if parts else pd.DataFrame({"fact_id": [], "answer_logprob": []})
    table.assign(template=style.template).to_parquet(out / "scores.parquet", index=False)
