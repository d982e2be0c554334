"""Claims of a study with replicates: what each is about, recomputed from the saved arrays; registration, power."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import changed
from typer.testing import CliRunner

import subjattn as sa
from subjattn.cli import app
from subjattn.errors import BadInput
from subjattn.evidence.ratios import mean_of
from subjattn.report import page
from subjattn.run.folder import Folder
from subjattn.study.checking import check_study
from subjattn.study.config import StudyConfig
from subjattn.study.files import REGISTERED, Run
from subjattn.study.plan import plan_study
from subjattn.study.registration import registered_in, registration_of
from subjattn.study.run import run_study
from subjattn.study.terms import Terms
from subjattn.study.values import Values, share


ATTENTION, DRAWS = "attention_to_subject", 4


def claim(name: str, measure: str, arms: list[str], **fields: Any) -> dict[str, Any]:
    about = {"id": name, "statement": name, "measure": measure, "arms": arms}
    return about | {"direction": "increase", "smallest_effect": 0.01} | fields


CLAIMS = [
    claim("plain", ATTENTION, ["unknown", "known"], primary=True),
    claim("models", ATTENTION, ["unknown", "known"], scope="models"),
    claim("before", ATTENTION, ["unknown", "base"], minus={"arms": ["known", "base"]}, style="list"),
    claim("styles", ATTENTION, ["unknown"], minus={"style": "sentence"}, style="list"),
    claim("routes", "knockout_drop_total", ["unknown", "known"], minus={"measure": "knockout_drop"}),
    claim("cells", ATTENTION, ["unknown", "known"], where={"layer": "1-1", "head": [0, 2]}, style="list"),
    claim("chosen", ATTENTION, ["unknown", "known"], select={"top": 3, "over": ["layer", "head"]}, style="list"),
    claim("on draws", ATTENTION, ["unknown", "known"], select={"top": 3, "over": ["layer", "head"], "on": 1}),
    claim("three arms", "accuracy", ["unknown", "known"], minus={"arms": ["base"]}, style="list"),
    claim("share", "direct_share", ["base"], against=0.5, style="sentence"),
    claim("one layer", "knockout_drop_in_parts", ["unknown"], where={"layer": 0, "route": "total"}, style="list"),
    claim("two routes", "knockout_drop_in_parts", ["unknown"], where={"route": ["direct", "total"]}, style="list"),
    claim("nowhere", "accuracy.part", ["unknown", "known"], style="list"),
]


@pytest.fixture(scope="module")
def study(small: StudyConfig) -> StudyConfig:
    return changed(
        small,
        arms={"base": {}, "known": {"train": "known"}, "unknown": {"train": "unknown"}},
        replicates={"draws": DRAWS, "first_only": ["token_attention", "patching"]},
        claims=CLAIMS,
        contrasts=[["unknown", "known"]],
    )


@pytest.fixture(scope="module")
def run(study: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("claims") / "run"
    run_study(study, out)
    return sa.open_run(out)


def found(run: Run, name: str, style: str = "list") -> dict[str, Any]:
    return next(row for row in run.summary["claims"] if row["id"] == name)["styles"][style]  # type: ignore[no-any-return]


def attention(run: Run, arm: str, style: str = "list") -> xr.DataArray:
    """`(draw, fact, layer, head)`, replicate by replicate from the files; without draws for base."""
    arrays = [run.measure(ATTENTION, arm, style, one)[ATTENTION] for one in run.replicates(arm)]
    return arrays[0] if arm == "base" else xr.concat(arrays, "draw")


def drop(run: Run, arm: str, style: str, route: str) -> float:
    arrays = [run.measure("knockout", arm, style, one)["knockout_drop"] for one in run.replicates(arm)]
    return float(np.mean([array.sel(route=route).mean() for array in arrays]))


EXPECTED: dict[str, Callable[[Run], Any]] = {
    "plain": lambda run: (attention(run, "unknown") - attention(run, "known")).mean(),
    "models": lambda run: (attention(run, "unknown") - attention(run, "known")).mean(),
    "before": lambda run: (attention(run, "unknown") - attention(run, "known")).mean(),
    "styles": lambda run: attention(run, "unknown").mean() - attention(run, "unknown", "sentence").mean(),
    "routes": lambda run: (
        (drop(run, "unknown", "list", "total") - drop(run, "known", "list", "total"))
        - (drop(run, "unknown", "list", "direct") - drop(run, "known", "list", "direct"))
    ),
    "cells": lambda run: (attention(run, "unknown") - attention(run, "known"))[..., 1, [0, 2]].mean(),
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_estimates_are_those_of_the_arrays(run: Run, name: str) -> None:
    assert found(run, name)["estimate"] == pytest.approx(float(EXPECTED[name](run)), abs=1e-6)


def test_cells_are_chosen_where_the_base_is_largest_and_are_the_same_in_both_arms(run: Run) -> None:
    base = attention(run, "base").mean("fact").values
    largest = [np.unravel_index(i, base.shape) for i in np.argsort(-base.ravel())[:3]]
    difference = (attention(run, "unknown") - attention(run, "known")).mean(["fact", "draw"]).values
    assert found(run, "chosen")["estimate"] == pytest.approx(np.mean([difference[cell] for cell in largest]), abs=1e-6)


def test_draws_that_choose_cells_are_left_out_of_the_test(run: Run) -> None:
    unknown, known = (attention(run, arm).mean("fact").values for arm in ("unknown", "known"))
    by = (unknown[0] + known[0]) / 2
    cells = [np.unravel_index(i, by.shape) for i in np.argsort(-by.ravel())[:3]]
    expected = np.mean([[unknown[draw][cell] - known[draw][cell] for cell in cells] for draw in range(1, DRAWS)])
    row = found(run, "on draws")
    assert row["estimate"] == pytest.approx(expected, abs=1e-6) and row["n_replicates"] == DRAWS - 1
    assert list(row["replicates"]) == [f"draw{draw}-seed0" for draw in range(1, DRAWS)]


def test_shares_and_parts(run: Run) -> None:
    knockout = run.measure("knockout", "base", "sentence")["knockout_drop"]
    share = float(knockout.sel(route="direct").mean() / knockout.sel(route="total").mean())
    row = found(run, "share", "sentence")
    if row["estimate"] is None:
        assert "may be nothing" in row["reason"]
    else:
        assert row["estimate"] == pytest.approx(share, rel=1e-5) and row["scope"] == "this model"
    parts = [
        run.measure("knockout", "unknown", "list", one)["knockout_drop_by_layer"] for one in run.replicates("unknown")
    ]
    expected = np.mean([float(part.sel(route="total").isel(layer=0).mean()) for part in parts])
    few = found(run, "one layer")
    assert few["estimate"] == pytest.approx(expected, rel=1e-5)
    assert few["verdict"] == "undecided" and "facts: under 20" in few["reason"]


def test_scopes_and_families(run: Run) -> None:
    plain, models, nowhere = found(run, "plain"), found(run, "models"), found(run, "nowhere")
    assert (plain["scope"], plain["n_replicates"], plain["replicates_are"]) == ("this way of training", DRAWS, "draws")
    assert models["scope"] == "these models", "eight of them"
    assert plain["ci_high"] - plain["ci_low"] >= models["ci_high"] - models["ci_low"] - 1e-12
    assert nowhere["verdict"] == "not defined" and nowhere["reason"] == "no fact has a value"
    assert "is of one route, not of 2: name one" in found(run, "two routes")["reason"]
    judged = [of for row in run.summary["claims"] for of in row["styles"].values() if of["estimate"] is not None]
    stated = sum(len(row["styles"]) for row in run.summary["claims"])
    assert stated > len(judged), "claims without a value count in the family"
    assert plain["family"] == 1 and models["family"] == stated - 1
    assert (plain["adjusted_ci_low"], plain["adjusted_ci_high"]) == (plain["ci_low"], plain["ci_high"])
    assert found(run, "plain", "sentence")["family"] == stated - 1, "a claim is primary in its first style"
    keys = {"scope", "n_facts", "n_replicates", "df", "ci_low", "ci_high", "adjusted_ci_low", "adjusted_ci_high"}
    for row in [*run.summary["contrasts"], *judged]:
        assert keys | {"variance_shares"} <= set(row)
    for of in judged:
        assert (of["verdict"] == "undecided") == ("needed" in of)


def test_each_replicate_of_a_share_is_its_own_share(run: Run) -> None:
    row = next(r for r in run.summary["contrasts"] if (r["measure"], r["style"]) == ("direct_share", "list"))
    arms = run.summary["arms"]["unknown"]["styles"]["list"]
    if row["estimate"] is None:
        assert "may be nothing" in row["reason"] or "is negative" in row["reason"]
        assert arms["direct_share"] is None or "direct_share" in arms["replicates"]["draw0-seed0"]
    for name, own in arms["replicates"].items():
        if "direct_share" in own:
            draw = int(name[4])
            drop = run.measure("knockout", "unknown", "list", (draw, 0))["knockout_drop"]
            expected = float(drop.sel(route="direct").mean() / drop.sel(route="total").mean())
            assert own["direct_share"] == pytest.approx(expected, rel=1e-5)


def test_a_share_of_something_negative_is_not_defined() -> None:
    facts = {"fact": [f"f{i}" for i in range(40)]}
    numbers = xr.DataArray(np.random.default_rng(0).normal(-3, 0.1, 40), facts, ("fact",))
    with pytest.raises(BadInput, match="what it is a share of is negative"):
        share(0.5 * numbers, numbers, None)


def test_measures_of_the_first_replicate_alone(run: Run) -> None:
    made = {stage.name for stage in run.plan if stage.name.endswith("/token_attention")}
    assert {name.split("/measures")[0] for name in made} == {
        "arms/base", "arms/known/draw0-seed0", "arms/unknown/draw0-seed0",
    }  # fmt: skip
    assert run.array("token_attention", "token_attention", "list").sizes["arm"] == 3
    row = next(row for row in run.summary["contrasts"] if row["measure"] == "subject_recovery")
    assert row["estimate"] is None or row["n_replicates"] == 1


def test_the_report_shows_every_replicate_and_what_it_speaks_of(run: Run) -> None:
    text = (run.folder / "report.html").read_text()
    assert "this way of training" in text and "cells stand" in text and 'class="tag">primary' in text
    assert "post hoc</span>" not in text and "before anything was measured" in text
    plain = found(run, "plain")
    assert len(plain["replicates"]) == DRAWS
    for value in next(row for row in run.summary["contrasts"] if row["measure"] == ATTENTION)["replicates"].values():
        assert f"{value:+.4f}" in text


# --- what was stated before anything was measured ---------------------------------------------------------------------


def test_claims_changed_after_measuring_are_post_hoc(study: StudyConfig, run: Run) -> None:
    """Planted: a threshold moved, a claim added, a contrast added; the rest stays as it was."""
    before = (run.folder / REGISTERED).read_bytes()
    moved = [CLAIMS[0] | {"smallest_effect": 0.001}, *CLAIMS[1:3], claim("late", ATTENTION, ["unknown", "base"])]
    later = changed(study, claims=moved, contrasts=[["unknown", "known"], ["known", "base"]])
    summary = run_study(later, run.folder)
    status = {row["id"]: row["registered"] for row in summary["claims"]}
    assert status == {"plain": "post hoc", "models": True, "before": True, "late": "post hoc"}
    assert summary["dropped"] == [one["id"] for one in CLAIMS[3:]]
    judged = sum(of["estimate"] is not None for row in summary["claims"] for of in row["styles"].values())
    styles = sum(1 if one.get("style") else 2 for one in CLAIMS[3:])
    assert summary["claims"][1]["family"] == judged - 1 + styles, "a claim that was dropped still counts"
    assert {(row["arm_a"], row["registered"]) for row in summary["contrasts"]} == {
        ("unknown", True),
        ("known", "post hoc"),
    }
    assert (run.folder / REGISTERED).read_bytes() == before
    assert (run.folder / "report.html").read_text().count("post hoc</span>") >= 3
    shown = CliRunner().invoke(app, ["plan", str(run.folder / "study.yaml"), "--out", str(run.folder)]).output
    assert registration_of(later).digest[:12] in shown and "not as written down on" in " ".join(shown.split())
    assert run_study(study, run.folder)["claims"][0]["registered"] is True


def test_what_a_claim_rests_on_is_part_of_it(study: StudyConfig) -> None:
    """Planted: other facts, another seed, other settings of its measure; what it does not rest on may change."""
    before, plain = registration_of(study, "now"), study.claims[0]
    raw = study.model_dump(mode="json")
    facts = raw["facts"] | {"n_test": 30}
    settings = raw["measures"] | {ATTENTION: {"reduce": "max"}}
    for changes in (
        {"facts": facts},
        {"seed": 5},
        {"measures": settings},
        {"styles": dict(reversed(raw["styles"].items()))},
    ):
        assert before.claim(plain, changed(study, **changes)) == "post hoc", changes
    knockout = raw["measures"] | {"knockout": {"by": None}}
    for harmless in ({"threads": 2}, {"measures": knockout}, {"arms": raw["arms"] | {"more": {"train": "whole"}}}):
        assert before.claim(plain, changed(study, **harmless)) is True


def test_a_contrast_rests_on_its_styles_and_settings(study: StudyConfig) -> None:
    """Planted: another template, other settings, a measure and a style added; the rows of the others stand."""
    before, raw = registration_of(study, "now"), study.model_dump(mode="json")
    row = {"arm_a": "unknown", "arm_b": "known", "style": "list", "measure": ATTENTION}
    templates = raw["styles"] | {"list": "Town: {subject}\nCountry:"}
    settings = raw["measures"] | {ATTENTION: {"reduce": "max"}}
    for changes in ({"styles": templates}, {"measures": settings}, {"seed": 5}):
        assert before.contrast(row, changed(study, **changes)) == "post hoc", changes
    more = raw["measures"] | {"logit_lens": {}, "knockout": {"by": None}}
    added = changed(study, styles=raw["styles"] | {"late": "late"}, measures=more)
    assert before.contrast(row, added) is True
    assert before.contrast(row | {"style": "late"}, added) == "post hoc"
    assert before.contrast(row | {"measure": "lens_logprob"}, added) == "post hoc"
    assert before.contrast(row | {"measure": "knockout_drop"}, added) == "post hoc"
    old = replace(before, contrasts=tuple(of[:3] for of in before.contrasts))
    assert old.contrast(row, added) is True, "registrations before 0.11 know nothing of styles and settings"


def test_a_claim_rests_on_the_arm_that_an_arm_is_made_of(study: StudyConfig) -> None:
    raw = study.model_dump(mode="json")
    arms = raw["arms"] | {"mended": {"of": "unknown", "restore": {"share": 0.5}}}
    own = changed(study, arms=arms, claims=[claim("made", ATTENTION, ["mended", "base"])])
    before = registration_of(own, "now")
    trained = arms | {"unknown": {"train": "unknown", "training": {"learning_rate": 0.5}}}
    for changes in ({"arms": trained}, {"arms": arms | {"unknown": {"train": "bottom"}}}):
        assert before.claim(own.claims[0], changed(own, **changes)) == "post hoc", changes
    assert before.claim(own.claims[0], changed(own, arms=arms | {"known": {"train": "top"}})) is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"where": {"zz": 1}}, "attention_to_subject has no cells by 'zz'; it has layer, head"),
        ({"where": {"layer": []}}, "where.layer names no cell"),
        ({"arms": ["known", "known"]}, "arm 'known' minus itself is always 0"),
        ({"minus": {"arms": ["unknown", "known"]}}, "what 'minus' names is the claim's own"),
        ({"id": "two\nlines"}, "'two\\nlines' is not one line of visible text"),
        ({"id": " "}, "' ' is not one line of visible text"),
        ({"measure": "accuracy", "smallest_effect": 5}, "no effect on accuracy can be 5"),
    ],
)
def test_claims_that_cannot_be_are_refused(study: StudyConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        changed(study, claims=[claim("one", ATTENTION, ["unknown", "known"]) | fields])


@pytest.mark.parametrize("where", [{"layer": "5-99"}, {"layer": 77}, {"head": [0, 4]}, {"layer": "2-1"}, {"layer": -1}])
def test_cells_that_the_model_has_not_are_refused_before_anything_runs(study: StudyConfig, where: Any) -> None:
    made = changed(study, claims=[claim("one", ATTENTION, ["unknown", "known"], where=where)])
    dim = next(iter(where))
    for look in (plan_study, check_study):
        with pytest.raises(BadInput, match=rf"claim 'one': no {dim} .*: the model has {dim}s 0 to"):
            look(made)


def test_cells_by_where_are_averaged_as_by_select(run: Run, study: StudyConfig) -> None:
    """Attention summed by layers, a maximum over layers: both are the mean of their cells."""
    terms = Terms(study, Folder(run.folder), Values(run.values), run.facts[run.facts["test"]])
    cells = [{"layer": 0}, {"layer": 1}]
    for name, measured in ((ATTENTION, ATTENTION), ("knockout_drop_in_parts", "knockout")):
        by_where = terms.raw("base", "list", name, {"layer": "0-1"})[0]
        by_rule = terms.raw("base", "list", name, None, cells)[0]
        np.testing.assert_allclose(by_where, by_rule.sel(fact=by_where["fact"]))
        assert measured


def test_every_arm_leaves_out_the_references_sinks(run: Run) -> None:
    base = run.measure(ATTENTION, "base", "list")["sink"].values
    for arm in ("known", "unknown"):
        for one in run.replicates(arm):
            np.testing.assert_array_equal(run.measure(ATTENTION, arm, "list", one)["sink"].values, base)
    stages = {stage.name: stage.inputs for stage in run.plan}
    made = {name: inputs for name, inputs in stages.items() if name.endswith(f"/list/{ATTENTION}")}
    assert {name.split("/")[1] for name, inputs in made.items() if "reference" in inputs} == {"known", "unknown"}


def test_every_quantity_is_described(run: Run) -> None:
    described = run.summary["quantities"]
    assert {"knockout_calibrated", "knockout_calibrated_total", "knockout_rank_rise"} <= set(described)
    assert [name for name, about in described.items() if not about["definition"].strip()] == []


def test_a_share_of_nothing_or_all_has_an_interval() -> None:
    """Bounded, as no answer of sixty lost is no proof that none would be."""
    facts = {"fact": [f"f{i}" for i in range(60)]}
    right = xr.DataArray(np.repeat([1.0, 0.0], [40, 20]), facts, ("fact",))
    for lost, wanted in ((right * 0, 0.0), (right, 1.0)):
        found = mean_of(lost, right, bounds=(0, 1))
        assert found.estimate == pytest.approx(wanted)
        low, high = found.ends()
        assert low in (0, 1) or high in (0, 1)
        assert 0 <= low < high <= 1 and 0.02 < high - low < 0.3


def test_claims_may_change_while_nothing_is_measured(study: StudyConfig, tmp_path: Path) -> None:
    from subjattn.run.folder import Folder
    from subjattn.study.registration import register

    first = register(study, Folder(tmp_path))
    again = register(study, Folder(tmp_path))
    assert again == first, "a run that was stopped keeps its time"
    other = register(changed(study, claims=CLAIMS[:1]), Folder(tmp_path))
    assert other.digest != first.digest and list(other.claims) == ["plain"]
    (tmp_path / REGISTERED).write_text((tmp_path / REGISTERED).read_text().replace("0.01", "0.001"))
    with pytest.raises(BadInput, match=r"registered\.json' is damaged or was changed"):
        registered_in(tmp_path)


def test_without_a_registration_all_is_post_hoc(study: StudyConfig, run: Run) -> None:
    kept = (run.folder / REGISTERED).read_bytes()
    (run.folder / REGISTERED).unlink()
    try:
        summary = run_study(study, run.folder)
        assert {row["registered"] for row in [*summary["claims"], *summary["contrasts"]]} == {"post hoc"}
        assert not (run.folder / REGISTERED).exists()
    finally:
        (run.folder / REGISTERED).write_bytes(kept)
        run_study(study, run.folder)


# --- what a study can decide ------------------------------------------------------------------------------------------


def test_power_of_a_run_and_a_plan_by_its_variances(run: Run, study: StudyConfig, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["power", str(run.folder), "--json"])
    rows = json.loads(shown.output)
    plain = next(row for row in rows if (row["claim"], row["style"]) == ("plain", "list"))
    assert (
        list(plain["curve"]) == ["3", "4", "5", "8", "12"] and plain["curve"]["12"]["960"] >= plain["curve"]["3"]["60"]
    )
    assert "studies that decide" in CliRunner().invoke(app, ["power", str(run.folder)]).output
    arguments = ["plan", str(run.folder / "study.yaml"), "--out", str(tmp_path / "new"), "--pilot", str(run.folder)]
    foreseen = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["claims"]
    first = next(row for row in foreseen if (row["claim"], row["style"]) == ("plain", "list"))
    assert set(first) == {"claim", "style", "as in the pilot", "none", "twice the smallest"}
    models = next(row for row in foreseen if (row["claim"], row["style"]) == ("models", "list"))
    assert "why" not in models, "the models there are need no replicates"
    assert 0 <= first["none"]["decided"] <= 1
    missing = next(row for row in foreseen if row["claim"] == "nowhere")
    assert missing["why"] == "the pilot has no such claim"
    assert "twice the smallest" in CliRunner().invoke(app, arguments).output


def test_a_report_is_written_of_a_study_whose_claims_are_not_defined(run: Run) -> None:
    assert page.write(run.folder).is_file()
