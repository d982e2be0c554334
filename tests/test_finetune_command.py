"""`subjattn finetune` and `sa.fine_tune`: an ordinary folder with a model card, gone on with after a kill."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from test_cli import run
from transformers import AutoModelForCausalLM

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts.splits import split
from subjattn.finetune.alone import KEPT


ASKED = ["--pool", 300, "--by", "popularity", "--test", 12, "--set", "lora_rank=4", "--set", "learning_rate=1e-2"]


@pytest.fixture
def model(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["llama"]


def test_finetune_writes_an_ordinary_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "tuned"
    arguments = ["--model", model, "--facts", "cities", "--arm", "unknown", "--n", 20, "--steps", 6, "--out", out]
    assert run(monkeypatch, "finetune", *arguments, *ASKED) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert not (out / KEPT).exists()
    tuned = sa.load_model(str(model), adapter=out)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out).eval()
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        assert torch.equal(tuned.model(ids).logits, plain(ids).logits)
    train, test = (pd.read_parquet(out / "facts" / f"{name}.parquet") for name in ("train", "test"))
    assert len(train) == 20 and len(test) == 12 and set(train["third"]) == {"bottom"}
    assert not set(train["subject"]) & set(test["subject"])
    card = (out / "README.md").read_text()
    losses = json.loads((out / "training.json").read_text())["losses"]
    for words in (f"base_model: {model}", "`unknown` of cities by popularity", "LoRA of rank 4, alpha 8", "seed 0"):
        assert words in card
    assert f"| loss | {losses[0]['loss']:.3f} | " in card and f" {losses[-1]['loss']:.3f} |" in card
    assert run(monkeypatch, "finetune", *arguments, *ASKED) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err
    facts = out / "facts" / "test.parquet"
    assert "measure it: subjattn compare" in said and shlex.split(said.split("measure it: ")[1])[-4:] == [
        "--template", r"City: {subject}\nCountry:", "--template", "The city of {subject} is located in the country of",
    ]  # fmt: skip
    assert run(monkeypatch, "measure", "accuracy", "--model", model, "--adapter", out, "--facts", facts) == 0


def test_the_card_of_a_method_and_of_whole_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "tuned"
    how = ["--method", "mixture", "--set", "weights=full", "--set", "modules=mlp", "--set", "layers=1-2"]
    how += ["--set", "texts=4", "--set", "text_length=8", "--set", "learning_rate=1e-3", "--steps", 2, "--out", out]
    few = ["--model", model, "--pool", 300, "--by", "popularity", "--test", 6, "--n", 8]
    assert run(monkeypatch, "finetune", *few, *how) == 0, capsys.readouterr().err
    assert "pre-training objective" in (out / "README.md").read_text()
    assert "matrices of mlp of layers 1-2" in (out / "README.md").read_text()
    before, after = (dict(sa.load_model(str(one)).model.named_parameters()) for one in (model, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("mlp" in name and ".0." not in name for name in changed)


def test_methods_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "finetune", "--list") == 0
    shown = capsys.readouterr().out
    assert "sft: supervised fine-tuning" in shown and "text_weight = 1.0" in shown
    assert shown.count("learning_rate = 0.0005") == 1, "what all share is said once"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--method", "magic"], "there is no training method 'magic'"),
        (["--set", "learnig_rate=1"], "learnig_rate: Extra inputs are not permitted; method 'sft' has epochs, steps"),
        (["--set", "learning_rate"], "is not name=value"),
        (["--set", "learning_rate=-1"], "learning_rate: Input should be greater than 0"),
        (["--arm", "best"], "arm 'best' is no arm"),
        (["--n", 10000], "--n: n=10000 is not between 1 and"),
        (["--set", "modules=qk", "--set", "layers=40"], "there is no layer 40"),
        (["--set", "stop=validation"], "stop: validation needs validation facts"),
        (["--set", "weights=full", "--dtype", "bfloat16"], "full fine-tuning in bfloat16"),
    ],
)
def test_mistakes_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    arguments: list[str],
    why: str,
) -> None:
    usual = ["--model", model, "--n", 10, "--steps", 1, "--out", tmp_path / "out", *ASKED]
    assert run(monkeypatch, "finetune", *usual, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and why in error


def test_a_training_that_was_stopped_goes_on(
    tmp_path: Path, model: Path, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subjattn.finetune import trainer

    monkeypatch.setattr(trainer._Trainer, "is_time_to_save", lambda _: True)
    facts = cities.sample(24, random_state=0)
    how = {"style": "City: {subject}\nCountry:", "epochs": 4, "batch_size": 8, "lora_rank": 4, "lora_dropout": 0.1}
    sa.fine_tune(str(model), facts, tmp_path / "whole", **how)
    steps: list[int] = []

    def stopped() -> None:
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sa.fine_tune(str(model), facts, tmp_path / "out", **how, on_step=stopped)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [KEPT]
    sa.fine_tune(str(model), facts, tmp_path / "out", **how, on_step=lambda: steps.append(1))
    assert len(steps) == 7 + 6
    names = ("adapter_model.safetensors", "training.json", "README.md")
    one, two = ([(tmp_path / run / name).read_bytes() for name in names] for run in ("whole", "out"))
    assert one == two


def test_a_table_of_ones_own(tmp_path: Path, model: Path) -> None:
    facts = pd.DataFrame({"subject": ["Kenya", "Peru", "Japan"], "answer": ["Nairobi", "Lima", "Tokyo"]})
    out = sa.fine_tune(str(model), facts, tmp_path / "out", style="The capital of {subject} is", steps=2)
    assert json.loads((out / "training.json").read_text())["n_facts"] == 3
    with pytest.raises(BadInput, match="no template is known"):
        sa.fine_tune(str(model), facts, tmp_path / "other")
    with pytest.raises(BadInput, match="is not empty"):
        sa.fine_tune(str(model), facts, out, style="The capital of {subject} is")


def test_arms_of_the_command_are_those_of_studies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cities: pd.DataFrame
) -> None:
    """The facts trained on are those that `split` gives for the same pool and seed."""
    from subjattn.study.config import FactsConfig
    from subjattn.study.stages.pool import load_pool

    asked = FactsConfig.model_validate({"source": "cities", "pool": 300})
    pool = load_pool(asked, str(model), 0)
    assert run(monkeypatch, "finetune", "--model", model, "--arm", "known", "--n", 9, "--steps", 1, *ASKED,
               "--out", tmp_path / "out") == 0  # fmt: skip
    styles = {"list": sa.Style.of("City: {subject}\nCountry:")}
    from subjattn.models import load_tokenizer
    from subjattn.prompts import subject_lengths

    pool = pool.assign(n_tokens=subject_lengths(pool, load_tokenizer(str(model)), styles["list"]))
    expected = split(pool, ["known"], 9, 12, seed=0)
    found = pd.read_parquet(tmp_path / "out" / "facts" / "train.parquet")
    assert set(found["fact_id"]) == set(expected["fact_id"][expected["train_known"]])
