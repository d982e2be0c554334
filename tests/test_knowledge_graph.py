"""Knowledge as a graph: paths by hand, and what the account predicts of a study's facts from its own files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.evidence.knowledge_graph import Edge, KnowledgeGraph
from subjattn.study.files import Run
from subjattn.study.graph_account import PREDICTORS, _rank_correlation
from subjattn.study.read import parse_study
from subjattn.study.run import run_study
from subjattn.worlds import record
from subjattn.worlds.record import WORLDS, Shape


NAMES = ["Nairobi", "Mombasa", "Lima", "Kenya", "Peru", "Chad"]
edges = st.builds(
    Edge, st.sampled_from(NAMES[:3]), st.sampled_from(["country", "language"]), st.sampled_from(NAMES[3:])
)


@pytest.fixture(scope="module")
def graph() -> KnowledgeGraph:
    return KnowledgeGraph(NAMES, np.random.default_rng(0).normal(0.4, 1, (len(NAMES), 5)))


def cosine(a: str, b: str) -> float:
    vectors = np.random.default_rng(0).normal(0.4, 1, (len(NAMES), 5))
    x, y = vectors[NAMES.index(a)], vectors[NAMES.index(b)]
    return 1.0 if a == b else max(0.0, float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))


@given(facts=st.lists(edges, min_size=1, max_size=5), own=st.lists(edges, max_size=6), more=st.lists(edges, max_size=3))
def test_paths_connect_as_by_hand(graph: KnowledgeGraph, facts: list[Edge], own: list[Edge], more: list[Edge]) -> None:
    def by_hand(fact: Edge, there: list[Edge]) -> float:
        left = 1.0
        for edge in set(there):
            if edge.relation == fact.relation:
                left *= 1 - cosine(fact.subject, edge.subject) * cosine(fact.answer, edge.answer)
        return 1 - left

    found = graph.connectivity(facts, own)
    np.testing.assert_allclose(found, [by_hand(fact, own) for fact in facts], atol=1e-12)
    assert (found[[fact in own for fact in facts]] == 1).all(), "a fact that is there is connected"
    gained = [by_hand(fact, [*own, *more]) - by_hand(fact, own) for fact in facts]
    np.testing.assert_allclose(np.exp(graph.added(facts, own, more)), gained, atol=1e-12)


def test_names_are_told_apart(graph: KnowledgeGraph) -> None:
    assert graph.similarity(["nairobi "], ["Nairobi"])[0, 0] == 1
    with pytest.raises(BadInput, match="the graph has no name 'Oslo'"):
        graph.connectivity([Edge("Oslo", "country", "Kenya")], [Edge("Lima", "country", "Peru")])
    with pytest.raises(BadInput, match="2 names want as many vectors"):
        KnowledgeGraph(["a", "b"], np.zeros((2, 3)))


def test_rank_correlations() -> None:
    rng = np.random.default_rng(1)
    x = pd.Series(rng.normal(size=80))
    y = (x + rng.normal(size=80)).round(1)
    alone = pd.DataFrame({"answer": [str(i) for i in range(80)]})
    found = _rank_correlation(x, y, alone)
    assert found["rho"] == pytest.approx(stats.spearmanr(x, y).statistic) and found["n"] == 80
    drawn = stats.bootstrap(
        (x.to_numpy(), y.to_numpy()),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=3,
    )
    np.testing.assert_allclose([found["low"], found["high"]], drawn.confidence_interval, atol=0.03)
    assert _rank_correlation(x, y.where(y.index < 9), alone)["n"] == 9
    for few in (y.where(y.index < 9), y * 0):
        assert np.isnan(_rank_correlation(x, few, alone)["rho"])


def test_an_interval_of_rho_counts_answers_and_not_their_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: noise that all facts of an answer share. Facts resampled alone would be sure of it."""
    monkeypatch.setattr("subjattn.study.graph_account.DRAWS", 200)
    outside = {"facts": 0, "answers": 0}
    for seed in range(40):
        rng, answers = np.random.default_rng(seed), np.repeat(np.arange(12), 8)
        x, y = (pd.Series(rng.normal(size=12)[answers] + 0.3 * rng.normal(size=96)) for _ in range(2))
        for name, labels in (("facts", np.arange(96)), ("answers", answers)):
            found = _rank_correlation(x, y, pd.DataFrame({"answer": labels.astype(str)}))
            outside[name] += not found["low"] <= 0 <= found["high"]
    assert outside["answers"] <= 6 < 12 < outside["facts"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A study in a small world, asked with and without demonstrations."""
    small = replace(
        WORLDS["zipf-weak"],
        name="small",
        n_subjects=40,
        n_relations=2,
        n_answers=4,
        n_sentences=400,
        shape=Shape(1, 32, 2),
        steps=60,
        batch=64,
        learning_rate=1e-2,
    )
    raw = {
        "name": "small",
        "model": "world:small",
        "facts": {
            "source": "world:small",
            "n_train": 8,
            "n_test": 18,
            "split": {"within": ["relation"], "match": ["relation"]},
        },
        "styles": {
            "bare": "cloze",
            "asked": "question",
            "shown": {"template": "cloze", "shots": 2, "demonstrations": "unknown", "seed": 4},
        },
        "arms": {"base": {}, "bottom": {"train": "bottom"}},
        "training": {"styles": ["asked"], "weights": "full", "steps": 4, "learning_rate": 1e-2},
        "replicates": {"draws": 2},
        "measures": {"accuracy": None, "answer_logprob": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(record, "WORLDS", {"small": small})
        out = tmp_path_factory.mktemp("runs") / "small"
        run_study(parse_study(raw, "small"), out, workers=1)
        yield sa.open_run(out)


def test_the_account_of_a_study(finished: Run) -> None:
    facts, judged = sa.graph_account(finished)
    assert len(facts) == 18 * 3 and set(facts["style"]) == {"shown"}, "base once, the other arm twice"
    prompts = {prompt.fact_id: prompt for prompt in finished.prompts("shown")}
    model = sa.load_model("world:small")
    table = finished.facts.set_index("fact_id")
    weights = model.model.get_input_embeddings().weight.detach().double().numpy()

    def vector(name: str) -> np.ndarray:
        (token,) = model.tokenizer(name, add_special_tokens=False).input_ids
        return np.asarray(weights[token] / np.linalg.norm(weights[token]))

    def like(a: str, b: str) -> float:
        return 1.0 if a == b else max(0.0, float(vector(a) @ vector(b)))

    def left(fact: pd.Series, shown: pd.DataFrame) -> float:
        total = 0.0
        for other in shown[shown["relation"] == fact["relation"]].itertuples():
            strength = like(fact["subject"], other.subject) * like(fact["answers"][0], other.answers[0])
            total += np.log1p(-strength) if strength < 1 else -np.inf
        return total

    known = table[(table["third"] == "top") & ~table["test"]]
    said = {(fact.subject, fact.answers[0]): fact for fact in table.itertuples()}
    answers = finished.predictions().set_index(["arm", "style", "fact_id"])
    for row in facts[(facts["arm"] == "bottom") & (facts["draw"] == 1)].itertuples():
        fact, text = table.loc[row.fact_id], prompts[row.fact_id].text.split()
        pairs = [(text[i], text[i + 2]) for i in range(0, len(text) - 3, 3)]
        assert len(pairs) == 2 and all(said[pair].third == "bottom" for pair in pairs)
        demonstrations = pd.DataFrame([said[pair] for pair in pairs])
        gained = np.log(-np.expm1(left(fact, demonstrations))) if left(fact, demonstrations) < 0 else -np.inf
        taught = finished.taught("bottom", 1)
        assert row.trained_graph == pytest.approx(left(fact, taught) + gained, abs=1e-5)
        assert row.graph == pytest.approx(left(fact, taught) + left(fact, known) + gained, abs=1e-5)
        assert row.similarity == pytest.approx(np.mean([like(fact["subject"], of[0]) for of in pairs]), abs=1e-5)
        before, after = (
            answers.loc[("bottom", style, row.fact_id)].query("draw == 1")["correct"].item()
            for style in ("bare", "shown")
        )
        assert (row.before, row.after) == (before, after)
        assert np.isnan(row.rescued) if before else row.rescued == after
    assert facts["rescued"].isna().any() and facts["rescued"].notna().any()
    values = finished.values.query("quantity == 'answer_logprob' and arm == 'base'").set_index(["style", "fact"])
    own = facts[facts["arm"] == "base"].set_index("fact_id")["logprob_gain"]
    for fact, gain in own.items():
        ends = [values.loc[(style, fact), "value"] for style in ("shown", "bare")]
        assert gain == pytest.approx(ends[0] - ends[1], abs=1e-6)
    assert len(judged) == 2 * 2 * len(PREDICTORS)
    row = judged.query("arm == 'base' and outcome == 'logprob_gain' and predictor == 'similarity'").iloc[0]
    base = facts[facts["arm"] == "base"]
    assert row["rho"] == pytest.approx(stats.spearmanr(base["similarity"], base["logprob_gain"]).statistic)


def test_a_study_without_demonstrations_is_refused(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    styles = {"bare": finished.study["styles"]["bare"]}
    monkeypatch.setitem(finished.study, "styles", styles)
    with pytest.raises(BadInput, match="needs accuracy, a style without shots, and one of its template with shots"):
        sa.graph_account(finished)
