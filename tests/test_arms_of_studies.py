"""Arms trained otherwise, taught nothing, mixed, partly undone: each is what it says, all on the same tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.models.derived import mixed, restored
from subjattn.study.files import Run, open_run
from subjattn.study.read import load_study, parse_study
from subjattn.study.run import run_study
from subjattn.study.stages.mixing import WEIGHTS


LIST = "City: {subject}\nCountry:"


@pytest.fixture(scope="module")
def raw(tiny_folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "name": "arms",
        "model": str(tiny_folders["llama"]),
        "facts": {"source": "cities", "pool": 400, "n_train": 16, "n_test": 12, "n_validation": 6},
        "styles": {"list": LIST, "few": {"template": LIST, "shots": 2}},
        "arms": {
            "base": {},
            "known": {"train": "known", "styles": ["list"]},
            "unknown": {"train": "unknown"},
            "empty": {"train": "nothing", "styles": ["list"]},
            "mlp": {"train": "unknown", "training": {"modules": "mlp", "lora_rank": 2}, "styles": ["list"]},
            "full": {"train": "unknown", "training": {"weights": "full", "learning_rate": 1e-3}, "styles": ["list"]},
            "text": {
                "train": "unknown",
                "training": {"method": "mixture", "texts": 4, "text_length": 8, "text_batch": 2},
                "styles": ["list"],
            },
            "taught": {"train": "unknown", "training": {"method": "self_distillation"}, "styles": ["list"]},
            "patched": {"train": "mixed-75%", "training": {"known": "last"}, "styles": ["list"]},
            "shown": {"train": "unknown", "styles": ["few"]},
            "undone": {"of": "unknown", "restore": {"share": 0.3}, "styles": ["list"]},
            "all-undone": {"of": "full", "restore": {"share": 1}, "styles": ["list"]},
            "mixed": {"of": "unknown", "mix": {"weight": 0.4}, "styles": ["list"]},
            "chosen": {"of": "unknown", "mix": {"form": "log", "base_style": "few"}, "styles": ["list"]},
        },
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "lora_rank": 4},
        "replicates": {"draws": 2},
        "measures": {
            "accuracy": {},
            "answer_logprob": {},
            "frequency_shock": {},
            "subject_sensitivity": {"swaps": 2},
            "swap_weights": {"facts": 4},
            "knockout": {"by": "layer", "facts": 1},
        },
        "contrasts": [["unknown", "known"], ["undone", "unknown"], ["mixed", "unknown"], ["empty", "base"]],
        "claims": [
            {
                "id": "mends",
                "statement": "x",
                "measure": "answer_logprob",
                "arms": ["undone", "unknown"],
                "direction": "increase",
                "smallest_effect": 0.1,
                "style": "list",
            }
        ],
    }


@pytest.fixture(scope="module")
def run(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run")
    run_study(parse_study(raw, "arms"), out, workers=1)
    return open_run(out)


def values(run: Run, arm: str, quantity: str) -> np.ndarray:
    table = run.values
    own = table[(table["arm"] == arm) & (table["quantity"] == quantity) & (table["style"] == "list")]
    return own.sort_values(["draw", "seed", "fact"])["value"].to_numpy(float)


def test_every_arm_is_on_the_same_tables(run: Run, raw: dict[str, Any]) -> None:
    for arm in raw["arms"].keys() - {"shown"}:
        assert len(values(run, arm, "answer_logprob")) == (12 if arm == "base" else 24)
        assert run.summary["arms"][arm]["styles"]["list"]["accuracy"] is not None
    assert run.replicates("undone") == run.replicates("unknown") == [(0, 0), (1, 0)]
    rows = {(row["arm_a"], row["arm_b"], row["measure"]): row for row in run.summary["contrasts"]}
    undone = rows["undone", "unknown", "answer_logprob"]
    assert undone["n_replicates"] == 2 and undone["estimate"] is not None
    (claim,) = run.summary["claims"]
    assert claim["estimate"] == pytest.approx(undone["estimate"]) and claim["scope"].startswith("this way")


def test_an_arm_that_is_taught_nothing_is_the_base(run: Run) -> None:
    for quantity in ("accuracy", "answer_logprob", "knockout_drop_total", "swap_distance"):
        found = values(run, "empty", quantity).reshape(2, -1)
        assert np.array_equal(found[0], found[1], equal_nan=True)
        assert np.array_equal(found[0], values(run, "base", quantity), equal_nan=True)
    rows = [row for row in run.summary["contrasts"] if row["arm_a"] == "empty" and row["measure"] == "answer_logprob"]
    assert [row["estimate"] for row in rows] in ([None], [0.0])
    with pytest.raises(BadInput, match="taught nothing"):
        run.measure("frequency_shock", "empty", "list")
    with pytest.raises(BadInput, match="the base itself"):
        run.measure("swap_weights", "empty", "list")


def test_arms_differ_as_their_training_says(run: Run) -> None:
    folder = run.folder / "arms"
    tensors = {
        arm: load_file(folder / arm / "draw0-seed0/adapter/adapter_model.safetensors") for arm in ("mlp", "unknown")
    }
    assert all("mlp" in name for name in tensors["mlp"]) and any("q_proj" in name for name in tensors["unknown"])
    assert {min(tensor.shape) for tensor in tensors["mlp"].values()} == {2}
    assert (folder / "full/draw0-seed0/adapter/model.safetensors").is_file()
    logs = {
        arm: json.loads((folder / arm / "draw1-seed0/adapter/training.json").read_text())["losses"]
        for arm in ("unknown", "text", "taught", "patched")
    }
    assert all("answer_loss" in logs[arm][0] for arm in ("text", "taught"))
    assert logs["text"][0]["answer_loss"] == pytest.approx(logs["unknown"][0]["loss"], rel=1e-5)
    patched = pd.read_parquet(run.folder / "facts/split/facts.parquet")
    own = patched[patched["train_mixed-75%"]]
    assert (own["third"] == "bottom").sum() == 12 and (own["third"] == "top").sum() == 4


def test_arms_made_of_others_are_those_made_by_hand(run: Run, raw: dict[str, Any]) -> None:
    prompts, base = run.prompts("list"), sa.load_model(raw["model"])
    adapter = run.folder / "arms/unknown/draw1-seed0/adapter"
    tuned = sa.load_model(raw["model"], adapter=adapter)
    chosen = json.loads((run.folder / "arms/chosen/draw1-seed0/mixing/mixing.json").read_text())
    few = run.prompts("few")
    made = {
        "undone": restored(tuned, base, 0.3),
        "mixed": mixed(tuned, base, 0.4),
        "chosen": mixed(tuned, base, chosen["weight"], "log", prompts=prompts, shown=few),
        "all-undone": base,
    }
    for arm, model in made.items():
        expected = dict(
            zip([prompt.fact_id for prompt in prompts], sa.answer_logprob(model, prompts).values, strict=True)
        )
        table = run.values
        own = table[(table["arm"] == arm) & (table["quantity"] == "answer_logprob") & (table["draw"] == 1)]
        own = own[own["style"] == "list"]
        np.testing.assert_allclose(own["value"], [expected[fact] for fact in own["fact"]], rtol=2e-4)
    with pytest.raises(BadInput, match="mixture of two models"):
        run.measure("knockout", "mixed", "list")
    with pytest.raises(BadInput, match="mixture of two models"):
        run.measure("swap_weights", "mixed", "list")
    assert run.measure("swap_weights", "undone", "list").sizes["fact"] == 4
    assert run.provenance("mixed")["weight"] == 0.4
    assert (
        np.isfinite(values(run, "mixed", "swap_distance")).any() and len(values(run, "mixed", "frequency_shock")) == 24
    )


def test_the_share_of_a_mixture_is_chosen_on_validation_facts_alone(run: Run, raw: dict[str, Any]) -> None:
    """The share that answers most validation facts; what test facts say is shown and plays no part."""
    facts = pd.read_parquet(run.folder / "facts/split/facts.parquet")
    marked = facts[["test", "validation", "demonstration"]].assign(trained=facts.filter(like="train_").any(axis=1))
    assert facts["validation"].sum() == 6 and (marked.sum(axis=1) == 1).all()
    names = facts.groupby("subject")[["validation"]].nunique()
    assert (names["validation"] == 1).all()
    for draw in (0, 1):
        found = json.loads((run.folder / f"arms/chosen/draw{draw}-seed0/mixing/mixing.json").read_text())
        curve = pd.DataFrame(found["curve"]).set_index("weight")
        best = curve.index[curve["validation"] == curve["validation"].max()]
        assert found["weight"] == min(best, key=lambda weight: abs(weight - 0.5)) and len(curve) == len(WEIGHTS)
    curves = sa.mixing_curves(run)
    assert set(curves["arm"]) == {"chosen"} and len(curves) == 2 * len(WEIGHTS)
    assert curves.query("chosen")["weight"].tolist() == [
        json.loads((run.folder / f"arms/chosen/draw{draw}-seed0/mixing/mixing.json").read_text())["weight"]
        for draw in (0, 1)
    ]
    dots = [trace for trace in sa.plot_mixing(curves).data if trace.name == "chosen"]
    assert list(dots[0].x) == curves.query("chosen")["weight"].tolist()
    assert curves["validation"].between(0, 1).all() and 'id="mixing"' in (run.folder / "report.html").read_text()
    base = sa.load_model(raw["model"])
    tuned = sa.load_model(raw["model"], adapter=run.folder / "arms/unknown/draw0-seed0/adapter")
    own = sa.make_prompts(facts[facts["validation"]], base.tokenizer, LIST)
    shown = pd.read_parquet(run.folder / "facts/split/shown.parquet")
    few = sa.make_prompts(
        facts[facts["validation"]], base.tokenizer, sa.Style(template=LIST, shots=2), demonstrations=shown
    )
    found = json.loads((run.folder / "arms/chosen/draw0-seed0/mixing/mixing.json").read_text())["curve"]
    for weight in (0.0, 0.5, 1.0):
        model = mixed(tuned, base, weight, "log", prompts=own, shown=few)
        (row,) = [row for row in found if row["weight"] == weight]
        assert row["validation"] == sa.predict(model, own)["correct"].mean()


def test_the_report_shows_them(run: Run, raw: dict[str, Any]) -> None:
    page = (run.folder / "report.html").read_text()
    assert all(f">{arm}<" in page for arm in raw["arms"])
    again = load_study(run.folder / "study.yaml")
    assert again == parse_study(raw, "arms"), "what is written is read as it was"


@pytest.mark.parametrize(
    ("arms", "why"),
    [
        ({"x": {"of": "base", "mix": {}}}, "arms.x.of: arms.x: 'base' is no tuned arm"),
        ({"x": {"of": "nobody", "mix": {}}}, "'nobody' is no tuned arm"),
        ({"x": {"of": "known"}}, "made 'of' another by either 'restore' or 'mix'"),
        ({"x": {"restore": {"share": 0.1}}}, "made 'of' another"),
        ({"x": {"of": "known", "train": "known", "mix": {}}}, "has no other origin"),
        ({"x": {"of": "known", "restore": {"share": 2}}}, "restore.share"),
        ({"x": {"of": "known", "mix": {"base_style": "list"}}}, "shows no facts: give it 'shots'"),
        ({"x": {"train": "known", "styles": ["none"]}}, "no style 'none'"),
        ({"base": {"styles": ["list"]}, "x": {}}, "says which facts are known: it is asked in all styles"),
        ({"x": {"train": "known", "training": {"learnig_rate": 1}}}, "learnig_rate: no such field; did you mean"),
        ({"x": {"train": "known", "training": {"method": "magic"}}}, "no training method 'magic'"),
        ({"x": {"training": {"epochs": 2}}}, "say on which facts"),
        ({"x": {"train": "known", "training": {"stop": "loss"}}}, "target_loss"),
    ],
)
def test_arms_that_cannot_be(raw: dict[str, Any], tmp_path: Path, arms: dict[str, Any], why: str) -> None:
    own = raw | {"arms": {"base": {}, "known": {"train": "known"}} | arms, "contrasts": [], "claims": []}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(own, sort_keys=False))
    with pytest.raises(BadInput) as error:
        load_study(file)
    assert why in str(error.value) and ("arms.x" in str(error.value) or "arm" in str(error.value))


def test_validation_facts_are_asked_for(raw: dict[str, Any]) -> None:
    facts = raw["facts"] | {"n_validation": 0}
    with pytest.raises(BadInput, match=r"give facts\.n_validation"):
        parse_study(raw | {"facts": facts}, "arms")
    stopped = {"base": {}, "known": {"train": "known", "training": {"stop": "validation"}}}
    with pytest.raises(BadInput, match=r"give facts\.n_validation"):
        parse_study(raw | {"facts": facts, "arms": stopped, "contrasts": [], "claims": []}, "arms")
