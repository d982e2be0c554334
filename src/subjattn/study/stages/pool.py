"""Stage `pool`: the facts there are, with their popularity, labels and subject lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts import draw, join_popularity, load_facts
from subjattn.facts.given import without_given
from subjattn.facts.table import plain_name
from subjattn.knowledge.labels import join_labels
from subjattn.measures.where import fits
from subjattn.models import load_tokenizer
from subjattn.prompts import Style, subject_lengths
from subjattn.run.plan import Context
from subjattn.study.config import FactsConfig


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `facts.parquet`."""
    asked = FactsConfig.model_validate(settings["facts"])
    facts = load_pool(asked, settings["model"], settings["seed"])
    check_scorer(facts, settings["letters"])
    style = Style.model_validate(settings["style"])
    facts = facts.assign(n_tokens=subject_lengths(facts, load_tokenizer(settings["model"]), style))
    facts.to_parquet(out / "facts.parquet", index=False)


def load_pool(asked: FactsConfig, model: str, seed: int) -> pd.DataFrame:
    """Facts of the source, and what is known of them from elsewhere."""
    facts = only_relations(load_facts(asked.source, columns=asked.columns or None), asked.relations)
    if asked.leave_out_given:
        facts = without_given(facts)
    if asked.trained_on is not None:
        facts = without_subjects(facts, asked.trained_on)
    if asked.knowledge:
        facts = join_labels(facts, asked.knowledge, model)
    if asked.where not in (None, "correct"):
        facts = facts[[fits(label, asked.where) for label in facts["category"]]].reset_index(drop=True)
        if facts.empty:
            raise BadInput(f"facts.where: no fact is {asked.where}", field="facts.where")
    if asked.pool is not None and asked.pool < len(facts):
        facts = draw(facts, asked.pool, seed)
    if asked.popularity:
        facts = join_popularity(facts, asked.popularity.path, asked.popularity.subject, asked.popularity.popularity)
    return facts


def check_scorer(facts: pd.DataFrame, letters: bool) -> None:
    """Refuse letters for facts in words, and words for multiple choice."""
    if letters != bool(facts["choices"].notna().any()):
        fits = "is multiple choice: set measures.accuracy.scorer to 'letters'" if not letters else "has no choices"
        raise BadInput(
            f"the scorer does not fit: {facts['source'].iloc[0]} {fits}; 'letters' is for multiple choice",
            field="measures.accuracy.scorer",
        )


def without_subjects(facts: pd.DataFrame, trained_on: str) -> pd.DataFrame:
    """Facts whose subject, whatever is asked of it, is in no fact of the file that a model was tuned on."""
    learnt = set(load_facts(trained_on)["subject"].dropna().map(plain_name))
    left = facts[~facts["subject"].map(plain_name).isin(learnt)].reset_index(drop=True)
    if left.empty:
        raise BadInput(
            f"facts.trained_on: {trained_on} holds every subject of {facts['source'].iloc[0]}: none is left",
            field="facts.trained_on",
        )
    return left


def only_relations(facts: pd.DataFrame, relations: Sequence[str]) -> pd.DataFrame:
    """Facts of these relations, of all if none is named; BadInput where the facts have no such relation."""
    known = sorted(facts["relation"].unique())
    if missing := [name for name in relations if name not in known]:
        raise BadInput(
            f"facts.relations: no relation {missing[0]!r}; there are {', '.join(known)[:300]}", field="facts.relations"
        )
    return facts[facts["relation"].isin(relations)].reset_index(drop=True) if relations else facts
