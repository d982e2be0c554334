"""What carries a loss, against models apart with plain hooks, and on faults that were planted."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
import zoo
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import subjattn as sa
from subjattn.errors import BadInput, NotDefined
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import mediation as module
from subjattn.measures.mediation import MEDIATORS, Margin, exchanged
from subjattn.measures.record import measure_of, values_of
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms
from subjattn.organisms import favour
from subjattn.prompts import Prompt, PromptSet, make_prompts


Made = Callable[[str], tuple[Arms, dict[str, LoadedModel]]]
ATTENTION, VALUES, MLPS, PRIOR = MEDIATORS


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 24, seed=3), tokenizer, TEMPLATES["country"]["list"])


@torch.no_grad()
def plain(model: Any, prompt: Prompt) -> torch.Tensor:
    return model(torch.tensor([prompt.ids[: prompt.prediction + 1]]), use_cache=False).logits[0, -1]


def answered_by(model: Any, prompts: PromptSet) -> list[Prompt]:
    """The same questions, of which a model's own next token is the answer."""
    found = []
    for prompt in prompts:
        own = int(plain(model, prompt).argmax())
        ids = (*prompt.ids[: prompt.prediction + 1], own)
        found.append(replace(prompt, ids=ids, tokens=(*prompt.tokens[: prompt.prediction + 1], "?"), answers=("?",)))
    return found


def margin(logits: torch.Tensor, prompt: Prompt) -> float:
    own, others = prompt.answer_ids[0], logits.clone()
    others[own] = -torch.inf
    return float((logits[own] - others.max()) / logits.std(correction=0))


def mlp_outputs_put(into: Any, of: Any, name: str, prompt: Prompt, at: list[int]) -> torch.Tensor:
    """Last logits of one model with another's MLP outputs, each run by itself."""
    places = [oracles.place(of, "mlp_out", layer, zoo.parts(name)) for layer in range(of.config.num_hidden_layers)]
    kept: dict[str, Any] = {}

    def put(state: Any, place: str) -> Any:
        state = state.clone()
        state[0, at] = kept[place][0, at]
        return state

    with torch.no_grad():
        with ExitStack() as stack:
            for place in places:
                keep = lambda state, place=place: kept.__setitem__(place, state.clone())  # noqa: E731
                stack.enter_context(oracles.replacing(of, place, keep))
            plain(of, prompt)
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(oracles.replacing(into, place, partial(put, place=place)))
            return plain(into, prompt)


def weights_put(own: list[float], other: list[float], at: list[int], kept: list[int]) -> list[float]:
    """One row of attention with some weights of another's, some left alone, and the rest scaled, number by number."""
    left, taken = 1 - sum(own[key] for key in kept), sum(other[key] for key in at)
    share = min(1.0, left / taken)
    rest = sum(weight for key, weight in enumerate(own) if key not in at and key not in kept)
    found = []
    for key, weight in enumerate(own):
        if key in at:
            weight = other[key] * share
        elif key not in kept:
            weight *= (left - taken * share) / rest
        found.append(weight)
    return found


def seen_put(into: Any, of: Any, component: str, prompt: Prompt, at: list[int], kept: list[int]) -> torch.Tensor:
    """Last logits of one model with another's values, or weights of the last position, each run by itself."""
    asked, layers = replace(prompt, ids=prompt.ids[: prompt.prediction + 1]), range(into.config.num_hidden_layers)
    theirs, ours = ([oracles.seen_inside(one, asked, component, layer) for layer in layers] for one in (of, into))

    def put(state: Any, layer: int) -> Any:
        state = state.clone()
        if component == "v":
            state[0, :, at] = theirs[layer][:, at]
            return state
        for head in range(state.shape[1]):
            own, other = (one[layer][head, -1].tolist() for one in (ours, theirs))
            state[0, head, -1] = torch.tensor(weights_put(own, other, at, kept))
        return state

    edits = {(component, layer): partial(put, layer=layer) for layer in layers}
    return oracles.edited_logits(into, asked, edits)[-1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_states_are_exchanged_as_between_two_models_apart(name: str, tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned(name)
    base, own = apart["base"].model, apart["one"].model
    asked = answered_by(base, prompts)
    found = sa.mediation(arms, asked, "one")["mediation"]
    lost = 0
    for prompt in asked:
        here = found.sel(fact=prompt.fact_id)
        before, after = (margin(plain(model, prompt), prompt) for model in (base, own))
        np.testing.assert_allclose(here.sel(state="base", late="base"), before, atol=2e-4)
        np.testing.assert_allclose(here.sel(state="one", late="one"), after, atol=2e-4)
        crossed = [here.sel(state="base", late="one"), here.sel(state="one", late="base")]
        if after > 0:
            assert all(np.isnan(cell).all() for cell in crossed), "nothing is asked of answers that are not lost"
            continue
        lost += 1
        if lost > 3:
            continue
        at = list(prompt.subject_positions)
        for cell, into, of in ((crossed[0], own, base), (crossed[1], base, own)):
            slow = {
                ATTENTION: seen_put(into, of, "pattern", prompt, at, []),
                VALUES: seen_put(into, of, "v", prompt, at, []),
                MLPS: mlp_outputs_put(into, of, name, prompt, at),
            }
            for mediator, logits in slow.items():
                value = float(cell.sel(mediator=mediator, patch="real"))
                assert value == pytest.approx(margin(logits, prompt), abs=2e-4), mediator
    assert lost


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_placebo_of_attention_leaves_the_subjects_weights_alone(
    name: str, tuned: Made, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, apart = tuned(name)
    base, own = apart["base"].model, apart["one"].model
    asked = answered_by(base, prompts)
    where: dict[str, list[int]] = {}
    real = module.elsewhere

    def noted(prompt: Prompt, *rest: Any) -> Any:
        found = real(prompt, *rest)
        where[prompt.fact_id] = list(found)
        return found

    monkeypatch.setattr(module, "elsewhere", noted)
    found = sa.mediation(arms, asked, "one")["mediation"].sel(mediator=ATTENTION, patch="placebo")
    checked = 0
    for prompt in [one for one in asked if where.get(one.fact_id)][:3]:
        logits = seen_put(own, base, "pattern", prompt, where[prompt.fact_id], list(prompt.subject_positions))
        value = float(found.sel(fact=prompt.fact_id, state="base", late="one"))
        assert value == pytest.approx(margin(logits, prompt), abs=2e-4)
        checked += 1
    assert checked


def test_the_prior_is_the_other_halfs_mean_difference(tuned: Made, prompts: PromptSet) -> None:
    """By relation; the halves are by subjects' names."""
    arms, apart = tuned("llama")
    base, own = apart["base"].model, apart["one"].model
    asked = answered_by(base, prompts)
    relations = {prompt.fact_id: "ab"[i % 2] for i, prompt in enumerate(asked)}
    found = sa.mediation(arms, asked, "one", relations=relations)["mediation"].sel(mediator=PRIOR, patch="real")
    logits = {prompt.fact_id: [plain(model, prompt) for model in (base, own)] for prompt in asked}
    compared = 0
    for prompt in asked:
        value = float(found.sel(fact=prompt.fact_id, state="base", late="one"))
        if np.isnan(value):
            continue
        others = [
            logits[one.fact_id]
            for one in asked
            if relations[one.fact_id] == relations[prompt.fact_id]
            and zlib.crc32(one.subject.encode()) % 2 != zlib.crc32(prompt.subject.encode()) % 2
        ]
        shift = torch.stack([after - before for before, after in others]).mean(0)
        assert value == pytest.approx(margin(logits[prompt.fact_id][1] - shift, prompt), abs=2e-4)
        compared += 1
    assert compared
    alone = sa.mediation(arms, asked, "one", relations={prompt.fact_id: prompt.fact_id for prompt in asked})
    assert np.isnan(alone["mediation"].sel(mediator=PRIOR, state="base", late="one")).all(), "no other facts, no prior"


def test_a_favoured_answer_is_carried_by_the_prior_alone(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet
) -> None:
    base = tiny_models["llama"]
    asked = answered_by(base.model, prompts)
    made = favour(base, 9, 20.0)
    found = sa.mediation(sa.load_arms(base, checkpoints={"made": made.model}), asked)
    shares = {quantity.name: quantity for quantity in measure_of("mediation").quantities}
    carried, lost = shares["mediated"].per_fact(found), shares["mediated"].over(found)
    there = lost > 0
    assert there.sum() >= 5
    for mediator, share in ((ATTENTION, 0), (VALUES, 0), (MLPS, 0), (PRIOR, 1)):
        each = (carried.sel(part=mediator) / lost).where(there, drop=True).dropna("fact")
        assert each.size
        np.testing.assert_allclose(each, share, atol=1e-3)
        assert (carried.sel(part=mediator).where(~there) == 0).sum() + each.size == carried.sizes["fact"]


def test_a_temperature_loses_no_answer(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    base = tiny_models["llama"]
    sharp = replace(base, model=copy.deepcopy(base.model))
    with torch.no_grad():
        sharp.model.model.norm.weight.mul_(2.2)
    asked = answered_by(base.model, prompts)
    found = sa.mediation(sa.load_arms(base, checkpoints={"sharp": sharp}), asked)["mediation"]
    plain_ = [found.sel(state=one, late=one, mediator=VALUES, patch="real", drop=True) for one in ("base", "sharp")]
    np.testing.assert_allclose(plain_[0], plain_[1], atol=1e-4)


def test_logits_that_are_no_numbers_are_refused(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    base = tiny_models["llama"]
    arms = sa.load_arms(base, checkpoints={"own": favour(base, 9, 1.0).model})
    head = base.model.get_output_embeddings()

    def broken(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        """In large batches alone, which the engine's own checks are not."""
        return logits * float("nan") if logits.shape[-2] >= len(prompts) else logits

    hook = head.register_forward_hook(broken)
    try:
        with pytest.raises(BadInput, match="logits are not finite"):
            sa.mediation(arms, prompts)
    finally:
        hook.remove()


def test_any_accepted_answer_counts(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    prompt = replace(prompts[0], answers=(prompts[0].answers[0], "Kenya"))
    token = arms.tokenizer(" Kenya", add_special_tokens=False).input_ids[0]
    logits = torch.zeros(1, len(plain(apart["base"].model, prompt)))
    logits[0, token], logits[0, (token + 1) % 40 + 40] = 3.0, 1.0
    metric = Margin(arms.tokenizer, [prompt])
    assert metric(logits, prompt) == pytest.approx(2 / float(logits[0].std(correction=0)), rel=1e-5)


def test_rows_of_a_study_have_shares_of_answers_lost(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    asked = answered_by(apart["base"].model, prompts)
    rows = pd.DataFrame(
        values_of(measure_of("mediation"), sa.mediation(arms, asked, "one")),
        columns=["fact", "quantity", "part", "value", "over"],
    )
    lost = rows[rows["quantity"] == "answers_lost"]["value"]
    assert set(lost) <= {0.0, 1.0} and lost.notna().all()
    shares = rows[(rows["quantity"] == "mediated") & (rows["part"] == VALUES)]
    assert (shares["over"] > 0).sum() == lost.sum() > 0 and (shares["value"][shares["over"] == 0] == 0).all()
    won = rows[rows["quantity"] == "answers_won"]["value"]
    changed = rows[rows["quantity"] == "answers_changed"]["value"]
    np.testing.assert_array_equal(changed, won.to_numpy() - lost.to_numpy())


def test_answers_that_begin_alike_are_not_told_apart(tuned: Made, prompts: PromptSet) -> None:
    """Years all begin with one token: to start with it is no right answer."""
    arms, apart = tuned("llama")
    asked = answered_by(apart["base"].model, prompts)
    token = asked[0].answer_ids[0]
    years = [
        replace(one, ids=(*one.ids[: one.prediction + 1], token), answers=(str(1900 + i),))
        for i, one in enumerate(asked)
    ]
    for measured in (lambda: sa.mediation(arms, years, "one"), lambda: sa.logit_lens(arms.base, years)):
        with pytest.raises(NotDefined, match="the first token of an answer tells none of them from others"):
            measured()
    other = next(one for one in asked[4:] if one.answer_ids[0] != token)
    mixed = [*years[:4], replace(other, answers=("Kenya",))]
    found = sa.mediation(arms, mixed, "one")["mediation"].isel(mediator=0, patch=0, state=0, late=0)
    assert found.isnull().values.tolist() == [True] * 4 + [False]
    lens = sa.logit_lens(arms.base, mixed)
    assert lens["lens_logprob"].isnull().all("layer").values.tolist() == [True] * 4 + [False]
    kinds = {one.fact_id: "year" if one.answers != ("Kenya",) else "country" for one in mixed}
    alone = [years[0], mixed[-1]]
    assert sa.mediation(arms, alone, "one", relations=kinds)["mediation"].isel(patch=0, state=0, late=0).notnull().all()


def test_facts_are_chosen_elsewhere(tuned: Made, prompts: PromptSet) -> None:
    """Those that the base knows in another wording count, right here or not; the others are left out."""
    arms, apart = tuned("llama")
    asked = answered_by(apart["base"].model, prompts)
    known = [prompt.fact_id for prompt in asked[::3]]
    found, every = sa.mediation(arms, asked, "one", known=known), sa.mediation(arms, asked, "one")
    lost = {quantity.name: quantity for quantity in measure_of("mediation").quantities}["answers_lost"]
    of_known = lost.per_fact(found)
    assert of_known.notnull().values.tolist() == [prompt.fact_id in known for prompt in asked]
    np.testing.assert_array_equal(of_known.sel(fact=known), lost.per_fact(every).sel(fact=known))


def test_draws_that_lose_other_facts_leave_no_gaps(tuned: Made, prompts: PromptSet) -> None:
    """A share over draws is of all that was lost in any, though no fact were lost in each."""
    arms, apart = tuned("llama")
    asked = answered_by(apart["base"].model, prompts)
    mediated = {of.name: of for of in measure_of("mediation").quantities}["mediated"]
    assert mediated.over is not None
    draws = [sa.mediation(arms, asked, name) for name in ("one", "two")]
    over = xr.concat([mediated.over(found) for found in draws], "draw")
    carried = xr.concat([mediated.per_fact(found).sel(part=VALUES, drop=True) for found in draws], "draw")
    assert ((over > 0).sum("draw") == 1).mean() > 0.2, "many facts are lost in one draw alone"
    assert carried.notnull().all() and over.notnull().all()
    assert (carried.where(over == 0, 0) == 0).all()


ROWS = arrays(np.float32, (1, 2, 7), elements=st.floats(0, 1, width=32)).map(
    lambda one: torch.softmax(torch.tensor(one) * 40, -1)
)


def _weights(*scores: float) -> torch.Tensor:
    return torch.softmax(torch.tensor(scores).expand(1, 2, 7) * 40, -1)


@given(ROWS, ROWS, st.permutations(range(7)), st.integers(1, 3), st.integers(0, 3))
@example(_weights(*[0.0] * 7), _weights(0.714, 0.826, *[0.0] * 5), [2, 1, 0, 3, 4, 5, 6], 1, 2)
@example(_weights(0.714, 0.826, *[0.0] * 5), _weights(*[0.0] * 7), [2, 1, 0, 3, 4, 5, 6], 1, 2)
def test_exchanged_weights_are_weights(own: Any, other: Any, order: list[int], n: int, m: int) -> None:
    at, kept = order[:n], order[n : n + m]
    found = exchanged(own, other, at, kept)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[..., kept], own[..., kept])
    room = 1 - own[..., kept].sum(-1) >= other[..., at].sum(-1) + 1e-6
    torch.testing.assert_close(found[..., at][room], other[..., at][room], atol=1e-6, rtol=0)
    torch.testing.assert_close(exchanged(own, own, at, kept), own, atol=1e-5, rtol=0)
