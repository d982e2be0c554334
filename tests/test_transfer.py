"""States and weights of one model in another, against runs of the models apart with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
from zoo import parts

from subjattn.engine import forward
from subjattn.engine.interventions import Component, Patch, Row, Run
from subjattn.engine.noise import Noise
from subjattn.errors import BadInput
from subjattn.evidence.returned import returned
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.answers import predict
from subjattn.measures.knockout import knockout
from subjattn.measures.metrics import measure_rows, parse_metrics
from subjattn.measures.swapping import shapley, swap_weights
from subjattn.measures.trace import trace
from subjattn.measures.transfer import elsewhere, places_in, transfer
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms
from subjattn.prompts import ROLES, Prompt, PromptSet, make_prompts


ARCHITECTURES = ("llama", "mistral", "gpt2", "qwen3", "gemma2", "gpt_neox")
Made = Callable[[str], tuple[Arms, dict[str, LoadedModel]]]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 3, seed=3), tokenizer, TEMPLATES["country"]["list"])


def logprob(logits: torch.Tensor, prompt: Prompt) -> float:
    logprobs = logits.double().log_softmax(-1)
    return sum(float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True))


@torch.no_grad()
def crossed(
    apart: dict[str, LoadedModel], state: str, late: str, prompt: Prompt, where: str, at: list[int]
) -> torch.Tensor:
    """All logits of one model with a module's states at positions of the other, each run by itself."""
    kept: list[torch.Tensor] = []
    with oracles.replacing(apart[state].model, where, lambda value: kept.append(value.clone())):
        apart[state].model(torch.tensor([prompt.ids]), use_cache=False)
    return oracles.hooked_logits(apart[late].model, prompt, prompt, [(where, tuple(at), kept[0][0, at], slice(None))])


@pytest.mark.parametrize("arm", ["one", "other"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cells_are_those_of_models_apart(name: str, arm: str, tuned: Made, prompts: PromptSet) -> None:
    """Every component, layer, role and direction, of an adapter and of a checkpoint."""
    arms, apart = tuned(name)
    prompt = next(one for one in prompts if len(one.answer_ids) > 1)
    plain = {one: oracles.logits(apart[one].model, prompt) for one in ("base", arm)}
    for component in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z"):
        found = transfer(arms, [prompt], component, arm).isel(fact=0).sel(patch="real")
        for layer, role in product(range(3), ROLES):
            at = list(prompt.predicting if role == "prediction" else prompt.role(role))
            cell = found.sel(layer=layer, role=role)
            if not at:
                assert cell["answer_logprob"].isnull().all()
                continue
            where = oracles.place(apart["base"].model, component, layer, parts(name))
            for state, late in product(("base", arm), repeat=2):
                wanted = plain[late] if state == late else crossed(apart, state, late, prompt, where, at)
                own = cell.sel(state=state, late=late)
                assert float(own["answer_logprob"]) == pytest.approx(logprob(wanted, prompt), abs=1e-4)
                first = float(wanted[prompt.prediction, prompt.answer_ids[0]])
                assert float(own["answer_logit"]) == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("component", ["q", "k", "v", "pattern"])
def test_what_attention_gets_is_put_as_it_is(name: str, component: Any, tuned: Made, prompts: PromptSet) -> None:
    """Against whole passes of the models apart, the other's states brought along; by head and all heads together."""
    arms, apart = tuned(name)
    prompt, layer = prompts[0], 1
    at = tuple(prompt.predicting)
    by_head = transfer(arms, [prompt], component, "one", at="prediction", by="head", layers=[layer])
    together = transfer(arms, [prompt], component, "one", at="prediction", layers=[layer])
    for state, late in (("base", "one"), ("one", "base")):
        given = forward.states(apart[state].model, [prompt], component)[0][layer, list(at)]
        patches = [Patch(layer, at, given[:, head], component, head) for head in range(given.shape[1])]
        cell = {"patch": "real", "state": state, "late": late}
        for some, found in ((patches, together), *zip(([one] for one in patches), _by_head(by_head), strict=True)):
            (output, *_) = forward.forward(apart[late].model, [Row(prompt, patches=tuple(some))])
            wanted = output.logits.double().log_softmax(-1)[range(len(at)), list(prompt.answer_ids)].sum()
            assert found["answer_logprob"].sel(cell).item() == pytest.approx(float(wanted), abs=1e-4)


def _by_head(found: xr.Dataset) -> list[xr.Dataset]:
    return [found.isel(head=head) for head in range(found.sizes["head"])]


def test_a_tuned_models_states_are_restored_into_the_bases_noised_run(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    prompt = prompts[0]
    found = trace(arms, [prompt], "mlp_out", states="one", at="subject", layers=[1], draws=2)
    own = trace(arms.base, [prompt], "mlp_out", at="subject", layers=[1], draws=2)
    at = list(prompt.subject_positions)
    given = forward.states(apart["one"].model, [prompt], "mlp_out")[0][1, at]
    noise = [Noise(own["noised"].attrs["noise_std"], 0, draw) for draw in range(2)]
    rows = [Row(prompt, patches=(Patch(1, tuple(at), given, "mlp_out"),), noise=one) for one in noise]
    rows += [Row(prompt, noise=one) for one in noise]
    wanted = measure_rows(forward.forward(apart["base"].model, rows), rows, parse_metrics("answer_logprob"))
    np.testing.assert_allclose(found["restored"].values.ravel(), wanted.values["answer_logprob"][:2], atol=1e-4)
    np.testing.assert_allclose(found["noised"], own["noised"], atol=1e-5)
    assert abs(found["restored"] - own["restored"]).max() > 1e-3
    whole = trace(arms, [prompt], "resid_pre", states="one", layers=[1], draws=2)
    assert (abs(whole["indirect_effect"].sel(role="before_subject")) > 1e-6).all()
    with pytest.raises(BadInput, match="name the arm whose states"):
        trace(arms, [prompt])
    with pytest.raises(BadInput, match="are another model's"):
        trace(arms.base, [prompt], states="one")


def test_answers_are_generated_under_a_transfer(tuned: Made, prompts: PromptSet, tokenizer: Any) -> None:
    """With every layer's outputs of the tuned model in it, the base answers as the tuned model does."""
    arms, apart = tuned("llama")
    layers = range(3)

    def put(prompt: Prompt) -> Row:
        source, at = Run(prompt, arms.arm("one")), tuple(range(prompt.predicting[-1] + 1))
        components: tuple[Component, ...] = ("attn_out", "mlp_out")
        return Row(prompt, patches=tuple(Patch(layer, at, source, one) for layer in layers for one in components))

    found = predict(arms.base, prompts, interventions=put)
    wanted, own = (predict(apart[name], prompts) for name in ("one", "base"))
    assert found["prediction"].tolist() == wanted["prediction"].tolist() != own["prediction"].tolist()


def test_all_of_a_model_is_that_model_and_nothing_of_it_is_the_other(tuned: Made, prompts: PromptSet) -> None:
    """Every layer's outputs, or the last residual, give the model they are from under the other's head."""
    arms, apart = tuned("llama")
    for arm in ("one", "other"):
        own = {late: oracles.logits(apart[late].model, prompts[0]) for late in ("base", arm)}
        every = transfer(arms, prompts[:1], ["attn_out", "mlp_out"], arm, at="all", by=None)["answer_logprob"]
        last = transfer(arms, prompts[:1], "resid_post", arm, at="all", layers=[2])["answer_logprob"].isel(layer=0)
        first = transfer(arms, prompts[:1], "resid_pre", arm, at="all", layers=[0])["answer_logprob"].isel(layer=0)
        for late, state in (("base", arm), (arm, "base")):
            with torch.no_grad():
                model, other = apart[late].model, apart[state].model
                hidden = other.model(torch.tensor([prompts[0].ids]), use_cache=False, output_hidden_states=True)
                kept: list[torch.Tensor] = []
                with oracles.replacing(other, "model.layers.2", lambda value, kept=kept: kept.append(value)):
                    other(torch.tensor([prompts[0].ids]), use_cache=False)
                under = logprob(model.lm_head(model.model.norm(kept[0]))[0], prompts[0])
            assert hidden is not None
            cell = {"fact": 0, "state": 0 if state == "base" else 1, "late": 0 if late == "base" else 1, "patch": 0}
            assert float(last.isel(cell)) == pytest.approx(under, abs=1e-4)
            if arm == "one":  # an adapter shares the embeddings
                assert float(every.isel(cell)) == pytest.approx(under, abs=1e-4)
                assert float(first.isel(cell)) == pytest.approx(logprob(own[late], prompts[0]), abs=1e-4)


@torch.no_grad()
def test_what_is_off_the_route_is_held(tuned: Made, prompts: PromptSet) -> None:
    """A state at the subject is read by the prediction alone: relays keep the receiving model's attention outputs."""
    arms, apart = tuned("llama")
    prompt, layer = prompts[0], 1
    at, ids = list(prompt.subject_positions), torch.tensor([prompt.ids])
    found = transfer(arms, [prompt], "resid_pre", "one", at="subject", layers=[layer], hold=True)
    relays = [position for position in range(at[0], prompt.prediction) if position not in at]
    kept: dict[str, torch.Tensor] = {}
    for name in ("model.layers.1.self_attn", "model.layers.2.self_attn"):
        with oracles.replacing(apart["one"].model, name, lambda value, name=name: kept.__setitem__(name, value)):
            apart["one"].model(ids, use_cache=False)
    where = "model.layers.1:in"
    with oracles.replacing(apart["base"].model, where, lambda value: kept.__setitem__(where, value)):
        apart["base"].model(ids, use_cache=False)
    patches = [(where, tuple(at), kept[where][0, at], slice(None))]
    patches += [(name, tuple(relays), kept[name][0, relays], slice(None)) for name in kept if name != where]
    wanted = logprob(oracles.hooked_logits(apart["one"].model, prompt, prompt, patches), prompt)
    cell = found["answer_logprob"].sel(patch="real", state="base", late="one")
    assert cell.item() == pytest.approx(wanted, abs=1e-4)
    free = transfer(arms, [prompt], "resid_pre", "one", at="subject", layers=[layer])["answer_logprob"]
    assert abs(free.sel(patch="real", state="base", late="one").item() - wanted) > 1e-3


def test_the_placebo_is_as_many_other_positions(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    prompt = prompts[0]
    found = transfer(arms, [prompt], "mlp_out", "one", layers=[1], seed=4)["answer_logprob"].isel(fact=0, layer=0)
    at, where = list(prompt.role("subject_first")), oracles.place(apart["one"].model, "mlp_out", 1, parts("llama"))
    assert len(at) == 1
    others = [position for position in range(prompt.prediction) if position not in at]
    wanted = [logprob(crossed(apart, "base", "one", prompt, where, [one]), prompt) for one in others]
    placebo = float(found.sel(patch="placebo", role="subject_first", state="base", late="one"))
    assert min(abs(placebo - one) for one in wanted) < 1e-4
    again = transfer(arms, [prompt], "mlp_out", "one", layers=[1], seed=4)["answer_logprob"].isel(fact=0, layer=0)
    np.testing.assert_array_equal(again.values, found.values)
    whole = transfer(arms, [prompt], "mlp_out", "one", at="all", layers=[1])["answer_logprob"]
    assert whole.sel(patch="placebo").isnull().all() and whole.sel(patch="real").notnull().all()


def test_shares_of_the_gap_are_medians_of_facts_that_have_one(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    found = transfer(arms, prompts, "mlp_out", "one", at="prediction")
    table = returned(found, smallest_gap=1e-6)
    cells = found["answer_logprob"].sel(patch="real").isel(layer=1)
    own, other, put = (
        cells.sel(state=s, late=m).values for s, m in (("one", "one"), ("base", "base"), ("base", "one"))
    )
    shares = (put - own) / (other - own)
    here = table.sel(patch="real", into="one").isel(layer=1)
    assert float(here["share"]) == pytest.approx(np.median(shares))
    assert float(here["between"]) == pytest.approx(np.mean((shares >= 0) & (shares <= 1)))
    back = cells.sel(state="one", late="base").values
    assert float(here["interaction"]) == pytest.approx(np.mean(other - put - back + own))
    none = returned(found, smallest_gap=1e9)
    assert none["share"].isnull().all() and (none["n_defined"] == 0).all() and len(none.attrs["gap_interval"]) == 2


def test_shapley_values_are_averages_over_orders() -> None:
    rng, players = np.random.default_rng(0), ("qk", "vo", "mlp", "rest")
    values = {
        frozenset(p for p, on in zip(players, bits, strict=True) if on): rng.normal(size=5)
        for bits in product((False, True), repeat=4)
    }
    wanted = np.zeros((5, 4))
    for order in permutations(players):
        for i, part in enumerate(order):
            before = frozenset(order[:i])
            wanted[:, players.index(part)] += (values[before | {part}] - values[before]) / 24
    np.testing.assert_allclose(shapley(values, players), wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("arm", ["one", "other"])
def test_shares_of_parts_add_up_to_the_change(name: str, arm: str, tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned(name)
    found = swap_weights(arms, prompts, arm, metric=["answer_logprob", "answer_logit"], by_depth=True, by_position=True)
    ends = [[logprob(oracles.logits(apart[one].model, p), p) for p in prompts] for one in ("base", arm)]
    parts_of = found["part"].values.tolist()
    values = found["answer_logprob"]
    np.testing.assert_allclose(values.sel(weights="base"), ends[0], atol=1e-4)
    np.testing.assert_allclose(values.sel(weights="+".join(parts_of)), ends[1], atol=1e-4)
    assert values.sizes["weights"] == 2 ** len(parts_of) == (16 if arm == "other" else 8)
    for metric in ("answer_logprob", "answer_logit"):
        whole = found[metric].sel(weights="+".join(parts_of)) - found[metric].sel(weights="base")
        np.testing.assert_allclose(found[f"{metric}_share"].sum("part"), whole, atol=1e-4)
    assert found["answer_logprob_at"].dims == ("fact", "where")
    alone = found["answer_logprob_alone"].sel(part="qk", third="early")
    np.testing.assert_allclose(alone, swap_of(arms, prompts, arm, "qk", 0) - np.array(ends[0]), atol=1e-4)


def swap_of(arms: Arms, prompts: PromptSet, arm: str, part: Any, layer: int) -> list[float]:
    """Log-probabilities with one part of one layer tuned, by whole passes one at a time."""
    chosen = arms.arm(arm, parts=[part], layers=[layer])
    outputs = [next(forward.forward(arms.base.model, [Row(prompt, arm=chosen)])) for prompt in prompts]
    logprobs = [output.logits.double().log_softmax(-1) for output in outputs]
    return [
        float(of[range(len(of)), list(prompt.answer_ids)].sum()) for of, prompt in zip(logprobs, prompts, strict=True)
    ]


def test_what_makes_no_sense_is_refused(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    with pytest.raises(BadInput, match="this takes one model: give the arms' base"):
        knockout(arms, prompts)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="several arms, one, two, other: name one"):
        transfer(arms, prompts)
    with pytest.raises(BadInput, match="takes a foil or a run of one model"):
        transfer(arms, prompts, tuned="one", metric="kl")
    with pytest.raises(BadInput, match="is not one of resid_pre"):
        transfer(arms, prompts, "nothing", "one")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="go with q, pattern and z"):
        transfer(arms, prompts, "mlp_out", "one", heads=[(0, 1)])
    with pytest.raises(BadInput, match="by='head' goes with components of the same heads"):
        transfer(arms, prompts, "mlp_out", "one", by="head")
    with pytest.raises(BadInput, match="is no metric of a transfer"):
        returned(transfer(arms, prompts[:1], tuned="one", layers=[0], at="subject"), "nothing")
    with pytest.raises(BadInput, match="takes a foil"):
        swap_weights(arms, prompts, "one", metric="logit_diff")


@pytest.mark.parametrize("at", ["prediction", "subject", "role", "position"])
def test_a_placebo_is_never_the_subjects(at: Any, tokenizer: Any, cities: pd.DataFrame) -> None:
    """Put at the subject, the base's states may bring the answer: such a placebo would be none."""
    prompts = make_prompts(draw(cities, 12, seed=1), tokenizer, TEMPLATES["country"]["sentence"])
    drawn = 0
    for prompt, seed in product(prompts, range(5)):
        for positions in places_in(prompt, at):
            own = [position for position in positions if position <= prompt.prediction]
            found = elsewhere(prompt, own, np.random.default_rng(seed))
            assert not {*found} & {*prompt.subject_positions, *own, *prompt.predicting}
            assert len(found) in (0, len(own))
            drawn += bool(found)
    assert drawn
