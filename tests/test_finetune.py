"""Training an arm: the loss is on the answer, a run repeats exactly, the adapter loads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.finetune.lora import IGNORED, Training, _collate, _example, batches, train_adapter
from subjattn.measures.answers import answer_logprob
from subjattn.models import load_model
from subjattn.prompts import PromptSet, make_prompts


ORDER = [[0, 5, 1, 2], [3, 4], [5, 1, 4, 3], [0, 2]]
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
    files = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("one", "again")]
    assert files[0] == files[1], "down to the file's bytes"
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
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(5)
    before = torch.get_rng_state(), random.getstate(), [*map(str, np.random.get_state(legacy=False).items())]
    train_adapter(base, list(prompts), Training(), tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == [*map(str, np.random.get_state(legacy=False).items())]


@given(n_facts=st.integers(1, 40), batch_size=st.integers(1, 12), n_steps=st.integers(1, 30), seed=st.integers(0, 3))
def test_every_epoch_is_an_order_of_all_facts(n_facts: int, batch_size: int, n_steps: int, seed: int) -> None:
    found = batches(n_facts, batch_size, n_steps, seed)
    per_epoch = -(-n_facts // batch_size)
    assert len(found) == n_steps and all(1 <= len(batch) <= batch_size for batch in found)
    epochs = [[i for batch in found[at : at + per_epoch] for i in batch] for at in range(0, n_steps, per_epoch)]
    for epoch in epochs[: n_steps // per_epoch]:
        assert sorted(epoch) == list(range(n_facts))
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert batches(n_facts, batch_size, n_steps + 5, seed)[:n_steps] == found, "steps only add"


def test_the_order_is_fixed_for_good() -> None:
    """Written down here: no library's next version may change it; seeds and epochs differ."""
    assert batches(6, 4, 4, 0) == ORDER
    assert batches(6, 4, 4, 1) != ORDER and ORDER[:2] != ORDER[2:]


@pytest.mark.parametrize("devices", [1, 4])
def test_a_batch_has_as_many_facts_on_any_number_of_devices(
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    cities: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    devices: int,
) -> None:
    """Planted: transformers takes its batch times the GPUs it sees, and deals them out."""
    from transformers import TrainingArguments

    seen: list[list[int]] = []
    steps: list[int] = []
    forward = torch.nn.Embedding.forward

    def recording(self: Any, ids: Any) -> Any:
        if self.num_embeddings == base.model.config.vocab_size:
            seen.append([len(ids), *ids[:, -1].tolist()])
        return forward(self, ids)

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: devices))
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", lambda *_: pytest.fail("dealt out over devices"))
    base = load_model(str(tiny_folders["llama"]))
    prompts = make_prompts(draw(cities, 10), base.tokenizer, TEMPLATES["country"]["list"])
    monkeypatch.setattr(torch.nn.Embedding, "forward", recording)
    training = Training(epochs=2, batch_size=4, lora_rank=2)
    train_adapter(base, list(prompts), training, tmp_path, on_step=lambda: steps.append(len(seen)))
    assert [batch[0] for batch in seen] == [4, 4, 2] * 2 and steps == [1, 2, 3, 4, 5, 6]


def test_refusals(tiny_folders: dict[str, Path], trained: tuple[Path, PromptSet], tmp_path: Path) -> None:
    folder, prompts = trained
    with pytest.raises(BadInput, match="no prompts to train on"):
        train_adapter(load_model(str(tiny_folders["llama"])), [], Training(), tmp_path)
    with pytest.raises(BadInput, match="already carries the adapter"):
        tuned = load_model(str(tiny_folders["llama"]), adapter=folder / "one")
        train_adapter(tuned, list(prompts), Training(), tmp_path)
