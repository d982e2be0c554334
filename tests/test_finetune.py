"""Training an arm: what is trained and on what, the loss on answers, when it stops; a run repeats exactly and loads."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from zoo import CONFIGS

from subjattn.errors import AdapterMismatch, BadInput, TrainingDiverged
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.finetune.examples import ALIKE, IGNORED, Example, batches, collate, end_of_answer, make_examples, share_of
from subjattn.finetune.fit import fit
from subjattn.finetune.record import Lessons
from subjattn.finetune.settings import Training, layer_numbers
from subjattn.finetune.stopping import Log, best_step, diverged, reason_to_stop
from subjattn.finetune.update import Update, load_base
from subjattn.measures.answers import answer_logprob
from subjattn.measures.attention import subject_attention
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import Prompt, PromptSet, Style, make_prompts


ORDER = [[3, 4], [1, 0, 2, 5], [3, 5], [1, 4, 2, 0]]
LIST = Style.of(TEMPLATES["country"]["list"])
TRAINING = Training(epochs=8, learning_rate=1e-2, batch_size=8, lora_rank=4)


@pytest.fixture(scope="module")
def examples(cities: pd.DataFrame, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    return make_examples(draw(cities, 24), tokenizer, [LIST])


@pytest.fixture(scope="module")
def trained(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PromptSet]:
    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        fit(load_model(str(tiny_folders["llama"])), Lessons(examples, seed=seed), TRAINING, folder / name)
    return folder, PromptSet("list", tuple(example.prompt for example in examples))


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["losses"]]


def test_training_makes_its_answers_likelier(trained: tuple[Path, PromptSet], tiny_folders: dict[str, Path]) -> None:
    folder, prompts = trained
    base, tuned = (load_model(str(tiny_folders["llama"]), adapter=a) for a in (None, folder / "one"))
    assert float((answer_logprob(tuned, prompts) - answer_logprob(base, prompts)).mean()) > 1.0
    found = losses(folder / "one")
    assert len(found) == TRAINING.n_steps(24) == 24
    assert found[-1] < found[0]


@pytest.mark.parametrize(("epochs", "n_facts", "steps"), [(1, 640, 20), (10, 40, 20), (0.5, 64, 1), (0.1, 3, 1)])
def test_an_epoch_is_every_fact_once(epochs: float, n_facts: int, steps: int) -> None:
    assert Training(epochs=epochs, batch_size=32).n_steps(n_facts) == steps


def test_training_repeats_exactly_and_depends_on_its_seed(trained: tuple[Path, PromptSet]) -> None:
    folder, _ = trained
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        files = [(folder / run / name).read_bytes() for run in ("one", "again")]
        assert files[0] == files[1], "down to the file's bytes"
    one, again, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "again", "other"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_opens_in_plain_peft_merged_or_not(
    trained: tuple[Path, PromptSet], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, prompts = trained
    ours = load_model(str(tiny_folders["llama"]), adapter=folder / "one")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]), folder / "one"
    ).eval()
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, plain(ids).logits)
    plain.merge_and_unload().save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    merged = load_model(str(tmp_path))
    for measured in (answer_logprob, subject_attention):
        np.testing.assert_allclose(measured(ours, prompts), measured(merged, prompts), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(trained: tuple[Path, PromptSet], tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterMismatch, match="not found in the base model"):
        load_model(str(tiny_folders["gpt2"]), adapter=trained[0] / "one")


# What is trained on


def test_the_loss_sees_answers_and_the_end_only(examples: list[Example]) -> None:
    batch = collate(examples[:6])
    for row, example in enumerate(examples[:6]):
        labels, prompt = batch["labels"][row], example.prompt
        assert labels[labels != IGNORED].tolist() == [*prompt.answer_ids, 1]
        assert batch["input_ids"][row][: len(prompt)].tolist() == list(prompt.ids)
        assert batch["attention_mask"][row].sum() == len(prompt) + 1


TURNS = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}",
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "strange": "{% for m in messages %}[{{ m.role }}] {{ m.content }} <end><s>\n{% endfor %}",
}


@pytest.mark.parametrize(("name", "end"), [("chatml", ["</s>"]), ("plain", ["</s>"]), ("strange", [" <end>", "<s>"])])
def test_an_answer_in_a_chat_ends_as_its_template_ends_it(
    tokenizer: PreTrainedTokenizerFast, cities: pd.DataFrame, name: str, end: list[str]
) -> None:
    """Planted: the end of the text behind a chat's answer, which the template follows by something else."""
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    own.chat_template = TURNS[name] + "{% if add_generation_prompt %}assistant:\n{% endif %}"
    ids = end_of_answer(own, Style(template="late", chat=True))
    assert own.decode(list(ids)) == "".join(end)
    assert end_of_answer(own, Style(template="late")) == (1,)
    (example,) = make_examples(draw(cities, 1), own, [Style(template=LIST.template, chat=True)])
    assert example.ids[-len(ids) :] == list(ids) and example.labels[-len(ids) :] == list(ids)


def made(lengths: list[int], known: list[bool] | None = None) -> list[Example]:
    known = known or [False] * len(lengths)
    return [
        Example(Prompt(str(i), None, "", ("a",), (0,) * (n + 2), ("",) * (n + 2), None, n), known=known[i])
        for i, n in enumerate(lengths)
    ]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    batch_size=st.integers(1, 12),
    n_steps=st.integers(1, 30),
    seed=st.integers(0, 3),
    order=st.sampled_from(["mixed", "first", "last"]),
)
def test_every_epoch_is_an_order_of_all_facts(
    lengths: list[int], batch_size: int, n_steps: int, seed: int, order: Any
) -> None:
    examples = made(lengths, [length % 3 == 0 for length in lengths])
    found = batches(examples, batch_size, n_steps, seed, order)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(found) == n_steps and all(1 <= len(batch) <= batch_size for batch in found)
    epochs = [[i for batch in found[at : at + per_epoch] for i in batch] for at in range(0, n_steps, per_epoch)]
    for epoch in epochs[: n_steps // per_epoch]:
        assert sorted(epoch) == list(range(len(lengths)))
        if order != "mixed":
            known = [examples[i].known for i in epoch]
            assert known == sorted(known, reverse=order == "first")
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert batches(examples, batch_size, n_steps + 5, seed, order)[:n_steps] == found, "steps only add"


def test_the_order_is_fixed_for_good() -> None:
    """Written down here: no library's next version may change it; seeds and epochs differ."""
    examples = made([1] * 6)
    assert batches(examples, 4, 4, 0) == ORDER
    assert batches(examples, 4, 4, 1) != ORDER and ORDER[:2] != ORDER[2:]


def test_batches_of_facts_alike_in_length_hold_little_padding() -> None:
    rng = np.random.default_rng(0)
    examples = made(rng.integers(5, 40, 512).tolist())
    padded = sum(len(batch) * max(len(examples[i].ids) for i in batch) for batch in batches(examples, 16, 32, 0))
    assert padded < 1.15 * sum(len(example.ids) for example in examples)
    epochs = [batches(examples, 16, 32 * (n + 1), 0)[-32:] for n in range(2)]
    assert {frozenset(batch) for batch in epochs[0]}.isdisjoint(frozenset(batch) for batch in epochs[1])
    assert ALIKE == 8


def test_processes_share_out_a_batch(examples: list[Example]) -> None:
    batch = collate(examples[:5])
    shares = [share_of(batch, rank, 3) for rank in range(3)]
    rows = sorted(row for share in shares for row in share["labels"].tolist())
    assert rows == sorted(batch["labels"].tolist())
    empty = share_of(collate(examples[:1]), 1, 2)
    assert (empty["labels"] == IGNORED).all() and len(empty["input_ids"]) == 1


# What is trained


PLACES = {
    "llama": {"qk": ["q_proj", "k_proj"], "vo": ["v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]},
    "gpt2": {"mlp": ["mlp.c_fc", "mlp.c_proj"]},
    "qwen3": {"qk": ["q_proj", "k_proj"], "vo": ["v_proj", "o_proj"]},
    "gpt_neox": {"mlp": ["dense_h_to_4h", "dense_4h_to_h"]},
}


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize(("name", "modules"), [(name, modules) for name, its in PLACES.items() for modules in its])
def test_only_the_modules_and_layers_asked_for_are_trained(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path, name: str, modules: Any, weights: Any
) -> None:
    """Against names written by hand: what is trained differs from the base, and nothing else does."""
    settings = Training(steps=2, learning_rate=1e-2, modules=modules, layers="1-2", weights=weights, lora_rank=2)
    fit(load_model(str(tiny_folders[name])), Lessons(examples), settings, tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tiny_folders[name])
    if weights == "lora":
        after: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folders[name]), tmp_path)
        after = after.merge_and_unload()
    else:
        after = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = dict(before.named_parameters())
    changed = {key for key, tensor in after.named_parameters() if not torch.equal(tensor, own[key])}
    matrices = {key for key in changed if own[key].ndim > 1}
    expected = {
        key
        for key, tensor in own.items()
        if tensor.ndim > 1 and any(place in key for place in PLACES[name][modules]) and (".1." in key or ".2." in key)
    }
    if name == "gpt2":
        expected = {key for key in expected if "attn" not in key}
    assert matrices == expected
    assert all(".0." not in key and "embed" not in key for key in changed)


def test_all_modules_and_attention(tiny_folders: dict[str, Path], examples: list[Example]) -> None:
    base = load_model(str(tiny_folders["llama"]))
    whole = Update(base, Training(weights="full"))
    assert set(whole.tensors) == dict(base.model.named_parameters()).keys(), "embeddings and norms too"
    attention = Update(load_model(str(tiny_folders["gpt2"])), Training(modules="attention"))
    assert {name.split(".")[-4] for name in attention.tensors} == {"c_attn", "c_proj"}
    assert all(".attn." in name for name in attention.tensors)


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize(("name", "modules"), [("gpt2", "qk"), ("phi3", "vo"), ("gpt_neox", "qk")])
def test_a_matrix_that_makes_queries_and_values_is_not_trained_in_part(
    tiny_folders: dict[str, Path], name: str, modules: Any, weights: Any
) -> None:
    with pytest.raises(BadInput, match="queries, keys and values in one matrix"):
        Update(load_model(str(tiny_folders[name])), Training(modules=modules, weights=weights))


def test_full_fine_tuning_is_a_bare_loop(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path
) -> None:
    """Against AdamW in a loop of our own: losses and every weight, the decay and the clipped gradient included."""
    settings = Training(epochs=2, learning_rate=1e-2, weight_decay=0.1, batch_size=8, weights="full")
    fit(load_model(str(tiny_folders["llama"])), Lessons(examples, seed=3), settings, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]).train()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], 1e-2
    )
    order, found = batches(examples, 8, 6, 3), []
    for step, numbers in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / len(order))
        total, tokens = torch.zeros(()), 0
        for i in numbers:
            ids = torch.tensor(examples[i].ids)
            start = examples[i].prompt.prediction
            logits = model(ids[None]).logits[0, start:-1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[start + 1 :], reduction="sum")
            tokens += len(ids) - start - 1
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach()) / tokens)
    np.testing.assert_allclose(losses(tmp_path), found, rtol=1e-4)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tuned.get_parameter(name), tensor, rtol=1e-3, atol=1e-4)
    assert load_model(str(tmp_path)).tokenizer.eos_token_id == 1


def test_layers_are_read() -> None:
    assert layer_numbers("8-10, 2,2") == (2, 8, 9, 10) and layer_numbers(None) == () and layer_numbers(3) == (3,)
    for wrong in ("3-1", "a", "1-", "-2"):
        with pytest.raises(ValueError, match="cannot be read"):
            layer_numbers(wrong)


def test_settings_say_what_cannot_be(tiny_folders: dict[str, Path]) -> None:
    for wrong, why in (
        ({"stop": "loss"}, "target_loss"),
        ({"target_loss": 1.0}, "target_loss"),
        ({"steps": 4, "checkpoints": [1, 8]}, "step 8 is beyond the last"),
        ({"layers": "x"}, "cannot be read"),
        ({"lora_dropout": 1.0}, "less than 1"),
    ):
        with pytest.raises(ValidationError, match=why):
            Training(**wrong)
    assert Training(lora_rank=8).alpha == 16 and Training(lora_rank=8, lora_alpha=8).alpha == 8
    assert Training(weights="full", lora_rank=8) == Training(weights="full", four_bit=True), "what counts for nothing"
    with pytest.raises(BadInput, match="no layer 7"):
        Update(load_model(str(tiny_folders["llama"])), Training(layers="7"))
    with pytest.raises(BadInput, match="float32"):
        load_base(str(tiny_folders["llama"]), "bfloat16", Training(weights="full"))


def test_four_bits_without_bitsandbytes(tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(BadInput, match="needs bitsandbytes: pip install"):
        load_base(str(tiny_folders["llama"]), "float32", Training(four_bit=True))


def test_an_adapter_over_four_bits_is_measured_as_plain_peft_computes_it(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example], tmp_path: Path
) -> None:
    """Against the base's matrices out of their 4 bits, with the adapter by plain peft; saved in between."""
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    folder = str(tmp_path / "base")
    wide = LlamaConfig(**CONFIGS["llama"][1] | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    AutoModelForCausalLM.from_config(wide).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = TRAINING.model_copy(update={"four_bit": True})
    base = load_base(folder, "float32", settings)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([examples[0].prompt.ids])
    exact = plain(ids).logits
    matrices = {name: of for name, of in base.model.named_modules() if type(of).__name__ == "Linear4bit"}
    assert len(matrices) == 7 * wide.num_hidden_layers
    for name, module in matrices.items():
        own = dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[arg-type]
        plain.get_submodule(name).weight.data = own.float()
    fit(base, Lessons(examples, seed=0), settings, tmp_path / "adapter")
    assert losses(tmp_path / "adapter")[-1] < losses(tmp_path / "adapter")[0] - 1
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * len(matrices) and {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    ours = load_model(folder, adapter=tmp_path / "adapter", four_bit=True)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = tuned(ids).logits
        for _ in range(2):
            assert torch.allclose(ours.model(ids).logits, expected, atol=1e-4)
            ours.model.state_dict()
    assert not torch.allclose(exact, expected, atol=1e-1)


# How long


def test_weights_of_steps_are_kept(tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path) -> None:
    """Each is what a run that is cut off there has: of equal steps the learning rate is the same."""
    settings = TRAINING.model_copy(update={"epochs": 3, "checkpoints": "log"})
    fit(load_model(str(tiny_folders["llama"])), Lessons(examples), settings, tmp_path)
    assert settings.n_steps(24) == 9
    assert sorted(int(one.name) for one in (tmp_path / "steps").iterdir()) == [1, 2, 4, 8]
    base = load_model(str(tiny_folders["llama"]))
    prompts = PromptSet("list", tuple(example.prompt for example in examples))
    at = [float(answer_logprob(base, prompts).mean())]
    for folder in (*(tmp_path / "steps" / str(step) for step in (1, 2, 4, 8)), tmp_path):
        at.append(float(answer_logprob(load_model(str(tiny_folders["llama"]), adapter=folder), prompts).mean()))
    assert at == sorted(at) and len(set(at)) == 6
    assert Training(checkpoints=[4, 1, 4, 9]).kept(9) == (1, 4) and Training().kept(9) == ()


def test_validation_keeps_the_best_weights(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path
) -> None:
    """On facts taught wrongly the loss on true ones soon rises; the weights kept are those of its least."""
    wrong = [
        replace(one, prompt=replace(one.prompt, ids=(*one.prompt.ids[: one.prompt.prediction + 1], 7 + i)))
        for i, one in enumerate(examples)
    ]
    settings = Training(epochs=30, stop="validation", patience=3, learning_rate=3e-2, batch_size=8, lora_rank=4)
    fit(load_model(str(tiny_folders["llama"])), Lessons(wrong, validation=examples), settings, tmp_path)
    said = json.loads((tmp_path / "training.json").read_text())
    found = {one["step"]: one["loss"] for one in said["validation"]}
    assert said["best_step"] == min(found, key=found.__getitem__) == len(said["losses"]) - 3 * 3
    assert said["stopped"] == f"the validation loss was least at step {said['best_step']}, 3 epochs before"
    tuned = load_model(str(tiny_folders["llama"]), adapter=tmp_path).model
    total, tokens = 0.0, 0
    for example in examples:
        ids, start = torch.tensor(example.ids), example.prompt.prediction
        with torch.no_grad():
            logits = tuned(ids[None]).logits[0, start:-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[start + 1 :], reduction="sum"))
        tokens += len(ids) - start - 1
    assert total / tokens == pytest.approx(min(found.values()), rel=1e-4)


def test_arms_of_equal_loss(tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path) -> None:
    for name, some in (("few", examples[:8]), ("many", examples)):
        settings = Training(epochs=60, stop="loss", target_loss=2.0, learning_rate=1e-2, batch_size=8, lora_rank=4)
        fit(load_model(str(tiny_folders["llama"])), Lessons(some), settings, tmp_path / name)
        per_epoch, found = settings.steps_of_epoch(len(some)), losses(tmp_path / name)
        epochs = np.array(found).reshape(-1, per_epoch).mean(1)
        assert epochs[-1] <= 2.0 < epochs[-2]


@given(values=st.lists(st.floats(0.01, 9), min_size=1, max_size=30), patience=st.integers(1, 4))
def test_rules_stop_once_and_for_all_that_is_logged(values: list[float], patience: int) -> None:
    """A rule asked after each step stops at the first log that meets it, so the log alone says why it ended."""
    settings = Training(stop="convergence", patience=patience)
    stops = [reason_to_stop(Log(values[:n], {}, 1), settings) is not None for n in range(1, len(values) + 1)]
    for n, stop in enumerate(stops, 1):
        falls = n <= patience or min(values[: n - patience]) - min(values[n - patience : n]) >= 0.01 * values[0]
        assert stop == (not falls)
    validation = dict(enumerate(values))
    last = [
        reason_to_stop(Log([], dict(list(validation.items())[:n]), 1), Training(stop="validation", patience=patience))
        for n in range(1, len(values) + 1)
    ]
    for n, why in enumerate(last, 1):
        assert (why is not None) == (n - 1 - int(np.argmin(values[:n])) >= patience)
    assert validation[best_step(validation)] == min(values)


def test_a_learning_rate_that_diverges_is_named(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Training(epochs=6, learning_rate=30, batch_size=8, weights="full")
    with pytest.raises(TrainingDiverged, match=r"lower learning_rate \(now 30\)"):
        fit(load_model(str(tiny_folders["llama"])), Lessons(examples), settings, tmp_path)
    assert not [*tmp_path.iterdir()]
    base = load_model(str(tiny_folders["llama"]))
    with torch.no_grad():
        base.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="the loss of step 1 is nan"):
        fit(base, Lessons(examples), TRAINING, tmp_path)
    assert diverged([2.0, 1.0]) is None and diverged([2.0]) is None and diverged([2.0, *[3.1] * 9]) is not None


# Beside training


def test_training_does_not_touch_the_random_state(
    tiny_folders: dict[str, Path], tmp_path: Path, examples: list[Example]
) -> None:
    base = load_model(str(tiny_folders["llama"]))
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(5)
    before = torch.get_rng_state(), random.getstate(), [*map(str, np.random.get_state(legacy=False).items())]
    fit(base, Lessons(examples[:8]), Training(), tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == [*map(str, np.random.get_state(legacy=False).items())]


@pytest.mark.parametrize("devices", [1, 4])
def test_a_batch_has_as_many_facts_on_any_number_of_devices(
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    examples: list[Example],
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
    monkeypatch.setattr(torch.nn.Embedding, "forward", recording)
    training = Training(epochs=2, batch_size=4, lora_rank=2)
    fit(base, Lessons(examples[:10], on_step=lambda: steps.append(len(seen))), training, tmp_path)
    assert sorted(batch[0] for batch in seen) == sorted([4, 4, 2] * 2) and steps == [1, 2, 3, 4, 5, 6]


def test_refusals(
    tiny_folders: dict[str, Path], trained: tuple[Path, PromptSet], examples: list[Example], tmp_path: Path
) -> None:
    def base(**how: Any) -> LoadedModel:
        return load_model(str(tiny_folders["llama"]), **how)

    with pytest.raises(BadInput, match="no prompts to train on"):
        fit(base(), Lessons([]), Training(), tmp_path)
    with pytest.raises(BadInput, match="already carries the adapter"):
        fit(base(adapter=trained[0] / "one"), Lessons(examples), Training(), tmp_path)
    with pytest.raises(BadInput, match="needs validation facts"):
        fit(base(), Lessons(examples), Training(stop="validation"), tmp_path)


def test_styles_take_turns_by_fact(cities: pd.DataFrame, tokenizer: PreTrainedTokenizerFast) -> None:
    facts = draw(cities, 40)
    styles = [LIST, Style.of(TEMPLATES["country"]["sentence"])]
    found = make_examples(facts, tokenizer, styles)
    backwards = {one.prompt.fact_id: one.prompt.text for one in make_examples(facts[::-1], tokenizer, styles)}
    assert {one.prompt.fact_id: one.prompt.text for one in found} == backwards
    texts = [{prompt.text for prompt in make_prompts(facts, tokenizer, style)} for style in styles]
    assert all(any(one.prompt.text in own for one in found) for own in texts)
    thirds = facts.assign(third=["top", "bottom"] * 20)
    assert [one.known for one in make_examples(thirds, tokenizer, styles)] == [True, False] * 20
