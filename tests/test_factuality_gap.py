"""The factuality gap of a finished study against its table of values, with answers planted; its table in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.study.files import Run
from subjattn.study.gaps import COLUMNS, has_gap, prompt_in_words
from subjattn.study.read import parse_study


PLAIN = "Q: {question}\nA:"
STYLES: dict[str, Any] = {
    "question": PLAIN,
    "known": {"template": PLAIN, "shots": 2, "demonstrations": "known"},
    "elsewhere": {"template": PLAIN, "shots": 2, "relation": "other"},
    "thinking": {"template": PLAIN, "chain_of_thought": True},
}


def fields(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    rows = [
        (f"{relation}-{i}", f"{relation.title()} Person {i}", relation, f"{relation[0].upper()}{i % 4}", 1000 - i)
        for relation in ("sport", "place", "team")
        for i in range(80)
    ]
    table = pd.DataFrame(rows, columns=["fact_id", "subject", "relation", "answer", "popularity"])
    path = folder / "people.csv"
    table.assign(question="Of {subject}, what is known?").to_csv(path, index=False)
    split = {"within": ["relation"], "match": ["relation"], "held_out": {"relations": ["team"], "n_test": 10}}
    return {
        "name": "gap",
        "model": str(model),
        "facts": {"source": str(path), "n_train": 16, "n_test": 20, "split": split},
        "styles": STYLES,
        "arms": {"base": {}, "known": {"train": "known"}, "unknown": {"train": "unknown"}},
        "training": {"steps": 1, "learning_rate": 1e-3, "batch_size": 8, "lora_rank": 2},
        "measures": {"accuracy": {}},
        "contrasts": [["unknown", "known"]],
    } | changes


@pytest.fixture(scope="module")
def run(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("gap")
    sa.run_study(parse_study(fields(folder, tiny_folders["llama"]), "test"), folder / "run")
    return sa.open_run(folder / "run")


@pytest.fixture
def planted(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same run with answers right at random, more often in the arm of known facts."""
    table, rng = run.values.copy(), np.random.default_rng(0)
    share = table["arm"].map({"base": 0.3, "known": 0.8, "unknown": 0.4}) - 0.2 * table["out_of_distribution"]
    table.loc[table["quantity"] == "accuracy", "value"] = (rng.random(len(table)) < share).astype(float)
    monkeypatch.setitem(run.__dict__, "values", table)
    return run


def test_the_gap_is_the_difference_of_accuracies_in_every_style_in_and_out_of_distribution(planted: Run) -> None:
    found = sa.factuality_gap(planted)
    assert list(found.columns) == list(COLUMNS)
    assert list(zip(found["style"], found["distribution"], strict=True)) == [
        (style, where) for where in ("in", "out") for style in STYLES
    ]
    values = planted.values
    for row in found.itertuples():
        chosen = (values["style"] == row.style) & (values["out_of_distribution"] == (row.distribution == "out"))
        own = values[chosen].pivot(index="fact", columns="arm", values="value")
        assert row.known == pytest.approx(own["known"].mean())
        assert row.gap == pytest.approx(own["known"].mean() - own["unknown"].mean())
        assert row.low < row.gap < row.high
        assert row.n_facts == len(own) == (10 if row.distribution == "out" else 20)
        about = sa.contrast(*(values_of(values[chosen], arm) for arm in ("known", "unknown")), bounds=(0, 1))
        assert (row.low, row.high) == pytest.approx(about.ends())
    assert set(found["prompt"]) == {
        "zero-shot",
        "2-shot, known facts",
        "2-shot, another relation",
        "zero-shot, chain of thought",
    }
    assert set(found["checkpoint"]) == {"end of training"}
    turned = sa.factuality_gap(planted, arms=("unknown", "known"))
    np.testing.assert_allclose(turned["gap"], -found["gap"])


def values_of(values: pd.DataFrame, arm: str) -> Any:
    from subjattn.study.values import labelled

    own = values[values["arm"] == arm].assign(draw=pd.NA, seed=pd.NA)
    return labelled(own, own["value"])


def test_several_studies_stand_in_one_table(planted: Run) -> None:
    both = sa.factuality_gap(planted, planted)
    pd.testing.assert_frame_equal(both[:8], both[8:].reset_index(drop=True))


def test_the_report_and_the_terminal_show_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from subjattn.cli.studies import show_gap

    assert has_gap(run)
    report = (run.folder / "report.html").read_text()
    assert "Factuality gap" in report
    assert "2-shot, known facts" in report
    show_gap(run)
    shown = capsys.readouterr().out
    assert "known − unknown" in shown
    assert "zero-shot, chain of thought" in shown


def test_what_has_no_gap_is_refused_or_left_out(
    run: Run, done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="give finished studies"):
        sa.factuality_gap()
    with pytest.raises(BadInput, match="no arm 'top'"):
        sa.factuality_gap(run, arms=("top", "bottom"))
    other = sa.open_run(done[0])
    assert not has_gap(other), "all of its prompts are zero-shot"
    assert set(sa.factuality_gap(other)["style"]) == {"list", "sentence"}
    monkeypatch.delitem(other.study["arms"], "unknown")
    with pytest.raises(BadInput, match="no arms that train on 'known' and on 'unknown'"):
        sa.factuality_gap(other)
    monkeypatch.delitem(other.study["measures"], "accuracy")
    with pytest.raises(BadInput, match="did not ask for accuracy"):
        sa.factuality_gap(other)
    assert "Factuality gap" not in (done[0] / "report.html").read_text()
    style = {"shots": 4, "demonstrations": "unknown", "relation": "other", "chain_of_thought": True}
    assert prompt_in_words(style) == "4-shot, unknown facts, another relation, chain of thought"
