"""The facts of a study: loaded, ranked, split into arms and test facts, and some set aside as demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts import draw, identity_of_source, join_popularity, load_facts
from subjattn.facts.distance import relation_distances
from subjattn.facts.select import set_aside, thirds_of
from subjattn.facts.splits import split
from subjattn.knowledge.labels import join_labels
from subjattn.measures.answers import answer_logprob
from subjattn.measures.embeddings import prompt_embeddings
from subjattn.models import LoadedModel, fingerprint, load_tokenizer
from subjattn.prompts import make_prompts, subject_lengths
from subjattn.study.config import FactsConfig, StudyConfig


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = 200
"""Facts of each relation that its place among the others is found from."""


def identity_of(facts: FactsConfig) -> list[Any]:
    """What the facts come from, for stage keys: settings, and digests of the files that are read."""
    paths = [facts.knowledge, facts.popularity and facts.popularity.path]
    settings = facts.model_dump(exclude={"n_train", "n_test", "split"})
    return [settings, identity_of_source(facts.source), *(path and fingerprint(path) for path in paths)]


def choose(config: StudyConfig, load_base: Callable[[], LoadedModel]) -> pd.DataFrame:
    """Facts in use, with the columns that `split` adds and `demonstration`.

    Args:
        config: the study.
        load_base: gives the study's model, where its embeddings or losses decide.

    Raises:
        BadInput: the facts do not give what is asked; the message says what is short.
    """
    asked, by = config.facts, config.facts.split.by
    facts = _loaded(asked, config.model)
    style = next(iter(config.styles.values()))
    tokenizer = load_tokenizer(config.model)
    facts = facts.assign(n_tokens=subject_lengths(facts, tokenizer, style))
    if by == "answer_logprob" and by not in facts:
        base = load_base()
        facts[by] = answer_logprob(base, make_prompts(facts, tokenizer, _plain(style))).values
        facts["answer_logprob_template"] = style.template
    if by not in facts:
        raise BadInput(f"split.by {by!r} needs 'facts.knowledge', which `subjattn knowledge` writes")
    ranking = (by, asked.split.within, asked.split.controlled)
    shots = max(style.shots for style in config.styles.values())
    facts["demonstration"] = set_aside(facts, *ranking, shots, config.seed)
    shown = facts[facts["demonstration"]]
    if config.trained:
        table = split(
            facts[~facts["demonstration"]],
            list(dict.fromkeys(config.trained.values())),
            asked.n_train,
            asked.n_test,
            by=by,
            within=asked.split.within,
            match=asked.split.match,
            controlled=asked.split.controlled,
            held_out=_held_out(config, facts, load_base),
            n_held_out=asked.split.held_out.n_test if asked.split.held_out else 0,
            seed=config.seed,
        )
    else:
        table = facts[~facts["demonstration"]]
        table = table.assign(
            third=thirds_of(table, *ranking), answer=table["answers"].str[0], out_of_distribution=False
        )
        table["test"] = table["fact_id"].isin(draw(table, asked.n_test, config.seed)["fact_id"])
    used = [name for name in map(str, table) if name == "test" or name.startswith("train_")]
    if shown.empty:
        return _asked(table[table[used].any(axis=1)], config, tokenizer)
    shown = shown.assign(third=thirds_of(facts, *ranking).loc[shown.index], answer=shown["answers"].str[0])
    shown = shown.assign(out_of_distribution=False, **dict.fromkeys(used, False))
    return _asked(pd.concat([table[table[used].any(axis=1)], shown], ignore_index=True), config, tokenizer)


def _asked(table: pd.DataFrame, config: StudyConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """The table itself, once every style has asked its test facts: what cannot be asked is found before training."""
    for style in config.styles.values():
        make_prompts(table[table["test"]], tokenizer, style, demonstrations=table[table["demonstration"]])
    return table


def _loaded(asked: FactsConfig, model: str) -> pd.DataFrame:
    facts = only_relations(load_facts(asked.source, columns=asked.columns or None), asked.relations)
    if asked.popularity:
        facts = join_popularity(facts, asked.popularity.path, asked.popularity.subject, asked.popularity.popularity)
    if asked.knowledge:
        facts = join_labels(facts, asked.knowledge, model)
    return facts


def only_relations(facts: pd.DataFrame, relations: Sequence[str]) -> pd.DataFrame:
    """Facts of these relations, of all if none is named; BadInput where the facts have no such relation."""
    known = sorted(facts["relation"].unique())
    if missing := [name for name in relations if name not in known]:
        raise BadInput(f"facts.relations: no relation {missing[0]!r}; there are {', '.join(known)[:300]}")
    return facts[facts["relation"].isin(relations)].reset_index(drop=True) if relations else facts


def _held_out(config: StudyConfig, facts: pd.DataFrame, load_base: Callable[[], LoadedModel]) -> list[str]:
    held_out = config.facts.split.held_out
    if held_out is None or held_out.relations:
        return held_out.relations if held_out else []
    some = facts.sort_values("fact_id").groupby("relation").head(EMBEDDED)
    base = load_base()
    style = next(iter(config.styles.values()))
    vectors = prompt_embeddings(base, make_prompts(some, base.tokenizer, _plain(style)))
    distances = relation_distances(some, vectors.values)
    if held_out.farthest >= len(distances):
        raise BadInput(
            f"held_out.farthest={held_out.farthest} leaves none of the {len(distances)} relations to train on"
        )
    return [str(name) for name in distances.index[: held_out.farthest]]


def _plain(style: Any) -> Any:
    """The style without what stands around its template."""
    return type(style)(template=style.template)
