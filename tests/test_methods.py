"""Training methods that add to the loss: each term against one computed by hand, and gone on from after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_training_kills import examples as examples
from test_training_kills import files
from test_training_kills import started as started
from transformers import PreTrainedTokenizerFast

from subjattn.errors import BadInput
from subjattn.finetune.examples import Example, collate
from subjattn.finetune.fit import fit
from subjattn.finetune.methods.attention_kl import AttentionKLTraining, Divergence
from subjattn.finetune.methods.mixture import MixtureTraining, Text
from subjattn.finetune.methods.self_distillation import DistillationTraining, Teacher
from subjattn.finetune.record import Lessons, method_of, methods
from subjattn.finetune.settings import Training
from subjattn.finetune.texts import blocks_of_text, sampled_text
from subjattn.finetune.update import Update
from subjattn.models import load_model


SHORT = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8, "lora_rank": 4}
METHODS = {
    "mixture": {"text_batch": 3, "text_length": 9, "texts": 10},
    "attention_kl": {"kl_batch": 4},
    "self_distillation": {},
}


def moved(folder: Path, settings: Training) -> Update:
    """A model whose update is not zero."""
    update = Update(load_model(str(folder)), settings)
    torch.manual_seed(1)
    update.put({name: 0.2 * torch.randn_like(tensor) for name, tensor in update.tensors.items()})
    update.model.eval()
    return update


def logprobs(update: Update, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return update.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_text_is_predicted_token_by_token(tiny_folders: dict[str, Path], weights: Any) -> None:
    settings = MixtureTraining(text_weight=0.5, text_batch=3, text_length=9, weights=weights)
    update, blocks = moved(tiny_folders["llama"], settings), torch.randint(2, 500, (4, 9))
    found = float(Text(update, blocks, settings)({}, torch.zeros(1), 1).detach())
    nats = []
    for row in (3, 0, 1):  # the second step goes on where the first ended, and round
        said = logprobs(update, blocks[row].tolist())
        nats += [-float(said[i, token]) for i, token in enumerate(blocks[row].tolist()[1:])]
    assert found == pytest.approx(0.5 * sum(nats) / len(nats), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_outputs_are_held_to_the_bases(
    tiny_folders: dict[str, Path], examples: list[Example], name: str
) -> None:
    """Against plain hooks on two models apart, prompt by prompt without padding."""
    settings = AttentionKLTraining(kl_weight=2.0, kl_batch=5)
    update = Update(load_model(str(tiny_folders[name])), settings)
    update.model.eval()
    term = Divergence(update, Lessons([], known=examples[:8]), settings)
    assert float(term({}, torch.zeros(1), 0).detach()) == pytest.approx(0, abs=1e-7), "nothing is changed yet"
    own = moved(tiny_folders[name], settings)
    update.put({key: tensor.data for key, tensor in own.tensors.items()})
    found = term({}, torch.zeros(1), 1)
    assert found.requires_grad
    base, n_tokens, total = load_model(str(tiny_folders[name])), 0, torch.zeros(3)
    for i in (5, 6, 7, 0, 1):
        kept: dict[str, list[torch.Tensor]] = {"base": [], "tuned": []}
        for which, model in (("base", base.model), ("tuned", own.model)):
            attention = [module for key, module in model.named_modules() if key.endswith(("self_attn", ".attn"))]
            hooks = [
                one.register_forward_hook(lambda *a, to=kept[which]: to.append(a[2][0][0].log_softmax(-1)))
                for one in attention
            ]
            with torch.no_grad():
                model(input_ids=torch.tensor([examples[i].ids]))
            for hook in hooks:
                hook.remove()
        for layer in range(3):
            p, q = kept["base"][layer], kept["tuned"][layer]
            total[layer] += (p.exp() * (p - q)).sum()
        n_tokens += len(examples[i].ids)
    assert float(found.detach()) == pytest.approx(2.0 * float((total / n_tokens).mean()), rel=1e-4)


def test_a_teachers_answers_are_kept_near(tiny_folders: dict[str, Path], examples: list[Example]) -> None:
    settings = DistillationTraining(distillation_weight=3.0, temperature=0.5)
    update, batch = moved(tiny_folders["llama"], settings), collate(examples[:4])
    update.model.train()
    state = {name: tensor * 0.3 for name, tensor in update.state().items()}
    before = update.state()
    with torch.no_grad():
        logits = update.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = float(Teacher(update, state, settings)(batch, logits, 0))
    assert all(torch.equal(before[name], tensor) for name, tensor in update.tensors.items()), "the student is back"
    assert update.model.training
    nats = []
    for example in examples[:4]:
        ours = logprobs(update, example.ids)
        update.put(state)
        theirs = logprobs(update, example.ids)
        update.put(before)
        for at in range(example.prompt.prediction, len(example.ids) - 1):
            p, q = (of[at].double().mul(2).log_softmax(-1) for of in (theirs, ours))
            nats.append(float((p.exp() * (p - q)).sum()))
    assert found == pytest.approx(3.0 * sum(nats) / len(nats), rel=1e-4)


def test_the_teacher_is_the_model_after_an_epoch_of_known_facts(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path
) -> None:
    """With a weight that leaves nothing else the student becomes what plain training on known facts gives."""
    from safetensors.torch import load_file

    folder = str(tiny_folders["llama"])
    plain = Training(epochs=1, learning_rate=1e-2, batch_size=8, lora_rank=4)
    fit(load_model(folder), Lessons(examples[12:], seed=2), plain, tmp_path / "alone")
    settings = DistillationTraining(**SHORT)
    lessons = Lessons(examples[:12], known=examples[12:], seed=2, kept=tmp_path / "kept")
    method_of("self_distillation").train(load_model(folder), lessons, settings, tmp_path / "student")
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    teacher = load_file(tmp_path / "kept" / "teacher.safetensors")
    assert all(torch.equal(alone[name.replace(".default", "")], tensor) for name, tensor in teacher.items())


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_begins_with_the_answers_own(
    name: str, tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path
) -> None:
    """Of every method the first step's answer loss is that of plain training; what it adds is beside it."""
    said = {}
    for one in ("sft", name):
        method = method_of(one)
        settings = method.settings(**SHORT, **METHODS.get(one, {}))
        out = tmp_path / one
        method.train(load_model(str(tiny_folders["llama"])), Lessons(examples[:16], known=examples[16:]), settings, out)
        said[one] = json.loads((out / "training.json").read_text())["losses"]
    assert said[name][0]["answer_loss"] == pytest.approx(said["sft"][0]["loss"], rel=1e-6)
    assert len(said[name]) == 4 and all(one["loss"] >= one["answer_loss"] for one in said[name])
    assert [one["loss"] for one in said[name]][1:] != [one["loss"] for one in said["sft"]][1:]


@pytest.mark.parametrize("weights", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_method_ends_with_the_same_bits(
    name: str, weights: str, started: Callable[..., int], tmp_path: Path
) -> None:
    own = SHORT | METHODS[name] | {"lora_dropout": 0.2, "weights": weights}
    settings = method_of(name).settings(**own | ({"learning_rate": 1e-3} if weights == "full" else {}))
    assert started(tmp_path / "whole", tmp_path / "one", settings, every=1000, method=name) == 0
    assert started(tmp_path / "out", tmp_path / "kept", settings, step=4, method=name) == -signal.SIGKILL
    assert started(tmp_path / "out", tmp_path / "kept", settings, method=name) == 0
    assert json.loads((tmp_path / "out" / "steps.json").read_text()) == 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_text_from_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parts = ["Nairobi is in Kenya.", "Lima is in Peru."]
    (tmp_path / "a.txt").write_text("\n\n".join(parts))
    pd.DataFrame({"text": parts}).to_parquet(tmp_path / "a.parquet")
    expected = [token for part in parts for token in [*tokenizer(part).input_ids, 1]]
    for name in ("a.txt", "a.parquet"):
        blocks = blocks_of_text(str(tmp_path / name), tokenizer, 99, 4)
        assert blocks.flatten().tolist() == expected[: len(expected) // 4 * 4]
    assert blocks_of_text(str(tmp_path / "a.txt"), tokenizer, 2, 4).shape == (2, 4)
    pd.DataFrame({"words": parts}).to_parquet(tmp_path / "b.parquet")
    for wrong, why in (("b.parquet", "no column 'text'; it has words"), ("c.txt", "there is no such file")):
        with pytest.raises(BadInput, match=why):
            blocks_of_text(str(tmp_path / wrong), tokenizer, 2, 4)
    with pytest.raises(BadInput, match="a block takes 500"):
        blocks_of_text(str(tmp_path / "a.txt"), tokenizer, 2, 500)


def test_text_is_drawn_from_the_model_itself(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Of many texts, tokens behind the first come as often as the model has it."""
    base = load_model(str(tiny_folders["llama"]))
    found = sampled_text(base, base.model, 3000, 2, 0, tmp_path)
    assert found.shape == (3000, 2) and (found[:, 0] == 0).all()
    with torch.no_grad():
        expected = base.model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    share = torch.bincount(found[:, 1], minlength=512) / 3000
    assert float((share - expected).abs().max()) < 4 * (0.25 / 3000) ** 0.5
    assert torch.equal(sampled_text(base, base.model, 3000, 2, 9, tmp_path), found), "what is written stays"


def test_methods_say_what_they_need(tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path) -> None:
    assert set(METHODS) | {"sft"} <= set(methods())
    for name in ("attention_kl", "self_distillation"):
        assert method_of(name).needs == {"known"}
        with pytest.raises(BadInput, match="known facts, and there are none"):
            settings = method_of(name).settings(**SHORT)
            method_of(name).train(load_model(str(tiny_folders["llama"])), Lessons(examples), settings, tmp_path)
