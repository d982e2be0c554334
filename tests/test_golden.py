"""Against 0.3: the numbers of a small study whose splits and adapters are frozen, and what becomes of its folder.

`data/golden` holds the study, `data/run-0.3` the run that 0.3 made of it, `data/run-0.5` one of this schema.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.study.read import load_study
from subjattn.study.run import run_study


DATA = Path(__file__).parent / "data"
CHANGED = {"ci_low", "ci_high", "n", "caveat", "verdict", "route", "pooled", "reason"}
"""Fields of 0.3 that mean another thing since 0.5 has other intervals."""

FORMS = ("max", "last", "value_weighted", "without_sinks", "over_its_place")
BESIDE_NATS = ("control", "over_control", "calibrated", "calibrated_total", "lost", "rank_rise")
SINCE_0_8 = {*(f"attention_{name}" for name in FORMS), *(f"knockout_{name}" for name in BESIDE_NATS)}
"""Quantities that these two measures have given since."""


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    study = load_study(DATA / "golden" / "study.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DATA / "golden")
        return run_study(study, tmp_path_factory.mktemp("golden") / "run")


def old() -> dict[str, Any]:
    return json.loads((DATA / "run-0.3" / "summary.json").read_text())  # type: ignore[no-any-return]


def agree(found: Any, expected: Any, where: str) -> None:
    """Equal in all that 0.3 said and still holds; numbers to the rounding of float32."""
    if isinstance(expected, dict):
        for name in set(expected) - CHANGED - SINCE_0_8:
            agree(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        for number, (own, of) in enumerate(zip(found, expected, strict=True)):
            agree(own, of, f"{where}.{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6), where
    else:
        assert found == expected, where


def test_arms_are_as_0_3_had_them(summary: dict[str, Any]) -> None:
    for arm, expected in old()["arms"].items():
        agree(summary["arms"][arm], expected, arm)


def test_contrasts_are_as_0_3_had_them(summary: dict[str, Any]) -> None:
    """Their estimates; intervals are wider, since facts share answers."""
    named = ("measure", "arm_a", "arm_b", "style")
    found = {tuple(row[name] for name in named): row for row in summary["contrasts"]}
    wider = []
    for expected in old()["contrasts"]:
        own = found.pop(tuple(expected[name] for name in named))
        agree(own, expected, str(expected))
        assert own["scope"] == "these two models" and own["n_facts"] == expected["n"]
        wider.append((own["ci_high"] - own["ci_low"]) / (expected["ci_high"] - expected["ci_low"]))
    assert min(wider) > 0.9 and sum(wider) / len(wider) > 1.1
    assert {key[0] for key in found} <= {"direct_share", "knockout_drop_in_parts", "subject_recovery", *SINCE_0_8}


def test_claims_are_as_0_3_had_them(summary: dict[str, Any]) -> None:
    """But that intervals are wider, so a verdict may have become undecided, never another."""
    for found, expected in zip(summary["claims"], old()["claims"], strict=True):
        agree(found, expected, expected["id"])
        assert found["verdict"] in (expected["verdict"], "undecided")


def test_a_run_of_0_3_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(DATA / "run-0.3", tmp_path / "run"))
    with pytest.raises(BadInput, match=r"run' was written by subjattn 0\.3 or older, which this version does not read"):
        sa.open_run(copy)
    monkeypatch.chdir(DATA / "golden")
    with pytest.raises(BadInput, match=r"was written by subjattn 0\.3 or older.*: run the study anew"):
        run_study(load_study("study.yaml"), copy)
    kept = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert kept == {
        path.relative_to(DATA / "run-0.3"): path.read_bytes()
        for path in (DATA / "run-0.3").rglob("*")
        if path.is_file()
    }, "nothing of it is touched"


def test_a_run_of_0_4_is_refused_in_one_line(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DATA / "run-0.5", tmp_path / "run"))
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps(plan | {"schema": 3}))
    with pytest.raises(
        BadInput, match=r"was written by subjattn 0\.4, which this version does not read: run the study anew"
    ):
        sa.open_run(copy)


def test_a_run_of_this_schema_is_read(summary: dict[str, Any]) -> None:
    """Kept as it was written: what it says, and that its stages count as finished, must not change by accident."""
    run = sa.open_run(DATA / "run-0.5")
    assert run.arms == ["base", "a", "b"] and run.styles == ["list", "sentence"]
    agree(run.summary["arms"]["a"]["styles"]["list"], summary["arms"]["a"]["styles"]["list"], "a")
    assert run.array("attention_to_subject", "attention_to_subject", "list").dims == ("arm", "fact", "layer", "head")
    assert len(run.predictions()) == 24 * 3 * 2 and len(run.prompts("list")) == 24
    assert set(run.values["quantity"]) >= {"accuracy", "knockout_drop"}


def test_a_run_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DATA / "run-0.5", tmp_path / "run"))
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps(plan | {"schema": plan["schema"] + 1}))
    with pytest.raises(BadInput, match="was written by a newer subjattn"):
        sa.open_run(copy)


def test_a_damaged_file_is_named_and_told_from_one_of_another_form(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DATA / "run-0.5", tmp_path / "run"))
    array = copy / "arms" / "a" / "measures" / "list" / "knockout" / "array.nc"
    array.write_bytes(array.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"knockout/array\.nc' is damaged \(not what was written\)"):
        sa.open_run(copy).measure("knockout", "a", "list")
    values = copy / "values.parquet"
    values.write_text("fact_id\n")
    with pytest.raises(BadInput, match=r"values\.parquet' cannot be read as parquet: "):
        _ = sa.open_run(copy).values
    array.unlink()
    with pytest.raises(BadInput, match=r"array\.nc' is missing: run the study again"):
        sa.open_run(copy).measure("knockout", "a", "list")
