"""What people bring who come from other tools: an nnsight model, a TransformerBridge, text in place of prompts."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import pytest

import subjattn as sa
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.models import LoadedModel
from subjattn.prompts import PromptSet


@pytest.fixture
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture
def prompts(llama: LoadedModel, cities: pd.DataFrame) -> PromptSet:
    return sa.make_prompts(cities[:3], llama.tokenizer, "City: {subject}\nCountry:")


def test_a_language_model_of_nnsight_is_taken(llama: LoadedModel, prompts: PromptSet) -> None:
    from nnsight import LanguageModel

    theirs = LanguageModel(copy.deepcopy(llama.model).eval(), tokenizer=llama.tokenizer)
    for measure in (sa.subject_attention, sa.knockout, sa.answer_logprob):
        assert (measure(theirs, prompts) == measure(llama, prompts)).all()  # type: ignore[operator]


def test_one_without_weights_is_refused(llama: LoadedModel, prompts: PromptSet) -> None:
    from nnsight import LanguageModel

    with pytest.raises(UnsupportedModel, match="has no weights yet: make it with dispatch=True"):
        sa.answer_logprob(LanguageModel(llama.name, tokenizer=llama.tokenizer), prompts)


def test_a_bridge_is_answered_with_what_helps(llama: LoadedModel, prompts: PromptSet) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(copy.deepcopy(llama.model), "LlamaForCausalLM", hf_config=llama.model.config)
    with pytest.raises(UnsupportedModel) as caught:
        sa.subject_attention(bridge, prompts)
    assert str(caught.value) == (
        "a TransformerBridge does not attend as the model does (a TransformerBridge rewrites it in place): give the "
        "Hugging Face model, loaded anew by AutoModelForCausalLM.from_pretrained(…) or sa.load_model(…)"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("The capital of Kenya is", "a prompt is text ('The capital of Kenya is'), whose subject is not known"),
        (["The capital of Kenya is"], "a prompt is text ('The capital of Kenya is'), whose subject is not known"),
        ([3], "a prompt is of type int"),
        (pd.DataFrame({"subject": ["Kenya"]}), "prompts are a PromptSet or a list, not one DataFrame"),
    ],
)
@pytest.mark.parametrize("measure", [sa.subject_attention, sa.knockout, sa.answer_logprob, sa.predict])
def test_what_is_no_prompts_is_named(llama: LoadedModel, measure: Any, given: Any, message: str) -> None:
    made_by = "make them by sa.make_prompts(facts, model.tokenizer, 'The capital of {subject} is')"
    with pytest.raises(BadInput) as caught:
        measure(llama, given)
    assert str(caught.value) == f"{message}: {made_by}"


def test_what_is_no_model_is_named(prompts: PromptSet) -> None:
    with pytest.raises(BadInput, match=r"^the model is str 'smollm2-135m': load one by sa.load_model\(…\)$"):
        sa.knockout("smollm2-135m", prompts)  # type: ignore[call-overload]
    with pytest.raises(BadInput, match="the model is PromptSet"):
        sa.knockout(prompts, prompts)  # type: ignore[call-overload]
