"""Every command as a user types it; bad input ends with status 2 and one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import CITIES, SMALL

from subjattn import cli
from subjattn.facts.splits import CATEGORIES
from subjattn.measures.record import measure_of, measures


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["subjattn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def model(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["llama"]


def test_facts_marks_the_subject(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "facts", "cities", "--n", 3) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^City:\[ .*\]⏎Country:  → ", shown, re.MULTILINE)) == 3


@pytest.mark.parametrize("what", list(measures()))
def test_measure(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    adapter: Path,
    what: str,
) -> None:
    target, tuned = tmp_path / "out.json", [] if "base" not in measure_of(what).needs else ["--adapter", adapter]
    n = 120 if what in ("probe", "probe_across") else 40  # labels of five subjects each
    if what == "hypotheses":
        assert run(monkeypatch, "measure", what, "--model", model, "--n", 40) == 2
        assert "error: hypotheses: name at least one set" in capsys.readouterr().err
        tuned = ["--sets", '{"two": {"heads": [[0, 1], [1, 2]]}}']
    if "trained" in measure_of(what).needs:
        assert run(monkeypatch, "measure", what, "--model", model, "--n", 40) == 2
        assert "give --training" in capsys.readouterr().err
        tuned = ["--training", "cities"]
    if "base" in measure_of(what).needs:
        assert run(monkeypatch, "measure", what, "--model", model, "--n", 40) == 2
        assert "compares a tuned model with its base: give --adapter" in capsys.readouterr().err
    assert run(monkeypatch, "measure", what, "--model", model, *tuned, "--n", n, "--json", target) == 0
    content = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(content["styles"]) == ["list", "sentence"]
    arrays = content["styles"]["list"]["arrays"]
    first = next(iter(arrays["data_vars"].values()))
    assert len(first["data"]) == len(arrays["coords"]["fact"]["data"]) > 0
    shown = capsys.readouterr().out
    names = {quantity.name for quantity in measure_of(what).quantities} - {"knockout_drop_in_parts"}  # asks for --by
    assert "list: " in shown and all(name in shown for name in names)


def test_settings_of_a_measure_are_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    assert run(monkeypatch, "measure", "knockout", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--by", "--window", "--knockout-facts", "--facts", "layer|window|head"):
        assert option in shown
    target = tmp_path / "out.json"
    few = ["--n", 8, "--by", "layer", "--knockout-facts", 2, "--json", target]
    assert run(monkeypatch, "measure", "knockout", "--model", model, *few) == 0
    arrays = json.loads(target.read_text())["styles"]["list"]["arrays"]
    assert arrays["dims"]["few_fact"] == 2 and arrays["data_vars"]["knockout_drop_by_layer"]["dims"][-1] == "layer"
    assert run(monkeypatch, "measure", "--list") == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in measures())


def test_a_setting_beside_an_absent_section_keeps_what_is_measured() -> None:
    """`--set measures.patching.pairs=3` on a study without the section means the others as they are."""
    from subjattn.study.config import MEASURED
    from subjattn.study.read import _apply

    raw: dict = {}
    _apply(raw, "measures.patching.pairs=3")
    assert list(raw["measures"]) == list(MEASURED) and raw["measures"]["patching"] == {"pairs": 3}


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import subjattn

    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"subjattn {subjattn.__version__}\n"


def test_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: tuple[Path, dict], model: Path
) -> None:
    settings = [part for setting in [*SMALL, f"model={model}"] for part in ("--set", setting)]
    assert run(monkeypatch, "plan", CITIES, "--out", done[0], *settings) == 0
    shown = capsys.readouterr().out
    assert "✓ knockout" in shown and "left: 0 forward passes" in shown and "nothing is left to compute" in shown
    assert run(monkeypatch, "plan", CITIES, "--out", done[0].with_name("none"), *settings, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in plan["stages"]} == {"to do"} and plan["place"].startswith(
        "1 worker (too little"
    )
    assert not done[0].with_name("none").exists()


def test_measure_with_own_facts_and_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    own, target = tmp_path / "own.csv", tmp_path / "out.json"
    own.write_text("subject,answer\nAda Lovelace,London\nAlan Turing,London\n")
    arguments = ["--model", model, "--facts", own, "--n", 2, "--json", target]
    assert run(monkeypatch, "measure", "knockout", *arguments, "--template", "{subject} was born in") == 0
    content = json.loads(target.read_text())["styles"]["style1"]
    assert content["template"] == "{subject} was born in"
    assert run(monkeypatch, "measure", "knockout", *arguments) == 2, "no built-in prompt for these"


def test_measure_shows_intervals_and_only_what_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    """Means, intervals and n are `sa.interval`'s; facts that give their answer away can be left out."""
    import subjattn as sa

    own, target = tmp_path / "own.csv", tmp_path / "out.json"
    names = [f"{name} {i}" for i in range(12) for name in ("Oslo", "Lima")]
    rows = [f"{name},{name[0]}x,seat" for name in names]
    own.write_text("\n".join(["subject,answer,relation", *rows, "A b,b,seat"]))
    template = "City: {subject}\\nCountry:"
    arguments = ["--model", model, "--facts", own, "--template", template, "--json", target]
    assert run(monkeypatch, "measure", "knockout", *arguments, "--leave-out-given") == 0
    shown = capsys.readouterr()
    assert "asked as style1: City: " in shown.out and "⏎Country: → " in shown.out
    assert shown.err.splitlines() == ["note: 1 of 25 facts have their answer in the name and are left out"]
    loaded = sa.load_model(str(model))
    prompts = sa.make_prompts(sa.load_facts(own), loaded.tokenizer, "City: {subject}\nCountry:")[:24]
    drops = sa.knockout(loaded, prompts)
    found = json.loads(target.read_text())["styles"]["style1"]
    for name, route in (("knockout_drop", "direct"), ("knockout_drop_total", "total")):
        of = sa.interval(drops.sel(route=route))
        expected = (of.estimate, *of.ends(), 24)
        assert [found[key][name] for key in ("mean", "low", "high", "n")] == pytest.approx(expected, rel=1e-4)
        assert f"style1: {name} {of.estimate:.4g} [{of.ends()[0]:.4g}, {of.ends()[1]:.4g}], n 24" in shown.out
    share = [found[key]["direct_share"] for key in ("mean", "low", "high", "n")]
    assert share == [None, None, None, 24] and "direct_share not defined, n 24; no interval: what it is a" in shown.out
    assert run(monkeypatch, "measure", "accuracy", *arguments, "--where", "correct") == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "note: 1 of 25 facts have their answer in the name (A b → b): see --leave-out-given"
    assert shown[-1].startswith(
        "error: where 'correct': none of 25 facts is left: answered rightly (answer_start); ask"
    )


def test_a_share_is_shown_with_the_interval_of_its_ratio() -> None:
    """A ratio of means, not a mean of ratios; a quantity without an interval says why."""
    import subjattn as sa
    from subjattn.cli.measure import _shown, mean_row

    rng = np.random.default_rng(0)
    over = xr.DataArray(rng.normal(5, 1, 30), dims="fact", coords={"fact": [f"f{i}" for i in range(30)]})
    values = over * 0.4 + rng.normal(0, 0.3, 30)
    found = mean_row(measure_of("knockout").quantities[2], values, over)
    of = sa.interval(sa.ratio(values, over))
    assert found["mean"] == pytest.approx(values.mean().item() / over.mean().item())
    assert (found["low"], found["high"], found["n"]) == (*of.ends(), 30)
    alone = mean_row(measure_of("accuracy").quantities[0], values[:1] * 0 + 1, None)
    assert _shown(alone) == "1, n 1; no interval: 1 of 1 facts have a value: an interval takes at least two"
    same = mean_row(measure_of("accuracy").quantities[0], values * 0 + 1, None)
    assert same["high"] == 1 and same["low"] < 1, "all right among thirty is no proof of always"


def test_measured_numbers_are_the_apis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    import subjattn as sa

    target = tmp_path / "out.json"
    assert (
        run(monkeypatch, "measure", "attention_to_subject", "--model", model, "--n", 5, "--seed", 3, "--json", target)
        == 0
    )
    loaded = sa.load_model(str(model))
    prompts = sa.make_prompts(sa.load_facts("cities", 5, seed=3), loaded.tokenizer, "City: {subject}\nCountry:")
    expected = sa.subject_attention(loaded, prompts)
    found = json.loads(target.read_text())["styles"]["list"]
    assert found["mean"]["attention_to_subject"] == pytest.approx(float(expected.mean()))


def test_compare_with_a_plain_peft_adapter(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    adapter: Path,
) -> None:
    out = tmp_path / "pair"
    assert run(monkeypatch, "compare", "--base", model, "--adapter", adapter, "--n", 25, "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == ["base", "tuned"]
    assert {row["measure"] for row in summary["contrasts"]} >= {"attention_to_subject", "knockout_drop"}
    assert {row["scope"] for row in summary["contrasts"] if row["estimate"] is not None} == {"these two models"}
    assert any(row["estimate"] != 0 for row in summary["contrasts"])
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("report.html")
    for said in (shown, (out / "report.html").read_text(), json.dumps(summary)):
        assert "these two models" in said and "way of training" not in said


def test_compare_with_a_full_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, adapter: Path
) -> None:
    """A merged checkpoint compares as its adapter does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "merged")
    found = []
    for name, tuned in (("full", ["--tuned", tmp_path / "merged"]), ("adapter", ["--adapter", adapter])):
        assert run(monkeypatch, "compare", "--base", model, *tuned, "--n", 12, "--out", tmp_path / name) == 0
        found.append(json.loads((tmp_path / name / "summary.json").read_text())["contrasts"])
    for full, live in zip(*found, strict=True):
        assert full["estimate"] == pytest.approx(live["estimate"], abs=1e-4)


def test_report_alone(monkeypatch: pytest.MonkeyPatch, done: tuple[Path, dict]) -> None:
    out, _ = done
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert run(monkeypatch, "report", out) == 0
    ids = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
    assert ids.sub("", (out / "report.html").read_text()) == ids.sub("", before)


def test_run_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    done: tuple[Path, dict],
    model: Path,
) -> None:
    """The study of the fixtures, found finished."""
    out, summary = done
    settings = [part for setting in [*SMALL, f"model={model}"] for part in ("--set", setting)]
    assert run(monkeypatch, "run", CITIES, "--out", out, *settings) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("report.html")
    for claim in summary["claims"]:
        assert claim["id"] in shown and claim["verdict"] in shown
        assert f"[{claim['ci_low']:+.4f}, {claim['ci_high']:+.4f}]" in shown, "tables fit 80 columns"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run nope.yaml", "no such study"),
        ("run {study} --set facts.ntest=3", "no such field; did you mean 'n_test'?"),
        ("run {study} --set model=nosuch --out {tmp}", "unknown model 'nosuch'"),
        ("run {study} --set model=/no/such --out {tmp}", "no such folder: '/no/such'"),
        (
            "run {study} --set facts.source=x.csv --out {tmp}",
            "facts 'x.csv' are no file or folder and no data set of the hub",
        ),
        ("report {tmp}", "holds no finished study"),
        ("facts nope", "unknown facts 'nope'"),
        ("facts cities --n 0", "--n"),
        (
            "facts cities --rejected {tmp}/no/left.csv",
            "/no': make it first",
        ),
        ("measure accuracy --model nosuch", "unknown model"),
        ("measure accuracy --n 1 --json {tmp}", "is a folder: name a file in it"),
        ("run {study} --set seed=2024-13-45", "not YAML"),
        ("run {study} --set seed=5000000000", "seed: Input should be less than"),
        ("run {study} --set training.epochs=.inf", "training.epochs: Input should be a finite number"),
        ("run {study} --out {study}", "is a file: name a folder for the results"),
        ("measure nothing", "there is no measure 'nothing'"),
        ("measure accuracy --dtype int4", "dtype 'int4' is not one of"),
        ("measure accuracy --template x --n 1", "must contain {subject} or {question}"),
        ("compare --base smollm2-135m --out {tmp}", "give either --tuned or --adapter"),
        ("compare --base smollm2-135m --adapter /no/such --out {tmp} --n 9", "no such adapter folder"),
        ("compare --base smollm2-135m --adapter x --tuned y --out {tmp}", "give either --tuned or --adapter"),
        ("compare", "Missing option"),
        ("check {study} --set styles.list=latest", "must contain {subject} or {question}"),
        ("knowledge --out {tmp} --temperature 0", "--temperature: Input should be greater than 0"),
        ("knowledge --out {tmp} --scorer best", "--scorer: Input should be 'exact_match'"),
        ("knowledge --out {tmp} --facts popqa:/no/such", "no such file or folder"),
        ("facts cities --columns subject", "'subject' is not FIELD=COLUMN"),
        ("nope", "No such command"),
        ("measure knockout --by row --n 2", "'row' is not one of 'layer', 'window', 'head'"),
        ("measure patching --n 2", "no two facts can be swapped"),
        ("run {study} --on slurm --out {tmp}", "--on 'slurm' is neither 'ray' nor 'ray://HOST:PORT'"),
        ("run {study} --workers 0", "--workers"),
        (
            "measure accuracy --n 1 --backend nnsight",
            "'accuracy' is computed by the model itself: leave out",
        ),
        ("check {study} --set arms.known={{}} --set arms.known.adapter=nonexist", "no such adapter folder: 'nonexist'"),
        ("check {study} --set arms.more.model=/nope/model", "no such folder: '/nope/model'"),
        ("compare --base smollm2-135m --adapter x --trained-on y.csv --out {tmp}", "no such adapter folder"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, message: str
) -> None:
    assert run(monkeypatch, *shlex.split(arguments.format(tmp=tmp_path, study=CITIES))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if not line.startswith("[")] == [lines[-1]], "one line beside the progress"
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def test_a_stage_that_fails_is_named_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: tuple[Path, dict], model: Path
) -> None:
    out, _ = done
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = ("--set", f"model={model}", "--set", "facts.n_test=99999", "--replace")
    assert run(monkeypatch, "run", CITIES, "--out", out, *changed) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines[0].startswith("error: facts/split: facts.n_test: n_test=99999 is not between 1 and the")
    assert lines[1:] == ["error: 1 failed; a second run makes what is left"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["", "run", "plan", "report", "facts", "measure", "compare", "verify", "bench"])
def test_help_shows_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("Example: subjattn " + command in shown) if command else all(name in shown for name in ("run", "compare"))


def test_verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    """Agreement ends with 0; a planted difference is named and ends with 1."""
    from subjattn.backends.hooks import Hooks

    target = tmp_path / "verify.json"
    assert run(monkeypatch, "verify", "--model", model, "--json", target) == 0
    content = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["passed"]
    assert {found["backend"] for found in content["comparisons"]} == {"hooks", "transformer-lens", "nnsight"}
    plain = Hooks.forward

    def wrong(self: Hooks, rows: list, **rest: bool) -> object:
        for output in plain(self, rows, **rest):
            off = torch.arange(output.logits.shape[1]) % 2 * 0.1 * (output.control is not None)
            yield replace(output, logits=output.logits + off)

    monkeypatch.setattr(Hooks, "forward", wrong)
    capsys.readouterr()
    assert run(monkeypatch, "verify", "--model", model) == 1
    assert "by hooks: differs by" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["hooks", "transformer-lens", "nnsight"])
def test_measure_by_another_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, backend: str) -> None:
    means = []
    for name in ("engine", backend):
        target = tmp_path / f"{name}.json"
        arguments = ["--model", model, "--n", 3, "--backend", name, "--json", target]
        assert run(monkeypatch, "measure", "knockout", *arguments) == 0
        content = json.loads(target.read_text())
        assert content["backend"] == name
        means.append(content["styles"]["list"]["mean"]["knockout_drop"])
    assert means[0] == pytest.approx(means[1], abs=1e-4)
    assert means[0] != 0


def test_facts_lists_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.csv"
    own.write_text("name,land\nKenya,Nairobi\nKENYA,Nairobi\nPeru,Lima\nChad,A\nChad,B\n")
    arguments = ["--columns", "subject=name,answer=land", "--rejected", str(tmp_path / "left.csv"), "--n", "1"]
    assert run(monkeypatch, "facts", str(own), *arguments, "--template", "The capital of {subject} is") == 0
    assert "2 facts in" in capsys.readouterr().out
    left = pd.read_csv(tmp_path / "left.csv")
    assert left["row"].tolist() == [3, 5, 6]
    assert left["reason"].str.contains("merged").tolist() == [True, False, False]


def test_knowledge(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    small = ["--n", "12", "--prompts", "2", "--shots", "2", "--samples", "3", "--out", str(tmp_path / "k")]
    assert run(monkeypatch, "knowledge", "--model", str(tiny_folders["llama"]), *small) == 0
    shown = capsys.readouterr()
    assert "96 answers: 12 facts × 2 prompts of 2 shots" in " ".join(shown.err.split())
    assert "HighlyKnown" in shown.out and "answer_logprob" in shown.out
    table = pd.read_parquet(tmp_path / "k" / "knowledge.parquet")
    assert len(table) == 12 and table["category"].isin(CATEGORIES).all() and table["answer_logprob"].notna().all()
    found = json.loads((tmp_path / "k" / "agreement.json").read_text())
    assert found["budget"]["n_samples"] == 3 and found["cost"]["answers"] == 96
    monkeypatch.setattr("subjattn.knowledge.slick._ask", lambda *_: pytest.fail("asked again"))
    assert run(monkeypatch, "knowledge", "--model", str(tiny_folders["llama"]), *small) == 0


def test_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "check", str(CITIES)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "30805 in 1 relation, 2 with their answer in the name (see facts.leave_out_given), split as asked" in lines[1]
        and "the study is valid" in lines[-1]
    )
    assert any(line.startswith("style list: City: ") and "⏎Country: → " in line for line in lines)


def test_check_notices_a_break_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In YAML's single quotes a backslash stays one."""
    study = tmp_path / "study.yaml"
    study.write_text("name: s\nfacts: {n_test: 9}\nstyles: {a: 'City: {subject}\\nCountry:'}\narms: {base: {}}\n")
    assert run(monkeypatch, "check", str(study)) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("style a: City: "))
    assert "\\nCountry: → " in line and line.endswith(
        "(\\n is two characters here; in double quotes it is a line break)"
    )


def test_models_says_what_is_at_hand_and_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(monkeypatch, "models") == 0
    shown = capsys.readouterr().out
    assert re.search(r"smollm2-135m +SmolLM2-135M-Instruct +Q4_1 +instruct +93 +Apache-2.0 +ready", shown)
    assert "gemma3-270m: read https://ai.google.dev/gemma/terms, then subjattn models --accept gemma3-270m" in shown
    assert run(monkeypatch, "models", "--accept", "gemma3-270m") == 0
    shown = capsys.readouterr().out
    assert "gemma3-270m: Gemma terms (https://ai.google.dev/gemma/terms) accepted" in shown and "then subj" not in shown
    assert run(monkeypatch, "models", "--accept", "smollm2-135m") == 2
    assert "there are no terms to accept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("subjattn com", "compare"), ("subjattn measure kno", "knockout"), ("subjattn compare --sm", "--smallest")],
)
def test_commands_measures_and_options_are_completed(typed: str, completed: str) -> None:
    words = {"_SUBJATTN_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    found = subprocess.run(
        [Path(sys.executable).parent / "subjattn"], env=os.environ | words, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [completed]


def test_threads_are_half_of_the_cores_or_as_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    before, asked = torch.get_num_threads(), ("measure", "answer_logprob", "--model", model, "--n", 2)
    monkeypatch.setattr("subjattn.study.places.cores", lambda: 6)
    try:
        for number, more in ((3, ()), (2, ("--threads", 2))):
            assert run(monkeypatch, *asked, "--json", tmp_path / "found.json", *more) == 0
            assert torch.get_num_threads() == json.loads((tmp_path / "found.json").read_text())["threads"] == number
    finally:
        torch.set_num_threads(before)
