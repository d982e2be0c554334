"""Noised runs: each against plain hooks on the Hugging Face model, with the noise drawn by hand."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import zoo
from transformers import PreTrainedModel

from subjattn.backends import BACKENDS, BackendName, open_backend
from subjattn.engine import cones, forward, prefix
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, Block, Output, Patch, Row, Run
from subjattn.engine.noise import Noise
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, Style, make_prompts


EMBEDDINGS = {
    "llama": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "gemma2": "model.embed_tokens",
    "gpt_neox": "gpt_neox.embed_in",
}
OUTSIDE = tuple(one for one in COMPONENTS if one == "z" or one not in BY_HEAD)
"""Components that plain hooks on modules reach."""
STD = 0.7


@pytest.fixture(params=list(EMBEDDINGS))
def named(request: pytest.FixtureRequest, tiny_models: dict[str, LoadedModel]) -> tuple[str, PreTrainedModel]:
    return request.param, tiny_models[request.param].model


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> PreTrainedModel:
    return tiny_models["llama"].model


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 4, seed=3), tokenizer, TEMPLATES["country"]["sentence"])


def by_hand(prompt: Prompt, seed: int = 0, draw: int = 0) -> torch.Tensor:
    """The draw of a fact, in the units of the embedding, at the positions of its subject."""
    start, stop = prompt.span
    fact = int(hashlib.sha256(prompt.fact_id.encode()).hexdigest()[:16], 16)
    values = np.random.default_rng([seed, draw, fact]).standard_normal((stop - start, 32), dtype=np.float32)
    return torch.tensor(STD * values)


def noised(model: PreTrainedModel, name: str, prompt: Prompt, draw: int = 0) -> Any:
    """A hook that adds it to what the embedding gives."""

    def add(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        state[0, prompt.span[0] : prompt.span[1]] += by_hand(prompt, 0, draw)
        return state

    return oracles.replacing(model, EMBEDDINGS[name], add)


@torch.no_grad()
def restored(
    model: PreTrainedModel, name: str, prompt: Prompt, component: str, layer: int, positions: Iterable[int], draw: int
) -> torch.Tensor:
    """All logits of the noised run with a component's clean states at some positions, of head 1 alone for `z`."""
    where, kept = oracles.place(model, component, layer, zoo.parts(name)), []
    d_head = getattr(model.config, "head_dim", None) or 8
    columns = slice(d_head, 2 * d_head) if component == "z" else slice(None)
    ids = torch.tensor([prompt.ids])
    with oracles.replacing(model, where, lambda state: kept.append(state.clone())):
        model(ids, use_cache=False)

    def put(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        for position in positions:
            state[0, position, columns] = kept[0][0, position, columns]
        return state

    with noised(model, name, prompt, draw), oracles.replacing(model, where, put):
        return model(ids, use_cache=False).logits[0]


def by_row(outputs: Iterable[Output], rows: list[Row]) -> list[torch.Tensor]:
    """Logits of each row, `[answer, vocab]`."""
    found: list[Any] = [None] * len(rows)
    for output in outputs:
        counts = [len(row.prompt.predicting) for row in output.rows]
        for i, logits in zip(output.index, output.logits.split(counts), strict=True):
            found[i] = logits
    return found


def largest_gap(name: str, model: PreTrainedModel, prompts: PromptSet, outputs: Any) -> tuple[float, float]:
    """Of restored and plain noised runs from the oracle, and how far noise moves the logits."""
    rows, expected = [], []
    for prompt in prompts:
        last = prompt.span[1] - 1
        for n in (0, 1):
            rows.append(Row(prompt, noise=Noise(STD, draw=n)))
            with noised(model, name, prompt, n), torch.no_grad():
                expected.append(model(torch.tensor([prompt.ids]), use_cache=False).logits[0])
            for component in OUTSIDE:
                patch = Patch(1, (last, prompt.prediction), prompt, component, 1 if component == "z" else None)
                rows.append(Row(prompt, patches=(patch,), noise=Noise(STD, draw=n)))
                expected.append(restored(model, name, prompt, component, 1, (last, prompt.prediction), n))
    found = by_row(outputs(model, rows), rows)
    wanted = [logits[list(row.prompt.predicting)] for row, logits in zip(rows, expected, strict=True)]
    clean = oracles.logits(model, prompts[0])[list(prompts[0].predicting)]
    return (
        max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)),
        float((wanted[0] - clean).abs().max()),
    )


@pytest.mark.parametrize("outputs", [cones.forward, forward.forward])
def test_noised_and_restored_runs_are_those_of_plain_hooks(
    named: tuple[str, PreTrainedModel], prompts: PromptSet, outputs: Any
) -> None:
    gap, moved = largest_gap(*named, prompts[:3], outputs)
    assert gap < 5e-5 < 0.2 < moved


@pytest.mark.parametrize("outputs", [cones.forward, forward.forward])
def test_noise_at_wrong_positions_is_seen(
    llama: PreTrainedModel, prompts: PromptSet, outputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: noise stands one token further on."""
    at = Noise.at
    monkeypatch.setattr(Noise, "at", lambda noise, prompt: tuple(position + 1 for position in at(noise, prompt)))
    assert largest_gap("llama", llama, prompts[:3], outputs)[0] > 0.05


def test_noised_states_go_into_clean_runs_and_edges_are_blocked_in_noised_ones(
    llama: PreTrainedModel, prompts: PromptSet
) -> None:
    prompt, noise = prompts[0], Noise(STD)
    at = (prompt.span[1] - 1,)
    edges = Block.between(prompt.predicting, prompt.subject_positions)
    rows = [Row(prompt, patches=(Patch(1, at, Run(prompt, noise=noise)),)), Row(prompt, edges, noise=noise)]
    kept: list[torch.Tensor] = []
    where = oracles.place(llama, "resid_pre", 1, zoo.parts("llama"))
    with noised(llama, "llama", prompt), oracles.replacing(llama, where, lambda state: kept.append(state.clone())):
        llama(torch.tensor([prompt.ids]), use_cache=False)

    def put(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        state[0, at[0]] = kept[0][0, at[0]]
        return state

    with oracles.replacing(llama, where, put):
        expected = [oracles.logits(llama, prompt)]
    with noised(llama, "llama", prompt):
        expected.append(oracles.logits(llama, prompt, oracles.hand_mask(llama, len(prompt), {*edges.edges})))
    for outputs in (cones.forward, forward.forward):
        for found, wanted in zip(by_row(outputs(llama, rows), rows), expected, strict=True):
            torch.testing.assert_close(found, wanted[list(prompt.predicting)], atol=2e-4, rtol=0)


def test_controls_are_the_noised_runs(llama: PreTrainedModel, prompts: PromptSet) -> None:
    """Beside a restored row runs its noised run without a patch, and not the clean one."""
    prompt = prompts[0]
    rows = [Row(prompt, patches=(Patch(1, (prompt.prediction,), prompt),), noise=Noise(STD, draw=n)) for n in (0, 1)]
    for outputs in (cones.forward, forward.forward):
        (output,) = outputs(llama, rows)
        count = len(prompt.predicting)
        for i in range(2):
            with noised(llama, "llama", prompt, i):
                expected = oracles.logits(llama, prompt)[list(prompt.predicting)]
            found = output.control.logits.split(count)[output.control_of[output.index.index(i)]]
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_a_draw_does_not_depend_on_what_else_runs(llama: PreTrainedModel, prompts: PromptSet) -> None:
    rows = [Row(p, noise=Noise(STD, draw=n)) for p in prompts for n in range(3)]
    rows += [Row(p) for p in prompts]
    together = by_row(cones.forward(llama, rows), rows)
    turned = by_row(cones.forward(llama, rows[::-1]), rows)[::-1]
    for row, one, other in zip(rows, together, turned, strict=True):
        alone = by_row(cones.forward(llama, [row]), [row])[0]
        torch.testing.assert_close(one, alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(other, alone, atol=1e-4, rtol=0)


def test_draws_differ_by_seed_draw_and_fact_and_by_nothing_else(prompts: PromptSet) -> None:
    one, other = prompts[0], prompts[1]
    first = Noise(STD).values(one, 32)
    assert torch.equal(first, by_hand(one)) and torch.equal(first, Noise(STD).values(replace(one, text="x"), 32))
    torch.testing.assert_close(Noise(2 * STD).values(one, 32), 2 * first)
    for changed in (Noise(STD, seed=1), Noise(STD, draw=1)):
        assert (changed.values(one, 32) - first).abs().min() > 0
    assert (Noise(STD, positions=(1, 2)).values(other, 32)[0] - first[0]).abs().max() > 0.1
    many = Noise(1.0, positions=tuple(range(400))).values(one, 400)
    assert abs(float(many.mean())) < 0.01 and float(many.std()) == pytest.approx(1, abs=0.01)


def test_the_beginning_is_shared_up_to_the_noise(
    tiny_models: dict[str, LoadedModel],
    tokenizer: Any,
    cities: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few-shot prompts and their noised runs: one whole run, the numbers of runs by themselves; Gemma's scale too."""
    style = Style(template=TEMPLATES["country"]["list"], shots=2)
    prompts = make_prompts(draw(cities, 4, seed=3), tokenizer, style, demonstrations=draw(cities, 9, seed=4))
    whole: list[int] = []
    run = prefix.run_base
    for name in ("llama", "gemma2"):
        model = tiny_models[name].model
        rows = [Row(p, noise=noise) for p in prompts for noise in (None, Noise(STD), Noise(STD, draw=1))]
        rows += [
            Row(p, patches=(Patch(1, (p.span[1] - 1,), p),), noise=Noise(STD, draw=n)) for p in prompts for n in (0, 1)
        ]
        expected = by_row(forward.forward(model, rows), rows)
        whole.clear()
        with monkeypatch.context() as patched:
            patched.setattr(prefix, "run_base", lambda m, runs, *rest: whole.append(len(runs)) or run(m, runs, *rest))
            found = by_row(cones.forward(model, rows), rows)
        assert {*whole} == {1}
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_adds_the_same_noise(llama: PreTrainedModel, prompts: PromptSet, name: BackendName) -> None:
    own = llama if name in ("engine", "hooks") else copy.deepcopy(llama)
    gap, moved = largest_gap("llama", llama, prompts[:1], lambda _, rows: open_backend(name, own).forward(rows))
    assert gap < 5e-5 < 0.2 < moved


def test_transformer_lens_without_the_models_own_embedding_is_refused(
    llama: PreTrainedModel, prompts: PromptSet
) -> None:
    backend: Any = open_backend("transformer-lens", copy.deepcopy(llama))
    assert backend.embeds
    backend.embeds = False
    with pytest.raises(UnsupportedModel, match="adds no noise to embeddings"):
        list(backend.forward([Row(prompts[0], noise=Noise(STD))]))
    list(backend.forward([Row(prompts[0])]))


@pytest.mark.parametrize(
    "noise",
    [
        Noise(0.0),
        Noise(-1.0),
        Noise(float("nan")),
        Noise(STD, seed=-1),
        Noise(STD, draw=-1),
        Noise(STD, positions=()),
        Noise(STD, positions=(2, 2)),
        Noise(STD, positions=(999,)),
    ],
)
def test_noise_that_would_do_nothing_is_refused(llama: PreTrainedModel, prompts: PromptSet, noise: Noise) -> None:
    row = Row(prompts[0], patches=(Patch(1, (3,), Run(prompts[0], noise=noise)),))
    for one in (Row(prompts[0], noise=noise), row):
        with pytest.raises(NotFired, match="noise"):
            list(cones.forward(llama, [one]))


def test_noise_that_was_never_added_is_an_error(
    llama: PreTrainedModel, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the embedding that is named is not the one that runs; and noise too small for half precision."""
    rows = [Row(prompts[0], noise=Noise(STD))]
    list(cones.forward(llama, rows))
    other = torch.nn.Embedding(2, 2)
    monkeypatch.setattr(llama, "get_input_embeddings", lambda: other)
    for outputs in (cones.forward, forward.forward):
        with pytest.raises(NotFired, match="noise for 1 rows: the input embedding .* gave \\[\\]"):
            list(outputs(llama, rows))
    monkeypatch.undo()
    half = copy.deepcopy(llama).bfloat16()
    with pytest.raises(NotFired, match="lost in the rounding of torch.bfloat16"):
        list(cones.forward(half, [Row(prompts[0], noise=Noise(1e-9))]))
