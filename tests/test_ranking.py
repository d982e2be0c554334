"""What ranks facts where a study does not say it, and whether known and unknown arms differ in what the base knows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from subjattn.cli import studies
from subjattn.facts.splits import parse_arm
from subjattn.report import page
from subjattn.study.checking import check_study
from subjattn.study.config import StudyConfig
from subjattn.study.files import Run, open_run
from subjattn.study.known_before import accuracy_difference, known_before
from subjattn.study.read import load_study, parse_study
from subjattn.study.run import run_study


def study(*specs: str, **facts: Any) -> dict[str, Any]:
    arms: dict[str, Any] = {f"arm{number}": {"train": spec} for number, spec in enumerate(specs)}
    return {
        "name": "ranked",
        "facts": {"n_train": 8, "n_test": 6, **facts},
        "styles": {"list": "City: {subject}\nCountry:"},
        "arms": {"base": {}} | arms,
    }


def own_facts(folder: Path, n: int = 120) -> str:
    rows = "".join(f"Land{i},Town{i % 3},{i}\n" for i in range(n))
    (folder / "facts.csv").write_text("subject,answer,popularity\n" + rows)
    return str(folder / "facts.csv")


@pytest.mark.parametrize(
    ("specs", "by"),
    [
        ((), "popularity"),
        (("top", "bottom-30%", "random", "whole", "nothing", "shuffled", "3x:whole"), "popularity"),
        (("HighlyKnown",), "popularity"),
        (("known",), "answer_logprob"),
        (("top", "unknown"), "answer_logprob"),
        (("mixed-25%",), "answer_logprob"),
        (("unknown-in:sport",), "answer_logprob"),
        (("shuffled:known",), "answer_logprob"),
        (("2x:unknown",), "answer_logprob"),
    ],
)
@pytest.mark.parametrize("split", [None, {}, {"within": []}])
def test_the_model_ranks_known_facts_where_nothing_else_is_said(
    specs: tuple[str, ...], by: str, split: dict[str, Any] | None
) -> None:
    raw = study(*specs) if split is None else study(*specs, split=split)
    config = parse_study(raw, "s")
    assert config.facts.split.by == by
    assert config.facts.scored == (by == "answer_logprob")
    written = config.model_dump(mode="json", exclude_unset=True)
    assert parse_study(written, "s") == config
    assert not specs or written["facts"]["split"]["by"] == by, "a run's study says it"


@pytest.mark.parametrize("specs", [("known", "unknown"), ("top", "bottom")])
@pytest.mark.parametrize("by", ["popularity", "answer_logprob"])
def test_a_ranking_that_is_said_is_kept(specs: tuple[str, ...], by: str) -> None:
    assert parse_study(study(*specs, split={"by": by}), "s").facts.split.by == by


def test_facts_of_a_study_that_gives_none() -> None:
    raw = study("known")
    del raw["facts"]
    assert parse_study(raw, "s").facts.split.by == "answer_logprob"
    raw["arms"] = {"base": {}}
    assert parse_study(raw, "s").facts.split.by == "popularity", "and the default of another study is as it was"


def test_an_invented_worlds_labels_say_no_log_probabilities() -> None:
    assert parse_study(study("known", source="world:zipf", knowledge="world:zipf"), "s").facts.scored
    assert not parse_study(study("known", knowledge="labels.parquet"), "s").facts.scored


@pytest.mark.parametrize(
    ("specs", "split", "said", "warned"),
    [
        (("known", "unknown"), {}, "facts of arm0, arm1: ranked by answer_logprob, the base model's log-prob", False),
        (("known", "mixed-50%", "top"), {"by": "popularity"}, "facts of arm0, arm1, arm2: ranked by popularity", True),
        (("top", "bottom"), {}, "facts of arm0, arm1: ranked by popularity, among facts of the same answer", False),
        (("random",), {}, None, False),
    ],
)
def test_check_says_what_ranks_facts(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    specs: tuple[str, ...],
    split: dict[str, Any],
    said: str | None,
    warned: bool,
) -> None:
    facts = {"source": own_facts(tmp_path), "split": {"within": ["answer"], "match": []} | split}
    with caplog.at_level(logging.WARNING):
        lines = check_study(parse_study(study(*specs, **facts), "s"))
    found = [line for line in lines if "ranked by" in line]
    assert len(found) == (said is not None) and all(line.startswith(str(said)) for line in found)
    notes = [one.getMessage() for one in caplog.records if "ranked by popularity" in one.getMessage()]
    assert len(notes) == warned
    assert all(note.startswith("note: arm0 and arm1 are") and "answer_logprob" in note for note in notes)


def test_a_study_in_a_runs_folder_is_read_as_it_was_made(tmp_path: Path) -> None:
    """Before 0.11 the default was popularity, and a run's `study.yaml` left it out; its manifest said it."""
    raw = study("known", split={"within": []})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    assert load_study(tmp_path / "study.yaml").facts.split.by == "answer_logprob"
    made = raw | {"facts": raw["facts"] | {"split": {"by": "popularity", "within": []}}}
    (tmp_path / "manifest.json").write_text(json.dumps({"study": made}))
    split = load_study(tmp_path / "study.yaml").facts.split
    assert (split.by, split.within) == ("popularity", [])
    assert load_study(tmp_path / "study.yaml", ["facts.split.by=answer_logprob"]).facts.split.by == "answer_logprob"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    assert load_study(tmp_path / "other.yaml").facts.split.by == "answer_logprob", "no run's own"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw | {"name": "new"}))
    assert load_study(tmp_path / "study.yaml").facts.split.by == "answer_logprob", "another study"


@pytest.mark.parametrize(
    ("spec", "share"),
    [("known", 0), ("mixed-25%", 0.25), ("unknown", 1), ("unknown-in:r", 1), ("Unknown", 1), ("MaybeKnown", 0)]
    + [(spec, None) for spec in ("top", "random", "whole", "nothing")],
)
def test_how_much_unknown_an_arm_asks_for(spec: str, share: float | None) -> None:
    found = parse_arm(spec).unknown
    assert (found is None) if share is None else float(found or 0) == share


def test_the_difference_of_two_groups_of_facts_is_that_of_their_means() -> None:
    """Without clusters: Welch's standard error but for degrees of freedom."""
    rng = np.random.default_rng(0)
    a = pd.Series(rng.random(150) < 0.6, [f"a{i}" for i in range(150)], dtype=float)
    b = pd.Series(rng.random(90) < 0.4, [f"b{i}" for i in range(90)], dtype=float)
    index = [*a.index, *b.index]
    alone = pd.DataFrame({"relation": "r", "answer": index}, index=index)
    difference, low, high = accuracy_difference(a, b, alone)
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert difference == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx((welch.low, welch.high), abs=0.01)
    swapped = accuracy_difference(b, a, alone)
    assert swapped == pytest.approx((-difference, -high, -low))
    again = accuracy_difference(a, a, alone)
    assert again == pytest.approx((0, 0, 0)), "a fact of both arms takes part in both"


def test_facts_of_one_answer_are_one_piece_of_evidence() -> None:
    names = [f"f{i}" for i in range(200)]
    right = pd.Series([float(i // 10 % 2) for i in range(200)], names)
    about = pd.DataFrame({"relation": "r", "answer": [f"x{i // 10}" for i in range(200)]}, names)
    apart = accuracy_difference(right[:100], right[100:], about.assign(answer=names))
    together = accuracy_difference(right[:100], right[100:], about)
    assert together[2] - together[1] > 2 * (apart[2] - apart[1])


@pytest.fixture(scope="module")
def config(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    facts = {"source": own_facts(tmp_path_factory.mktemp("facts")), "n_train": 15}
    raw = study("known", "unknown", **facts, split={"within": [], "match": []})
    raw |= {"model": str(tiny_folders["llama"]), "measures": {"accuracy": {}}}
    return parse_study(raw | {"training": {"steps": 1, "batch_size": 4, "lora_rank": 2}}, "s")


@pytest.fixture(scope="module")
def run(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ranked") / "run"
    run_study(config, folder)
    return open_run(folder)


def planted(monkeypatch: pytest.MonkeyPatch, known: int, unknown: int) -> None:
    """Let the base be right on so many of the 15 training facts of either arm."""
    original = Run.before_training

    def before(run: Run, spec: str, draw: int = 0) -> pd.DataFrame | None:
        table = original(run, spec, draw)
        assert table is not None
        return table.assign(correct=np.arange(len(table)) < (known if spec == "known" else unknown))

    monkeypatch.setattr(Run, "before_training", before)


def test_the_study_ranks_by_the_model(run: Run) -> None:
    facts = run.facts.set_index("fact_id")["answer_logprob"]
    known, unknown = (facts[run.facts.set_index("fact_id")[f"train_{name}"]] for name in ("known", "unknown"))
    assert known.min() > unknown.max()


@pytest.mark.parametrize(
    ("known", "unknown", "said"),
    [
        (14, 1, ""),
        (15, 0, ""),
        (0, 0, "The arms arm0 and arm1 do not differ significantly in what the base model knows: before training it "
         "answers 0.0 % of the training facts of arm0 correctly and 0.0 % of those of arm1 (difference +0.0 points; "),
        (8, 7, "The arms arm0 and arm1 do not differ significantly in what the base model knows: before training it "
         "answers 53.3 % of the training facts of arm0 correctly and 46.7 % of those of arm1 (difference +6.7 points"),
        (1, 14, "The base model knows the facts of arm1 better than those of arm0: before training it answers 6.7 % "),
    ],
)  # fmt: skip
def test_it_is_said_where_the_base_knows_no_more_of_known_facts(
    run: Run, monkeypatch: pytest.MonkeyPatch, known: int, unknown: int, said: str
) -> None:
    planted(monkeypatch, known, unknown)
    found = known_before(run)
    assert found.startswith(said) and bool(found) == bool(said)
    assert not found or found.endswith("n 15 and 15).")
    text = page.write(run.folder).read_text()
    assert (found in text) if said else "in what the base model knows:" not in text


def test_the_terminal_says_it_too(
    run: Run, config: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(monkeypatch, 3, 3)
    studies._run(config, run.folder, workers=1)
    assert "do not differ significantly in what the base model knows" in " ".join(capsys.readouterr().out.split())


def test_arms_that_ask_for_nothing_known_are_not_compared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for arms in ({"arm0": "top", "arm1": "bottom"}, {"arm0": "known", "arm1": "random"}, {"arm0": "known"}):
        made = {name: run.study["arms"][name] | {"train": spec} for name, spec in arms.items()}
        monkeypatch.setitem(run.study, "arms", {"base": run.study["arms"]["base"]} | made)
        assert not known_before(run)
