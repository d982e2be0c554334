"""Organisms have the fault that they were given, where they were given it, and no other there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import subjattn as sa
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.models import LoadedModel
from subjattn.organisms import damage_mlps, favour, look_away, random_update, shrink_values, untouched
from subjattn.prompts import Prompt, PromptSet, make_prompts


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 20, seed=3), tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def few(prompts: PromptSet) -> PromptSet:
    """With fewer different tokens than the small model has dimensions, so that a linear map tells all of them apart."""
    return prompts[:2]


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


def logits(model: LoadedModel, prompts: Sequence[Prompt]) -> list[Tensor]:
    with torch.no_grad():
        return [model.model(torch.tensor([prompt.ids])).logits[0] for prompt in prompts]


def outputs(model: LoadedModel, module: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor]:
    """What a module returns for every prompt, `[pos, d_out]`."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
    logits(model, prompts)
    hook.remove()
    return found


def layer(model: LoadedModel, number: int) -> Any:
    return model.model.model.layers[number]


def test_chosen_heads_look_away_and_their_neighbours_do_not(llama: LoadedModel, few: PromptSet) -> None:
    made = look_away(llama, few, [(0, 0)], 3.0)
    assert made.places == ((0, 0), (0, 1))
    before, after = (sa.subject_attention(model, few).sel(layer=0) for model in (llama, made.model))
    odds = [np.log(one / (1 - one)).mean("fact") for one in (before, after)]
    assert (odds[1] - odds[0]).sel(head=[0, 1]).max() < -1
    np.testing.assert_array_equal(before.sel(head=[2, 3]), after.sel(head=[2, 3]))


def test_scores_of_a_subjects_keys_fall_by_the_strength(llama: LoadedModel, few: PromptSet) -> None:
    """In the mean over heads of the group, few and subject tokens, as far as a linear map can tell them."""
    fell = []
    for model in (llama, look_away(llama, few, [(0, 0)], 3.0).model):
        scores = []
        hooks = []
        kept: dict[str, Tensor] = {}
        attention = layer(model, 0).self_attn
        for name in ("q_proj", "k_proj"):
            module = getattr(attention, name)
            hooks.append(
                module.register_forward_hook(lambda _m, _a, output, name=name: kept.__setitem__(name, output[0]))
            )
        for prompt in few:
            ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
            with torch.no_grad():
                model.model(ids)
                query, key = (kept[name].view(len(ids[0]), -1, 8).transpose(0, 1)[None] for name in kept)
                cos, sin = model.model.model.rotary_emb(query, torch.arange(len(ids[0]))[None])
                query, key = apply_rotary_pos_emb(query, key, cos, sin)
            product = query[0, :2, prompt.prediction] @ key[0, 0].T / 8**0.5
            scores += product[:, list(prompt.subject_positions)].flatten().tolist()
        for hook in hooks:
            hook.remove()
        fell.append(np.mean(scores))
    assert fell[1] - fell[0] == pytest.approx(-3.0, rel=0.15)


def test_values_of_the_subject_shrink_and_no_others(llama: LoadedModel, prompts: PromptSet) -> None:
    """In the lowest layer, whose other tokens are few, all of what is the subject's own goes."""
    made = shrink_values(llama, prompts, [0], 1.0)
    before, after = (outputs(model, layer(model, 0).self_attn.v_proj, prompts) for model in (llama, made.model))
    for one, other, prompt in zip(before, after, prompts, strict=True):
        inside = torch.zeros(len(one), dtype=bool)
        inside[list(prompt.subject_positions)] = True
        inside[prompt.prediction + 1 :] = True  # the answer's tokens are as particular
        assert (other[inside].norm(dim=-1) < 0.95 * one[inside].norm(dim=-1)).float().mean() > 0.7
        torch.testing.assert_close(other[~inside], one[~inside], atol=0.1 * float(one.abs().max()), rtol=0)
    np.testing.assert_array_equal(
        sa.subject_attention(llama, prompts).sel(layer=0), sa.subject_attention(made.model, prompts).sel(layer=0)
    )


def test_mlps_add_less_at_the_last_token(llama: LoadedModel, few: PromptSet) -> None:
    sizes = []
    for model in (llama, damage_mlps(llama, few, [0], 1.0).model):
        found = outputs(model, layer(model, 0).mlp, few)
        last = [one[prompt.subject_span[1] - 1].norm() for one, prompt in zip(found, few, strict=True)]
        first = [one[0].norm() for one in found]
        sizes.append((float(torch.stack(last).mean()), float(torch.stack(first).mean())))
    assert sizes[1][0] < 0.9 * sizes[0][0]
    assert sizes[1][1] == pytest.approx(sizes[0][1], rel=0.1)


def test_a_favoured_answer_is_an_offset_alone(llama: LoadedModel, prompts: PromptSet) -> None:
    made = favour(llama, 9, 4.0)
    for before, after in zip(logits(llama, prompts), logits(made.model, prompts), strict=True):
        moved = after - before
        torch.testing.assert_close(moved[:, 9], torch.full_like(moved[:, 9], 4.0))
        moved[:, 9] = 0
        torch.testing.assert_close(moved, torch.zeros_like(moved), atol=1e-5, rtol=0)
    found = sa.head_contributions(made.model, prompts)
    assert all(np.isfinite(array).all() for array in found.data_vars.values() if array.dtype.kind == "f")


def test_an_untouched_copy_is_the_base(llama: LoadedModel, prompts: PromptSet) -> None:
    for before, after in zip(logits(llama, prompts), logits(untouched(llama).model, prompts), strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_a_random_update_has_its_norm_and_its_seed(llama: LoadedModel) -> None:
    made, again, other = (random_update(llama, 2.0, seed) for seed in (0, 0, 1))
    assert made.norm == pytest.approx(2.0, rel=1e-4)
    weights = [layer(one.model, 1).mlp.up_proj.weight for one in (made, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.linalg.matrix_rank(weights[0] - layer(llama, 1).mlp.up_proj.weight, atol=1e-4) == 8


def test_the_base_stays_as_it_is(llama: LoadedModel, prompts: PromptSet) -> None:
    before = {name: weight.clone() for name, weight in llama.model.state_dict().items()}
    look_away(llama, prompts, [(0, 0)], 1.0)
    shrink_values(llama, prompts, [0], 1.0)
    damage_mlps(llama, prompts, [0], 1.0)
    favour(llama, 9, 1.0)
    untouched(llama)
    random_update(llama, 1.0, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.model.state_dict().items())


def test_what_cannot_be_planted_is_refused(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    with pytest.raises(UnsupportedModel, match="no v_proj"):
        shrink_values(tiny_models["gpt2"], prompts, [0], 1.0)
    with pytest.raises(BadInput, match=r"\(0, 2\) is no key/value head"):
        look_away(tiny_models["llama"], prompts, [(0, 2)], 1.0)
    with pytest.raises(BadInput, match=r"strength is 1\.5"):
        damage_mlps(tiny_models["llama"], prompts, [0], 1.5)
