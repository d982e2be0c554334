"""TransformerLens and nnsight as second and third implementations, on SmolLM2."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.attention import subject_attention
from subjattn.measures.knockout import knockout
from subjattn.measures.patching import patch_grid
from subjattn.models import LoadedModel, packaged_model
from subjattn.prompts import Prompt, PromptSet, make_prompts, swap_subjects


LAYER = 12


@pytest.fixture(scope="module")
def prompts(smollm2: LoadedModel, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 40, seed=2), smollm2.tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def pair(prompts: PromptSet) -> tuple[Prompt, Prompt]:
    return swap_subjects(prompts, np.random.default_rng(0))[0]


def own_instance() -> torch.nn.Module:
    """A model of the reference's own: a bridge rewrites the one it wraps in place."""
    return AutoModelForCausalLM.from_pretrained(packaged_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bridge(smollm2: LoadedModel) -> object:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        str(packaged_model()), hf_model=own_instance(), tokenizer=smollm2.tokenizer
    )


def ids_of(prompt: Prompt) -> torch.Tensor:
    return torch.tensor([prompt.ids[: prompt.prediction + 1]])


def logit_diff(logits: torch.Tensor, pair: tuple[Prompt, Prompt]) -> float:
    last = logits[0, -1]
    return float(last[pair[0].answer_ids[0]] - last[pair[1].answer_ids[0]])


def test_attention_is_transformer_lenss_pattern(smollm2: LoadedModel, bridge: object, prompts: PromptSet) -> None:
    found = subject_attention(smollm2, prompts[:2])
    for i, prompt in enumerate(prompts[:2]):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids_of(prompt))
        rows = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1] for layer in range(30)])
        np.testing.assert_allclose(found[i], rows[..., list(prompt.subject_positions)].sum(-1), atol=1e-5)


def test_patching_is_transformer_lenss(smollm2: LoadedModel, bridge: object, pair: tuple[Prompt, Prompt]) -> None:
    clean, corrupt = pair
    grid = patch_grid(smollm2, [pair])
    name = f"blocks.{LAYER}.hook_in"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids_of(clean))
        base = logit_diff(bridge(ids_of(corrupt)), pair)
        for role in ("subject_last", "after_subject"):
            positions = list(clean.role(role))

            def put(value: torch.Tensor, hook: object, positions: list[int] = positions) -> torch.Tensor:
                value = value.clone()
                value[:, positions] = cache[name][:, positions]
                return value

            patched = logit_diff(bridge.run_with_hooks(ids_of(corrupt), fwd_hooks=[(name, put)]), pair)
            assert float(grid.sel(role=role)[0, LAYER]) == pytest.approx(patched - base, abs=1e-3)


def test_patching_is_nnsights(smollm2: LoadedModel, pair: tuple[Prompt, Prompt]) -> None:
    from nnsight import LanguageModel

    model = LanguageModel(own_instance(), tokenizer=smollm2.tokenizer)
    clean, corrupt = pair
    positions = list(clean.role("subject_last"))
    with torch.no_grad():
        with model.trace(ids_of(clean)):
            kept = model.model.layers[LAYER].input.save()
        with model.trace(ids_of(corrupt)):
            base = model.lm_head.output.save()
        with model.trace(ids_of(corrupt)):
            model.model.layers[LAYER].input[:, positions] = kept[:, positions]
            patched = model.lm_head.output.save()
    expected = logit_diff(patched, pair) - logit_diff(base, pair)
    found = float(patch_grid(smollm2, [pair]).sel(role="subject_last")[0, LAYER])
    assert found == pytest.approx(expected, abs=1e-3)
    assert abs(expected) > 0.5, "the patch moves too little to test anything"


def test_knockout_is_transformer_lenss(smollm2: LoadedModel, bridge: object, prompts: PromptSet) -> None:
    prompt = next(prompt for prompt in prompts if len(prompt.answer_ids) == 1)
    keys = list(prompt.subject_positions)

    def block(scores: torch.Tensor, hook: object) -> torch.Tensor:
        scores = scores.clone()
        scores[:, :, -1, keys] = -torch.inf
        return scores

    with torch.no_grad():
        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", block) for layer in range(30)]
        base = bridge(ids_of(prompt))[0, -1].log_softmax(-1)[prompt.answer_ids[0]]
        blocked = bridge.run_with_hooks(ids_of(prompt), fwd_hooks=hooks)[0, -1].log_softmax(-1)[prompt.answer_ids[0]]
    assert float(base - blocked) != 0
    assert float(knockout(smollm2, [prompt]).sel(route="direct")[0]) == pytest.approx(float(base - blocked), abs=1e-3)
