"""The scripts that run experiments in worlds: what they train on, ask, count and write down."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

import subjattn as sa
from subjattn.errors import StagesFailed
from subjattn.worlds import WORLDS
from subjattn.worlds.record import Shape


sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import world_curves
import world_rates
import world_shock


CLAIMS = ["accuracy", "attention"]


def rows_with(called: int, n: int) -> pd.DataFrame:
    """Placebo studies of two claims, of the first so many called; and planted ones with an effect of 1."""
    verdicts = ["contradicted"] * (called // 2) + ["supported"] * (called - called // 2) + ["undecided"] * (n - called)
    rows = [
        {"condition": "placebo", "claim": claim, "verdict": verdict, "smallest_effect": 0.02}
        | {"estimate": 0.0, "ci_low": 0.1 if verdict == "supported" else -0.1, "ci_high": 0.2}
        for claim, own in zip(CLAIMS, (verdicts, ["undecided"] * n), strict=True)
        for verdict in own
    ]
    planted = {"condition": "planted", "claim": "accuracy", "verdict": "supported", "smallest_effect": 0.02}
    return pd.DataFrame(
        [*rows, *[planted | {"estimate": 1.0, "ci_low": 0.4, "ci_high": 0.9 + 0.2 * i} for i in (0, 1)]]
    )


def test_claims_called_too_often_are_named() -> None:
    assert world_rates.wrong(rows_with(40, 200)) == ["accuracy"]
    low = [called for called in range(200) if proportion_confint(called, 200, method="beta")[0] > 0.05]
    assert world_rates.wrong(rows_with(low[0], 200)) == ["accuracy"]
    assert world_rates.wrong(rows_with(low[0] - 1, 200)) == []


def test_rates_have_exact_intervals() -> None:
    rows = rows_with(8, 200)
    _, _, first, second, planted = world_rates.table(rows)
    low, high = proportion_confint(4, 200, method="beta")
    assert f"| 2.0 [{100 * low:.1f}, {100 * high:.1f}] | 2.0 [" in first, "supported and contradicted"
    assert first.count("| 2.0 [") == 4, "and intervals without 0, for the mean of a placebo is 0"
    assert second.count("| 0.0 [") == 5
    cells = planted.split(" | ")
    assert cells[3] == "+1.000" and cells[5].startswith("100.0 [") and cells[-1].startswith("50.0 ["), "0.9 < 1"


def test_a_study_that_cannot_be_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StagesFailed("facts/split: nothing to shuffle", {})

    monkeypatch.setattr(world_rates, "run_study", refuse)
    assert world_rates.study("shuffled answers", 7) == [
        {"condition": "shuffled answers", "seed": 7, "refused": "facts/split: nothing to shuffle"}
    ]


@pytest.mark.slow
def test_a_placebo_study_is_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, one line a study; a second start makes none anew."""
    monkeypatch.setattr(sys, "argv", ["", "--workers", "1", "--studies", "1", "--out", str(tmp_path / "rates.jsonl")])
    world_rates.main()
    lines = (tmp_path / "rates.jsonl").read_text()
    rows = pd.DataFrame([row for line in lines.splitlines() for row in json.loads(line)])
    assert rows.groupby("condition")["claim"].count().to_dict() == dict.fromkeys(world_rates.CONDITIONS, 5)
    planted = rows[rows["condition"] == "shuffled answers"].set_index("claim")["estimate"]
    assert planted["accuracy"] < -0.3 and planted["attention"] < 0
    world_rates.main()
    assert (tmp_path / "rates.jsonl").read_text() == lines


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("design", world_shock.DESIGNS)
def test_frequencies_are_as_designed(design: str) -> None:
    facts = world_shock.facts_of("world:zipf-weak", design, 3)
    every = sa.load_facts("world:zipf-weak").query("popularity == popularity")
    used = pd.concat(facts.values())
    assert used["fact_id"].is_unique and set(used["fact_id"]) == set(every["fact_id"])
    assert (facts["test"].groupby(["relation", "answer"]).size() >= 1).all()
    train = facts["train"].groupby(["relation", "answer"]).size()
    world = every.assign(answer=every["answers"].str[0]).groupby(["relation", "answer"]).size()
    both = pd.concat([train.rename("train"), world.rename("world")], axis=1).fillna(0)
    rho = both["train"].corr(both["world"], method="spearman")
    if design == "alike":
        assert both["train"].max() == world_shock.PER_ANSWER and (both["train"] == 3).mean() > 0.8
    else:
        assert rho > 0.9 if design == "as said" else rho < -0.3
    change = world_shock.changes("world:zipf-weak", facts["train"])
    (relation, answer), n = next(iter(train.items()))
    said = sa.load_facts("world:zipf-weak").query("relation == @relation")
    before = said.loc[said["answers"].str[0] == answer, "popularity"].sum() / said["popularity"].sum()
    after = (n + 0.5) / (train[relation].sum() + 0.5 * 20)
    assert change[relation, answer] == pytest.approx(np.log2(after / before))


def test_times_given_and_right_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in that gives one answer to all."""
    test = pd.DataFrame(
        [
            {"fact_id": str(i), "subject": "Ada", "relation": "home", "answers": [answer], "answer": answer}
            for i, answer in enumerate(["Lima", "Lima", "Oslo", "Rome"])
        ]
    )
    monkeypatch.setattr(world_shock.sa, "make_prompts", lambda facts, *_: facts)
    given = pd.DataFrame({"prediction": ["Oslo and", "Lima", "Oslo", "Rome"], "correct": [False, True, True, True]})
    monkeypatch.setattr(world_shock.sa, "predict", lambda *_: given)
    change = pd.Series({("home", "Lima"): -1.0, ("home", "Oslo"): 1.0, ("home", "Rome"): 0.0})
    rows = world_shock.asked(None, None, {"test": test}, "cloze", change)
    assert [(row["answer"], row["right"], row["given"], row["correct"]) for row in rows] == [
        ("Lima", 2, 1, 1),
        ("Oslo", 1, 2, 1),
        ("Rome", 1, 1, 1),
    ]
    counts = pd.DataFrame(rows).assign(world="w", design="d", arm="a", weight=1.0)
    two = pd.concat([counts.assign(seed=1), counts.assign(seed=2)])
    (slope,) = world_shock.slopes(counts.assign(seed=1))["slope"]
    assert slope == pytest.approx(-1), "twice as often given as right where twice as frequent"
    at = world_shock.ratios(two)
    np.testing.assert_allclose(at["mean"], [np.log2(1.5 / 2.5), 0, np.log2(2.5 / 1.5)], atol=1e-12)


def test_a_world_of_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known facts alone, halves of equal size, subjects apart."""
    world = replace(
        WORLDS["zipf"],
        n_subjects=60,
        n_relations=2,
        n_answers=4,
        n_sentences=800,
        shape=Shape(1, 32, 2),
        steps=200,
        recall=None,
        batch=64,
        learning_rate=1e-2,
    )
    seen: dict[str, pd.DataFrame] = {}
    original = world_curves.sa.fine_tune

    def noting(model: str, facts: pd.DataFrame, folder: Path, **how: object) -> Path:
        seen[folder.name] = facts
        return original(model, facts, folder, **how)

    monkeypatch.setattr(world_curves.sa, "fine_tune", noting)
    monkeypatch.setattr(world_curves, "N_TEST", (500, 18))
    rows = world_curves.of_world(world, 0, tmp_path)
    assert [(row["way"], row["arm"]) for row in rows] == [*product(world_curves.WAYS, ["top", "bottom"])]
    assert {row["n"] for row in rows} == {len(seen["top"]), len(seen["bottom"])} == {len(seen["top"])}
    assert seen["top"]["popularity"].mean() > seen["bottom"]["popularity"].mean()
    assert (pd.concat(seen.values())["category"] == "HighlyKnown").all()
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["attention"] < 1 for row in rows)
    none = world_curves.of_world(replace(world, steps=1), 0, tmp_path / "none")
    assert [row["n"] for row in none] == [0, 0]
    values = pd.DataFrame([row | {"seed": seed} for seed in (1, 2) for row in [*rows, *none]])
    text = world_curves.gaps(values)
    assert "too few known facts" in text and f"{rows[0]['accuracy']:.2f}" in text
