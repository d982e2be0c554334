"""Studies of one-layer worlds: who is trained and tested, tables against loops, the road from YAML to page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
from scipy import stats
from typer.testing import CliRunner

from subjattn.cli import app
from subjattn.errors import BadInput
from subjattn.theory.gap import ARMS, ERRORS, Finetuning, Pretraining, WorldSettings, ask, finetune, pretrain
from subjattn.theory.onelayer import OneLayer
from subjattn.theory.read import load_theory
from subjattn.theory.results import PATTERNS, SHARES, gaps, interval, percentiles_of, values_of
from subjattn.theory.run import TABLES, open_theory, run_theory


WORLD = WorldSettings(n_subjects=21, n_relations=3, n_answers=5)
PRE = Pretraining(steps=[60, 150], learning_rate=0.05, batch=64)
FINE = Finetuning(steps=[5, 20], batch=8)
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def models() -> dict[int, OneLayer]:
    return pretrain(WORLD, 1.0, PRE, SEEDS)


@pytest.fixture(scope="module")
def found(models: dict[int, OneLayer]) -> xr.Dataset:
    arrays = [finetune(WORLD, 1.0, model, FINE, SEEDS) for model in models.values()]
    return xr.concat(arrays, dim=xr.IndexVariable("pretraining", list(models)))


def test_a_replicate_has_the_numbers_that_it_has_alone(models: dict[int, OneLayer], found: xr.Dataset) -> None:
    alone = pretrain(WORLD, 1.0, PRE, [1])
    torch.testing.assert_close(alone[150].values[0], models[150].values[1])
    own = finetune(WORLD, 1.0, alone[150], FINE, [1])
    xr.testing.assert_allclose(
        own.isel(replicate=0), found.sel(pretraining=150, drop=True).isel(replicate=1), rtol=1e-5
    )


def test_more_steps_begin_with_the_same_ones(models: dict[int, OneLayer]) -> None:
    shorter = pretrain(WORLD, 1.0, PRE.model_copy(update={"steps": [60]}), SEEDS)
    assert torch.equal(shorter[60].values, models[60].values)


def test_arms_are_halves_of_the_known_training_facts(found: xr.Dataset) -> None:
    for pretraining in found["pretraining"].values:
        for number in range(len(SEEDS)):
            one = found.sel(pretraining=pretraining).isel(replicate=number)
            tested = one["asked"].any("relation").values
            trained = {arm: np.argwhere(one["trained"].sel(arm=arm).values) for arm in ARMS}
            known = one["known"].values
            for facts in trained.values():
                assert known[tuple(facts.T)].all() and not tested[facts[:, 0]].any()
            assert (one["asked"].values <= known).all()
            whole, half = len(trained["whole"]), len(trained["whole"]) // 2
            assert one["n_facts"].values.tolist() == [half, half, half, whole] and half > 2
            assert trained["top"][:, 0].max() <= trained["bottom"][:, 0].min()
            every = {tuple(fact) for fact in trained["whole"]}
            assert {tuple(fact) for arm in ARMS for fact in trained[arm]} == every
            world = WORLD.make(1.0, SEEDS[number])
            own = [world.answers[trained["top"][trained["top"][:, 1] == r, 0], r] for r in range(3)]
            modal = sum(np.bincount(answers).max() for answers in own if len(answers)) / half
            assert float(one["modal_share"].sel(arm="top")) == pytest.approx(modal)


def test_of_two_neighbours_one_is_tested() -> None:
    every = finetune(
        WORLD, 1.0, OneLayer.zeros(WORLD.make(1.0, 0).tokens, 1), FINE.model_copy(update={"known": False}), [0]
    )
    tested = every["asked"].any("relation").values[0]
    assert (tested[:20].reshape(10, 2).sum(1) == 1).all() and every["asked"].values[0][tested].all()


def test_answers_are_told_apart(models: dict[int, OneLayer]) -> None:
    answers = np.stack([WORLD.make(1.0, seed).answer_tokens for seed in SEEDS])
    kinds = set()
    for number, seed, prompts in [(i, of, asked) for asked in (False, True) for i, of in enumerate(SEEDS)]:
        found = ask(models[60], answers, prompts=prompts)
        world = WORLD.make(1.0, seed)
        for subject in range(21):
            for relation in range(3):
                last = int(world.tokens.prompt(relation) if prompts else world.tokens.relation(relation))
                facts = torch.tensor([[subject]] * 3), torch.tensor([[last]] * 3)
                given = int(models[60].logits(*facts)[number, 0].argmax())
                others = [int(of) for r, of in enumerate(world.answer_tokens[subject]) if r != relation]
                own = [int(world.tokens.answer(relation, k)) for k in range(5)]
                right = given == world.answer_tokens[subject, relation]
                kind = "right" if right else "subject" if given in others else "relation" if given in own else "else"
                assert ERRORS[int(found["answer"][number, subject, relation])] == kind
                assert float(found["attention"][number, subject, relation]) == pytest.approx(
                    float(models[60].attention(*facts)[number, 0])
                )
                kinds.add(kind)
    assert {"right", "subject", "relation"} <= kinds


def test_tables_are_those_of_loops(found: xr.Dataset) -> None:
    table = values_of(found).set_index(["pretraining", "replicate", "arm", "step"])
    curves = percentiles_of(found).set_index(["pretraining", "replicate", "arm", "share"])["accuracy"]
    rng = np.random.default_rng(0)
    for _ in range(12):
        at = int(rng.choice([60, 150])), int(rng.integers(3)), str(rng.choice(ARMS)), int(rng.choice([0, 5, 20]))
        one = found.sel(pretraining=at[0], arm=at[2], step=at[3]).isel(replicate=at[1])
        asked, trained = one["asked"].values, one["trained"].values
        answer, attention = one["answer"].values[asked], one["attention"].values
        row = table.loc[at]
        assert row["accuracy"] == pytest.approx(np.mean(answer == 0)) and row["n_asked"] == asked.sum()
        assert row["subject"] + row["relation"] + row["else"] == pytest.approx(np.mean(answer != 0))
        assert row["relation"] == pytest.approx(np.mean(answer == 2))
        assert row["attention"] == pytest.approx(attention[asked].mean())
        salience = one["salience"].values
        edges = np.quantile(salience[trained], [1 / 3, 2 / 3])
        low, high = trained & (salience <= edges[0]), trained & (salience > edges[1])
        assert row["attention_low"] == pytest.approx(attention[low].mean(), rel=1e-5)
        assert row["attention_high"] == pytest.approx(attention[high].mean(), rel=1e-5)
        tested = np.flatnonzero(asked.any(1))
        last = found.sel(pretraining=at[0], arm=at[2], step=20).isel(replicate=at[1])["answer"].values
        share = float(rng.choice(SHARES[4:]))
        most = tested[: int(share * len(tested) + 1e-9)]
        right = (last == 0)[most][asked[most]]
        assert curves.loc[(*at[:3], share)] == pytest.approx(right.mean())


def test_gaps_are_paired_and_named_by_their_signs() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"world": world, "zipf": 1.0, "pretraining": 10, "finetuning": "x", "step": 5, "replicate": i, "arm": arm}
        | {"accuracy": base + accuracy * (arm == "top"), "attention": attention * (arm == "top") + rng.normal(0, 0.01)}
        | {"recall": 1.0, "n_facts": 9}
        for world, accuracy, attention in (("b", 0.2, -0.3), ("a", -0.2, 0.0))
        for i, base in enumerate(rng.normal(0, 1, 6))
        for arm in ("top", "bottom", "whole")
    ]
    found = gaps(pd.DataFrame(rows)).set_index("world")
    assert list(found.index) == ["b", "a"], "as the study has them"
    assert found.loc["b", "accuracy"] == pytest.approx(0.2) and found.loc["b", "accuracy_low"] == pytest.approx(0.2)
    assert found.loc["b", "pattern"] == PATTERNS[1, -1] and found.loc["a", "pattern"] == PATTERNS[-1, 0]
    assert found.loc["b", "attention"] == pytest.approx(-0.3, abs=0.02)


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(3, 2, 7)
    own = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mine = interval([*values, float("nan")])
    assert (mine["low"], mine["high"], mine["n"]) == (pytest.approx(own.low), pytest.approx(own.high), 7)
    assert np.isnan(interval([1.0])["low"])


def test_what_the_prompt_token_holds_and_what_is_frozen(models: dict[int, OneLayer]) -> None:
    """A copied column asks before training as uniform attention over the relation's column does; frozen W_V stays."""
    copied = finetune(WORLD, 1.0, models[150], FINE.model_copy(update={"prompt": "copied"}), SEEDS)
    empty = finetune(WORLD, 1.0, models[150], FINE, SEEDS)
    answers = np.stack([WORLD.make(1.0, seed).answer_tokens for seed in SEEDS])
    flat = OneLayer(models[150].tokens, models[150].values, torch.zeros_like(models[150].scores))
    expected = ask(flat, answers, prompts=False)["answer"].values
    for arm in ARMS:
        assert (copied["answer"].sel(step=0, arm=arm).values == expected).all()
    assert (empty["answer"].sel(step=0).values != copied["answer"].sel(step=0).values).any()
    alone = Finetuning(steps=[20], freeze_values=True, prompt="copied", optimiser="sgd", learning_rate=0.1)
    frozen = finetune(WORLD, 1.0, models[150], alone, SEEDS)
    moved = frozen["attention"].sel(step=20) - frozen["attention"].sel(step=0)
    assert float(np.abs(moved).max()) > 1e-3
    weight = torch.tensor(frozen["attention"].sel(step=20, arm="top").values.reshape(3, -1))
    subjects, relations = (torch.tensor(axis.ravel()).expand(3, -1) for axis in np.indices((21, 3)))
    logits = models[150].logits(subjects, subjects.new_tensor(21) + relations, weight)
    right = (logits.argmax(-1).numpy() == answers.reshape(3, -1)).reshape(3, 21, 3)
    assert (right == (frozen["answer"].sel(step=20, arm="top").values == 0)).all()


# From YAML to page


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theory") / "small.yaml"
    world = {"n_subjects": 20, "n_relations": 2, "n_answers": 4}
    raw = {
        "name": "small",
        "theory": "one-layer",
        "replicates": 2,
        "worlds": {
            "two": world | {"zipf": [0.5, 1], "pretraining": {"steps": [40, 80]}},
            "one": world | {"n_relations": 1, "zipf": [1], "pretraining": {"steps": [40]}, "finetuning": ["frozen"]},
        },
        "finetuning": {
            "copied": {"prompt": "copied", "steps": [4, 8]},
            "frozen": {"freeze_values": True, "steps": [4]},
        },
        "along": {"long": {"init": "normal", "steps": [5, 50]}},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_study_runs_resumes_and_shows(study: Path) -> None:
    out = study.parent / "out"
    ran = CliRunner().invoke(app, ["run", str(study), "--out", str(out), "--workers", "1"])
    assert ran.exit_code == 0, ran.output
    assert "FAILS  a fact is lost at Att_s <= d / S" in ran.output and "no difference" in ran.output
    config, summary, tables = open_theory(out)
    assert config == load_theory(study) and set(tables) == set(TABLES) and len(summary["statements"]) == 9
    cells = tables["gaps"].query("step > 0").groupby(["world", "zipf", "pretraining", "finetuning"]).ngroups
    assert cells == 2 * 2 * 2 + 1
    page = (out / "report.html").read_text()
    assert all(f">{title}<" in page for title in ("The paper's statements", "Where which gap appears"))
    assert "Long training from scratch in “two”, α 1 (fig. 6)" in page and "violations" in page

    planned = CliRunner().invoke(app, ["plan", str(study), "--out", str(out)])
    assert "✓ finished 12 of 12" in planned.output, planned.output
    before = {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")}
    (out / "worlds/one/zipf-1/frozen/array.nc").unlink()
    again = run_theory(config, out, workers=1)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")}
    assert [str(path.relative_to(out).parent) for path in after if after[path] != before[path]] == [
        "worlds/one/zipf-1/frozen"
    ]
    for name, table in tables.items():
        pd.testing.assert_frame_equal(again[name], table)
    shown = CliRunner().invoke(app, ["report", str(out)])
    assert shown.exit_code == 0 and len((out / "report.html").read_text()) == len(page)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("worlds.two.n_answers=30", "worlds.two.n_answers: n_answers=30 is more than the 20 subjects"),
        ("worlds.two.zipf=[-1]", "zipf.0: Input should be greater than or equal to 0"),
        ("worlds.one.finetuning=[cold]", "no way 'cold'; there are copied, frozen"),
        ("finetuning.copied.steps=[8, 4]", r"steps \[8, 4\] are not in order"),
        ("replicates=1", "replicates: Input should be greater than or equal to 2"),
        ("finetuning.copied.prompts=empty", "no such field"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(study: Path, setting: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        load_theory(study, [setting])


def test_only_a_finished_study_is_opened(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no finished study of worlds"):
        open_theory(tmp_path)


def test_options_for_models_are_refused(study: Path, tmp_path: Path) -> None:
    for command in (["run", str(study), "--random-init"], ["plan", str(study), "--pilot", str(tmp_path)]):
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, BadInput) and "worlds" in str(refused.exception)


def test_studies_kept_here_are_valid() -> None:
    for path in sorted((Path(__file__).parent.parent / "experiments").glob("theory_*.yaml")):
        raw: dict[str, Any] = yaml.safe_load(path.read_text())
        assert load_theory(path).name == raw["name"] == path.stem
    assert json.loads(json.dumps(PATTERNS[1, 1])) == "accuracy and attention fall (the paper's)"
