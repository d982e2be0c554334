"""Label a model's knowledge into a folder: SliCK, the other definitions beside it, and their agreement.

| under the folder | what |
|---|---|
| knowledge.parquet | one row per fact: its columns, the labels, whose they are, and the budget they come from |
| agreement.json | how far the definitions agree; budget, cost, model |
| prompts/prompt-NN/ | answers of each few-shot prompt, kept so that a stopped run goes on |
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from subjattn.facts.table import COLUMNS
from subjattn.knowledge.labels import agreement, with_popularity_ranks
from subjattn.knowledge.slick import Budget, cost, slick
from subjattn.measures.answers import answer_logprob
from subjattn.models import LoadedModel, identity
from subjattn.progress import Progress
from subjattn.prompts import make_prompts
from subjattn.run.folder import alone, replacing


def know(
    model: LoadedModel,
    facts: pd.DataFrame,
    pool: pd.DataFrame,
    out: Path,
    budget: Budget | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Label facts and write `knowledge.parquet` and `agreement.json`; what is finished in the folder is reused.

    Args:
        model: whose knowledge is meant.
        facts: the facts to label.
        pool: all facts of the source: demonstrations come from them, and popularity is ranked among them.
        out: the folder.
        budget: how much to ask.
        console: where cost and progress are shown.

    Returns:
        The content of `agreement.json`.
    """
    budget = budget or Budget()
    with alone(out), Progress(console) as progress:
        stated = cost(facts, pool, model.tokenizer, budget)
        prompts = make_prompts(facts, model.tokenizer, budget.template)
        longest = max(budget.longest(model.tokenizer, prompts))
        progress.console.print(
            f"{stated['answers']:,} answers: {len(facts):,} facts × {budget.n_prompts} prompts of {budget.shots} "
            f"shots × (1 greedy + {budget.n_samples} at T = {budget.temperature:g}), {longest} tokens "
            f"each at most; {stated['prompt_tokens']:,} prompt tokens, {stated['computed_prompt_tokens']:,} of them "
            "computed and the others shared",
            highlight=False,
        )
        progress.plan(stated["computed_prompt_tokens"])
        progress.stage("asking")
        started = time.monotonic()
        labels = slick(
            model,
            facts,
            pool,
            budget,
            folder=out / "prompts",
            advance=lambda share: progress.advance(share * stated["computed_prompt_tokens"]),
            on_reused=lambda share: progress.skip(share * stated["computed_prompt_tokens"]),
        )
        seconds = time.monotonic() - started
        progress.stage("log-probability of the answers")
        logprobs = answer_logprob(model, prompts)
    ranked = with_popularity_ranks(pool)[["fact_id", "popularity_in_relation", "popularity_in_answer"]]
    own = facts[[name for name in COLUMNS if name in facts]]
    table = own.merge(ranked, on="fact_id", how="left").merge(labels, on="fact_id", validate="one_to_one")
    table["answer_logprob"] = table["fact_id"].map(dict(zip(logprobs["fact"].values, logprobs.values, strict=True)))
    who = {
        "model": model.name,
        "model_identity": identity(model.name),
        "adapter": model.adapter,
        "adapter_identity": model.adapter and identity(model.adapter),
        "answer_logprob_template": budget.template,
    }
    table = table.assign(**who, **{**budget.model_dump(), "new_tokens": longest})
    found = {
        **who,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "budget": budget.model_dump(),
        "cost": stated,
        "seconds_of_this_run": round(seconds, 1),
        **agreement(table),
    }
    with replacing(out / "knowledge.parquet") as path:
        table.to_parquet(path, index=False)
    with replacing(out / "agreement.json") as path:
        path.write_text(json.dumps(found, indent=1))
    return found
