"""What the engine refuses instead of returning a wrong number: each fault is planted and seen caught."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from subjattn.engine import cones
from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.forward import forward
from subjattn.engine.interventions import Block, Patch, Row
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.answers import answer_logprob
from subjattn.measures.attention import subject_attention
from subjattn.measures.knockout import knockout
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import PromptSet, make_prompts


STYLES = TEMPLATES["country"]


@pytest.fixture
def prompts(tiny: LoadedModel, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 4, seed=3), tiny.tokenizer, STYLES["list"])


@pytest.mark.parametrize("run", [forward, cones.forward])
def test_a_query_without_keys_is_refused(tiny: LoadedModel, prompts: PromptSet, run: Any) -> None:
    with pytest.raises(NotFired, match="without any key"):
        list(run(tiny.model, [Row(prompts[0], Block.between((3,), (0, 1, 2, 3)))]))


@pytest.mark.parametrize("run", [forward, cones.forward])
def test_an_intervention_that_reaches_nothing_is_refused(tiny: LoadedModel, prompts: PromptSet, run: Any) -> None:
    prompt = prompts[0]
    values = torch.zeros(1, tiny.model.config.hidden_size)
    outside = [
        Row(prompt, Block.between((3,), (1,), layers=(99,))),
        Row(prompt, Block.between((3,), (1,), layers=())),
        Row(prompt, Block.between((3,), (1,), heads=(4,))),
        Row(prompt, Block.between((1,), (3,))),
        Row(prompt, Block.between((len(prompt),), (1,))),
        Row(prompt, Block.between((len(prompt) - 1,), (1,))),
        Row(prompt, Block(frozenset({(3, 1)}), cells=frozenset({(0, 0), (1, 4)}))),
        Row(prompt, Block(frozenset({(3, 1)}), cells=frozenset())),
        Row(prompt, Block(frozenset({(3, 1)}), layers=(0,), cells=frozenset({(0, 0)}))),
        Row(prompt, patches=(Patch(99, (1,), values),)),
        Row(prompt, patches=(Patch(1, (len(prompt) - 1,), values),)),
        Row(prompt, patches=(Patch(1, (1,), values, "z"),)),
        Row(prompt, patches=(Patch(1, (1,), values, "mlp_out", 2),)),
    ]
    for row in outside:
        with pytest.raises(NotFired, match="outside the prompt or model"):
            list(run(tiny.model, [row]))
    twice = Row(prompt, patches=(Patch(1, (1, 2), prompt, "mlp_out"), Patch(1, (2,), prompt, "mlp_out")))
    with pytest.raises(NotFired, match=r"two patches write to one place, \('mlp_out', 1, None, 2\)"):
        list(run(tiny.model, [twice]))
    for elsewhere in ((99, 1), (1,), (-1, 1)):
        with pytest.raises(NotFired, match="patched from is too short, or its positions do not match"):
            list(run(tiny.model, [Row(prompt, patches=(Patch(1, (1, 2), prompt, source_positions=elsewhere),))]))


def test_a_hook_that_never_fires_is_noticed(
    tiny: LoadedModel, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: an MLP that is found in the wrong place, so that its patches would silently do nothing."""
    rows = [Row(prompts[0], patches=(Patch(1, (2,), prompts[1], "mlp_out"),))]
    list(cones.forward(tiny.model, rows))
    monkeypatch.setattr("subjattn.engine.anatomy.mlp_module", lambda _layer: tiny.model.get_input_embeddings())
    with pytest.raises(NotFired, match="never"):
        list(cones.forward(tiny.model, rows))


def test_a_bidirectional_model_is_refused(tokenizer: Any, cities: pd.DataFrame) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    prompts = make_prompts(draw(cities, 2), tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="not a causal decoder"):
        subject_attention(BertLMHeadModel(config).eval(), prompts)


def test_logits_that_are_not_finite_are_refused(tiny_folders: dict[str, Path], cities: pd.DataFrame) -> None:
    """Planted: one weight that overflowed; no comparison with NaN may let it through."""
    model = load_model(str(tiny_folders["llama"]))
    model.model.lm_head.weight.data[5, 5] = torch.nan
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    for measure in (subject_attention, knockout):
        with pytest.raises(UnsupportedModel, match="not finite in torch.float32"):
            measure(model, prompts)


def test_prefix_tuning_is_refused(tiny_folders: dict[str, Path], cities: pd.DataFrame) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = load_model(str(tiny_folders["llama"]))
    wrapped = get_peft_model(model.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="adds prompt tokens"):
        answer_logprob(wrapped, prompts)


def test_training_mode_is_refused(tiny: LoadedModel, prompts: PromptSet) -> None:
    tiny.model.train()
    try:
        with pytest.raises(UnsupportedModel, match=r"call model\.eval\(\)"):
            answer_logprob(tiny, prompts)
    finally:
        tiny.model.eval()


def test_a_model_whose_cones_are_not_exact_is_refused(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a causal layer that looks at running sums, so that a suffix alone is not enough."""
    model = load_model(str(tiny_folders["llama"]))
    layer = decoder_layers(model.model)[1]
    layer.mlp.register_forward_hook(lambda _module, _args, output: output + output.cumsum(1))
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="would not be exact"):
        knockout(model, prompts)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("Bloom", {"n_layer": 2, "n_head": 2}, "attention interface"),
        ("Falcon", {"num_hidden_layers": 2, "num_attention_heads": 2}, "attention interface"),
        ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, "attention interface"),
        ("Mamba", {"num_hidden_layers": 2, "state_size": 4}, "attention interface"),
        ("RecurrentGemma", {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}, "interface"),
        (
            "GptOss",
            {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
            "s_aux",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_before_anything_is_computed(
    tokenizer: Any, cities: pd.DataFrame, name: str, settings: dict[str, Any], why: str
) -> None:
    import transformers
    from transformers import AutoModelForCausalLM

    config = getattr(transformers, f"{name}Config")(vocab_size=512, hidden_size=32, pad_token_id=1, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = make_prompts(draw(cities, 2), tokenizer, STYLES["list"])
    for measure in (subject_attention, knockout, answer_logprob):
        with pytest.raises(UnsupportedModel, match=why):
            measure(model, prompts)


def test_a_model_rewritten_by_a_bridge_is_refused(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    """TransformerBridge puts its own blocks into the model it wraps."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = copy.deepcopy(tiny_models["llama"].model)
    knockout(model, prompts)
    build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    with pytest.raises(UnsupportedModel, match="rewritten in place by a TransformerBridge"):
        knockout(model, prompts)


def test_attention_that_is_not_the_models_own_is_refused(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: our attention function forgets the model's scaling, on its first use of a model."""
    from subjattn.engine import attention

    run = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, scaling=None, **rest: run(*args, scaling=1.0, **rest)
    )
    model = load_model(str(tiny_folders["llama"]))
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="against its own eager one"):
        knockout(model, prompts)


def test_the_probe_takes_bfloat16_as_it_is(smollm2: LoadedModel, prompts: PromptSet) -> None:
    """A probe of special tokens used to refuse this model, on which two kernels part in bfloat16."""
    from subjattn.engine.checks import check_model

    check_model(copy.deepcopy(smollm2.model).bfloat16())
