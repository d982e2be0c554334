"""Extraction by layer against plain hooks, norms and matrices by hand, and on a model that always says one thing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from test_contributions import BEHIND, PROMPTS, layers_of, made, returned
from torch import Tensor
from transformers import PreTrainedModel

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.measures.extraction import extraction
from subjattn.measures.record import measure_of
from subjattn.models import LoadedModel
from subjattn.plots.extraction import plot_extraction


def by_hand(model: PreTrainedModel, arch: str) -> tuple[np.ndarray, np.ndarray]:
    """Likeliest tokens `[fact, layer, component]` of updates, and of the model."""
    tokens, answers = [], []
    attention, mlp, _ = zoo.parts(arch)
    names = BEHIND.get(arch, (attention, mlp))
    norm = model.base_model.ln_f if arch == "gpt2" else model.base_model.norm  # type: ignore[union-attr, operator]
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.ids[: prompt.prediction + 1]])).logits[0, -1]
            updates = [
                [returned(model, prompt, layer.get_submodule(name)) for name in names] for layer in layers_of(model)
            ]
            tokens.append([[read(model, norm, update) for update in each] for each in updates])
        answers.append(int(logits.argmax()))
    return np.array(tokens), np.array(answers)


def read(model: PreTrainedModel, norm: Any, update: Tensor) -> int:
    head = model.get_output_embeddings()
    return int((norm(update[None])[0] @ head.weight.T).argmax())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "olmo2"])
def test_updates_are_read_as_by_hand(arch: str) -> None:
    model = made(arch)
    tokens, answers = by_hand(model, arch)
    found = extraction(model, PROMPTS)
    np.testing.assert_array_equal(found["update_token"], tokens)
    np.testing.assert_array_equal(found["answer_token"], answers)
    np.testing.assert_array_equal(found["extracted"], tokens == answers[:, None, None])
    for suffix, number in (("", 0), ("_mlp", 1)):
        quantities = {quantity.name: quantity for quantity in measure_of("extraction").quantities}
        expected = [answer in its[:, number] for answer, its in zip(answers, tokens, strict=True)]
        np.testing.assert_array_equal(quantities[f"extraction_rate{suffix}"].per_fact(found), expected)
        others = [
            np.mean([answers[j] in tokens[i, :, number] for j in range(len(answers)) if j != i])
            for i in range(len(answers))
        ]
        np.testing.assert_allclose(quantities[f"extraction_control{suffix}"].per_fact(found), others)
        over = quantities[f"extraction_over_control{suffix}"].per_fact(found)
        np.testing.assert_allclose(over, np.array(expected, float) - others)
        last = quantities[f"extraction_rate{suffix}"].per_fact(found.isel(layer=[2]))
        np.testing.assert_array_equal(last, tokens[:, 2, number] == answers)


def test_an_update_that_writes_one_answer_whoever_is_asked_is_shown_by_the_control() -> None:
    """The last MLP always adds a great deal of one direction: rate and control are both 1."""
    model = made("llama")
    direction = 1000 * model.get_output_embeddings().weight[77].detach()  # type: ignore[union-attr, index, operator]
    last = layers_of(model)[2].get_submodule("mlp")
    handle = last.register_forward_hook(lambda _module, _args, output: direction.expand_as(output))
    try:
        found = extraction(model, PROMPTS)
    finally:
        handle.remove()
    of = {quantity.name: quantity.per_fact(found).values.tolist() for quantity in measure_of("extraction").quantities}
    assert of["extraction_rate_mlp"] == of["extraction_control_mlp"] == [1.0] * len(PROMPTS)
    assert of["extraction_over_control_mlp"] == [0.0] * len(PROMPTS)
    assert set(found["answer_token"].values) == set(found["update_token"].values[:, 2, 1])


def test_one_fact_has_no_control_and_none_is_refused(tiny: LoadedModel) -> None:
    prompts = sa.make_prompts(sa.load_facts("cities", 3), tiny.tokenizer, "City: {subject}\nCountry:")
    alone = extraction(tiny, prompts[:1])
    assert np.isnan(alone["extracted_others"]).all()
    control = {quantity.name: quantity for quantity in measure_of("extraction").quantities}["extraction_control"]
    assert np.isnan(control.per_fact(alone)).all()
    with pytest.raises(BadInput, match="no prompts"):
        extraction(tiny, [])
    found = extraction(tiny, prompts)
    drawn = plot_extraction(found["extracted"], found["extracted_others"])
    assert [trace.name for trace in drawn.data] == ["", "", "other facts", "other facts"]
    np.testing.assert_allclose(drawn.data[0].y, found["extracted"].sel(component="attn").mean("fact"))
