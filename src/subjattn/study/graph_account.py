"""Which test facts a prompt's demonstrations should rescue: the graph account against a study's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from subjattn.errors import BadInput
from subjattn.evidence.clusters import clusters_of
from subjattn.evidence.knowledge_graph import Edge, KnowledgeGraph
from subjattn.measures.embeddings import name_embeddings
from subjattn.prompts.style import Style, demonstrations_of, shown_to
from subjattn.study.files import Replicate, Run


if TYPE_CHECKING:
    from subjattn.models import LoadedModel

PREDICTORS = ("graph", "trained_graph", "similarity", "popularity")
OUTCOMES = ("rescued", "logprob_gain")
MIN_FACTS = 10
"""Facts that a rank correlation is made of at least."""
DRAWS = 1000
"""Of its facts, for the interval."""
ABOUT = ("relation", "answer")
"""By which facts belong together."""


def graph_account(run: Run, model: LoadedModel | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the graph account predicts that demonstrations rescue, and how well (after Gong et al. 2025).

    Definitions are ours (`subjattn.evidence.knowledge_graph`); a name's vector is the mean input embedding of its
    tokens. Predictors, of each fact asked behind demonstrations:

    * `graph`: log connectivity that the shown edges add to the facts of the upper third of the study's ranking
      (known to the base; not the fact itself) and to those the arm was trained on;
    * `trained_graph`: to those it was trained on alone;
    * `similarity`: mean similarity of its subject to those shown, and `popularity`: the rivals.

    Args:
        run: a finished study with accuracy, a style without shots, and others of the same template with shots.
        model: whose embeddings; None: the study's own, which is loaded.

    Returns:
        Facts: a row for each arm, style with shots, replicate and test fact: predictors; `before` and `after`, right
        without and with demonstrations; `rescued`, `after` of those that were wrong before, else NaN; where the study
        measured `answer_logprob`, `logprob_gain`. Judged: for each arm, style, outcome and predictor Spearman's `rho`
        with the outcome's mean over replicates, its 95 % interval `low`, `high` (percentiles, the wider of facts
        and of whole answers or relations resampled) and `n` facts; NaN where fewer than 10 have an outcome, or one of
        the two does not vary.

    Raises:
        BadInput: a study without such styles, or without accuracy.
    """
    pairs = list(_pairs(run))
    if not pairs or "accuracy" not in run.study["measures"]:
        raise BadInput("the graph account needs accuracy, a style without shots, and one of its template with shots")
    if model is None:
        from subjattn.models import load_model

        model = load_model(run.study["model"], dtype=run.study["dtype"])
    facts = pd.concat([rows for pair in pairs for rows in _asked(run, model, *pair)], ignore_index=True)
    outcomes = [name for name in OUTCOMES if name in facts]
    mean = facts.groupby(["arm", "style", "fact_id", *ABOUT], sort=False)[[*PREDICTORS, *outcomes]].mean().reset_index()
    judged = [
        {"arm": arm, "style": style, "outcome": outcome, "predictor": name}
        | _rank_correlation(own[name], own[outcome], own[list(ABOUT)])
        for (arm, style), own in mean.groupby(["arm", "style"], sort=False)
        for outcome in outcomes
        for name in PREDICTORS
    ]
    return facts, pd.DataFrame(judged)


def _pairs(run: Run) -> Iterator[tuple[str, str]]:
    """Styles without and with shots that are alike in all else."""
    styles = {name: Style.model_validate(of) for name, of in run.study["styles"].items()}
    bare = {name: Style.model_fields[name].default for name in ("shots", "demonstrations", "relation", "seed")}
    for name, style in styles.items():
        if style.shots and not style.chain_of_thought:
            plain = Style.model_validate(style.model_dump() | bare)
            yield from ((before, name) for before, other in styles.items() if other == plain)


def _asked(run: Run, model: LoadedModel, before: str, after: str) -> Iterator[pd.DataFrame]:
    """Rows of one style with shots: predictors and answers of each arm and replicate."""
    test = run.facts[run.facts["test"]].reset_index(drop=True)
    asked, shown = _edges(test), _shown(run, after, test)
    known = _edges(run.facts[(run.facts["third"] == "top") & ~run.facts["test"]])
    taught = {cell: _taught(run, *cell) for arm in run.arms for cell in [(arm, one) for one in run.replicates(arm)]}
    names = [name for of in (asked, known, *shown, *taught.values()) for edge in of for name in (edge[0], edge[2])]
    names = list(dict.fromkeys(names))
    graph = KnowledgeGraph(names, name_embeddings(model, names))
    alike = [
        float(graph.similarity([fact.subject], [edge.subject for edge in of]).mean())
        for fact, of in zip(asked, shown, strict=True)
    ]
    for (arm, one), own in taught.items():
        if not {before, after} <= set(run.styles_of(arm)):
            continue
        draw, seed = one or (None, None)
        table = test[["fact_id", *ABOUT]].assign(arm=arm, style=after, draw=draw, seed=seed)
        for column, there in (("graph", [*known, *own]), ("trained_graph", own)):
            added = [graph.added([fact], there, of)[0] for fact, of in zip(asked, shown, strict=True)]
            table[column] = np.array(added)
        table["similarity"], table["popularity"] = alike, test["popularity"]
        for column, style in (("before", before), ("after", after)):
            table[column] = _of_facts(run, "accuracy", arm, style, one, table["fact_id"])
        table["rescued"] = table["after"].where(table["before"] == 0)
        if "answer_logprob" in run.study["measures"]:
            ends = [_of_facts(run, "answer_logprob", arm, style, one, table["fact_id"]) for style in (after, before)]
            table["logprob_gain"] = ends[0] - ends[1]
        yield table


def _shown(run: Run, style: str, test: pd.DataFrame) -> list[list[Edge]]:
    """Of each test fact the demonstrations that its prompt has in a style."""
    own = Style.model_validate(run.study["styles"][style])
    pool = run.shown
    candidates = {relation: demonstrations_of(own, relation, pool) for relation in test["relation"].unique()}
    asked: list[dict[str, Any]] = test.to_dict("records")  # type: ignore[assignment]
    return [_edges(pd.DataFrame(shown_to(fact, candidates[fact["relation"]], own.shots))) for fact in asked]


def _taught(run: Run, arm: str, replicate: Replicate | None) -> list[Edge]:
    """What an arm (or the one it is made of) was trained on."""
    arms = run.study["arms"]
    spec = arms[arms[arm].get("of") or arm]["train"]
    return _edges(run.taught(spec, replicate[0])) if replicate and spec else []


def _edges(facts: pd.DataFrame) -> list[Edge]:
    answers = facts["answers"].str[0]
    if "answer" in facts:
        answers = facts["answer"].fillna(answers)
    return [Edge(*map(str, of)) for of in zip(facts["subject"], facts["relation"], answers, strict=True)]


def _of_facts(run: Run, quantity: str, arm: str, style: str, one: Replicate | None, facts: Iterable[str]) -> np.ndarray:
    found: np.ndarray = run.measure(quantity, arm, style, one)[quantity].sel(fact=list(facts)).to_numpy().astype(float)
    return found


def _rank_correlation(x: pd.Series, y: pd.Series, about: pd.DataFrame) -> dict[str, Any]:
    """Spearman's, with its 95 % interval: the wider of facts resampled and of whole clusters of `about`."""
    pairs = pd.DataFrame({"x": x, "y": y}).assign(**about).dropna(subset=["x", "y"])
    if len(pairs) < MIN_FACTS or (pairs[["x", "y"]].nunique() < 2).any():
        return {"rho": np.nan, "low": np.nan, "high": np.nan, "n": len(pairs)}
    columns = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    labels = {name: ("fact", pairs[name].to_numpy(object)) for name in about}
    clusterings, _ = clusters_of(xr.DataArray(columns[0], labels, ("fact",)))
    rng, ends = np.random.default_rng(0), []
    for codes in (np.arange(len(pairs)), *clusterings.values()):
        members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
        draws = rng.integers(0, len(members), (DRAWS, len(members)))
        resampled = (np.concatenate([members[i] for i in draw]) for draw in draws)
        found = [float(_spearman(*(column[index] for column in columns))) for index in resampled]
        ends.append(np.nanquantile(found, [0.025, 0.975]))
    low, high = np.min(ends, 0)[0], np.max(ends, 0)[1]
    return {"rho": float(_spearman(*columns)), "low": float(low), "high": float(high), "n": len(pairs)}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one of the two does not vary."""
    a, b = (stats.rankdata(of, axis=-1) - (of.shape[-1] + 1) / 2 for of in (x, y))
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))
