"""`compare`: verdicts on what changed, facts that turned, and what it refuses before it measures."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from rich.console import Console

import subjattn as sa
from subjattn import change_tables, tables
from subjattn.cli import main
from subjattn.errors import BadInput
from subjattn.evidence.changes import difference, judge_changes
from subjattn.knowledge.labels import LABELS
from subjattn.models import identity
from subjattn.prompts import Style, notice_first
from subjattn.study.config import StudyConfig
from subjattn.study.read import parse_study
from subjattn.study.run import run_study
from subjattn.study.stages.pool import load_pool, without_subjects


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["subjattn", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def model(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["llama"]


@pytest.fixture(scope="module")
def facts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cities of which the tiny model is right about every other one: the answer is what it says."""
    loaded = sa.load_model(str(model))
    cities = sa.load_facts("cities", n=40)
    said = sa.predict(loaded, sa.make_prompts(cities, loaded.tokenizer, "City: {subject}\nCountry:"))["prediction"]
    whole = [re.split(r"[\ufffd\x00-\x1f\x7f-\x9f]", text) for text in said]  # no table holds half a character
    begun = [next((part for part in parts if any(map(str.isalnum, part))), "Atlantis") for parts in whole]
    answers = [text if i % 2 else "Atlantis" for i, text in enumerate(begun)]
    path = tmp_path_factory.mktemp("facts") / "mine.jsonl"
    rows = [{"subject": subject, "answer": answer} for subject, answer in zip(cities["subject"], answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["answer"]))
    return path


@pytest.fixture(scope="module")
def study(model: Path, adapter: Path, facts: Path) -> dict[str, Any]:
    return {
        "name": "pair",
        "model": str(model),
        "facts": {"source": str(facts), "n_test": 30},
        "styles": {"list": "City: {subject}\nCountry:"},
        "measures": {"accuracy": {}, "answer_logprob": {}, "knockout": {}, "patching": {}},
        "arms": {"base": {}, "tuned": {"adapter": str(adapter)}},
        "contrasts": [["tuned", "base"]],
    }


def around(mean: float, spread: float = 0.1, n: int = 60) -> sa.interval:
    values = np.random.default_rng(0).normal(0, spread, n)
    return sa.interval(xr.DataArray(values - values.mean() + mean, dims="fact"))


@pytest.mark.parametrize(
    ("mean", "spread", "verdict", "reason"),
    [
        (0.5, 0.1, "rises", "an effect of at least 0.2 upward"),
        (-0.5, 0.1, "falls", "an effect of at least 0.2 downward"),
        (0.05, 0.1, "no change that matters", "the whole interval lies within ±0.2"),
        (0.2, 0.1, "undecided", "the interval reaches across +0.2"),
        (0.21, 0.01, "rises", "an effect of at least 0.2 upward"),
        (0.0, 3.0, "undecided", "the interval reaches across -0.2 and +0.2"),
    ],
)
def test_a_change_is_judged_against_the_smallest_that_matters(
    mean: float, spread: float, verdict: str, reason: str
) -> None:
    (found,) = judge_changes([(around(mean, spread), 0.2)])
    assert (found.verdict, found.reason) == (verdict, reason) and found.smallest_effect == 0.2


def test_changes_judged_together_are_one_family() -> None:
    """A difference that stands alone does not among fifty that are nothing."""
    edge = next(one for one in (around(0.2 + 0.001 * i) for i in range(100)) if one.p_value(0.2) < 0.04)
    assert judge_changes([(edge, 0.2)])[0].verdict == "rises"
    among = judge_changes([(edge, 0.2), *[(around(0.0), 0.2)] * 49])
    assert among[0].verdict == "undecided" and among[0].judged_together == 50
    assert "among 50 differences" in among[0].reason
    assert {one.verdict for one in among[1:]} == {"no change that matters"}


def test_facts_that_turned_are_those_whose_predictions_did(study: dict[str, Any], tmp_path: Path) -> None:
    summary = run_study(StudyConfig.model_validate(study), tmp_path)
    predictions = sa.open_run(tmp_path).predictions().pivot(index="fact_id", columns="arm", values="correct")
    facts = sa.open_run(tmp_path).facts.set_index("fact_id")
    (found,) = summary["flips"]
    assert found["n_facts"] == 30
    for name, before in (("lost", True), ("won", False)):
        turned = predictions[(predictions["base"] == before) & (predictions["tuned"] != before)]
        assert {row["fact_id"] for row in found[name]} == set(turned.index)
        assert all(row["subject"] == facts["subject"][row["fact_id"]] for row in found[name])
    assert found["lost"] or found["won"], "the fixture's adapter turns some"


def test_only_facts_that_the_first_arm_knows(study: dict[str, Any], tmp_path: Path) -> None:
    """All measures but accuracy are of the facts that base answers rightly; their values are those of the whole."""
    whole = run_study(StudyConfig.model_validate(study), tmp_path / "all")
    some = run_study(
        StudyConfig.model_validate(study | {"facts": study["facts"] | {"where": "correct"}}), tmp_path / "known"
    )
    all_values, values = (sa.open_run(tmp_path / name).values for name in ("all", "known"))
    correct = all_values.query("arm == 'base' and quantity == 'accuracy' and value == 1")["fact"]
    assert 2 <= len(correct) < 30
    assert set(values.query("quantity == 'answer_logprob'")["fact"]) == set(correct)
    assert set(values.query("quantity == 'subject_recovery'")["fact"]) <= set(correct)
    keys = ["arm", "style", "fact", "quantity", "part"]
    # What pairs there are, temperatures and sinks depend on which other facts are asked.
    pooled = "subject_recovery|knockout_calibrated.*|attention_(without_sinks|over_its_place)"
    own = values[~values["quantity"].str.fullmatch(pooled)]
    both = own.merge(all_values, on=keys, suffixes=("", "_all"))
    assert len(both) == len(own) > 0
    np.testing.assert_allclose(both["value"], both["value_all"], atol=1e-5)
    assert whole["arms"]["tuned"]["accuracy"] == some["arms"]["tuned"]["accuracy"]


def test_where_nothing_is_known_nothing_is_measured(study: dict[str, Any], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("subject,answer\n" + "".join(f"{subject},Atlantis\n" for subject in ["Paris", "Rome", "Oslo"]))
    facts = {"source": str(wrong), "n_test": 3, "where": "correct"}
    summary = run_study(StudyConfig.model_validate(study | {"facts": facts}), tmp_path / "out")
    assert summary["arms"]["base"]["accuracy"] == 0
    assert summary["not_defined"]["answer_logprob"]["list"] == "the reference model answers none of the facts rightly"


def test_only_facts_with_a_label(study: dict[str, Any], facts: Path, tmp_path: Path) -> None:
    every = sa.load_facts(str(facts))
    categories = [("Unknown", "HighlyKnown", None)[i % 3] for i in range(len(every))]
    labels = every[["fact_id", "subject", "relation", "answers"]].assign(category=categories, adapter=None)
    labels = labels.assign(model=study["model"], model_identity=identity(study["model"]))
    labels[[name for name in LABELS if name != "category"]] = 0.0
    labels.to_parquet(tmp_path / "labels.parquet")
    asked = study["facts"] | {"where": "known", "n_test": 10}
    with pytest.raises(BadInput, match="needs 'facts.knowledge'"):
        parse_study(study | {"facts": asked}, "pair")
    asked["knowledge"] = str(tmp_path / "labels.parquet")
    found = load_pool(StudyConfig.model_validate(study | {"facts": asked}).facts, study["model"], 0)
    known = set(labels.query("category == 'HighlyKnown'")["fact_id"])
    assert set(found["fact_id"]) == known
    drawn = load_pool(StudyConfig.model_validate(study | {"facts": asked | {"pool": 4}}).facts, study["model"], 0)
    assert len(drawn) == 4 and set(drawn["fact_id"]) <= known, "labels first, then the draw"


def test_quick_measures_are_shown_before_the_others_are_made(study: dict[str, Any], tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = []
    made: list[bool] = []

    def show(summary: dict[str, Any]) -> None:
        shown.append(summary)
        made.append(any(tmp_path.rglob("knockout/array.nc")))

    summary = run_study(StudyConfig.model_validate(study), tmp_path, first=["accuracy", "answer_logprob"], show=show)
    assert made == [False] and any(tmp_path.rglob("knockout/array.nc"))
    early = {row["measure"]: row["estimate"] for row in shown[0]["contrasts"]}
    late = {row["measure"]: row["estimate"] for row in summary["contrasts"]}
    assert set(early) == {"accuracy", "answer_logprob"} and early.items() <= late.items()
    assert {row["registered"] for row in summary["contrasts"]} == {True}


def test_compare_concludes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    adapter: Path,
    facts: Path,
    tmp_path: Path,
) -> None:
    out, smallest = tmp_path / "pair", "answer_logprob=0.001"
    asked = ("--base", model, "--adapter", adapter, "--facts", facts, "--n", 25, "--out", out, "--smallest", smallest)
    asked += ("--template", "City: {subject}\nCountry:")
    assert compare(monkeypatch, *asked) == 0
    shown, summary = capsys.readouterr().out, json.loads((out / "summary.json").read_text())
    assert "forward passes of a prompt, about" in shown.splitlines()[1]
    assert "patching" not in json.loads((out / "manifest.json").read_text())["study"]["measures"]
    before, after = shown.split("what changed", 1)
    assert "so far" in before and "knockout_drop" not in before
    for row in summary["contrasts"]:
        if row["estimate"] is not None:
            assert difference(row) in after and (row["verdict"] or "").split(" ")[0] in after
    changed = next(row for row in summary["contrasts"] if row["measure"] == "answer_logprob")
    assert changed["smallest_effect"] == 0.001 and "answer_logprob 0.001" in " ".join(after.split())
    for found in summary["flips"]:
        assert f"right to wrong, {len(found['lost'])}:" in after and f"wrong to right, {len(found['won'])}:" in after
    assert "these two models, asked other facts" in " ".join(after.split())
    page = (out / "report.html").read_text()
    assert "What changed" in page and all(row["subject"] in page for row in summary["flips"][0]["lost"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tuned", "{model}"], "is the same model as --base"),
        (["--adapter", "{adapter}", "--smallest", "knockout_drop"], "is not QUANTITY=VALUE"),
        (["--adapter", "{adapter}", "--smallest", "nothing=1"], "nothing"),
        (["--adapter", "{adapter}", "--where", "wrong"], "facts.where: Input should be 'correct', 'known'"),
    ],
)
def test_compare_refuses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    adapter: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    given = [text.format(model=model, adapter=adapter) for text in arguments]
    assert compare(monkeypatch, "--base", model, "--n", 9, "--out", tmp_path / "pair", *given) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "pair").exists()


def test_facts_chosen_by_an_arm_give_no_verdict_against_it(study: dict[str, Any], tmp_path: Path) -> None:
    """Chosen where base is right by chance, it looks better than it is: an interval, and why there is no verdict."""
    asked = study | {"facts": study["facts"] | {"where": "correct"}}
    summary = run_study(StudyConfig.model_validate(asked), tmp_path)
    rows = {row["measure"]: row for row in summary["contrasts"]}
    assert rows["accuracy"]["verdict"] and rows["accuracy"]["judged_together"] == 1
    assert rows["answer_logprob"]["estimate"] is not None and rows["answer_logprob"]["verdict"] is None
    assert "chosen by the right answers of base" in rows["answer_logprob"]["reason"]
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(*change_tables.conclusion(summary), sep="\n")
    text = shown.export_text()
    assert "facts were chosen by the right answers of base" in " ".join(text.split())
    assert "style “list”: all but accuracy is of the" in text and "of 30 facts that base" in text
    claim = {"id": "c", "statement": "s", "measure": "answer_logprob", "arms": ["tuned", "base"]}
    claim |= {"direction": "decrease", "smallest_effect": 0.1}
    with pytest.raises(BadInput, match="compares with arm 'base', whose right answers chose the facts"):
        parse_study(asked | {"claims": [claim]}, "pair")


@pytest.mark.parametrize("columns", [80, 100])
def test_no_number_is_cut(study: dict[str, Any], tmp_path: Path, columns: int) -> None:
    summary = run_study(StudyConfig.model_validate(study), tmp_path)
    for row in summary["contrasts"]:
        if row["estimate"] is not None:
            row |= {"estimate": -14.02, "ci_low": -19.27, "ci_high": -11.04}
    for arm in summary["arms"].values():
        arm["styles"]["list"] |= {row["measure"]: -14.0213 for row in summary["contrasts"]}
    shown = Console(width=columns, record=True, file=io.StringIO())
    shown.print(*change_tables.changes(summary, "what changed"), *[tables.arms_table(summary, "list")], sep="\n")
    text = shown.export_text()
    assert "…" not in text and text.count("-14.02 [-19.27, -11.04]") >= 3


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1"])
def test_a_smallest_effect_is_a_positive_number(study: dict[str, Any], value: str) -> None:
    with pytest.raises(BadInput, match="smallest_effects.accuracy"):
        parse_study(study | {"smallest_effects": {"accuracy": float(value)}}, "pair")


def test_what_a_model_was_tuned_on_is_counted_and_named(
    facts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every = sa.load_facts(str(facts))
    rows = [(every["subject"][0], "x"), (every["subject"][1], every["subject"][2])]
    learnt = tmp_path / "learnt.csv"
    learnt.write_text("name,country\n" + "".join(f'"{name}","{answer}"\n' for name, answer in rows))
    left = without_subjects(every, str(learnt), {"subject": "name", "answer": "country"})
    assert set(every["subject"]) - set(left["subject"]) == {name for name, _ in rows}
    assert f"note: 2 of {len(every)} facts are of subjects in {learnt}: left out; 1 of the others are" in caplog.text
    with pytest.raises(BadInput, match=r"facts.trained_on: .*learnt.csv:1: no column 'subject'"):
        without_subjects(every, str(learnt))


def test_a_comparison_is_not_replaced_by_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, adapter: Path, tmp_path: Path
) -> None:
    asked = ("--base", model, "--adapter", adapter, "--n", 8, "--out", tmp_path / "pair")
    assert compare(monkeypatch, *asked, "--template", "City: {subject}\\nCountry:") == 0
    before = (tmp_path / "pair" / "summary.json").read_text()
    capsys.readouterr()
    assert compare(monkeypatch, *asked, "--template", "{subject} lies in") == 2
    said = capsys.readouterr().err
    assert "holds a comparison of its own (made anew: facts/pool: style.template was" in " ".join(said.split())
    assert (tmp_path / "pair" / "summary.json").read_text() == before
    assert compare(monkeypatch, *asked, "--template", "City: {subject}\\nCountry:", "--deep") == 0
    assert any((tmp_path / "pair").rglob("token_attention/array.nc")), "more measures are welcome"


def test_a_subject_that_stands_first_is_noticed(cities: pd.DataFrame, caplog: pytest.LogCaptureFixture) -> None:
    for style in ("City: {subject}\nCountry:", "late", Style(template="{subject} lies in", prefix=8)):
        notice_first(style, cities[:3])
    assert not caplog.records
    for _ in range(2):
        notice_first("{subject} lies where? In", cities[:3])
    (record,) = caplog.records
    assert "the subject stands first, where attention rests whatever the name is" in record.getMessage()


def test_what_the_base_gives_the_tuned_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, adapter: Path, tmp_path: Path
) -> None:
    """The end, the summary and the page hold what transfer and swap_weights give for the pair; base has none."""
    out = tmp_path / "pair"
    asked = ("--base", model, "--adapter", adapter, "--n", 25, "--out", out, "--template", "late")
    assert compare(monkeypatch, *asked, "--deep") == 0
    shown, page = capsys.readouterr().out, (out / "report.html").read_text()
    run = sa.open_run(out)
    assert run.array("transfer_by_layer", "transfer_by_layer", "style1")["arm"].values.tolist() == ["tuned"]
    with pytest.raises(BadInput, match="this arm is the base itself"):
        run.measure("swap_weights", "base", "style1")
    (found,) = run.summary["across"]
    assert (found["arm"], found["n"], len(found["put"])) == ("tuned", 8, 7) and not run.summary["not_defined"]
    assert not any("put_back" in row["measure"] or "update" in row["measure"] for row in run.summary["contrasts"])
    arms = sa.load_arms(str(model), {"tuned": str(adapter)})
    every = {prompt.fact_id: prompt for prompt in run.prompts("style1")}
    parts = sa.swap_weights(arms, list(every.values()))["answer_logprob_share"]
    for part in parts["part"].values:
        own = found["parts"][str(part)]
        assert own["mean"] == pytest.approx(float(parts.sel(part=part).mean()), abs=1e-5)
        assert own["low"] < own["mean"] < own["high"]
        assert f"{own['mean']:+.3f}" in shown and f"{own['mean']:+.4f}" in page
    few = [every[fact] for fact in run.measure("transfer", "tuned", "style1")["fact"].values]
    for row in found["put"]:
        component, at = row["put"].split(" at ")
        cells = sa.transfer(arms, few, component, at=at, by=None)["answer_logprob"].sel(patch="real")
        base, tuned, put = (
            cells.sel(state=s, late=m).values for s, m in (("base",) * 2, ("tuned",) * 2, ("base", "tuned"))
        )
        known = np.abs(base - tuned) >= 0.1
        share = np.median(((put - tuned) / (base - tuned))[known])
        real = row["into"]["tuned"]["real"]
        assert row["n"] == known.sum() and real["share"] == pytest.approx(share, abs=1e-3)
        assert real["change"] == pytest.approx(np.mean(put - tuned), abs=1e-4)
        assert row["put"] in shown and row["put"] in page and f"{real['share']:+.2f}" in shown
    answers = found["answers"]
    few = [every[fact] for fact in run.measure("transfer_accuracy", "tuned", "style1")["fact"].values]
    put = (
        sa.put_back_accuracy(arms, few, ["pattern", "z", "mlp_out at prediction"])["correct"]
        .sel(cell=["base", "tuned", "put_back"])
        .mean("fact")
    )
    assert (answers["n"], len(answers["put"])) == (20, 3) and "may be nothing: a share of it is not defined" in page
    for row in answers["put"]:
        base, tuned, back = put.sel(put=row["put"]).values
        assert (answers["base"], answers["tuned"], row["real"]["accuracy"]) == pytest.approx((base, tuned, back))
    assert "answers of the tuned model" in shown and "right again" in page
    assert "Which part of the update does it" in page and "return in the other" in page and "Not drawn" not in page
