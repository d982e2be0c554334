"""`subjattn probe`, and the tables and figures of what probes read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.metrics import f1_score

import subjattn as sa
from subjattn.cli import main
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.columns import column_of
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.alone import measure
from subjattn.models import LoadedModel
from subjattn.plots.figures import Drawn, figure_of
from subjattn.prompts import PromptSet, make_prompts


COUNTRIES = ("India", "China", "Brazil")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["subjattn", "probe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def large(cities: pd.DataFrame) -> pd.DataFrame:
    return draw(cities[cities["answers"].map(lambda answers: answers[0] in COUNTRIES)], 90, seed=3)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, large: pd.DataFrame) -> PromptSet:
    return make_prompts(large, tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def found(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> xr.Dataset:
    return sa.probe(tiny_models["llama"], prompts, twin=True)


@pytest.fixture
def table(large: pd.DataFrame, tmp_path: Path) -> Path:
    """A user's own file, with a column of two values and a gap."""
    own = pd.DataFrame({"city": large["subject"], "country": large["answers"].str[0]})
    own["coastal"] = ["yes", "no"] * 45
    own.loc[0, "coastal"] = ""
    own.to_csv(tmp_path / "own.csv", index=False)
    return tmp_path / "own.csv"


def test_scores_are_scikit_learns_and_the_projects(found: xr.Dataset) -> None:
    scores = sa.probe_scores(found).set_index(["layer", "role"])
    assert len(scores) == 6
    for (layer, role), row in scores.iterrows():
        here = found.sel(layer=layer, role=role)
        given = [found.attrs["classes"][i] for i in here["predicted"].values]
        labels = here["label"].values.astype(str)
        assert row["accuracy"] == pytest.approx(np.mean(labels == given))
        assert row["macro_f1"] == pytest.approx(f1_score(labels, given, average="macro"))
        assert row["macro_f1_low"] < row["macro_f1"] < row["macro_f1_high"]
        ends = sa.interval(here["correct"].reset_coords(["label", "fold"], drop=True), bounds=(0, 1)).ends()
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(ends)
        recurs = here["control"].notnull()
        assert row["n_selectivity"] == int(recurs.sum())
        assert row["selectivity"] == pytest.approx(float((here["correct"] - here["control"]).where(recurs).mean()))
        for name in ("control", "embedding", "characters", "majority", "twin"):
            assert row[name] == pytest.approx(float(here[name].mean()))


def test_a_measured_array_has_the_same_scores(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, found: xr.Dataset
) -> None:
    measured = measure("probe", tiny_models["llama"], prompts)
    given = found.drop_vars("twin")
    pd.testing.assert_frame_equal(sa.probe_scores(measured), sa.probe_scores(given))
    with pytest.raises(BadInput, match=r"it holds no 'correct'"):
        sa.probe_scores(xr.Dataset())


def test_figures_show_accuracy_above_selectivity(found: xr.Dataset) -> None:
    figure = sa.plot_probes(found["correct"], found["selectivity"])
    above, beneath = figure.data
    np.testing.assert_allclose(above.z, found["correct"].mean("fact").transpose("layer", "role"))
    np.testing.assert_allclose(beneath.z, found["selectivity"].mean("fact").transpose("layer", "role"))
    assert list(above.x) == ["subject, last", "prediction"]
    assert figure.layout.coloraxis2.cmin == -figure.layout.coloraxis2.cmax
    assert len(sa.plot(found["correct"]).data) == 1
    renamed = found.rename({"correct": "probe_correct", "selectivity": "probe_selectivity"})
    drawn = figure_of("probe").draw(Drawn(lambda name: renamed.get(name)))
    assert drawn is not None and len(drawn.data) == 2


def test_heads_are_drawn_at_the_last_subject_token(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    heads = sa.probe(tiny_models["llama"], prompts, site="z", layers=[1, 2])
    (trace,) = sa.plot(heads["correct"]).data
    np.testing.assert_allclose(trace.z, heads["correct"].sel(role="subject_last").mean("fact"))
    assert len(sa.probe_scores(heads)) == 2 * 2 * 4


def test_a_column_is_found_by_fact_id(table: Path, cities: pd.DataFrame) -> None:
    columns = {"subject": "city", "answer": "country"}
    facts = sa.load_facts(table, columns=columns)
    coastal = column_of(facts, "coastal", table, columns)
    cells = pd.read_csv(table).set_index("city")["coastal"]
    assert coastal.index.tolist() == facts["fact_id"].tolist()
    assert coastal.iloc[1:].tolist() == cells[facts["subject"]].iloc[1:].tolist()
    assert pd.isna(coastal.iloc[0])
    frame = pd.read_csv(table, index_col="city").reset_index()
    same = column_of(sa.load_facts(frame, columns=columns), "coastal", frame, columns)
    assert same.iloc[1:].tolist() == coastal.iloc[1:].tolist()
    assert set(column_of(facts, "relation", table, columns)) == {"unnamed"}
    with pytest.raises(BadInput, match=r"own.csv:1: no column 'coast'; there are .*relation, .*coastal"):
        column_of(facts, "coast", table, columns)
    with pytest.raises(BadInput, match="'cities' has no column 'coast': there are subject, relation, "):
        column_of(cities, "coast", "cities")


def test_the_command_shows_what_the_functions_give(
    tiny_folders: dict[str, Path],
    tiny_models: dict[str, LoadedModel],
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns = {"subject": "city", "answer": "country"}
    asked = ["--model", tiny_folders["llama"], "--facts", table, "--columns", "subject=city,answer=country"]
    asked += ["--template", "City: {subject}\\nCountry:", "--target", "coastal", "--seed", 2]
    files = ["--json", tmp_path / "probe.json", "--figure", tmp_path / "probe.html"]
    assert run(monkeypatch, *asked, *files) == 0
    shown = capsys.readouterr().out
    facts = sa.load_facts(table, columns=columns)
    prompts = make_prompts(facts, tiny_models["llama"].tokenizer, "City: {subject}\nCountry:")
    expected = sa.probe(tiny_models["llama"], prompts, column_of(facts, "coastal", table, columns), seed=2)
    content = json.loads((tmp_path / "probe.json").read_text())
    scores = pd.DataFrame(content["styles"]["style1"]["scores"])
    pd.testing.assert_frame_equal(scores, sa.probe_scores(expected), check_dtype=False)
    assert "coastal, 2 labels, 89 facts; left out, with no label of enough subjects: 1" in shown
    assert f"majority {float(expected['majority'].mean()):.2f}" in shown
    assert all(f"{value:.2f}" in shown for value in scores["accuracy"])
    assert (tmp_path / "probe.html").stat().st_size > 1000
    assert max(map(len, shown.splitlines()[4:-2])) <= 80


def test_the_measures_command_takes_roles_as_it_prints_them(
    tiny_folders: dict[str, Path],
    tiny_models: dict[str, LoadedModel],
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ["--model", tiny_folders["llama"], "--facts", table, "--columns", "subject=city,answer=country", "--n", 90]
    asked = ["measure", "probe", *own, "--template", "City: {subject}\\nCountry:"]
    facts = sa.load_facts(table, columns={"subject": "city", "answer": "country"})
    prompts = make_prompts(facts, tiny_models["llama"].tokenizer, "City: {subject}\nCountry:")
    for more, roles in (([], ("subject_last", "prediction")), (["--roles", "prediction"], ("prediction",))):
        monkeypatch.setattr(sys, "argv", ["subjattn", *map(str, [*asked, *more])])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        share = float(sa.probe(tiny_models["llama"], prompts, roles=roles)["correct"].isel(role=0).mean())
        assert f"probe_accuracy {share:.4g} [" in capsys.readouterr().out


def test_the_command_crosses_base_and_adapter(
    tiny_folders: dict[str, Path],
    adapter: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--model", tiny_folders["llama"], "--facts", table, "--columns", "subject=city,answer=country"]
    asked += ["--template", "{subject} lies in", "--adapter", adapter, "--across", "--roles", "prediction"]
    assert run(monkeypatch, *asked, "--json", tmp_path / "p.json", "--figure", tmp_path / "p.html") == 0
    shown = capsys.readouterr().out
    assert all(f"{a}, {b}, prediction" in shown for a in ("base", "tuned") for b in ("base", "tuned"))
    scores = pd.DataFrame(json.loads((tmp_path / "p.json").read_text())["styles"]["style1"]["scores"])
    assert len(scores) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--across"], "--across takes a tuned model beside its base: give --adapter"),
        (["--target", "coast"], "'cities' has no column 'coast'"),
        (["--target", "relation", "--n", 30], "a probe needs two labels of 5 subjects or more each"),
        (["--roles", "subject"], "role 'subject' is not one of"),
        (["--figure", "probe.gif"], "a figure is saved as"),
    ],
)
def test_what_cannot_be_probed_ends_with_one_line(
    arguments: list[object],
    message: str,
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--model", tiny_folders["llama"], *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
