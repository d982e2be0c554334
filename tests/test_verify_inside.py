"""`verify` of tracing and scaled scores: the engine agrees with plain hooks, and planted faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pandas as pd
import pytest
from test_verify_arms import Planted, failed

import subjattn.verify_inside as verification
from subjattn.backends import BackendName, open_backend
from subjattn.engine.interventions import Row
from subjattn.engine.noise import Noise
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.trace import Traced
from subjattn.models import LoadedModel
from subjattn.verify import Verification, verify, verify_facts
from subjattn.verify_inside import NOISED, SCALED, SCALED_HEADS, with_inside


RESTORED = {f"restored {component}" for component in get_args(Traced)}
Change = Callable[[Row], Row]


def verified(model: LoadedModel, cities: pd.DataFrame) -> tuple[Verification, LoadedModel, Any]:
    prompts, pairs = verify_facts(model, cities, TEMPLATES["country"]["list"])
    return verify(model, prompts, pairs, ()), model, prompts


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_the_engine_agrees_with_plain_hooks(
    name: str, tiny_models: dict[str, LoadedModel], cities: pd.DataFrame
) -> None:
    found = with_inside(*verified(tiny_models[name], cities))
    assert not failed(found) and set(found.quantities) >= RESTORED | {NOISED, SCALED, SCALED_HEADS}
    compared = {(one.quantity, one.backend) for one in found.comparisons}
    refused = {refusal.backend for refusal in found.refusals}
    for backend in {"hooks", "transformer-lens", "nnsight"} - refused:
        assert {(quantity, backend) for quantity in RESTORED | {NOISED, SCALED, SCALED_HEADS}} <= compared
    assert "hooks" not in refused and not any(one.weak for one in found.comparisons)
    json.dumps(found.to_dict(), allow_nan=False)


def nothing_restored(row: Row) -> Row:
    return replace(row, patches=())


def next_layer(row: Row) -> Row:
    return replace(row, patches=tuple(replace(one, layer=(one.layer + 1) % 3) for one in row.patches))


def noised_states(row: Row) -> Row:
    """States of the noised run itself, put where they are."""
    patches = tuple(replace(one, values=replace(one.values, noise=row.noise)) for one in row.patches)
    return replace(row, patches=patches)


def twice_the_dose(row: Row) -> Row:
    return replace(row, scale=None if row.scale is None else replace(row.scale, add=2 * row.scale.add))


def next_head(row: Row) -> Row:
    if row.scale is None or row.scale.cells is None:
        return row
    cells = frozenset((layer, (head + 1) % 4) for layer, head in row.scale.cells)
    return replace(row, scale=replace(row.scale, cells=cells))


def last_query_alone(row: Row) -> Row:
    """What a block that ends with the prompt would do to the answer's later tokens."""
    if row.scale is None:
        return row
    edges = frozenset(edge for edge in row.scale.edges if edge[0] == row.prompt.prediction)
    return replace(row, scale=replace(row.scale, edges=edges))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nothing_restored, RESTORED),
        (next_layer, RESTORED),
        (noised_states, RESTORED),
        (twice_the_dose, {SCALED, SCALED_HEADS}),
        (next_head, {SCALED_HEADS}),
        (last_query_alone, {SCALED, SCALED_HEADS}),
    ],
)
def test_planted_faults_are_named(
    tiny_models: dict[str, LoadedModel],
    cities: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    expected: set[str],
) -> None:
    def opened(name: BackendName, model: Any, *_: Any) -> Any:
        backend = open_backend(name, model)
        return Planted(backend, change) if name == "engine" else backend

    before = verified(tiny_models["llama"], cities)
    monkeypatch.setattr(verification, "opened", opened)
    found = with_inside(*before, ("hooks",))
    assert failed(found) == expected and "failed" in found.verdict


def test_noise_of_half_its_size_is_named(
    tiny_models: dict[str, LoadedModel], cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verified(tiny_models["llama"], cities)

    def put(self: Noise, prompt: Any, embedded: Any) -> Any:
        return embedded[list(self.at(prompt))] + self.values(prompt, embedded.shape[-1]) / 2

    monkeypatch.setattr(Noise, "put", put)
    assert failed(with_inside(*before, ("hooks",))) == {NOISED, *RESTORED}


def test_a_backend_that_does_not_open_is_said_once(tiny_models: dict[str, LoadedModel], cities: pd.DataFrame) -> None:
    before, model, prompts = verified(tiny_models["gpt_neox"], cities)
    found = with_inside(before, model, prompts, ("hooks", "transformer-lens"))
    (refusal,) = found.refusals
    assert (refusal.backend, refusal.quantity) == ("transformer-lens", None) and "cannot take" in refusal.reason
    again = with_inside(found, model, prompts, ("hooks", "transformer-lens"))
    assert again.refusals == found.refusals
