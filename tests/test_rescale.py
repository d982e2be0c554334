"""Dose–response of attention against attention written out by hand, and against the knock-out at its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr

import subjattn as sa
from subjattn.backends import BackendName
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.alone import measure
from subjattn.measures.knockout import ROUTES, knockout, other_edges
from subjattn.measures.record import measure_of, values_of
from subjattn.measures.rescale import rescale, slope_at_nothing
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts


DOSES = [-1.5, 0.0, 2.0]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 6, seed=1), tokenizer, TEMPLATES["country"]["list"])


def by_hand(model: Any, prompt: Prompt, edges: set[tuple[int, int]], dose: float, layers: Any, heads: Any) -> float:
    """Change of the answer's log-probability, every score of the edges raised."""

    def raised(scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for query, key in edges:
            scores[0, heads, query, key] += dose
        return scores

    logits = oracles.edited_logits(model, prompt, {("scores", layer): raised for layer in layers}).double()
    logprobs = logits.log_softmax(-1)
    value = sum(float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True))
    return value - oracles.answer_logprob(model, prompt)


def direct(prompt: Prompt) -> set[tuple[int, int]]:
    return {(query, key) for query in prompt.predicting for key in prompt.subject_positions}


def test_doses_by_hand(tiny: LoadedModel, prompts: PromptSet) -> None:
    """All layers, some layers and some heads; weights multiplied are scores raised by the logarithm."""
    for where, layers, heads in (
        ({}, range(3), slice(None)),
        ({"layers": [0, 2]}, (0, 2), slice(None)),
        ({"heads": [(1, 0), (1, 3)]}, (1,), [0, 3]),
    ):
        found = rescale(tiny, prompts[:3], DOSES, **where)
        factors = rescale(tiny, prompts[:3], list(np.exp(DOSES)), what="times", **where)
        assert found.dims == ("fact", "dose") and found["dose"].values.tolist() == DOSES
        np.testing.assert_allclose(factors, found, atol=2e-5)
        for i, prompt in enumerate(prompts[:3]):
            for j, dose in enumerate(DOSES):
                expected = by_hand(tiny.model, prompt, direct(prompt), dose, layers, heads)
                assert float(found[i, j]) == pytest.approx(expected, abs=1e-4)
            assert float(found[i, 1]) == pytest.approx(0, abs=2e-5)
        assert float(abs(found).max()) > 1e-3


@pytest.mark.parametrize("route", ROUTES)
def test_far_down_is_the_knock_out(tiny: LoadedModel, prompts: PromptSet, route: Any) -> None:
    drop = knockout(tiny, prompts, [route])
    down = rescale(tiny, prompts, [-1e4], route=route)
    nothing_left = rescale(tiny, prompts, [0.0, 1.0], what="times", route=route)
    np.testing.assert_allclose(down[:, 0], -drop[:, 0], atol=2e-5)
    np.testing.assert_allclose(nothing_left[:, 0], -drop[:, 0], atol=2e-5)
    np.testing.assert_allclose(nothing_left[:, 1], 0 * drop[:, 0], atol=2e-5)
    np.testing.assert_allclose(down["baseline_answer_logprob"], drop["baseline_answer_logprob"], atol=2e-5)


def test_the_control_takes_as_many_other_edges(tiny: LoadedModel, prompts: PromptSet) -> None:
    """By the rule, and the numbers by hand; where a prompt has too few other keys there is none."""
    found = rescale(tiny, prompts, DOSES)
    rng, seen = np.random.default_rng(0), 0
    for i, prompt in enumerate(prompts):
        others = other_edges(prompt, frozenset(direct(prompt)), rng)
        for query in prompt.predicting:
            keys = {key for at, key in others if at == query}
            assert len(keys) in (0, len(prompt.subject_positions))
            assert not keys & {0, query, *prompt.subject_positions} and all(key < query for key in keys)
        if not others:
            assert found["control"][i].isnull().all()
            continue
        seen += 1
        for j, dose in enumerate(DOSES):
            expected = by_hand(tiny.model, prompt, set(others), dose, range(3), slice(None))
            assert float(found["control"][i, j]) == pytest.approx(expected, abs=1e-4)
    assert seen > 0


@pytest.mark.parametrize("backend", ["hooks", "transformer-lens", "nnsight"])
def test_other_backends(tiny: LoadedModel, prompts: PromptSet, backend: BackendName) -> None:
    found, expected = (rescale(tiny, prompts[:2], DOSES, backend=name) for name in (backend, "engine"))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found["control"], expected["control"], atol=1e-4)


def test_slopes_by_hand() -> None:
    def change(doses: list[float], values: list[float], what: str = "add") -> xr.DataArray:
        return xr.DataArray([values], {"dose": doses}, ("fact", "dose"), attrs={"what": what})

    for found, expected in (
        (change([-2.0, -1.0, 0.0, 0.5, 4.0], [9.0, -1.0, 0.0, 2.0, 9.0]), (2.0 - -1.0) / 1.5),
        (change([3.0, 0.5], [9.0, 2.0]), 4.0),
        (change([-0.5, -3.0], [-1.0, 9.0]), 2.0),
        (change([0.0, 0.5, 1.0, 2.0], [9.0, -1.0, 0.0, 2.0], "times"), 3.0 / (2 * np.log(2))),
        (change([0.0], [0.0]), np.nan),
        (change([0.0, 1.0], [-3.0, 0.0], "times"), np.nan),
    ):
        np.testing.assert_allclose(slope_at_nothing(found).values, [expected])


def test_the_measure_gives_its_quantities(tiny: LoadedModel, prompts: PromptSet) -> None:
    dataset = measure("rescale", tiny, prompts, {"doses": "-1,1,3", "facts": 4})
    assert dataset.sizes == {"fact": 4, "dose": 3}
    rows = values_of(measure_of("rescale"), dataset)
    assert {row[1] for row in rows} == {quantity.name for quantity in measure_of("rescale").quantities}
    chosen = [prompt for prompt in prompts if prompt.fact_id in dataset["fact"].values]
    chosen.sort(key=lambda prompt: list(dataset["fact"].values).index(prompt.fact_id))
    array = rescale(tiny, chosen, [-1.0, 1.0, 3.0])
    of = {name: [value for _, its, _, value, _ in rows if its == name] for _, name, *_ in rows}
    np.testing.assert_allclose(of["rescale_slope"], (array[:, 1] - array[:, 0]) / 2, atol=1e-5)
    np.testing.assert_allclose(
        of["rescale_control_slope"], (array["control"][:, 1] - array["control"][:, 0]) / 2, atol=1e-5
    )
    np.testing.assert_allclose(of["rescale_change"], array[:, 2], atol=1e-5)


def test_the_figure_has_a_line_and_a_dashed_one(tiny: LoadedModel, prompts: PromptSet) -> None:
    array = rescale(tiny, prompts, [2.0, -1.0])
    figure = sa.plot(array)
    route, other = figure.data
    assert list(route.x) == [-1.0, 2.0] and other.line.dash == "dash"
    np.testing.assert_allclose(route.y, array.mean("fact").sortby("dose"))
    np.testing.assert_allclose(other.y, array["control"].mean("fact").sortby("dose"))
    assert figure.layout.xaxis.title.text == "added to the scores"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"doses": []}, "give numbers, each once"),
        ({"doses": [1.0, 1.0]}, "give numbers, each once"),
        ({"doses": [np.inf]}, "give numbers, each once"),
        ({"doses": [-1.0], "what": "times"}, "not below 0"),
        ({"doses": [1.0], "what": "set"}, "neither 'add'"),
        ({"doses": [1.0], "route": "subject"}, "is not one of direct, total"),
        ({"doses": [1.0], "layers": [0], "heads": [(0, 0)]}, "one of them"),
        ({"doses": [1.0], "layers": [9]}, "is no set of this model"),
        ({"doses": [1.0], "metric": "logit_diff"}, "rescale has no foils"),
    ],
)
def test_wrong_arguments_are_named(tiny_models: Any, prompts: PromptSet, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        rescale(tiny_models["llama"], prompts, **asked)
