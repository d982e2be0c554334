"""Answers with scores raised, against the tuned model by itself, its scores changed by hand, one whole pass a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.evidence.returned import returned_accuracy
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import answers
from subjattn.measures.alone import measure
from subjattn.measures.raised_accuracy import CELLS, raised_accuracy
from subjattn.measures.record import measure_of, values_of
from subjattn.measures.scoring import SCORERS
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms, load_arms
from subjattn.organisms import damage_mlps, look_away
from subjattn.prompts import Prompt, PromptSet, make_prompts


Made = Callable[[str], tuple[Arms, dict[str, LoadedModel]]]
Edges = Callable[[int], set[tuple[int, int]]]
"""By the text's length."""


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 6, seed=3), tokenizer, TEMPLATES["country"]["sentence"])


def masked_logits(model: Any, prompt: Prompt, edges: set[tuple[int, int]], dose: float) -> torch.Tensor:
    """The last logits, the dose in the mask that plain attention adds to all scores."""
    length = len(prompt)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    for query, key in edges:
        mask[query, key] += dose
    return oracles.logits(model, prompt, mask[None, None])[-1]


def scored_logits(model: Any, prompt: Prompt, edges: set[tuple[int, int]], dose: float, heads: Any) -> torch.Tensor:
    """The last logits, the dose added to the scores of some heads `(layer, head)` by hand."""

    def raised(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            for query, key in edges:
                scores[0, [head for at, head in heads if at == layer], query, key] += dose
            return scores

        return change

    return oracles.edited_logits(model, prompt, {("scores", layer): raised(layer) for layer, _ in heads})[-1]


def slowly(model: LoadedModel, prompt: Prompt, edges: Edges, dose: float, heads: Any = None) -> str:
    """The greedy text, its line's end included, as far as the scorer lets it grow."""
    text: list[int] = []
    for step in range(*answers.longest_answers(SCORERS["answer_start"], model.tokenizer, [prompt])):
        so_far = replace(prompt, ids=(*prompt.ids[: prompt.prediction + 1], *text))
        own = edges(len(so_far))
        of = (own, dose) if heads is None else (own, dose, heads)
        logits = (masked_logits if heads is None else scored_logits)(model.model, so_far, *of)
        text.append(int(logits.argmax()))
        if text[-1] == model.tokenizer.eos_token_id or (step and "\n" in model.tokenizer.decode(text[-1:])):
            break
    found = model.tokenizer.decode(text, skip_special_tokens=True).strip()
    return found.splitlines()[0].strip() if found else found


def edges_in(prompt: Prompt, route: str, order: Any = None) -> Edges:
    """From each query to the subject; or, of an order, to the first as many keys that are free."""
    first = {"direct": prompt.prediction, "total": prompt.subject_span[1]}[route]

    def keys(query: int) -> Any:
        if order is None:
            return prompt.subject_positions
        return [at for at in order if 0 < at < query and at not in prompt.subject_positions][
            : len(prompt.subject_positions)
        ]

    return lambda length: {(query, key) for query in range(first, length) for key in keys(query)}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts in full, so that all of them can be compared."""
    rule = replace(SCORERS["answer_start"], decided=lambda _begun, _answers: False)
    monkeypatch.setattr(answers, "SCORERS", SCORERS | {"answer_start": rule})


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("name", "route"), [("llama", "direct"), ("llama", "total"), ("gpt2", "direct"), ("qwen3", "direct")]
)
def test_answers_are_those_of_the_tuned_model_with_another_mask(
    name: str, route: Any, tuned: Made, prompts: PromptSet
) -> None:
    arms, apart = tuned(name)
    found = raised_accuracy(arms, prompts[:4], [2.0, -3.0], "one", route=route, seed=5)
    assert found["cell"].values.tolist() == ["base", "tuned", "raised", "placebo", "base_raised"]
    texts, rng, moved = found["prediction"], np.random.default_rng(5), 0
    for i, prompt in enumerate(prompts[:4]):
        subject, others = edges_in(prompt, route), edges_in(prompt, route, rng.permutation(prompt.prediction))
        length = prompt.prediction + 1
        there = len(others(length)) == len(subject(length))
        assert found["correct"].sel(cell="placebo")[i].isnull().all() == (not there)
        for dose in (2.0, -3.0):
            for cell, one in (("raised", "one"), ("base_raised", "base")):
                assert texts.sel(dose=dose, cell=cell).values[i] == slowly(apart[one], prompt, subject, dose)
            if there:
                placebo = slowly(apart["one"], prompt, others, dose)
                assert texts.sel(dose=dose, cell="placebo").values[i] == placebo
                moved += placebo != texts.sel(dose=dose, cell="tuned").values[i]
    assert (texts.sel(cell="raised") != texts.sel(cell="tuned")).any() and moved
    for cell, one in (("base", "base"), ("tuned", "one")):
        expected = sa.predict(apart[one], prompts[:4])["prediction"].tolist()
        assert (texts.sel(cell=cell).T.values == np.array(expected)).all()


@pytest.mark.usefixtures("whole")
def test_a_dose_that_ends_with_the_prompt_is_seen(tuned: Made, prompts: PromptSet) -> None:
    """Scores are raised from the positions of the answer too: raised at the prediction alone, other texts come."""
    arms, apart = tuned("llama")
    found = raised_accuracy(arms, prompts, [4.0], "one")["prediction"].sel(cell="raised").values[:, 0]
    first = [
        slowly(apart["one"], prompt, lambda _, p=prompt: {(p.prediction, key) for key in p.subject_positions}, 4.0)
        for prompt in prompts
    ]
    assert found.tolist() != first
    assert found.tolist() == [slowly(apart["one"], prompt, edges_in(prompt, "direct"), 4.0) for prompt in prompts]


@pytest.mark.usefixtures("whole")
def test_some_heads_and_random_ones_beside_them(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    heads = [(0, 1), (2, 0), (2, 3)]
    found = raised_accuracy(arms, prompts[:3], [6.0], "one", heads=heads, random_sets=2, seed=1)
    assert found["cell"].values.tolist() == ["base", "tuned", *CELLS, "random 0", "random 1"]
    words = found["heads"].values.tolist()
    assert words[:5] == ["", "", *["0.1 2.0 2.3"] * 3] and len(set(words[2:])) == 3
    assert found["correct"].attrs["matched"].startswith("as many heads in each layer")
    seen = 0
    for cell, of in zip(found["cell"].values, words, strict=True):
        if cell in ("raised", "random 0", "random 1"):
            these = [tuple(map(int, head.split("."))) for head in of.split()]
            expected = [slowly(apart["one"], prompt, edges_in(prompt, "direct"), 6.0, these) for prompt in prompts[:3]]
            assert found["prediction"].sel(cell=cell).values[:, 0].tolist() == expected
            seen += expected != found["prediction"].sel(cell="tuned").values[:, 0].tolist()
    assert seen


def test_letters(tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned("llama")
    asked = [replace(prompt, choice_ids=(40, 41, 42, 43), answers=("B",)) for prompt in prompts]
    found = raised_accuracy(arms, asked, [3.0], "one", scorer="letters").isel(dose=0)
    for i, prompt in enumerate(asked):
        so_far = replace(prompt, ids=prompt.ids[: prompt.prediction + 1])
        logits = masked_logits(apart["one"].model, so_far, edges_in(prompt, "direct")(len(so_far)), 3.0)
        letter = "ABCD"[int(logits[[40, 41, 42, 43]].argmax())]
        assert found["prediction"].sel(cell="raised").values[i] == letter
        assert found["correct"].sel(cell="raised").values[i] == (letter == "B")


def test_no_dose_is_the_tuned_model(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    found = raised_accuracy(arms, prompts, [0.0], "one")["prediction"].isel(dose=0)
    assert found.sel(cell="raised").values.tolist() == found.sel(cell="tuned").values.tolist()


def test_a_prompt_without_the_routes_edges_has_no_answer(tuned: Made, prompts: PromptSet) -> None:
    """Planted: a subject that stands first has nothing before it."""
    arms, _ = tuned("llama")
    first = replace(prompts[0], span=(0, 2))
    found = raised_accuracy(arms, [first, prompts[1]], [1.0], "one", route="subject_to_earlier")["correct"]
    assert found.sel(cell="raised").isnull().values.ravel().tolist() == [True, False]
    assert found.sel(cell="placebo").isnull().all() and found.sel(cell=["base", "tuned"]).notnull().all()


def test_the_measure_gives_what_the_function_gives(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    two = Arms(arms.base, {"one": arms.sources["one"]})
    found = measure("raised_accuracy", two, prompts, {"facts": 4, "doses": "0.5,2", "scorer": "containment"})
    few = [next(prompt for prompt in prompts if prompt.fact_id == fact) for fact in found["fact"].values]
    own = raised_accuracy(arms, few, [0.5, 2], "one", scorer="containment")
    xr.testing.assert_identical(found, own)
    rows = pd.DataFrame(values_of(measure_of("raised_accuracy"), found)).set_index([1, 2])[3]
    for quantity, cell, model in (
        ("accuracy_raised", "raised", "tuned"),
        ("accuracy_raised_placebo", "placebo", "tuned"),
        ("accuracy_raised_base", "base_raised", "base"),
    ):
        for part, dose in (("0.5", 0.5), ("2", 2.0)):
            change = (own["correct"].sel(cell=cell) - own["correct"].sel(cell=model)).sel(dose=dose)
            np.testing.assert_array_equal(rows[quantity, part], change)


def test_refusals(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    for wrong, says in (
        ({"doses": []}, "give numbers, each once"),
        ({"doses": [1.0, 1.0]}, "give numbers, each once"),
        ({"doses": [np.nan]}, "give numbers, each once"),
        ({"route": "straight"}, "route 'straight' is not one of direct"),
        ({"heads": [(9, 0)]}, "is no set of this model"),
        ({"random_sets": 2}, r"give heads=\[\(layer, head\), …\]"),
        ({"scorer": "bleu"}, "scorer 'bleu' is not one of"),
    ):
        with pytest.raises(BadInput, match=says):
            raised_accuracy(arms, prompts, tuned="one", **wrong)
    with pytest.raises(BadInput, match="give it what load_arms gives"):
        raised_accuracy(arms.base, prompts)
    with pytest.raises(BadInput, match="ends with its subject"):
        ending = replace(prompts[0], span=(prompts[0].prediction, prompts[0].prediction + 1))
        raised_accuracy(arms, [ending], tuned="one")


def correct_of(cells: dict[str, Any]) -> xr.DataArray:
    """Right answers `(fact, dose, cell)` of one dose."""
    values = np.stack([np.asarray(one, float) for one in cells.values()], -1)[:, None]
    coords = {"fact": np.arange(len(values)), "dose": [2.0], "cell": list(cells)}
    return xr.DataArray(values, coords, ("fact", "dose", "cell"), "correct")


def test_shares_of_the_gap_by_dose() -> None:
    """As of states put back, with random heads as one more control."""
    rng = np.random.default_rng(0)
    base, tuned = (rng.random(200) < 0.8).astype(int), (rng.random(200) < 0.4).astype(int)
    raised = np.where(rng.random(200) < 0.5, base, tuned)
    cells = {"base": base, "tuned": tuned, "raised": raised, "placebo": tuned, "base_raised": base, "random 0": base}
    found = returned_accuracy(correct_of(cells))
    assert found["share"].dims == ("patch", "dose")
    assert found["patch"].values.tolist() == ["real", "placebo", "random 0"]
    wanted = (raised.mean() - tuned.mean()) / (base.mean() - tuned.mean())
    np.testing.assert_allclose(found["share"].sel(dose=2.0), [wanted, 0, 1])
    lost = (base == 1) & (tuned == 0)
    assert found["right_again"].values[:, 0].tolist() == [raised[lost].sum(), 0, lost.sum()] and lost.sum() > 9
    assert found["accuracy"].sel(cell="raised").item() == pytest.approx(raised.mean())
    put = correct_of({"base": base, "tuned": tuned, "put_back": raised, "placebo": tuned})
    same = returned_accuracy(put.rename(dose="put"))
    for name in ("share", "share_low", "share_high", "right_again"):
        np.testing.assert_array_equal(same[name], found[name][:2])


def test_where_nothing_was_lost_there_is_no_share() -> None:
    """Planted: both models all wrong, and no more wrong than before."""
    for base, raised in (([0] * 30, [0] * 30), ([0] * 30, [1] * 30), ([1] * 30, [0] * 30)):
        found = returned_accuracy(correct_of({"base": base, "tuned": base, "raised": raised, "placebo": base}))
        assert found["share"].isnull().all() and found["n_lost"] == 0 == found.attrs["gap"]
        assert found["right_again"].values.ravel().tolist() == [0, 0]


@pytest.fixture(scope="module")
def known(smollm2: LoadedModel, cities: pd.DataFrame) -> list[Prompt]:
    large = cities.sort_values("popularity", ascending=False).drop_duplicates("subject").head(60)
    prompts = make_prompts(large, smollm2.tokenizer, TEMPLATES["country"]["list"])
    return [one for one, right in zip(prompts, sa.predict(smollm2, prompts)["correct"], strict=True) if right]


def test_answers_lost_by_looking_away_return_and_others_do_not(smollm2: LoadedModel, known: list[Prompt]) -> None:
    """Planted: heads that look away, raised by as much again; and MLPs damaged, whose answers no score returns."""
    planting, asked = known[::3], [prompt for number, prompt in enumerate(known) if number % 3]
    n_kv = smollm2.model.config.num_key_value_heads
    looks = sa.subject_attention(smollm2, planting).mean("fact").values
    order = np.argsort(-looks.reshape(len(looks), n_kv, -1).mean(-1), axis=None)[:8]
    away = look_away(smollm2, planting, [divmod(int(one), n_kv) for one in order], 3.0)
    damaged = damage_mlps(smollm2, planting, range(20), 0.7)
    found = {}
    for name, organism in (("away", away), ("damaged", damaged)):
        arms = load_arms(smollm2, checkpoints={"one": organism.model})
        found[name] = returned_accuracy(raised_accuracy(arms, asked, [3.0], heads=list(away.places)))
        assert found[name]["n_lost"] >= 8 and found[name].attrs["gap_interval"][1] < 0
    again = {name: (one["right_again"] / one["n_lost"]).values[:, 0].tolist() for name, one in found.items()}
    assert again["away"][0] > 0.8 and again["away"][1] < 0.2, again
    assert max(again["damaged"]) < 0.2, again
    low, high = (found["away"][end].values[:, 0] for end in ("share_low", "share_high"))
    assert low[0] > max(0, high[1])
    assert not (found["damaged"]["share_low"] > 0).any()
