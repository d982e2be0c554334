"""The backend hooks: value norms read from the cache and from the weights of W_O, without the engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from subjattn.backends import open_backend
from subjattn.engine import forward
from subjattn.errors import UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, make_prompts


TARGETS = {"llama": "o_proj", "phi3": "o_proj", "gpt_neox": "dense", "gpt2": "c_proj"}


@pytest.fixture(scope="module")
def prompt(tokenizer: Any, cities: pd.DataFrame) -> Prompt:
    return make_prompts(draw(cities, 2, seed=3), tokenizer, TEMPLATES["country"]["list"])[0]


def norms(model: PreTrainedModel, prompt: Prompt) -> dict[int, torch.Tensor]:
    (output,) = open_backend("hooks", model).attention_rows([prompt], value_norms=True)
    return output.value_norms


@torch.no_grad()
def by_pushing(model: PreTrainedModel, name: str, prompt: Prompt) -> list[torch.Tensor]:
    """`[head, key]` a layer: every head's value alone through the output projection that is named by hand."""
    found: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    attention, _, projection = zoo.parts(name)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
    n_heads = model.config.num_attention_heads
    for layer in layers:
        split = {"phi3": "qkv_proj", "gpt_neox": "query_key_value", "gpt2": "c_attn"}.get(name, "v_proj")
        module = layer.get_submodule(attention).get_submodule(split)
        handle = module.register_forward_hook(lambda _m, _args, output: values.append(output[0]))
        model(ids, use_cache=False)
        handle.remove()
        joint = values.pop()
        d_head = layer.get_submodule(projection).in_features // n_heads if name != "gpt2" else 8
        if name == "gpt_neox":
            own = joint.view(len(joint), n_heads, 3, d_head)[:, :, 2]
        elif name in ("phi3", "gpt2"):
            n_kv = 2 if name == "phi3" else 4
            own = joint[:, -n_kv * d_head :].view(len(joint), n_kv, d_head)
        else:
            own = joint.view(len(joint), -1, d_head)
        own = own.repeat_interleave(n_heads // own.shape[1], dim=1)
        rows = []
        for head in range(n_heads):
            alone = torch.zeros(len(own), n_heads, d_head)
            alone[:, head] = own[:, head]
            push = layer.get_submodule(projection)
            rows.append((push(alone.flatten(1)) - push(torch.zeros_like(alone).flatten(1))).norm(dim=-1))
        found.append(torch.stack(rows))
    return found


@pytest.mark.parametrize("name", list(zoo.CONFIGS))
def test_value_norms_of_every_architecture(
    tiny_models: dict[str, LoadedModel], prompt: Prompt, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand; and, planted, an engine that weighs by the wrong heads moves nothing here."""
    model = tiny_models[name].model
    expected = by_pushing(model, name, prompt)
    monkeypatch.setattr(forward, "_value_norms", lambda value, gram: torch.ones(1, len(gram), value.shape[2]))
    found = norms(model, prompt)
    assert sorted(found) == [0, 1, 2]
    for layer, one in enumerate(expected):
        torch.testing.assert_close(found[layer][0], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_live_adapter_on_the_projection_counts(tiny_folders: dict[str, Path], prompt: Prompt, name: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_folders[name]).eval()
    plain = [one.clone() for one in norms(base, prompt).values()]
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=[TARGETS[name]], fan_in_fan_out=name == "gpt2")
    tuned = get_peft_model(base, settings).eval()
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    inner = tuned.get_base_model()
    found = norms(inner, prompt)
    for layer, one in enumerate(by_pushing(inner, name, prompt)):
        torch.testing.assert_close(found[layer][0], one, atol=1e-5, rtol=1e-4)
    assert max(float((found[i] - plain[i]).abs().max()) for i in range(3)) > 0.01
    with tuned.disable_adapter():
        for layer, one in norms(inner, prompt).items():
            torch.testing.assert_close(one, plain[layer], atol=1e-5, rtol=1e-4)


def test_an_output_projection_of_another_kind_is_refused(tiny_models: dict[str, LoadedModel], prompt: Prompt) -> None:
    model = copy.deepcopy(tiny_models["llama"].model)
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(UnsupportedModel, match="output projection of layer 1 is a Sequential"):
        norms(model, prompt)


def test_a_dora_adapter_is_refused(tiny_folders: dict[str, Path], prompt: Prompt) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]).eval()
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj"], use_dora=True)).eval()
    with pytest.raises(UnsupportedModel, match="adapter .* is no plain LoRA"):
        norms(tuned.get_base_model(), prompt)
