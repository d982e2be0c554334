"""Stage `pool`: the facts there are, with their popularity, labels and subject lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts import draw, join_popularity, load_facts
from subjattn.facts.given import without_given
from subjattn.facts.names import plain_name
from subjattn.facts.own import UnnamedColumns
from subjattn.facts.table import COLUMNS
from subjattn.knowledge.labels import join_labels
from subjattn.measures.where import fits
from subjattn.models import load_tokenizer
from subjattn.prompts import Style, subject_lengths
from subjattn.run.plan import Context
from subjattn.study.config import FactsConfig


log = logging.getLogger(__name__)


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
    facts = only_relations(source_of(asked), asked.relations)
    if asked.leave_out_given:
        left = without_given(facts)
        _say_once(f"note: {len(facts) - len(left)} of {len(facts)} facts hold their answer in the name: left out")
        facts = left
    if asked.trained_on is not None:
        facts = without_subjects(facts, asked.trained_on, asked.columns)
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


def source_of(asked: FactsConfig) -> pd.DataFrame:
    """All facts of a study's source."""
    try:
        return load_facts(asked.source, columns=asked.columns or None)[COLUMNS]
    except UnnamedColumns as error:
        raise BadInput(error.in_study(), field="facts.columns") from None


def check_scorer(facts: pd.DataFrame, letters: bool) -> None:
    """Refuse letters for facts in words, and words for multiple choice."""
    if letters != bool(facts["choices"].notna().any()):
        fits = "is multiple choice: set measures.accuracy.scorer to 'letters'" if not letters else "has no choices"
        raise BadInput(
            f"the scorer does not fit: {facts['source'].iloc[0]} {fits}; 'letters' is for multiple choice",
            field="measures.accuracy.scorer",
        )


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def without_subjects(
    facts: pd.DataFrame, trained_on: str, columns: Mapping[str, str] = MappingProxyType({})
) -> pd.DataFrame:
    """Facts whose subject, whatever is asked of it, is in no fact of the file that a model was tuned on.

    The file has columns of the usual names, or else those that the facts have.
    """
    try:
        learnt_from = load_facts(trained_on)
    except BadInput as error:
        if not columns:
            raise BadInput(f"facts.trained_on: {error}", field="facts.trained_on") from None
        learnt_from = load_facts(trained_on, columns=columns)
    learnt = set(learnt_from["subject"].dropna().map(plain_name))
    answers = {plain_name(answer) for own in learnt_from["answers"] for answer in own}
    left = facts[~facts["subject"].map(plain_name).isin(learnt)].reset_index(drop=True)
    if left.empty:
        raise BadInput(
            f"facts.trained_on: {trained_on} holds every subject of {facts['source'].iloc[0]}: none is left",
            field="facts.trained_on",
        )
    named = left["subject"].dropna().map(plain_name).isin(answers).sum()
    also = f"; {named} of the others are answers there" if named else ""
    _say_once(f"note: {len(facts) - len(left)} of {len(facts)} facts are of subjects in {trained_on}: left out{also}")
    return left


def only_relations(facts: pd.DataFrame, relations: Sequence[str]) -> pd.DataFrame:
    """Facts of these relations, of all if none is named; BadInput where the facts have no such relation."""
    known = sorted(facts["relation"].unique())
    if missing := [name for name in relations if name not in known]:
        raise BadInput(
            f"facts.relations: no relation {missing[0]!r}; there are {', '.join(known)[:300]}", field="facts.relations"
        )
    return facts[facts["relation"].isin(relations)].reset_index(drop=True) if relations else facts
