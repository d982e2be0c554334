"""Measures over training, and hyper-parameters tried on validation facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.plots.over_training import plot_over_training
from subjattn.study.arms import Grid, TrainingConfig
from subjattn.study.files import Run, open_run
from subjattn.study.plan import plan_study
from subjattn.study.read import parse_study
from subjattn.study.run import run_study
from subjattn.study.stages.trying import choose


LIST = "City: {subject}\nCountry:"


@pytest.fixture(scope="module")
def raw(tiny_folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "name": "over",
        "model": str(tiny_folders["llama"]),
        "facts": {"source": "cities", "pool": 400, "n_train": 16, "n_test": 24, "n_validation": 6},
        "styles": {"list": LIST, "sentence": "The city of {subject} is in"},
        "arms": {
            "base": {},
            "known": {"train": "known"},
            "unknown": {"train": "unknown", "training": {"checkpoints": [1, 3]}},
            "full": {"train": "known", "training": {"weights": "full", "learning_rate": 1e-3}, "styles": ["list"]},
        },
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "lora_rank": 4, "checkpoints": "log"},
        "replicates": {"draws": 2},
        "measures": {"accuracy": {}, "answer_logprob": {}, "swap_weights": {"facts": 2}},
        "over_training": ["answer_logprob", "swap_weights"],
        "claims": [
            {"id": "c", "statement": "x", "measure": "answer_logprob", "arms": ["known", "base"],
             "direction": "increase", "smallest_effect": 0.1}
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run")
    run_study(parse_study(raw, "over"), out, workers=1)
    return open_run(out)


def test_every_kept_step_is_measured_as_its_weights_are(run: Run, raw: dict[str, Any]) -> None:
    """Against each step's adapter loaded by itself, the base at step 0 and the trained arm at the last."""
    prompts = run.prompts("list")
    for arm, steps in (("known", [0, 1, 2, 4, 6]), ("unknown", [0, 1, 3, 6]), ("full", [0, 1, 2, 4, 6])):
        found = run.over_training("answer_logprob", arm, replicate=(1, 0))["answer_logprob"]
        assert found["step"].values.tolist() == steps and found.sizes["fact"] == 24
        folder = run.folder / f"arms/{arm}/draw1-seed0/adapter"
        for step in steps:
            weights = folder if step == steps[-1] else folder / "steps" / str(step)
            if step == 0:
                model = sa.load_model(raw["model"])
            else:
                model = sa.load_model(str(weights)) if arm == "full" else sa.load_model(raw["model"], adapter=weights)
            np.testing.assert_allclose(found.sel(step=step), sa.answer_logprob(model, prompts), rtol=1e-5)
        last = run.measure("answer_logprob", arm, "list", (1, 0))["answer_logprob"]
        np.testing.assert_array_equal(found.sel(step=6), last)
    across = run.over_training("swap_weights", "known")
    assert across["step"].values.tolist() == [1, 2, 4, 6], "a base has nothing to be compared with"


def test_the_best_weights_stand_at_their_own_step(raw: dict[str, Any], tmp_path: Path) -> None:
    """With `stop: validation` an arm is the model of its best step, which is seldom its last."""
    stopping = raw["training"] | {"stop": "validation", "epochs": 8, "patience": 2, "learning_rate": 0.05}
    arms = {"base": {}, "known": {"train": "known"}}
    few = raw | {"training": stopping, "arms": arms, "replicates": {"draws": 1}, "measures": {"answer_logprob": {}}}
    run_study(parse_study(few | {"over_training": ["answer_logprob"]}, "over"), tmp_path, workers=1)
    run = open_run(tmp_path)
    log = json.loads((tmp_path / "arms/known/draw0-seed0/adapter/training.json").read_text())
    found = run.over_training("answer_logprob", "known")["answer_logprob"]
    own = run.measure("answer_logprob", "known", "list")["answer_logprob"]
    assert log["best_step"] < len(log["losses"]) and len(log["losses"]) not in found["step"]
    assert found["step"].values.tolist() == sorted(found["step"].values.tolist())
    np.testing.assert_array_equal(found.sel(step=log["best_step"]), own)


def test_the_summary_has_a_curve_with_its_interval(run: Run) -> None:
    rows = pd.DataFrame(run.summary["over_training"])
    own = rows[(rows["arm"] == "known") & (rows["measure"] == "answer_logprob")]
    assert (
        own["step"].tolist() == [0, 1, 2, 4, 6] and (own["n_replicates"] == 2).all() and set(rows["style"]) == {"list"}
    )
    arm = run.summary["arms"]["known"]["styles"]["list"]
    last = own[own["step"] == 6].iloc[0]
    assert last["estimate"] == pytest.approx(arm["answer_logprob"])
    assert [last["ci_low"], last["ci_high"]] == pytest.approx(arm["intervals"]["answer_logprob"])
    first = own[own["step"] == 0].iloc[0]
    assert first["estimate"] == pytest.approx(run.summary["arms"]["base"]["styles"]["list"]["answer_logprob"])
    page = (run.folder / "report.html").read_text()
    assert 'id="over-training"' in page and "step %{customdata}" in page


def test_the_figure_draws_every_arm_and_step(run: Run) -> None:
    rows = [row for row in run.summary["over_training"] if row["measure"] == "answer_logprob"]
    figure = plot_over_training(rows, {"answer_logprob": "nats"})
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert set(lines) == {"known", "unknown", "full"}
    assert list(lines["unknown"].customdata) == [0, 1, 3, 6]
    expected = [row["estimate"] for row in rows if row["arm"] == "unknown"]
    assert list(lines["unknown"].y) == expected
    assert list(figure.layout.xaxis.ticktext) == ["base", "1", "2", "4", "6"]


def test_a_study_without_checkpoints_has_none(raw: dict[str, Any]) -> None:
    plain = {**raw, "training": {"epochs": 1}, "arms": {"base": {}, "known": {"train": "known"}}}
    with pytest.raises(BadInput, match=r"over_training: no arm keeps weights"):
        parse_study(plain, "over")
    with pytest.raises(BadInput, match="no measure 'knockout'"):
        parse_study({**raw, "over_training": ["knockout"]}, "over")


# Hyper-parameters


def test_a_grid_is_tried_and_the_best_is_taken(raw: dict[str, Any], tmp_path: Path) -> None:
    """With a rate that learns nothing, one that learns and one that diverges, what learns is taken; arm by arm."""
    rates = {"values": {"learning_rate": [1e-9, 0.02, 1e6], "weights": ["full"]}, "select": "each"}
    study = {
        **raw,
        "arms": {"base": {}, "known": {"train": "known"}, "unknown": {"train": "unknown"}},
        "training": {"epochs": 4, "batch_size": 8, "grid": rates},
        "measures": {"accuracy": {}},
        "over_training": [],
        "claims": [],
        "replicates": {"draws": 2},
        "styles": {"list": LIST},
    }
    run_study(parse_study(study, "grid"), tmp_path, workers=1)
    for arm in ("known", "unknown"):
        found = json.loads((tmp_path / f"arms/{arm}/grid/chosen/chosen.json").read_text())
        assert found["settings"]["learning_rate"] == 0.02 and len(found["tried"]) == 3
        assert "diverged" in found["tried"][2]["reason"] and found["tried"][2]["accuracy"] is None
        for draw in (0, 1):
            folder = tmp_path / f"arms/{arm}/draw{draw}-seed0/adapter"
            assert (folder / "model.safetensors").is_file()
            losses = [one["loss"] for one in json.loads((folder / "training.json").read_text())["losses"]]
            assert losses[-1] < losses[0] - 1
    assert not [*tmp_path.rglob("grid/*/*.safetensors")], "only scores are kept of what is tried"


def test_a_shared_choice_counts_all_arms(tmp_path: Path) -> None:
    scores = {  # accuracy by arm: the first is best for a, the second on average, the third diverges for b
        "0/a": 0.9, "0/b": 0.1, "1/a": 0.6, "1/b": 0.6, "2/a": 1.0, "2/b": None, "3/a": 0.6, "3/b": 0.6,
    }  # fmt: skip
    inputs = {}
    for role, accuracy in scores.items():
        inputs[role] = tmp_path / f"{role.replace('/', '-')}.json"
        said = {"settings": {"steps": int(role[0])}, "accuracy": accuracy, "logprob": -1.0 - int(role[0] == "1")}
        inputs[role].write_text(json.dumps(said | {"reason": "diverged"}))
    choose({}, inputs, tmp_path, None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "chosen.json").read_text())["settings"] == {"steps": 3}, "likelier of equal ones"
    with pytest.raises(BadInput, match="every combination"):
        choose({}, {"2/b": inputs["2/b"]}, tmp_path, None)  # type: ignore[arg-type]


def test_the_paper_s_grid_has_each_combination_once() -> None:
    """Table 4 of Ghosal et al. (2024): full fine-tuning has no rank, so it is there once for each rate and decay."""
    values = {
        "learning_rate": [1e-5, 1e-4, 1e-3],
        "weight_decay": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2],
        "lora_rank": [8, 16, 32, 64],
        "weights": ["lora", "full"],
    }
    training = TrainingConfig.model_validate({"grid": {"values": values}})
    points = Grid(values=values).points(training.settings)
    assert len(points) == 3 * 5 * (4 + 1) and {(point.lora_rank, point.alpha) for point in points} == {
        (8, 16), (16, 32), (32, 64), (64, 128),
    }  # fmt: skip


def test_arms_that_share_a_choice_have_one(raw: dict[str, Any]) -> None:
    grid = {"values": {"learning_rate": [1e-3, 1e-2]}, "select": "shared"}
    study = {**raw, "training": {"grid": grid, "checkpoints": "log"}}
    plan = plan_study(parse_study(study, "grid"))
    chosen = {stage.inputs["chosen"] for stage in plan if stage.work.endswith("train:work")}
    names = [stage.name for stage in plan]
    assert len(chosen) == 3, "known, unknown and full differ in their own settings, so each shares with none"
    same = {**study, "arms": {"base": {}, "a": {"train": "known"}, "b": {"train": "unknown"}}, "claims": []}
    plan = plan_study(parse_study(same, "grid"))
    (one,) = {stage.inputs["chosen"] for stage in plan if stage.work.endswith("train:work")}
    assert set(plan[one.partition(":")[0]].inputs) == {"0/a", "0/b", "1/a", "1/b"}
    assert names.count("arms/known/grid/0") == 1
    with pytest.raises(BadInput, match="has no setting 'rate'"):
        parse_study({**raw, "training": {"grid": {"values": {"rate": [1]}}, "checkpoints": "log"}}, "grid")
