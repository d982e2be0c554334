"""Random weights of a model's shape take the whole road; a sharded folder loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import run
from transformers import AutoModelForCausalLM

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.models.random import random_folder, shapes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_random_weights_have_the_models_shape_and_are_the_same_each_time(tiny_folders: dict[str, Path]) -> None:
    folder = random_folder(str(tiny_folders["llama"]), seed=5)
    assert (
        folder == random_folder(str(tiny_folders["llama"]), seed=5) != random_folder(str(tiny_folders["llama"]), seed=1)
    )
    one, again, own = (sa.load_model(str(name)) for name in (folder, folder, tiny_folders["llama"]))
    other = sa.load_model(str(random_folder(str(tiny_folders["llama"]), seed=1)))
    for name, tensor in own.model.named_parameters():
        assert tensor.shape == one.model.get_parameter(name).shape
        assert torch.equal(one.model.get_parameter(name), again.model.get_parameter(name))
    weights = [of.model.get_parameter("model.layers.0.mlp.up_proj.weight") for of in (one, own, other)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_shape_that_is_known_stands_for_a_model_that_is_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    real = shapes()["llama-2-7b"]
    assert (real.hidden_size, real.num_hidden_layers, real.num_attention_heads) == (4096, 32, 32)
    monkeypatch.setattr("subjattn.models.random.shapes", lambda: {"llama-2-7b": small})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = sa.load_model(str(random_folder("meta-llama/Llama-2-7b-hf")), dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and loaded.model.config.num_hidden_layers == 2
    assert loaded.model.config.vocab_size >= len(loaded.tokenizer), "every token has a row"
    with pytest.raises(BadInput, match="the shape of 'org/unheard-of' is not at hand"):
        random_folder("org/unheard-of")


@pytest.mark.parametrize("name", ["popqa_llama2_7b"])
def test_the_whole_road_with_random_weights(
    name: str,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The experiment as it is but for its size and its facts."""
    facts = tmp_path / "facts.csv"
    rows = [f"City {i},What is City {i}?,Land {i % 3},{i}" for i in range(90)]
    facts.write_text("subject,question,answer,popularity\n" + "\n".join(rows))
    small = {"model": tiny_folders["llama"], "facts.source": facts, "facts.n_train": 8, "facts.n_test": 6}
    small |= {"training.steps": 1, "measures.knockout.facts": 1, "measures.patching.pairs": 1, "dtype": "bfloat16"}
    small |= {"measures.swap_weights.facts": 2}
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "out"
    study = Path(__file__).parent.parent / "experiments" / f"{name}.yaml"
    assert run(monkeypatch, "run", study, "--out", out, "--random-init", "--workers", 1, *settings) == 0
    said = capsys.readouterr()
    assert "random weights" in said.err and "train: 2 stages" in said.out and "all: " in said.out
    seconds = [json.loads(path.read_text())["seconds"] for path in out.rglob("stage.json")]
    total = float(said.out.rsplit("all: ", 1)[1].split(" stages, ")[1].split(" s")[0])
    assert total == pytest.approx(sum(seconds), abs=0.1)
    assert "random" in yaml.safe_load((out / "study.yaml").read_text())["model"]


def test_random_weights_are_the_studys_own_models(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {"name": "x", "model": str(tiny_folders["llama"]), "styles": {"a": "{subject} is"}, "facts": {"n_test": 4}}
    study |= {"arms": {"base": {}, "other": {"model": str(tiny_folders["mistral"])}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(study))
    assert run(monkeypatch, "run", tmp_path / "x.yaml", "--random-init") == 2
    assert "leave out arms that bring another" in capsys.readouterr().err


def test_a_sharded_folder_loads(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    own = sa.load_model(str(tiny_folders["llama"]))
    AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]).save_pretrained(tmp_path / "s", max_shard_size="40KB")
    own.tokenizer.save_pretrained(tmp_path / "s")
    assert len([*(tmp_path / "s").glob("*.safetensors")]) > 2
    loaded = sa.load_model(str(tmp_path / "s"))
    for name, tensor in own.model.named_parameters():
        assert torch.equal(tensor, loaded.model.get_parameter(name))
