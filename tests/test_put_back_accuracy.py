"""Answers with the base's states put back, against models apart with plain hooks, one whole pass a token."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
import zoo

import subjattn as sa
from subjattn import change_tables
from subjattn.errors import BadInput
from subjattn.evidence.returned import accuracy_in_rows, returned_accuracy
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import answers
from subjattn.measures import put_back_accuracy as module
from subjattn.measures.alone import measure
from subjattn.measures.beside import OWN
from subjattn.measures.put_back import PLACES, places_of
from subjattn.measures.put_back_accuracy import CELLS, put_back_accuracy
from subjattn.measures.record import measure_of, values_of
from subjattn.measures.scoring import SCORERS
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms
from subjattn.prompts import Prompt, PromptSet, make_prompts
from subjattn.study.across import _replicated


Made = Callable[[str], tuple[Arms, dict[str, LoadedModel]]]
INSIDE = ("q", "k", "v", "pattern")


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 6, seed=3), tokenizer, TEMPLATES["country"]["list"])


@torch.no_grad()
def next_logits(apart: dict[str, LoadedModel], name: str, component: str, prompt: Prompt, at: list[int]) -> Any:
    """The tuned model's last logits on a text, the base's states of all layers in it, each model run by itself."""
    base, tuned = (apart[one].model for one in ("base", "one"))
    text, n_layers = torch.tensor([prompt.ids]), tuned.config.num_hidden_layers
    if component in INSIDE:
        given = [oracles.seen_inside(base, prompt, component, layer) for layer in range(n_layers)]

        def put(layer: int) -> Callable[[Any], Any]:
            def change(state: Any) -> Any:
                state = state.clone()
                state[0, :, at] = given[layer][:, at]
                return state

            return change

        return oracles.edited_logits(tuned, prompt, {(component, layer): put(layer) for layer in range(n_layers)})[-1]
    places = [oracles.place(base, component, layer, zoo.parts(name)) for layer in range(n_layers)]
    kept: dict[str, Any] = {}
    with ExitStack() as stack:
        for where in places:
            keep = lambda state, where=where: kept.__setitem__(where, state.clone())  # noqa: E731
            stack.enter_context(oracles.replacing(base, where, keep))
        base(text, use_cache=False)

    def change_at(where: str) -> Callable[[Any], Any]:
        def change(state: Any) -> Any:
            state = state.clone()
            state[0, at] = kept[where][0, at]
            return state

        return change

    with ExitStack() as stack:
        for where in places:
            stack.enter_context(oracles.replacing(tuned, where, change_at(where)))
        return tuned(text, use_cache=False).logits[0, -1]


def slowly(apart: dict[str, LoadedModel], name: str, component: str, prompt: Prompt, positions: Callable) -> str:
    """The greedy text under a put whose positions go by the text's length, as far as the scorer lets it grow."""
    rule, ids, own = SCORERS["answer_start"], list(prompt.ids[: prompt.prediction + 1]), apart["one"]
    text: list[int] = []
    for step in range(*answers.longest_answers(rule, own.tokenizer, [prompt])):
        so_far = replace(prompt, ids=tuple(ids + text))
        text.append(int(next_logits(apart, name, component, so_far, positions(len(so_far))).argmax()))
        if text[-1] == own.tokenizer.eos_token_id or (step and "\n" in own.tokenizer.decode(text[-1:])):
            break
    found = own.tokenizer.decode(text, skip_special_tokens=True).strip()
    return found.splitlines()[0].strip() if found else found


def positions_of(prompt: Prompt, at: str) -> Callable[[int], list[int]]:
    return {
        "prediction": lambda n: list(range(prompt.prediction, n)),
        "subject": lambda _: list(prompt.subject_positions),
        "all": lambda n: list(range(n)),
    }[at]


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts in full, so that all of them can be compared."""
    rule = replace(SCORERS["answer_start"], decided=lambda _begun, _answers: False)
    monkeypatch.setattr(answers, "SCORERS", SCORERS | {"answer_start": rule})


@pytest.mark.parametrize(
    ("name", "components", "at"),
    [
        ("llama", tuple(PLACES), None),
        ("llama", ("attn_out", "mlp_out", "v"), "all"),
        ("gpt2", ("mlp_out", "z", "k"), None),
        ("qwen3", ("mlp_out", "pattern"), None),
        ("gpt_neox", ("mlp_out", "v"), None),
    ],
)
def test_answers_are_those_of_models_apart(
    name: str, components: Any, at: Any, tuned: Made, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(monkeypatch)
    arms, apart = tuned(name)
    found = put_back_accuracy(arms, prompts[:4], components, "one", at=at)
    texts = found["prediction"].sel(cell="put_back")
    for place, (component, where) in places_of(components, at).items():
        expected = [slowly(apart, name, component, one, positions_of(one, where)) for one in prompts[:4]]
        assert texts.sel(put=place).values.tolist() == expected
    for cell, one in (("base", "base"), ("tuned", "one")):
        expected = sa.predict(apart[one], prompts[:4])["prediction"].tolist()
        assert (found["prediction"].sel(cell=cell).T.values == np.array(expected)).all()
    assert (texts.values != found["prediction"].sel(cell="tuned").values).any(), "else nothing was put"


def test_a_put_that_ends_with_the_prompt_is_seen(
    tuned: Made, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: states stand at the prediction position alone, and are not taken of the text that follows."""
    whole(monkeypatch)
    arms, apart = tuned("llama")
    own = module.places_in
    monkeypatch.setattr(module, "places_in", lambda prompt, at: [own(prompt, at)[0][:1]])
    found = put_back_accuracy(arms, prompts, "mlp_out", "one", at="prediction")["prediction"].sel(cell="put_back")
    expected = [slowly(apart, "llama", "mlp_out", one, positions_of(one, "prediction")) for one in prompts]
    assert found.values[:, 0].tolist() != expected
    first = [slowly(apart, "llama", "mlp_out", one, lambda _, one=one: [one.prediction]) for one in prompts]
    assert found.values[:, 0].tolist() == first


def test_the_placebo_grows_with_the_text(tuned: Made, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many other positions of the prompt, the ones before kept; none where there are too few."""
    whole(monkeypatch)
    arms, apart = tuned("llama")
    orders: list[Any] = []
    own = module._others
    monkeypatch.setattr(module, "_others", lambda *given: orders.append(own(*given)) or orders[-1])
    found = put_back_accuracy(arms, prompts[:3], "mlp_out", "one", at="prediction", seed=2)
    for prompt, order, text in zip(prompts, orders, found["prediction"].sel(cell="placebo").values[:, 0], strict=False):
        assert sorted(order) == sorted(set(range(prompt.prediction)) - set(prompt.subject_positions))
        expected = slowly(apart, "llama", "mlp_out", prompt, lambda n, p=prompt, o=order: o[: n - p.prediction])
        assert text == expected
    every = put_back_accuracy(arms, prompts[:3], "mlp_out", "one", at="all")
    assert (
        every["correct"].sel(cell="placebo").isnull().all() and not every["correct"].sel(cell="put_back").isnull().any()
    )


def test_every_output_of_the_base_gives_the_bases_answers(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    found = put_back_accuracy(arms, prompts, "resid_post", "one", at="all")["prediction"]
    assert found.sel(cell="put_back").values.tolist() == found.sel(cell="base").values.tolist()
    assert found.sel(cell="tuned").values.tolist() != found.sel(cell="base").values.tolist()


@pytest.mark.parametrize("scorer", ["answer_start", "containment", "exact_match"])
def test_texts_that_end_where_they_are_decided_are_judged_alike(
    tuned: Made, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch, scorer: Any
) -> None:
    monkeypatch.setattr(answers, "longest_answers", lambda rule, _, asked: [rule.new_tokens] * len(asked))
    arms, apart = tuned("llama")
    said = sa.predict(apart["base"], prompts, scorer)["prediction"]
    asked = [replace(p, answers=(text,)) if i % 2 else p for i, (p, text) in enumerate(zip(prompts, said, strict=True))]
    short = put_back_accuracy(arms, asked, ("mlp_out", "v"), "one", scorer=scorer)
    rule = replace(SCORERS[scorer], decided=lambda _begun, _answers: False)
    monkeypatch.setattr(answers, "SCORERS", SCORERS | {scorer: rule})
    long = put_back_accuracy(arms, asked, ("mlp_out", "v"), "one", scorer=scorer)
    xr.testing.assert_equal(short["correct"], long["correct"])
    assert set(np.unique(short["correct"].sel(cell="base"))) == {0, 1}
    for one, other in zip(short["prediction"].values.ravel(), long["prediction"].values.ravel(), strict=True):
        assert other.startswith(one)
    assert (short["prediction"] != long["prediction"]).any() or scorer == "containment"


def test_letters(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    asked = [replace(prompt, choice_ids=(40, 41, 42, 43), answers=("B",)) for prompt in prompts]
    found = put_back_accuracy(arms, asked, "mlp_out", "one", at="prediction", scorer="letters").isel(put=0)
    for i, prompt in enumerate(asked):
        so_far = replace(prompt, ids=prompt.ids[: prompt.prediction + 1])
        logits = next_logits(apart, "llama", "mlp_out", so_far, [prompt.prediction])
        letter = "ABCD"[int(logits[[40, 41, 42, 43]].argmax())]
        assert found["prediction"].sel(cell="put_back").values[i] == letter
        assert found["correct"].sel(cell="put_back").values[i] == (letter == "B")


def correct_of(base: list[int], tuned: list[int], put: list[int], placebo: list[float]) -> xr.DataArray:
    values = np.stack([np.asarray(one, float) for one in (base, tuned, put, placebo)], -1)[:, None]
    coords = {"fact": np.arange(len(base)), "put": ["z at prediction"], "cell": [*OWN, *CELLS]}
    return xr.DataArray(values, coords, ("fact", "put", "cell"), "correct")


def test_the_share_is_a_difference_of_means_over_another() -> None:
    rng = np.random.default_rng(0)
    base, tuned = (rng.random(200) < 0.8).astype(int), (rng.random(200) < 0.4).astype(int)
    put = np.where(rng.random(200) < 0.5, base, tuned)
    found = returned_accuracy(correct_of(base, tuned, put, tuned))
    wanted = (put.mean() - tuned.mean()) / (base.mean() - tuned.mean())
    share = found["share"].sel(patch="real").item()
    assert share == pytest.approx(wanted)
    low, high = found["share_low"].sel(patch="real").item(), found["share_high"].sel(patch="real").item()
    draws = [rng.integers(0, 200, 200) for _ in range(2000)]
    shares = [(put[i].mean() - tuned[i].mean()) / (base[i].mean() - tuned[i].mean()) for i in draws]
    np.testing.assert_allclose([low, high], np.quantile(shares, [0.025, 0.975]), atol=0.06)
    lost = (base == 1) & (tuned == 0)
    assert found["n_lost"] == lost.sum() and found["right_again"].sel(patch="real").item() == (put[lost] == 1).sum()
    assert found["share"].sel(patch="placebo").item() == 0 == found["right_again"].sel(patch="placebo").item()
    assert found["share_low"].sel(patch="placebo").item() < 0 < found["share_high"].sel(patch="placebo").item()
    gained = returned_accuracy(correct_of(tuned, base, put, base))
    again = (put.mean() - base.mean()) / (tuned.mean() - base.mean())
    assert gained["share"].sel(patch="real").item() == pytest.approx(again)


def test_a_placebo_is_of_the_same_facts() -> None:
    """Planted: a placebo that does nothing, in the half of the facts with longer prompts, which are harder."""
    rng = np.random.default_rng(0)
    base = np.concatenate([rng.random(100) < 0.9, rng.random(100) < 0.4]).astype(float)
    tuned = np.concatenate([rng.random(100) < 0.6, rng.random(100) < 0.1]).astype(float)
    placebo = np.where(np.arange(200) < 100, np.nan, tuned)
    found = returned_accuracy(correct_of(base, tuned, base, placebo))
    accuracy, lost = found["accuracy"].isel(put=0), (base == 1) & (tuned == 0)
    assert float(accuracy.sel(cell="placebo")) == float(accuracy.sel(cell="tuned")) == tuned[100:].mean()
    assert float(accuracy.sel(cell="put_back")) == base[100:].mean()
    assert found["n"].item() == 100 and found["n_lost"].item() == lost[100:].sum()
    assert found["right_again"].values.ravel().tolist() == [lost[100:].sum(), 0]
    assert found.attrs["gap"] == pytest.approx((tuned - base).mean()), "the gap is of all facts"
    row = accuracy_in_rows(found)["put"][0]
    assert (row["n"], row["lost"]) == (100, lost[100:].sum())


def test_every_share_has_an_interval() -> None:
    """Also where an answer moves it as far as one can: right by the tuned model alone, and wrong with the state put."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        base, tuned, put = ((rng.random(40) < share).astype(int) for share in (0.6, 0.15, 0.1))
        found = returned_accuracy(correct_of(base, tuned, put, tuned))
        if found.attrs["gap_interval"][1] < 0:
            assert (found["share_low"] < found["share"]).all() and (found["share"] < found["share_high"]).all()


def test_a_gap_that_may_be_nothing_has_no_share() -> None:
    """Planted: as many answers won as lost; and a gap of one fact in thirty."""
    base, tuned = [1, 0] * 15, [0, 1] * 15
    found = returned_accuracy(correct_of(base, tuned, base, tuned))
    assert found["share"].isnull().all() and found.attrs["gap"] == 0 and found["n_lost"] == 15
    assert found["right_again"].values.ravel().tolist() == [15, 0]
    one = returned_accuracy(correct_of([1] * 30, [0] + [1] * 29, [1] * 30, [np.nan] * 30))
    assert one["share"].isnull().all() and one.attrs["gap"] == pytest.approx(-1 / 30)
    rows = accuracy_in_rows(one)
    assert json.loads(json.dumps(rows))["put"][0]["placebo"]["accuracy"] is None
    assert rows["low"] < 0 < rows["high"] and rows["put"][0]["real"]["share"] is None
    title, line = change_tables.answers_tables("here", rows)
    assert "which may be nothing: a share of it is not defined" in str(line) and title.row_count == 1
    alone = returned_accuracy(correct_of([1], [0], [1], [0]))
    assert alone["share"].isnull().all() and np.isnan(alone.attrs["gap_interval"]).all()
    with pytest.raises(BadInput, match="give what put_back_accuracy or raised_accuracy returns"):
        returned_accuracy(xr.Dataset())


def test_the_measure_gives_what_the_function_gives(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    two = Arms(arms.base, {"one": arms.sources["one"]})
    found = measure("transfer_accuracy", two, prompts, {"facts": 4, "components": "z, mlp_out at subject"})
    few = [prompt for prompt in prompts if prompt.fact_id in set(found["fact"].values)]
    own = put_back_accuracy(arms, few, ["z", "mlp_out"], "one")["correct"].sel(fact=found["fact"], put=found["put"])
    some = ["base", "tuned", "put_back"]
    xr.testing.assert_equal(found["correct"].sel(cell=some), own.sel(cell=some))
    rows = pd.DataFrame(values_of(measure_of("transfer_accuracy"), found)).set_index([1, 2])[3]
    change = (own.sel(cell="put_back") - own.sel(cell="tuned")).sel(put="z at prediction")
    assert rows["accuracy_put_back", "z at prediction"].tolist() == change.values.tolist()
    gap = (own.sel(cell="tuned") - own.sel(cell="base")).isel(put=0)
    assert rows["accuracy_gap", ""].tolist() == gap.values.tolist()
    assert found["put"].values.tolist() == ["z at prediction", "mlp_out at subject"]
    for given in (list(PLACES), ",".join(PLACES), str(tuple(PLACES))):  # the last as the command line has its default
        assert measure_of("transfer_accuracy").parse({"components": given}).components == tuple(PLACES)
    with pytest.raises(BadInput, match="'y' is not one of resid_pre"):
        measure("transfer_accuracy", two, prompts, {"components": ["y"]})


def test_refusals(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    with pytest.raises(BadInput, match="put at the prediction, the subject, or all"):
        put_back_accuracy(arms, prompts, "z", "one", at="role")
    with pytest.raises(BadInput, match="component 'y' is not one of"):
        put_back_accuracy(arms, prompts, "y", "one")
    with pytest.raises(BadInput, match="scorer 'bleu' is not one of"):
        put_back_accuracy(arms, prompts, "z", "one", scorer="bleu")


def test_replicates_are_crossed_with_facts() -> None:
    """Answers of two draws of two seeds: the share is that of all of them, the interval one over facts and draws."""
    rng = np.random.default_rng(3)
    found, every = {}, []
    for replicate in product(range(3), range(2)):
        base, tuned = (np.arange(40) % 5 > 0).astype(int), (rng.random(40) < 0.2).astype(int)
        put = np.where(rng.random(40) < 0.6, base, tuned)
        found[replicate] = correct_of(base, tuned, put, tuned).to_dataset()
        every.append((base, tuned, put))
    facts = pd.DataFrame({"fact_id": np.arange(40), "relation": "country"})
    whole = returned_accuracy(_replicated(found, facts))
    base, tuned, put = (np.mean([one[i] for one in every]) for i in range(3))
    assert whole["share"].sel(patch="real").item() == pytest.approx((put - tuned) / (base - tuned))
    assert whole["n"] == 240 and whole.attrs["gap"] == pytest.approx(tuned - base)
    lost = sum(int(((one[0] == 1) & (one[1] == 0)).sum()) for one in every)
    assert whole["n_lost"] == lost
    alone = returned_accuracy(_replicated({None: found[0, 0]}, facts))
    assert alone["n"] == 40 and alone.attrs["gap"] == pytest.approx(every[0][1].mean() - every[0][0].mean())
