"""`subjattn init`: a study that fits the facts, passes `check` and runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from _pytest.capture import CaptureResult
from hypothesis import given, settings
from hypothesis import strategies as st

from subjattn import cli
from subjattn.errors import BadInput
from subjattn.facts import load_facts
from subjattn.facts.splits import split
from subjattn.study.draft import draft, sizes_of
from subjattn.study.read import parse_study


def facts_of(groups: list[tuple[str, str, int]], **columns: object) -> pd.DataFrame:
    rows = [(f"Name {i} {a}{r}", a, r) for r, a, n in groups for i in range(n)]
    return pd.DataFrame(rows, columns=["subject", "answer", "relation"]).assign(**columns)


GROUPS = st.lists(
    st.tuples(st.sampled_from(["capital", "author"]), st.sampled_from("UVWX"), st.integers(1, 40)),
    min_size=1,
    max_size=6,
    unique_by=lambda group: group[:2],
)


@given(groups=GROUPS, ranking=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_the_sizes_are_there_whatever_the_ranking(groups: list[tuple[str, str, int]], ranking: int) -> None:
    """The model's ranking is not known yet: another random one than those that sizes were tried on."""
    facts = load_facts(facts_of(groups))
    try:
        found = sizes_of(facts)
    except BadInput as error:
        assert len(facts) < 40 and "are too few to train two arms on: give more facts" in str(error)
        return
    scored = facts.assign(answer_logprob=np.random.default_rng(ranking).normal(size=len(facts)))
    chosen = {"by": "answer_logprob", "within": found.within, "match": found.within, "seed": 0}
    table = split(scored, ["known", "unknown"], found.n_train, found.n_test, **chosen)
    counts = [table[name].sum() for name in ("train_known", "train_unknown", "test")]
    assert counts == [found.n_train, found.n_train, found.n_test]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> CaptureResult:
    """What a command that ends well prints, on both streams."""
    monkeypatch.setattr(sys, "argv", ["subjattn", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert not stop.value.code, shown.err
    return shown


def test_a_study_of_ones_own_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """From a CSV of other column names to a report; what is printed is all it takes."""
    monkeypatch.chdir(tmp_path)
    own = facts_of([("seat", answer, 14) for answer in ("Kenya", "Peru")]).rename(columns={"subject": "name: x"})
    own.assign(question=[f"Where is {name}?" for name in own["name: x"]]).to_csv("my facts.csv", index=False)
    arguments = ["my facts.csv", "--model", tiny_folders["llama"], "--columns", "subject=name: x"]
    text = run(monkeypatch, capsys, "init", *arguments).out
    study = yaml.safe_load(text)
    assert study["name"] == "my-facts" and study["styles"] == {"question": "{question}"}
    assert study["facts"]["n_train"] >= 4
    Path("study.yaml").write_text(text)
    assert "the study is valid" in run(monkeypatch, capsys, "check", "study.yaml").out
    small = ["--set", "replicates={draws: 1}", "--set", "measures={accuracy: {}, attention_to_subject: {}}"]
    run(monkeypatch, capsys, "run", "study.yaml", "--out", "run", "--workers", "1", *small)
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["arms"]) == ["base", "known", "unknown"] and len(summary["contrasts"]) > 0
    small[-1] = "measures={accuracy: {scorer: containment}, attention_to_subject: {}}"
    small += ["--replace"]
    said = run(monkeypatch, capsys, "run", "study.yaml", "--out", "run", "--workers", "1", *small).err.splitlines()
    assert [line for line in said if "made anew" in line] == [
        'made anew: 3 finished stages of measure: settings.scorer was "answer_start", is now "containment"',
        'made anew: 2 finished stages of before: scorer was "answer_start", is now "containment"',
        "made anew: 4 more, unless what they are made from comes out as it was",
    ]


def test_an_adapter_is_compared_without_training(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_folders: dict[str, Path],
    adapter: Path,
) -> None:
    path = tmp_path / "facts.csv"
    facts_of([("capital", f"T{i}", 1) for i in range(9)]).to_csv(path, index=False)
    text = run(monkeypatch, capsys, "init", path, "--model", tiny_folders["llama"], "--adapter", adapter).out
    study = yaml.safe_load(text)
    assert study["arms"] == {"base": {}, "tuned": {"adapter": str(adapter)}}
    assert study["facts"]["n_test"] == 9 and "training" not in study and study["contrasts"] == [["tuned", "base"]]
    assert list(study["styles"]) == ["question", "paraphrase"]
    claims = yaml.safe_load("\n".join(line.removeprefix("# ") for line in text.partition("# claims:")[2].splitlines()))
    parse_study(study | {"claims": claims}, "with the claim that it suggests")


def test_too_few_facts_are_refused() -> None:
    facts = load_facts(facts_of([("capital", f"T{i}", 1) for i in range(5)]))
    with pytest.raises(BadInput, match="5 facts are too few to train two arms on: give more facts of a relation"):
        sizes_of(facts)


def test_multiple_choice_has_no_subject_to_measure() -> None:
    rows = {"subject": [None] * 40, "relation": "x", "answers": [["A"], ["B"]] * 20, "question": "Q?"}
    facts = pd.DataFrame(rows).assign(fact_id=[f"f{i}" for i in range(40)], choices=[["u", "v"]] * 40, source="MMLU")
    study = yaml.safe_load(draft(facts, "mmlu", {"choices": "{question}\n{choices}\nAnswer:"}, model="smollm2-135m"))
    assert parse_study(study, "drafted").scorer == "letters" and list(study["measures"]) == [
        "accuracy",
        "answer_logprob",
    ]
