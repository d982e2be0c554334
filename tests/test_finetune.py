"""Training an arm: the loss is on the answer, a run repeats exactly, the adapter loads."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.finetune.lora import IGNORED, Training, _collate, _example, train_adapter
from subjattn.measures.answers import answer_logprob
from subjattn.models import load_model
from subjattn.prompts import PromptSet, make_prompts


TRAINING = Training(epochs=8, learning_rate=1e-2, batch_size=8, lora_rank=4, lora_alpha=8)


@pytest.fixture(scope="module")
def trained(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PromptSet]:
    folder = tmp_path_factory.mktemp("trained")
    base = load_model(str(tiny_folders["llama"]))
    prompts = make_prompts(draw(cities, 24), base.tokenizer, TEMPLATES["country"]["list"])
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        train_adapter(load_model(str(tiny_folders["llama"])), list(prompts), TRAINING, folder / name, seed=seed)
    return folder, prompts


def test_training_makes_its_answers_likelier(trained: tuple[Path, PromptSet], tiny_folders: dict[str, Path]) -> None:
    folder, prompts = trained
    base, tuned = (load_model(str(tiny_folders["llama"]), adapter=a) for a in (None, folder / "one"))
    assert float((answer_logprob(tuned, prompts) - answer_logprob(base, prompts)).mean()) > 1.0
    losses = [entry["loss"] for entry in json.loads((folder / "one" / "training.json").read_text())["losses"]]
    assert len(losses) == TRAINING.n_steps(24) == 24
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("epochs", "n_facts", "steps"), [(1, 640, 20), (10, 40, 20), (0.5, 64, 1), (0.1, 3, 1)])
def test_an_epoch_is_every_fact_once(epochs: float, n_facts: int, steps: int) -> None:
    assert Training(epochs=epochs, batch_size=32).n_steps(n_facts) == steps


def test_training_repeats_exactly_and_depends_on_its_seed(trained: tuple[Path, PromptSet]) -> None:
    folder, _ = trained
    one, again, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "again", "other"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_the_loss_sees_answers_and_the_end_only(cities: pd.DataFrame, tokenizer: object) -> None:
    prompts = make_prompts(draw(cities, 6), tokenizer, TEMPLATES["country"]["list"])
    batch = _collate([_example(prompt, 1) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == [*prompt.answer_ids, 1]
        assert batch["input_ids"][row][: len(prompt)].tolist() == list(prompt.ids)
        assert batch["attention_mask"][row].sum() == len(prompt) + 1


def test_training_does_not_touch_the_random_state(
    trained: object, tiny_folders: dict[str, Path], tmp_path: Path, cities: pd.DataFrame
) -> None:
    base = load_model(str(tiny_folders["llama"]))
    prompts = make_prompts(draw(cities, 8), base.tokenizer, TEMPLATES["country"]["list"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_adapter(base, list(prompts), Training(), tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_refusals(tiny_folders: dict[str, Path], trained: tuple[Path, PromptSet], tmp_path: Path) -> None:
    folder, prompts = trained
    with pytest.raises(BadInput, match="no prompts to train on"):
        train_adapter(load_model(str(tiny_folders["llama"])), [], Training(), tmp_path)
    with pytest.raises(BadInput, match="already carries the adapter"):
        tuned = load_model(str(tiny_folders["llama"]), adapter=folder / "one")
        train_adapter(tuned, list(prompts), Training(), tmp_path)
