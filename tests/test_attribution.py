"""Head contributions and the logit lens as measures, against other implementations and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model
from subjattn.measures.first_tokens import telling
from subjattn.measures.head_contributions import SOURCES, sources_of
from subjattn.measures.logit_lens import settled
from subjattn.measures.record import measure_of, values_of
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts


@pytest.fixture(scope="module")
def asked(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 12, seed=3), tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def found(asked: PromptSet, tiny_models: dict[str, LoadedModel]) -> xr.Dataset:
    return sa.head_contributions(tiny_models["gemma3"], asked)


def last_logits(model: LoadedModel, prompt: Prompt) -> torch.Tensor:
    with torch.no_grad():
        return hf_model(model)(torch.tensor([prompt.ids[: prompt.prediction + 1]])).logits[0, -1].double()


def parts_of(found: xr.Dataset) -> xr.DataArray:
    """The sum of all contributions."""
    return (
        found["head_contribution"].sum(("layer", "head", "source"), skipna=False)
        + (found["mlp_contribution"] + found["bias_contribution"]).sum("layer", skipna=False)
        + found["embedding_contribution"]
        + found["offset"]
    )


def test_contributions_add_up_to_the_logits(
    found: xr.Dataset, asked: PromptSet, tiny_models: dict[str, LoadedModel]
) -> None:
    np.testing.assert_allclose(parts_of(found), found["logit"], rtol=1e-5, atol=1e-5)
    firsts = {prompt.answer_ids[0] for prompt in asked}
    for prompt in asked:
        logits = last_logits(tiny_models["gemma3"], prompt)
        own, others = prompt.answer_ids[0], sorted(firsts - {prompt.answer_ids[0]})
        row = found["logit"].sel(fact=prompt.fact_id)
        assert float(row.sel(of="answer")) == pytest.approx(float(logits[own] - logits.mean()), abs=1e-4)
        assert float(row.sel(of="others")) == pytest.approx(float(logits[others].mean() - logits.mean()), abs=1e-4)


def test_what_is_read_from_a_source_is_lost_without_its_values(
    asked: PromptSet, tiny_models: dict[str, LoadedModel]
) -> None:
    """The last layer's attention output without the subject's values, by plain hooks, along the direction by hand."""
    model, prompt, layer = tiny_models["llama"], asked[0], 2
    hf = hf_model(model)
    attention, subject = hf.model.layers[layer].self_attn, list(prompt.subject_positions)
    written: list[torch.Tensor] = []
    last: list[torch.Tensor] = []

    def without(_module: Any, _args: Any, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[:, subject] = 0
        return values

    keeps = attention.register_forward_hook(lambda _m, _a, output: written.append(output[0][0, -1].double()))
    final = hf.model.norm.register_forward_pre_hook(lambda _m, args: last.append(args[0][0, -1].double()))
    last_logits(model, prompt)
    blinds = attention.v_proj.register_forward_hook(without)
    last_logits(model, prompt)
    for hook in (keeps, final, blinds):
        hook.remove()
    norm, unembedding = hf.model.norm, hf.lm_head.weight.double()
    scale = norm.weight.double() / (last[0].square().mean() + norm.variance_epsilon).sqrt()
    expected = float((written[0] - written[1]) @ (scale * (unembedding[prompt.answer_ids[0]] - unembedding.mean(0))))
    found = sa.head_contributions(model, asked)["head_contribution"]
    got = float(found.sel(fact=prompt.fact_id, of="answer", layer=layer, source="subject").sum())
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert abs(expected) > 1e-2


def test_every_token_has_one_source(asked: PromptSet) -> None:
    """The first token is a source of its own, unless the subject begins with it."""
    start, stop = asked[0].subject_span
    assert start > 1
    between = asked[0].prediction - stop
    expected = ["first_token", *["before_subject"] * (start - 1), *["subject"] * (stop - start)]
    assert sources_of(asked[0]) == [*expected, *["after_subject"] * between, "prediction"]
    first = Prompt(**{**vars(asked[0]), "span": (0, 2)})
    assert sources_of(first)[:3] == ["subject", "subject", "after_subject"]
    assert set(sources_of(asked[0])) == set(SOURCES)


def test_without_other_answers_there_is_nothing_to_be_over(
    asked: PromptSet, tiny_models: dict[str, LoadedModel]
) -> None:
    first = asked[0].answer_ids[0]
    same = PromptSet("list", tuple(prompt for prompt in asked if prompt.answer_ids[0] == first)[:1])
    dataset = sa.head_contributions(tiny_models["llama"], same)
    assert np.isnan(dataset["logit"].sel(of="others")).all()
    assert not np.isnan(dataset["head_contribution"].sel(of="answer")).any()
    rows = values_of(measure_of("head_contributions"), dataset)
    assert all(np.isnan(value) for *_, value, _ in rows)


def test_the_lens_is_the_models_own_norm_and_unembedding(tiny: LoadedModel, asked: PromptSet) -> None:
    """Against `output_hidden_states`, whose last is behind the final norm already."""
    found, tells = sa.logit_lens(tiny, asked), telling(asked)
    np.testing.assert_array_equal(found["lens_logprob"].notnull().all("layer"), tells)
    hf = hf_model(tiny)
    inner = hf.base_model
    norm = getattr(inner, "norm", None) or getattr(inner, "ln_f", None) or inner.final_layer_norm
    some = [prompt for prompt, alone in zip(asked, tells, strict=True) if alone][:4]
    assert len(some) > 1
    for prompt in some:
        with torch.no_grad():
            states = hf(
                torch.tensor([prompt.ids[: prompt.prediction + 1]]), output_hidden_states=True, use_cache=False
            ).hidden_states
        token = prompt.answer_ids[0]
        for layer in range(len(states) - 1):
            with torch.no_grad():
                state = states[layer + 1][0, -1]
                logits = hf.get_output_embeddings()(state if layer == len(states) - 2 else norm(state))
            if cap := getattr(hf.config, "final_logit_softcapping", None):
                logits = cap * torch.tanh(logits / cap)
            expected = float(logits.log_softmax(-1)[token])
            row = found.sel(fact=prompt.fact_id, layer=layer)
            assert float(row["lens_logprob"]) == pytest.approx(expected, abs=1e-4)
            assert float(row["lens_rank"]) == float((logits > logits[token]).sum())


def test_settled_is_where_the_answer_stays_the_likeliest() -> None:
    rank = xr.DataArray([[0, 3, 0, 0], [0, 0, 0, 0], [5, 0, 0, 2]], dims=("fact", "layer"))
    np.testing.assert_array_equal(settled(rank), [2, 0, np.nan])


def test_on_a_real_model_contributions_are_transformer_lenss(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    """Heads' results of its cache, along the same direction."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    from subjattn.models import packaged_model

    prompts = make_prompts(draw(cities, 8, seed=2), smollm2.tokenizer, TEMPLATES["country"]["list"])
    found = sa.head_contributions(smollm2, prompts)
    np.testing.assert_allclose(parts_of(found), found["logit"], rtol=1e-4, atol=1e-3)
    own = AutoModelForCausalLM.from_pretrained(packaged_model(), dtype=torch.float32).eval()
    weight, norm = own.lm_head.weight.detach().clone(), own.model.norm.requires_grad_(False)
    bridge = TransformerBridge.boot_transformers(str(packaged_model()), hf_model=own, tokenizer=smollm2.tokenizer)
    prompt = prompts[0]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([prompt.ids[: prompt.prediction + 1]]))
    last = cache["blocks.29.hook_out"][0, -1]
    scale = norm.weight / (last.square().mean() + norm.variance_epsilon).sqrt()
    direction = scale * (weight[prompt.answer_ids[0]] - weight.mean(0))
    for layer in (3, 17, 29):
        z = cache[f"blocks.{layer}.attn.hook_z"][0, -1]
        projection = smollm2.model.model.layers[layer].self_attn.o_proj.weight.detach().T
        z = z.reshape(9, -1)
        heads = torch.stack([z[h] @ projection[h * 64 : (h + 1) * 64] for h in range(9)])
        got = found["head_contribution"].sel(fact=prompt.fact_id, of="answer", layer=layer).sum("source")
        np.testing.assert_allclose(got, heads @ direction, rtol=1e-3, atol=1e-3)


def test_bad_prompts_are_refused(asked: PromptSet, tiny_models: dict[str, LoadedModel]) -> None:
    for measure in (sa.head_contributions, sa.logit_lens):
        with pytest.raises(BadInput, match="no prompts"):
            measure(tiny_models["llama"], [])
    ends = Prompt(**{**vars(asked[0]), "span": (asked[0].prediction, asked[0].prediction + 1)})
    with pytest.raises(BadInput, match="ends with its subject"):
        sa.head_contributions(tiny_models["llama"], [ends])
