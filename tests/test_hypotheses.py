"""Hypotheses about sets of heads and layers: on models where what is needed, and enough, was planted."""

from __future__ import annotations

import zlib
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.evidence.ratios import ratio
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model
from subjattn.measures.ablation import ablation
from subjattn.measures.hypotheses import Named, ablate_hypothesis
from subjattn.measures.knockout import edges_of, other_edges
from subjattn.measures.record import VALUE_COLUMNS, measure_of, values_of
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts


@pytest.fixture(scope="module")
def asked(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 24, seed=3), tokenizer, TEMPLATES["country"]["sentence"])


@pytest.fixture(scope="module")
def planted(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> LoadedModel:
    """A random GPT-2 in which head 2.1 alone writes, wherever it looks, what raises every token of the answers."""
    model = deepcopy(tiny_models["gpt2"])
    hf = hf_model(model)
    width, raises = 8, torch.zeros(32)
    raises[0], raises[1] = 1.0, -1.0
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
    with torch.no_grad():
        for layer in hf.transformer.h:
            for parameter in (*layer.attn.c_proj.parameters(), *layer.mlp.c_proj.parameters()):
                parameter.mul_(1e-3)
        last = hf.transformer.h[2].attn
        last.c_attn.weight[:, 64 + width : 64 + 2 * width] = 0
        last.c_attn.bias[64 + width : 64 + 2 * width] = 1
        last.c_proj.weight[width : 2 * width] = raises
        answers = sorted({token for prompt in asked for token in prompt.answer_ids})
        hf.lm_head.weight[answers] += raises * hf.transformer.ln_f.weight.sign()
    return model


def test_numbers_are_those_of_ablations(tiny: LoadedModel, asked: PromptSet) -> None:
    heads = [(1, 2), (2, 0)]
    found = ablate_hypothesis(tiny, asked, Named(heads=((1, 2), (2, 0))), random_sets=3)
    own = ablation(tiny, asked, heads=heads, random_sets=3)
    np.testing.assert_allclose(found["drop"], own[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["random_drop"], own[:, 1:].mean("set"), atol=1e-5)
    others = [(layer, head) for layer in range(3) for head in range(4) if (layer, head) not in heads]
    np.testing.assert_allclose(found["others_drop"], ablation(tiny, asked, heads=others)[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["all_drop"], ablation(tiny, asked, heads=[*others, *heads])[:, 0], atol=1e-5)
    layers = ablate_hypothesis(tiny, asked, Named(layers=(1,), component="mlp_out", to="zero"), random_sets=2)
    mlp = {"component": "mlp_out", "to": "zero"}
    np.testing.assert_allclose(layers["drop"], ablation(tiny, asked, layers=[1], **mlp)[:, 0], atol=1e-5)
    np.testing.assert_allclose(layers["others_drop"], ablation(tiny, asked, layers=[0, 2], **mlp)[:, 0], atol=1e-5)


def test_a_planted_head_is_needed_and_enough_and_another_is_neither(planted: LoadedModel, asked: PromptSet) -> None:
    tested = sa.test_hypothesis(planted, asked, heads=[(2, 1)], to="zero", random_sets=3)
    assert tested.verdicts["necessity"].verdict == "supported"
    assert tested.verdicts["sufficiency"].verdict == "supported"
    assert tested.intervals["sufficiency"].estimate == pytest.approx(1, abs=0.05)
    other = sa.test_hypothesis(planted, asked, heads=[(1, 1)], to="zero", random_sets=3)
    assert other.verdicts["necessity"].verdict == "no effect that matters"
    assert other.verdicts["sufficiency"].verdict == "contradicted"
    assert "sufficiency: contradicted" in str(other)


@pytest.mark.parametrize("route", ["direct", "relayed", "total", "last"])
def test_a_route_is_tested_by_blocked_edges(route: Any, tiny: LoadedModel, asked: PromptSet) -> None:
    """By hand-made masks; what is enough is asked where other edges lead to the subject."""
    found = ablate_hypothesis(tiny, asked[:6], Named(route=route), random_sets=2)
    model, own = hf_model(tiny), partial(edges_of, route)
    for i, prompt in enumerate(asked[:6]):
        plain = oracles.answer_logprob(model, prompt)

        def fall(edges: Any, prompt: Prompt = prompt, plain: float = plain) -> float:
            return plain - oracles.answer_logprob(model, prompt, oracles.hand_mask(model, len(prompt), set(edges)))

        row, total = found.isel(fact=i), set(edges_of("total", prompt))
        assert float(row["drop"]) == pytest.approx(fall(own(prompt)), abs=1e-4)
        seeds = [[zlib.crc32(prompt.fact_id.encode()), 0, number] for number in (0, 1)]
        beside = [other_edges(prompt, own(prompt), np.random.default_rng(seed)) for seed in seeds]
        if all(beside):
            assert float(row["random_drop"]) == pytest.approx(np.mean([fall(some) for some in beside]), abs=1e-4)
        else:
            assert row["random_drop"].isnull()
        if route in ("direct", "relayed"):
            assert float(row["all_drop"]) == pytest.approx(fall(total), abs=1e-4)
            assert float(row["others_drop"]) == pytest.approx(fall(total - set(own(prompt))), abs=1e-4)
        else:
            assert row["all_drop"].isnull() and row["others_drop"].isnull()
    assert np.isfinite(found["random_drop"]).any() or route == "total"


def test_nothing_is_enough_where_ablating_everything_helps() -> None:
    """Planted: all of the kind hold the answer down, and the set holds it down by more than half of that."""
    facts = {"fact": [f"f{i}" for i in range(40)]}
    everything = xr.DataArray(np.random.default_rng(0).normal(-1.35, 0.1, 40), facts, ("fact",))
    with pytest.raises(BadInput, match=r"what it is a share of is negative \(-1.3"):
        ratio(0.64 * everything, everything, positive=True)
    assert float(ratio(0.64 * everything, everything).mean()) == pytest.approx(0.64)


def test_a_route_has_verdicts_and_is_a_part_of_the_measure(tiny: LoadedModel, asked: PromptSet) -> None:
    tested = sa.test_hypothesis(tiny, asked, route="direct", random_sets=2)
    assert set(tested.verdicts) == {"necessity", "sufficiency"} and tested.intervals["necessity"] is not None
    whole = sa.test_hypothesis(tiny, asked, route="total", random_sets=2)
    assert "sufficiency: not defined: no fact has a value" in str(whole)
    sets = {"reads": {"route": "direct"}, "head": {"heads": [[1, 1]]}}
    found: xr.Dataset = sa.measure("hypotheses", tiny, asked, {"sets": sets, "random_sets": 2})
    ordered = tested.arrays["drop"].sel(fact=found["fact"].values)
    np.testing.assert_allclose(found["drop"].sel(part="reads"), ordered, atol=1e-5)


def test_what_tuning_changed_is_a_claim_of_two_models(
    planted: LoadedModel, tiny_models: dict[str, LoadedModel], asked: PromptSet
) -> None:
    tested = sa.test_hypothesis(
        planted, asked, heads=[(2, 1)], to="zero", random_sets=3, base=deepcopy(planted), smallest_effect=0.2
    )
    assert "the value 0, which says nothing" in str(tested.verdicts["change"])
    against = sa.test_hypothesis(
        tiny_models["gpt2"], asked, heads=[(2, 1)], to="zero", random_sets=3, base=planted, smallest_effect=0.2
    )
    assert against.verdicts["change"].verdict == "contradicted"


def test_the_measure_takes_named_sets(planted: LoadedModel, asked: PromptSet) -> None:
    sets = {"planted": {"heads": [[2, 1]], "to": "zero"}, "other": {"heads": [[1, 1]], "to": "zero"}}
    found: xr.Dataset = sa.measure("hypotheses", planted, asked, {"sets": sets, "random_sets": 3})
    rows = pd.DataFrame(values_of(measure_of("hypotheses"), found), columns=VALUE_COLUMNS)
    means = rows[rows["quantity"] == "necessity"].groupby("part")["value"].mean()
    assert means["planted"] > 0.5 > 0.05 > abs(means["other"])
    shares = rows[rows["quantity"] == "sufficiency"].groupby("part")[["value", "over"]].mean()
    assert shares["value"]["planted"] / shares["over"]["planted"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("by", ["head_contributions", "attention_to_subject"])
def test_heads_are_chosen_on_facts_that_are_left_out(by: Any, tiny: LoadedModel, asked: PromptSet) -> None:
    """The largest means of one half, by hand; no fact, and no answer, is in both halves."""
    heads, left = sa.choose_heads(tiny, asked, 3, by=by, split=1)
    chosen_on = [prompt for prompt in asked if prompt.fact_id not in {one.fact_id for one in left}]
    assert 8 <= len(left) == len(asked) - len(chosen_on) and left.style == asked.style
    assert not {prompt.answers[0] for prompt in left} & {prompt.answers[0] for prompt in chosen_on}
    if by == "head_contributions":
        array = sa.head_contributions(tiny, chosen_on)["head_contribution"].sel(source="subject")
        means = (array.sel(of="answer") - array.sel(of="others")).mean("fact").values
    else:
        means = sa.subject_attention(tiny, chosen_on).mean("fact").values
    largest = np.argsort(-means, axis=None)[:3]
    assert heads == [tuple(int(i) for i in np.unravel_index(at, means.shape)) for at in largest]
    assert sa.choose_heads(tiny, asked, 3, by=by, split=1)[0] == heads
    assert set(sa.test_hypothesis(tiny, left, heads=heads, random_sets=2).verdicts) == {"necessity", "sufficiency"}


def test_heads_that_cannot_be_chosen_are_refused(tiny: LoadedModel, asked: PromptSet) -> None:
    for wrong, message in (({"by": "size"}, "by 'size' is not one of"), ({"n": 13}, "n=13: 12 heads have a value")):
        with pytest.raises(BadInput, match=message):
            sa.choose_heads(tiny, asked, **wrong)
    with pytest.raises(BadInput, match="cannot be halved"):
        sa.choose_heads(tiny, asked[:3])


def test_bad_sets_are_refused(planted: LoadedModel, asked: PromptSet) -> None:
    for wrong in (
        {},
        {"heads": [(0, 0)], "layers": [1]},
        {"layers": [1]},
        {"heads": [(0, 0)], "route": "direct"},
        {"route": "direct", "to": "zero"},
    ):
        with pytest.raises(BadInput, match=r"give heads=\[\(layer, head\), …\] with"):
            sa.test_hypothesis(planted, asked, **wrong)
    with pytest.raises(BadInput, match="is no set of this model"):
        sa.test_hypothesis(planted, asked, heads=[(7, 0)])
    with pytest.raises(BadInput, match="route 'straight' is not one of direct, total"):
        sa.test_hypothesis(planted, asked, route="straight")
    with pytest.raises(BadInput, match="keeps=2"):
        sa.test_hypothesis(planted, asked, heads=[(0, 0)], keeps=2)
    with pytest.raises(BadInput, match="name at least one set"):
        sa.measure("hypotheses", planted, asked)
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    with pytest.raises(BadInput, match="no set of this model|there are 0 other sets"):
        sa.test_hypothesis(planted, asked, heads=everything, random_sets=1)
