"""Studies end to end on a small model: files, reuse, what is made anew, arms brought along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import CITIES, ROOT, changed

import subjattn as sa
from subjattn.errors import BadInput, StagesFailed, SubjattnError
from subjattn.report import page
from subjattn.run.folder import Folder, alone
from subjattn.run.plan import Plan
from subjattn.study.config import StudyConfig
from subjattn.study.foresee import foresee
from subjattn.study.plan import plan_study, training_seed
from subjattn.study.read import load_study, parse_study
from subjattn.study.run import run_study


Done = tuple[Path, dict[str, Any]]
QUANTITIES = ("accuracy", "answer_logprob", "attention_to_subject", "knockout_drop", "knockout_drop_total")


def to_do(config: StudyConfig, out: Path) -> set[str]:
    """Stages that are not finished."""
    return {name for name, state in Folder(out).states(plan_study(config)).items() if state != "finished"}


def test_summary_has_its_keys(done: Done) -> None:
    out, returned = done
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    assert set(summary) >= {"study", "model", "arms", "contrasts", "claims"}
    assert list(summary["arms"]) == ["base", "known", "unknown", "random"]
    for arm in summary["arms"].values():
        assert arm["n_test"] == 24
        assert set(arm["styles"]) == {"list", "sentence"}
        assert all(arm[name] == arm["styles"]["list"][name] for name in QUANTITIES)
    assert {(row["arm_a"], row["arm_b"]) for row in summary["contrasts"]} == {
        ("unknown", "known"), ("known", "base"), ("unknown", "base"),
    }  # fmt: skip
    for row in [*summary["contrasts"], *summary["claims"]]:
        if row["ci_low"] is not None:
            assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
    assert len(summary["claims"]) >= 3
    for claim in summary["claims"]:
        assert {"id", "statement", "verdict", "reason", "estimate", "ci_low", "ci_high"} <= set(claim)
        assert claim["scope"] == "these two models" and claim["registered"] is True
        assert (claim["n_facts"], claim["n_replicates"]) == (24, 1)
        if claim["verdict"] == "undecided":
            assert set(claim["needed"]) == {"facts", "replicates", "facts_alone"}


def test_summary_agrees_with_the_arrays(done: Done) -> None:
    """Arms and contrasts recomputed from the saved files."""
    run = sa.open_run(done[0])
    predictions = run.predictions()
    for arm, found in run.summary["arms"].items():
        for style, numbers in found["styles"].items():
            attention = run.measure("attention_to_subject", arm, style)["attention_to_subject"]
            assert numbers["attention_to_subject"] == pytest.approx(float(attention.mean()), abs=1e-6)
            drop = run.measure("knockout", arm, style)["knockout_drop"].mean("fact")
            assert numbers["knockout_drop"] == pytest.approx(float(drop.sel(route="direct")))
            assert numbers["knockout_drop_total"] == pytest.approx(float(drop.sel(route="total")))
            own = predictions[(predictions["arm"] == arm) & (predictions["style"] == style)]
            assert numbers["accuracy"] == pytest.approx(own["correct"].mean())
            thirds = numbers["by_popularity_third"]
            assert sum(third["n"] * third["accuracy"] for third in thirds.values()) == pytest.approx(
                own["correct"].sum()
            )
    drops = [
        run.measure("knockout", arm, "sentence")["knockout_drop"].sel(route="direct") for arm in ("unknown", "known")
    ]
    row = next(
        r
        for r in run.summary["contrasts"]
        if (r["measure"], r["style"], r["arm_b"]) == ("knockout_drop", "sentence", "known")
    )
    assert row["estimate"] == pytest.approx(float((drops[0] - drops[1]).mean()))


def test_arms_learn_other_facts_than_are_tested(done: Done) -> None:
    facts = sa.open_run(done[0]).facts
    for arm in ("known", "unknown", "random"):
        assert facts[f"train_{arm}"].sum() == 32
        assert not (facts[f"train_{arm}"] & facts["test"]).any()


def test_tuned_arms_differ_from_base(done: Done) -> None:
    array = sa.open_run(done[0]).array("answer_logprob", "answer_logprob", "list")
    for arm in ("known", "unknown", "random"):
        assert float(abs(array.sel(arm=arm) - array.sel(arm="base")).min()) > 0


def test_manifest_says_where_numbers_come_from(done: Done) -> None:
    manifest = sa.open_run(done[0]).manifest
    assert manifest["versions"]["torch"]
    base, known = manifest["arms"]["base"], manifest["arms"]["known"]
    assert base["weights_sha256"] == known["weights_sha256"]
    assert base["adapter_sha256"] is None and known["adapter_sha256"] is not None
    assert known["adapter_merged"] is False
    assert base["dtype"] == "float32"
    stage = manifest["stages"]["arms/known/draw0-seed0/adapter"]
    assert stage["versions"]["torch"] == manifest["versions"]["torch"]
    assert stage["device"] and stage["threads"] == 1 and stage["seconds"] > 0
    assert manifest["mixtures"] == []


def test_arrays_say_what_they_are(done: Done) -> None:
    run = sa.open_run(done[0])
    attention = run.array("attention_to_subject", "attention_to_subject", "list")
    assert attention.dims == ("arm", "fact", "layer", "head") and attention.attrs["unit"] == "share of attention"
    by_layer = run.array("knockout", "knockout_drop_by_layer", "list")
    assert by_layer.dims == ("arm", "few_fact", "route", "layer") and by_layer.sizes["few_fact"] == 2
    patching = run.array("patching", "patch_effect", "list")
    assert patching.dims == ("arm", "fact", "layer", "role")
    assert run.array("token_attention", "token_attention", "sentence").sizes["arm"] == 4


def test_each_arm_keeps_its_own_noise_floor_and_clean_run(done: Done) -> None:
    """Merging once gave every arm the first one's attributes, and would have given it the first one's coordinates."""
    run = sa.open_run(done[0])
    joined = run.array("patching", "patch_effect", "list")
    for arm in run.arms:
        own = run.measure("patching", arm, "list")["patch_effect"]
        assert float(joined["noise_floor"].sel(arm=arm)) == own.attrs["noise_floor"]
        np.testing.assert_array_equal(joined["clean_logit_diff"].sel(arm=arm), own["clean_logit_diff"])
    assert (
        float(abs(joined["clean_logit_diff"].sel(arm="known") - joined["clean_logit_diff"].sel(arm="base")).max()) > 0
    )
    assert "noise_floor" not in joined.attrs


def test_what_was_asked_is_kept(done: Done, small: StudyConfig) -> None:
    run = sa.open_run(done[0])
    prompts = run.prompts("sentence")
    tokenizer = sa.load_model(small.model).tokenizer
    again = sa.make_prompts(run.facts[run.facts["test"]], tokenizer, small.styles["sentence"])
    assert {prompt.fact_id: prompt for prompt in prompts} == {prompt.fact_id: prompt for prompt in again}


def test_a_finished_study_is_reused(done: Done, small: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    out, summary = done
    monkeypatch.setattr("subjattn.run.schedule.perform", lambda *_, **__: pytest.fail("done again"))
    assert run_study(small, out) == summary


def test_only_what_changed_is_made_again(done: Done, small: StudyConfig) -> None:
    out, raw = done[0], small.model_dump(mode="json")
    assert to_do(small, out) == set()
    claims = json.loads(json.dumps(raw["claims"]))
    claims[0]["smallest_effect"] = 0.5
    assert to_do(changed(small, claims=claims), out) == set()
    tokens = raw["measures"] | {"token_attention": {"facts": 3}}
    assert all("token_attention" in name for name in to_do(changed(small, measures=tokens), out))
    assert len(to_do(changed(small, measures=tokens), out)) == 8
    faster = to_do(changed(small, training=raw["training"] | {"learning_rate": 0.02}), out)
    assert {"arms/known/draw0-seed0/adapter", "arms/known/draw0-seed0/measures/list/accuracy"} <= faster
    assert not any(name.startswith(("arms/base", "facts", "prompts", "before")) for name in faster)


def test_a_style_more_trains_nothing_anew(done: Done, small: StudyConfig) -> None:
    raw = small.model_dump(mode="json")
    styles = raw["styles"] | {"more": "Where is {subject}? In"}
    left = to_do(changed(small, styles=styles), done[0])
    assert left and all("more" in name for name in left), "the new style's stages, and they alone"


def test_a_style_more_is_tried_on_the_facts_at_once(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """In a finished folder too: what cannot be asked is found before anything is measured."""
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    raw = small.model_dump(mode="json")
    config = changed(small, styles=raw["styles"] | {"bad": {"template": "Where is {subject}?", "chat": True}})
    assert "bad" in [stage.name.rpartition("/")[2] for stage in plan_study(config)][:6]
    with pytest.raises(StagesFailed, match=r"prompts/bad: the tokenizer has no chat template"):
        run_study(config, out)


def test_an_arm_more_trains_only_itself(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """Its facts are drawn by a stream of its own, so the others keep theirs, and their adapters."""
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    raw = small.model_dump(mode="json")
    adapters = {path: path.stat().st_mtime_ns for path in out.glob("arms/*/draw0-seed0/adapter/*")}
    more = changed(small, arms={"base": {}, "more": {"train": "top"}, **raw["arms"]})
    with pytest.raises(BadInput, match="holds finished results of another study .*another folder, or --replace"):
        run_study(more, out)
    assert (out / "summary.json").read_bytes() == (done[0] / "summary.json").read_bytes()
    run_study(more, out, replace=True)
    assert not (out / "previous").exists()
    before, now = (sa.open_run(folder).facts.set_index("fact_id") for folder in (done[0], out))
    for name in ("train_known", "train_unknown", "train_random"):
        assert set(now.index[now[name]]) == set(before.index[before[name]])
    assert {path: path.stat().st_mtime_ns for path in adapters} == adapters
    assert (out / "arms" / "more" / "draw0-seed0" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_replaced_adapter_makes_its_measures_anew(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """Keys hold what went in, not how it was made: planted, another arm's adapter under the same recipe."""
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    known, unknown = (out / "arms" / name / "draw0-seed0" / "adapter" for name in ("known", "unknown"))
    record = json.loads((known / "stage.json").read_text())
    shutil.rmtree(known)
    shutil.copytree(unknown, known)
    other = json.loads((unknown / "stage.json").read_text())
    (known / "stage.json").write_text(json.dumps(record | {"files": other["files"]}))
    left = to_do(small, out)
    measured = {"accuracy", "answer_logprob", "attention_to_subject", "knockout", "patching", "token_attention"}
    assert left == {f"arms/known/draw0-seed0/measures/{style}/{name}" for style in small.styles for name in measured}


def test_a_folder_moved_elsewhere_is_reused(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """Another place, other times of change, the model in another folder: the same stages."""
    out = Path(shutil.copytree(done[0], tmp_path / "moved", copy_function=shutil.copy))
    model = shutil.copytree(small.model, tmp_path / "model", copy_function=shutil.copy)
    assert to_do(changed(small, model=str(model)), out) == set()


def test_styles_in_another_order_are_another_training(small: StudyConfig) -> None:
    raw = small.model_dump(mode="json")
    training = raw["training"] | {"styles": list(reversed(raw["training"]["styles"]))}
    adapter = "arms/known/draw0-seed0/adapter"
    assert plan_study(small)[adapter].recipe(1) != plan_study(changed(small, training=training))[adapter].recipe(1)


def test_replicates_have_their_own_facts_and_seeds(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json") | {"arms": {"base": {}, "known": {"train": "known"}}, "claims": []}
    raw |= {
        "contrasts": [["known", "base"]],
        "replicates": {"draws": 2, "seeds": 2},
        "measures": {"answer_logprob": {}},
    }
    summary = run_study(parse_study(raw, "test"), tmp_path)
    run = sa.open_run(tmp_path)
    assert run.replicates("base") == [None] and run.replicates("known") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    values = run.values[(run.values["quantity"] == "answer_logprob") & (run.values["style"] == "list")]
    assert values["draw"][values["arm"] == "base"].isna().all()
    means = values[values["arm"] == "known"].groupby(["draw", "seed"])["value"].mean()
    base = values["value"][values["arm"] == "base"].mean()
    row = next(r for r in summary["contrasts"] if r["measure"] == "answer_logprob" and r["style"] == "list")
    assert len(set(means.round(9))) == 4, "each replicate is another training"
    assert row["estimate"] == pytest.approx(means.mean() - base)
    for (draw, seed), mean in means.items():
        assert row["replicates"][f"draw{draw}-seed{seed}"] == pytest.approx(mean - base)
    assert (row["n_replicates"], row["replicates_are"]) == (2, "draws"), "seeds are averaged within draws"
    assert (
        row["scope"] == "this way of training" and "two draws are a screen: 3 are needed for a verdict" in row["notes"]
    )
    first, second = (set(run.facts["fact_id"][run.facts[name]]) for name in ("train_known", "train_known@1"))
    assert first != second and len(first) == len(second) == 32
    assert training_seed(7, (0, 0)) == 7 and len({training_seed(7, r) for r in run.replicates("known")}) == 4
    array = run.array("answer_logprob", "answer_logprob", "list")
    assert float(array.sel(arm="known").mean()) == pytest.approx(means.mean())


def test_replicates_are_averaged_with_what_goes_with_them(small: StudyConfig, tmp_path: Path) -> None:
    """Patching of several trained arms: coordinates are means too, a pair counts where every replicate keeps it."""
    raw = small.model_dump(mode="json") | {"replicates": {"seeds": 2}, "styles": {"list": "City: {subject}\nCountry:"}}
    raw |= {"arms": {"base": {}, "known": {"train": "known"}, "unknown": {"train": "unknown"}}, "claims": []}
    raw |= {"contrasts": [["unknown", "known"]], "measures": {"patching": {"pairs": 6}, "knockout": {"by": "layer"}}}
    raw["training"] |= {"styles": None}
    run_study(parse_study(raw, "test"), tmp_path)
    run = sa.open_run(tmp_path)
    joined = run.array("patching", "patch_effect", "list")
    both = [run.measure("patching", "known", "list", (0, seed))["patch_effect"] for seed in (0, 1)]
    kept = both[0]["kept"] & both[1]["kept"]
    np.testing.assert_array_equal(joined["kept"].sel(arm="known"), kept)
    means = (both[0]["clean_logit_diff"] + both[1]["clean_logit_diff"]) / 2
    np.testing.assert_allclose(joined["clean_logit_diff"].sel(arm="known"), means)
    shown = joined.sel(arm="known").notnull().any(["layer", "role"])
    np.testing.assert_array_equal(shown, kept)
    assert run.array("knockout", "knockout_drop_by_layer", "list").dims == ("arm", "few_fact", "route", "layer")
    assert "Not drawn" not in (tmp_path / "report.html").read_text()


def test_a_model_overwritten_in_one_process_is_read_again(small: StudyConfig, tmp_path: Path) -> None:
    """A notebook runs a study, saves another model in the same folder, and runs it again."""
    import torch
    from transformers import AutoModelForCausalLM

    model = Path(shutil.copytree(small.model, tmp_path / "model"))
    raw = small.model_dump(mode="json") | {"model": str(model), "arms": {"base": {}}, "claims": [], "contrasts": []}
    raw |= {"measures": {"answer_logprob": {}}}
    before = run_study(parse_study(raw, "test"), tmp_path / "run")["arms"]["base"]["answer_logprob"]
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(model)
    with pytest.raises(BadInput, match="finished results of another study .*model is another now"):
        run_study(parse_study(raw, "test"), tmp_path / "run")
    again = run_study(parse_study(raw, "test"), tmp_path / "run", replace=True)
    after = again["arms"]["base"]["answer_logprob"]
    fresh = run_study(parse_study(raw, "test"), tmp_path / "fresh")["arms"]["base"]["answer_logprob"]
    assert after == fresh and abs(after - before) > 0.1


def test_what_ranks_and_reads_facts_is_part_of_the_recipe(small: StudyConfig, tmp_path: Path) -> None:
    table = tmp_path / "views.csv"
    table.write_text("subject,views,visits\nNairobi,1,2\n")
    learnt = tmp_path / "learnt.csv"
    learnt.write_text("subject,answer\nNairobi,Kenya\n")
    raw = small.model_dump(mode="json")

    def recipe(**facts: Any) -> str:
        return plan_study(changed(small, facts=raw["facts"] | facts))["facts/pool"].recipe(1)

    by = [recipe(popularity={"path": str(table), "popularity": column}) for column in ("views", "visits")]
    assert by[0] != by[1]
    assert recipe(source=f"popqa:{learnt}") != recipe(source=f"world-places:{learnt}") != recipe(source=str(learnt))
    before = recipe(trained_on=f"popqa:{learnt}")
    learnt.write_text("subject,answer\nLagos,Nigeria\n")
    assert recipe(trained_on=f"popqa:{learnt}") != before


def test_units_go_by_the_settings(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json") | {"arms": {"base": {}, "same": {"model": small.model}}, "claims": []}
    raw |= {"contrasts": [["same", "base"]]}
    raw |= {"measures": {"attention_to_subject": {"value_weighted": True, "reduce": "max"}, "knockout": {}}}
    summary = run_study(parse_study(raw, "test"), tmp_path)
    described = summary["quantities"]["attention_to_subject"]
    assert (
        described["unit"] == "length in the residual stream"
        and "largest of the subject's tokens" in described["definition"]
    )
    units = {row["measure"]: row["unit"] for row in summary["contrasts"]}
    assert units["attention_to_subject"] == "length in the residual stream" and units["knockout_drop"] == "nats"
    assert "every answer-predicting position to the subject are" in summary["quantities"]["knockout_drop"]["definition"]
    assert "every position after the subject" in summary["quantities"]["knockout_drop_total"]["definition"]
    assert "length in the residual stream" in (tmp_path / "report.html").read_text()


def test_damaged_results_are_named(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    for name in ("plan.json", "summary.json", "manifest.json"):
        out = Path(shutil.copytree(done[0], tmp_path / name))
        (out / name).write_text((out / name).read_text()[:60])
        with pytest.raises(BadInput, match=rf"{name}' is missing or damaged: run the study again"):
            sa.open_run(out)
        assert foresee(small, out)["passes"] == 0
        run_study(small, out)
        assert (out / name).read_text() == (done[0] / name).read_text()


def test_multiple_choice_is_not_scored_by_words(small: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "x_test.csv").write_text("\n".join(f"What is {i}?,{i},{i + 1},{i + 2},{i + 3},A" for i in range(9)))
    facts = {"source": f"mmlu:{tmp_path}", "n_test": 6}
    config = changed(
        small, facts=facts, arms={"base": {}}, styles={"c": "{question}\n{choices}\nA:"}, claims=[], contrasts=[]
    )
    with pytest.raises(StagesFailed, match="facts/pool: the scorer does not fit: .* is multiple choice"):
        run_study(config, tmp_path / "run")


def test_more_replicates_keep_the_first(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json") | {"arms": {"base": {}, "known": {"train": "known"}}, "claims": []}
    raw |= {"contrasts": [], "measures": {}}
    run_study(parse_study(raw, "test"), tmp_path)
    adapter = tmp_path / "arms" / "known" / "draw0-seed0" / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    run_study(parse_study(raw | {"replicates": {"draws": 2}}, "test"), tmp_path, replace=True)
    assert adapter.stat().st_mtime_ns == written
    assert sa.open_run(tmp_path).replicates("known") == [(0, 0), (1, 0)]


def test_a_style_may_be_called_adapter(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json") | {"styles": {"adapter": "{subject} is in"}, "measures": {}}
    raw |= {"arms": {"base": {}, "known": {"train": "known"}}, "contrasts": [], "claims": []}
    raw["training"] |= {"styles": None}
    run_study(parse_study(raw, "test"), tmp_path)
    assert (tmp_path / "arms" / "known" / "draw0-seed0" / "adapter" / "adapter_model.safetensors").is_file()


def test_one_process_a_folder(small: StudyConfig, tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(BadInput, match="another process is writing"):
        run_study(small, tmp_path)


def test_a_report_never_stands_beside_another_summary(
    done: Done, small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the process ends between summary and report."""
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    monkeypatch.setattr("subjattn.report.page._content", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_study(small, out)
    assert not (out / "report.html").exists() and (out / "summary.json").exists()
    monkeypatch.undo()
    run_study(small, out)
    assert (out / "report.html").exists()


def test_a_summary_never_stands_beside_other_stages(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """Planted: a changed study fails half-way, and a report is asked for."""
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    raw = small.model_dump(mode="json")
    raw["styles"]["bad"] = {"template": "Where is {subject}?", "chat": True}
    raw["facts"]["n_test"] = 21
    with pytest.raises(StagesFailed):
        run_study(parse_study(raw, "test"), out, replace=True)
    with pytest.raises(BadInput, match="holds no finished study"):
        page.write(out)
    for name in ("summary.json", "report.html"):
        assert (out / "previous" / name).read_bytes() == (done[0] / name).read_bytes()


def test_arm_of_another_shape_is_refused(tiny_folders: dict[str, Path], small: StudyConfig, tmp_path: Path) -> None:
    import zoo
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(**zoo.SHAPE | {"num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tiny_folders["llama"]).save_pretrained(tmp_path / "two")
    arms = {"base": {}, "tuned": {"model": str(tmp_path / "two")}}
    with pytest.raises(BadInput, match="arm 'tuned' has 2 layers of 4 heads"):
        run_study(changed(small, arms=arms, contrasts=[], claims=[]), tmp_path / "out")


def test_arm_with_another_tokenizer_is_refused(
    tiny_folders: dict[str, Path], small: StudyConfig, tmp_path: Path, smollm2: Any
) -> None:
    other = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "other"))
    smollm2.tokenizer.save_pretrained(other)
    arms = {"base": {}, "tuned": {"model": str(other)}}
    with pytest.raises(SubjattnError, match="arm 'tuned' reads .* as other tokens"):
        run_study(changed(small, arms=arms, contrasts=[], claims=[]), tmp_path / "out")
    assert not (tmp_path / "out" / "arms" / "tuned").exists(), "nothing of it is measured"


def test_accuracy_before_training_is_the_untrained_models(small: StudyConfig, tmp_path: Path) -> None:
    """Also where the first arm is a trained one."""
    raw = small.model_dump(mode="json")
    raw |= {"arms": {"known": {"train": "known"}}, "contrasts": [], "claims": [], "measures": {}}
    plan = plan_study(parse_study(raw, "test"))
    before = plan["before/known-draw0"]
    assert before.where["model"] == small.model and "adapter" not in before.inputs
    run_study(parse_study(raw, "test"), tmp_path)
    run = sa.open_run(tmp_path)
    found = run.before_training("known")
    model = sa.load_model(small.model)
    own = run.facts[run.facts["train_known"]]
    asked = sa.make_prompts(own, model.tokenizer, small.styles["list"])
    expected = sa.predict(model, asked).set_index("fact_id")["prediction"]
    assert found["prediction"].tolist() == expected.reindex(found["fact_id"]).tolist()


def test_an_arm_called_test_has_its_own_column(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json")
    raw |= {"arms": {"base": {}, "test": {"train": "known"}}, "contrasts": [], "claims": [], "measures": {}}
    run_study(parse_study(raw, "test"), tmp_path)
    groups = page._composition(sa.open_run(tmp_path))["groups"]
    assert [(group["title"], group["n"]) for group in groups] == [("test facts", 24), ("test", 32)]


def test_facts_without_a_value_are_left_out_and_counted(done: Done, small: StudyConfig) -> None:
    """Not skipped in the means and refused in the contrasts."""
    from subjattn.study.registration import registered_in
    from subjattn.study.summary import Summary
    from subjattn.study.values import collect

    folder = Folder(done[0])
    table = collect(small, folder)
    mine = (table["arm"] == "known") & (table["style"] == "list") & (table["quantity"] == "knockout_drop")
    gone = table.index[mine][:3]
    table.loc[gone, "value"] = np.nan
    facts = pd.read_parquet(folder.path("facts/split:test.parquet"))
    summary = Summary(small, folder, table, facts, registered_in(done[0])).content()
    found = summary["arms"]["known"]["styles"]["list"]
    assert found["n_undefined"]["knockout_drop"] == 3
    assert found["knockout_drop"] == pytest.approx(table["value"][mine].mean())
    row = next(
        r
        for r in summary["contrasts"]
        if (r["measure"], r["style"], r["arm_a"], r["arm_b"]) == ("knockout_drop", "list", "known", "base")
    )
    assert (row["n_facts"], row["n_undefined"]) == (21, 3)


def test_foresee_tells_what_is_left(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    out = done[0]
    found = foresee(small, out)
    assert found["finished"] == len(found["stages"]) and found["passes"] == 0 and found["time"] == "0:00"
    fresh = foresee(small, tmp_path / "none")
    assert fresh["finished"] == 0 and fresh["passes"] > 0 and fresh["seconds"] > 0
    assert not (tmp_path / "none").exists(), "nothing is written"
    assert json.loads(json.dumps(fresh))["stages"][0]["name"] == "facts/pool"
    longer = foresee(changed(small, threads=2), out)
    assert any(stage["state"] == "to do" for stage in longer["stages"]), "sums differ with threads"


def test_stages_made_under_other_versions_are_named(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    record = out / "arms" / "base" / "measures" / "list" / "accuracy" / "stage.json"
    content = json.loads(record.read_text())
    content["versions"]["torch"] = "1.0"
    record.write_text(json.dumps(content))
    found = foresee(small, out)
    assert found["finished"] == len(found["stages"]), "no reason to do it again"
    (line,) = found["mixtures"]
    assert line.startswith("torch: ") and "1.0 (1 stages, such as arms/base/measures/list/accuracy)" in line


def test_the_plan_is_plain_data(small: StudyConfig) -> None:
    plan = plan_study(small)
    again = Plan.from_json(plan.to_json())
    assert [stage.recipe(1) for stage in again] == [stage.recipe(1) for stage in plan]
    assert all(stage.resolve() for stage in plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("facts.ntest=4", r"facts\.ntest: no such field; did you mean 'n_test'\?"),
        ("facts.n_test=0", r"facts\.n_test: .*greater than 0, not '0'"),
        (
            "arms.known.train=best",
            r"arms\.known: arm 'best' is no arm: use known, unknown, random, whole, nothing, top, bottom",
        ),
        ("arms.known.adapter=x", "either trained here .* or brings an 'adapter', not both"),
        ("contrasts=[[unknown, nobody]]", "arm 'nobody' is compared but not defined"),
        ("styles.list='City'", r"must contain \{subject\} or \{question\}, or be one of cloze, late"),
        ("claims=[]x", "not YAML|claims"),
        ("nonsense", "is not key=value"),
        ("model.x=1", "'model' has no fields"),
        ("measures.knockout.byy=layer", r"measures\.knockout\.byy: no such field; did you mean 'by'\?"),
        ("measures.knockout.by=row", r"measures\.knockout\.by: Input should be 'layer', 'window' or 'head'"),
        ("measures.knokout={}", r"measures\.knokout: there is no measure 'knokout', did you mean 'knockout'\?"),
        ("training.epocs=2", r"training\.epocs: no such field; did you mean 'epochs'\?"),
        ("training.settings={rank: 4}", r"training\.settings: no such field"),
        ("training.method=full", "training: there is no training method 'full'"),
        ("training.styles=[nope]", r"training\.styles: no style 'nope'; the styles are list, sentence"),
        ("scorer=containment", r"scorer: no such field; it is a setting of a measure now: measures\.accuracy\.scorer"),
        ("replicates.draws=0", r"replicates\.draws: Input should be greater than 0"),
        ("facts.split.by=category", "facts.split.by 'category' needs 'facts.knowledge'"),
    ],
)
def test_wrong_field_is_named(change: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_study(CITIES, [change])
    assert "\n" not in str(caught.value)


def test_a_claim_names_a_quantity_of_the_study() -> None:
    claim = {"id": "c", "statement": "s", "arms": ["known", "base"], "direction": "increase", "smallest_effect": 1}
    good = claim | {"measure": "accuracy"}
    for changes, message in (
        ([{"measure": "attention"}], "there is no quantity 'attention', did you mean 'attention_"),
        ([{"arms": ["known", "nobody"]}], "arm 'nobody' is compared but not defined"),
        ([{"style": "poem"}], "claim 'c': no style 'poem'; the styles are list, sentence"),
        ([{"minus": {"style": "poem"}}], "claim 'c': no style 'poem'"),
        (
            [{"arms": ["base"], "scope": "training"}],
            "claim 'c' is about a way of training, which takes an arm trained here and replicates",
        ),
        ([{}, {}], "two claims have the id 'c'"),
        ([{"primary": True}, {"id": "d", "primary": True}], "claims 'c' and 'd' are both primary"),
        ([{"select": {"top": 1, "over": ["layer"]}}], "chooses cells on arm 'base' and compares with it"),
        ([{"select": {"top": 1, "over": ["layer"], "on": 1}}], "on draws, of which arm 'base' has none"),
        ([{"select": {"top": 1, "over": ["layer"], "on": 9}, "arms": ["known", "unknown"]}], "leaves none of 1"),
        ([{"select": {"top": 1, "over": ["layer"]}, "arms": ["known"]}], "which it can for a difference of two arms"),
    ):
        with pytest.raises(BadInput, match=message):
            load_study(CITIES, [f"claims={json.dumps([good | change for change in changes])}"])
    with pytest.raises(BadInput, match="replicates.first_only: no measure 'patching' in the study"):
        load_study(CITIES, ["measures={accuracy: {}}", "replicates={first_only: [patching]}", "claims=[]"])


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not readable YAML"), ("- a", "holds no study"), ("", "holds no study")]
)
def test_bad_yaml(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        load_study(path)


def test_no_such_study() -> None:
    with pytest.raises(BadInput, match=r"no such study: 'nope\.yaml'"):
        load_study(Path("nope.yaml"))


def test_a_study_survives_its_own_yaml(small: StudyConfig) -> None:
    """What `study.yaml` of a run holds is the study again."""
    text = yaml.safe_dump(small.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    again = parse_study(yaml.safe_load(text), "test")
    assert again.model_dump(mode="json") == small.model_dump(mode="json")
    assert again.styles.keys() == small.styles.keys()


def test_the_demo_states_three_claims_of_the_paper() -> None:
    claims = yaml.safe_load((ROOT / "experiments" / "cities.yaml").read_text())["claims"]
    assert sum(claim.get("primary", False) for claim in claims) == 1
    assert len([claim for claim in claims if "Ghosal" in claim["statement"]]) >= 3
    assert np.isfinite([claim["smallest_effect"] for claim in claims]).all()
