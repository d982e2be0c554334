"""Studies end to end on a small model: files, reuse, being killed, arms brought along."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml
from conftest import CITIES

from subjattn.errors import BadInput
from subjattn.plots import report
from subjattn.progress import Progress
from subjattn.stages import alone, finished, writing
from subjattn.study.config import StudyConfig, load_study, parse_study
from subjattn.study.run import Runner, run_study
from subjattn.study.summary import MEASURES


def test_summary_has_its_keys(done: tuple[Path, dict[str, Any]]) -> None:
    out, returned = done
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    assert set(summary) >= {"study", "model", "arms", "contrasts", "claims"}
    assert list(summary["arms"]) == ["base", "known", "unknown", "random"]
    for arm in summary["arms"].values():
        assert arm["n_test"] == 24
        assert set(arm["styles"]) == {"list", "sentence"}
        assert all(arm[measure] == arm["styles"]["list"][measure] for measure in MEASURES)
    assert {(row["arm_a"], row["arm_b"]) for row in summary["contrasts"]} == {
        ("unknown", "known"), ("known", "base"), ("unknown", "base"),
    }  # fmt: skip
    for row in [*summary["contrasts"], *summary["claims"]]:
        assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
        assert row["n"] == 24
    assert len(summary["claims"]) >= 3
    for claim in summary["claims"]:
        assert {"id", "statement", "verdict", "estimate", "ci_low", "ci_high"} <= set(claim)
        assert claim["caveat"] == "one seed: interval over facts only"


def test_summary_agrees_with_its_arrays(done: tuple[Path, dict[str, Any]]) -> None:
    """Arms and contrasts recomputed from the saved files."""
    out, summary = done
    arrays = xr.open_dataset(out / "measures.nc")
    predictions = pd.read_parquet(out / "predictions.parquet")
    for arm, found in summary["arms"].items():
        for style, numbers in found["styles"].items():
            cell = arrays.sel(arm=arm, style=style)
            assert numbers["attention_to_subject"] == pytest.approx(
                float(cell["attention_to_subject"].mean()), abs=1e-6
            )
            assert numbers["knockout_drop"] == pytest.approx(float(cell["knockout_drop"].mean()))
            own = predictions[(predictions["arm"] == arm) & (predictions["style"] == style)]
            assert numbers["accuracy"] == pytest.approx(own["correct"].mean())
            assert numbers["answer_logprob"] == pytest.approx(own["answer_logprob"].mean())
            thirds = numbers["by_popularity_third"]
            assert sum(third["n"] * third["accuracy"] for third in thirds.values()) == pytest.approx(
                own["correct"].sum()
            )
    drop = arrays["knockout_drop"].sel(style="sentence")
    row = next(
        r
        for r in summary["contrasts"]
        if (r["measure"], r["style"], r["arm_b"]) == ("knockout_drop", "sentence", "known")
    )
    assert row["estimate"] == pytest.approx(float((drop.sel(arm="unknown") - drop.sel(arm="known")).mean()))


def test_arms_learn_other_facts_than_are_tested(done: tuple[Path, dict[str, Any]]) -> None:
    facts = pd.read_parquet(done[0] / "facts" / "facts.parquet")
    for arm in ("known", "unknown", "random"):
        assert facts[f"train_{arm}"].sum() == 32
        assert not (facts[f"train_{arm}"] & facts["test"]).any()


def test_tuned_arms_differ_from_base(done: tuple[Path, dict[str, Any]]) -> None:
    arrays = xr.open_dataset(done[0] / "measures.nc")["answer_logprob"]
    for arm in ("known", "unknown", "random"):
        assert float(abs(arrays.sel(arm=arm) - arrays.sel(arm="base")).min()) > 0


def test_manifest_says_where_numbers_come_from(done: tuple[Path, dict[str, Any]]) -> None:
    manifest = json.loads((done[0] / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    base, known = manifest["arms"]["base"], manifest["arms"]["known"]
    assert base["weights_sha256"] == known["weights_sha256"]
    assert base["adapter_sha256"] is None and known["adapter_sha256"] is not None
    assert known["adapter_merged"] is False
    assert base["dtype"] == "float32"


def test_arrays_open_in_one_line_and_say_what_they_are(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    arrays = xr.open_dataset(out / "measures.nc")
    assert arrays["attention_to_subject"].dims == ("arm", "style", "fact", "layer", "head")
    assert arrays["knockout_drop_by_layer"].dims == ("arm", "style", "layer_fact", "route", "layer")
    for array in arrays.data_vars.values():
        assert array.attrs["unit"] and array.attrs["definition"]
    assert "every answer-predicting position to" in arrays["knockout_drop"].attrs["definition"]
    assert "every position after the subject to" in arrays["knockout_drop_total"].attrs["definition"]
    patching = xr.open_dataarray(out / "patching-list.nc")
    assert patching.dims == ("arm", "fact", "layer", "role")
    assert xr.open_dataarray(out / "tokens-sentence.nc").sizes["arm"] == 4


def test_a_finished_study_is_reused(
    done: tuple[Path, dict[str, Any]], small: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, summary = done
    for work in ("load_model", "train_adapter", "choose"):
        monkeypatch.setattr(f"subjattn.study.run.{work}", lambda *_, **__: pytest.fail("done again"))
    assert run_study(small, out) == summary


def test_only_what_changed_is_done_again(
    done: tuple[Path, dict[str, Any]], small: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another smallest effect touches no stage; other training touches trained arms only."""
    out, _ = done
    raw = small.model_dump(mode="json")
    raw["claims"][0]["smallest_effect"] = 0.5
    monkeypatch.setattr("subjattn.study.run.load_model", lambda *_, **__: pytest.fail("done again"))
    assert run_study(parse_study(raw, "test"), out)["claims"][0]["smallest_effect"] == 0.5
    asked: list[str | None] = []

    def stop(*_: object, adapter: str | None = None, **__: object) -> None:
        asked.append(adapter)
        raise KeyboardInterrupt

    raw["training"]["learning_rate"] = 0.02
    monkeypatch.setattr("subjattn.study.run.load_model", stop)
    with pytest.raises(KeyboardInterrupt):
        run_study(parse_study(raw, "test"), out)
    assert asked == [None], "training of the first arm begins with the plain model"
    assert (out / "arms" / "known" / "adapter" / "adapter_model.safetensors").is_file(), "nothing finished is lost"
    monkeypatch.undo()
    run_study(small, out)


KILLER = """
import os, signal, sys
from pathlib import Path
from subjattn import stages
from subjattn.study import run, summary
from subjattn.study.config import parse_study
import json

config, out, target = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if target == "facts":
    stages._sync = die
elif target == "train":
    original = run.train_adapter
    def train(*args, **kwargs):
        steps = []
        kwargs["on_step"] = lambda: steps.append(1) or (len(steps) > 0 and die())
        original(*args, **kwargs)
    run.train_adapter = train
elif target == "measure":
    run.measuring.patch_grid = die
elif target == "rename":
    original = stages._sync
    def sync(folder):
        original(folder)
        if "sentence" in str(folder) and "unknown" in str(folder):
            die()
    stages._sync = sync
elif target == "summary":
    summary._manifest = die
elif target == "report":
    run.report.write = die
run.run_study(parse_study(config, "killed"), out)
"""


def test_killed_in_every_stage_it_ends_with_the_same_numbers(
    done: tuple[Path, dict[str, Any]], small: StudyConfig, tmp_path: Path
) -> None:
    """SIGKILL inside facts, training, measuring, before a rename, in summary and report, one after the other."""
    out = tmp_path / "killed"
    for target in ("facts", "train", "measure", "rename", "summary", "report"):
        arguments = [sys.executable, "-c", KILLER, small.model_dump_json(), str(out), target]
        process = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
        assert not (out / "report.html").exists()
    summary = run_study(small, out)
    assert summary == done[1]
    assert (out / "report.html").is_file()
    assert not list(out.rglob(".*.unfinished"))


def test_a_summary_never_stands_beside_other_stages(
    done: tuple[Path, dict[str, Any]], small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a changed study is stopped half-way, and a report is asked for."""
    out = Path(shutil.copytree(done[0], tmp_path / "copy"))
    raw = small.model_dump(mode="json")
    raw["facts"]["n_test"] = 21

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subjattn.study.run.train_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        run_study(parse_study(raw, "test"), out)
    with pytest.raises(BadInput, match="holds no finished study"):
        report.write(out)


def test_styles_in_another_order_are_another_training(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json")
    raw["styles"] = dict(reversed(raw["styles"].items()))
    keys = [Runner(config, tmp_path, Progress()).training_key("known") for config in (small, parse_study(raw, "test"))]
    assert keys[0] != keys[1]


def test_a_style_may_be_called_adapter(small: StudyConfig, tmp_path: Path) -> None:
    raw = small.model_dump(mode="json") | {"styles": {"adapter": "{subject} is in"}}
    raw |= {"arms": {"base": {}, "known": {"train": "known"}}, "contrasts": [], "claims": []}
    run_study(parse_study(raw, "test"), tmp_path)
    assert (tmp_path / "arms" / "known" / "adapter" / "adapter_model.safetensors").is_file()


def test_one_process_a_folder(small: StudyConfig, tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(BadInput, match="another process is writing"):
        run_study(small, tmp_path)


def test_a_failed_stage_leaves_the_finished_one(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    with writing(folder, "a") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(RuntimeError), writing(folder, "b") as temporary:
        (temporary / "x").write_text("new")
        raise RuntimeError
    assert (folder / "x").read_text() == "old"
    assert finished(folder, "a") and not finished(folder, "b")
    with writing(folder, "b") as temporary:
        (temporary / "x").write_text("new")
    assert finished(folder, "b") and (folder / "x").read_text() == "new"


def test_arm_of_another_shape_is_refused(tiny_folders: dict[str, Path], small: StudyConfig, tmp_path: Path) -> None:
    import zoo
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(**zoo.SHAPE | {"num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tiny_folders["llama"]).save_pretrained(tmp_path / "two")
    raw = small.model_dump(mode="json") | {
        "arms": {"base": {}, "tuned": {"model": str(tmp_path / "two")}},
        "contrasts": [],
        "claims": [],
    }
    with pytest.raises(BadInput, match="arm 'tuned' has 2 layers of 4 heads"):
        run_study(parse_study(raw, "test"), tmp_path / "out")


def test_arm_with_another_tokenizer_is_refused(
    tiny_folders: dict[str, Path], small: StudyConfig, tmp_path: Path, smollm2: Any
) -> None:
    other = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "other"))
    smollm2.tokenizer.save_pretrained(other)
    raw = small.model_dump(mode="json") | {
        "arms": {"base": {}, "tuned": {"model": str(other)}},
        "contrasts": [],
        "claims": [],
    }
    with pytest.raises(BadInput, match="arm 'tuned' reads .* as other tokens"):
        run_study(parse_study(raw, "test"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("facts.ntest=4", r"facts\.ntest: no such field; did you mean 'n_test'\?"),
        ("facts.n_test=0", r"facts\.n_test: .*greater than 0, not '0'"),
        ("arms.known.train=best", r"arms\.known: arm 'best' is no arm: use known, unknown, random, whole, top, bottom"),
        ("arms.known.adapter=x", "either trained here .* or brings an 'adapter', not both"),
        ("contrasts=[[unknown, nobody]]", "arm 'nobody' is compared but not defined"),
        ("styles.list='City'", r"must contain \{subject\} or \{question\}, or be one of cloze, late"),
        ("claims=[]x", "not YAML|claims"),
        ("nonsense", "is not key=value"),
        ("model.x=1", "'model' has no fields"),
    ],
)
def test_wrong_field_is_named(change: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_study(CITIES, [change])
    assert "\n" not in str(caught.value)


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


def test_the_demo_states_three_claims_of_the_paper() -> None:
    claims = yaml.safe_load(CITIES.read_text())["claims"]
    assert len([claim for claim in claims if "Ghosal" in claim["statement"]]) >= 3
    assert np.isfinite([claim["smallest_effect"] for claim in claims]).all()
