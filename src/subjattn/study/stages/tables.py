"""Prompts as a table, so that a run keeps what was asked word for word, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.facts.files import read_parquet
from subjattn.prompts import Prompt, PromptSet


def save_prompts(prompts: PromptSet, path: Path, reasoning: Mapping[str, str] | None = None) -> None:
    """One row a prompt: its text and what the model reasoned, its tokens and spans."""
    rows = [
        {
            "fact_id": prompt.fact_id,
            "subject": prompt.subject,
            "text": prompt.text,
            "reasoning": None if reasoning is None else reasoning[prompt.fact_id],
            "answers": list(prompt.answers),
            "ids": list(prompt.ids),
            "tokens": list(prompt.tokens),
            "span": None if prompt.span is None else list(prompt.span),
            "prediction": prompt.prediction,
            "shared_edge": prompt.shared_edge,
            "choice_ids": list(prompt.choice_ids),
            "lead": prompt.lead,
            "style": prompts.style,
        }
        for prompt in prompts
    ]
    pd.DataFrame(rows).to_parquet(path, index=False)


def load_prompts(path: Path) -> PromptSet:
    """What `save_prompts` wrote."""
    table = read_parquet(path)
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    prompts = tuple(
        Prompt(
            fact_id=row["fact_id"],
            subject=row["subject"],
            text=row["text"],
            answers=tuple(row["answers"]),
            ids=tuple(map(int, row["ids"])),
            tokens=tuple(row["tokens"]),
            span=None if row["span"] is None else (int(row["span"][0]), int(row["span"][1])),
            prediction=int(row["prediction"]),
            shared_edge=bool(row["shared_edge"]),
            choice_ids=tuple(map(int, row["choice_ids"])),
            lead=row.get("lead"),
        )
        for row in records
    )
    return PromptSet(str(table["style"].iloc[0]) if len(table) else "", prompts)
