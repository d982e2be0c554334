"""Interventions inside attention against attention that is written out step by step, with edits in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from subjattn.backends import Backend, open_backend
from subjattn.engine import attend, cones
from subjattn.engine.anatomy import n_kv_heads
from subjattn.engine.base import Base
from subjattn.engine.forward import forward
from subjattn.engine.interventions import Block, Component, Edges, Patch, Row, Scale, times
from subjattn.engine.memory import PeakMemory
from subjattn.errors import BadInput, NotFired, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.patching import patch_grid
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts, swap_subjects


NAMES = ("llama", "gpt2", "mistral", "qwen3", "gemma2", "gpt_neox", "phi3")
INSIDE: tuple[Component, ...] = ("q", "k", "v", "pattern")


@pytest.fixture(scope="module", params=NAMES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(arch: str, tiny_models: dict[str, LoadedModel]) -> PreTrainedModel:
    return tiny_models[arch].model


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 12, seed=3), tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def two(prompts: PromptSet) -> tuple[Prompt, Prompt]:
    """A short prompt and a long one."""
    return min(prompts, key=len), max(prompts, key=len)


def logits(run: Any, model: PreTrainedModel, row: Row) -> torch.Tensor:
    (output,) = run(model, [row]) if not hasattr(run, "forward") else run.forward([row])
    return output.logits


def by_hand(model: PreTrainedModel, target: Prompt, patches: tuple[Patch, ...]) -> torch.Tensor:
    """Logits with patches as edits, one after another."""
    edits: oracles.Edits = {}
    for patch in patches:
        values = patch.values
        if isinstance(values, Prompt):
            values = oracles.seen_inside(model, values, patch.component, patch.layer)[patch.head][list(patch.taken_at)]
        at = patch.component, patch.layer
        put, before = oracles.put_inside(values, patch.positions, patch.head), edits.get(at, lambda state: state)
        edits[at] = lambda state, put=put, before=before: put(before(state))
    return oracles.edited_logits(model, target, edits)[target.predicting]


@pytest.mark.parametrize("component", INSIDE)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_patch_is_an_edit_by_hand(
    model: PreTrainedModel, two: tuple[Prompt, Prompt], component: Component, layer: int
) -> None:
    """From a longer and from a shorter prompt, whole passes and cones; keys and values reach what follows them."""
    for target, source in (two, two[::-1]):
        for positions in ((min(target.prediction, source.prediction), 5), (2,)):
            head = n_kv_heads(model)[layer] - 1 if component in ("k", "v") else 2
            patch = Patch(layer, positions, source, component, head)
            expected = by_hand(model, target, (patch,))
            for run in (forward, cones.forward):
                found = logits(run, model, Row(target, patches=(patch,)))
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_oracle_attends_as_the_model_does(model: PreTrainedModel, prompts: PromptSet) -> None:
    for prompt in prompts[:3]:
        found = oracles.edited_logits(model, prompt, {})
        torch.testing.assert_close(found, oracles.logits(model, prompt), atol=1e-4, rtol=0)


def several(model: PreTrainedModel, source: Prompt, end: int) -> tuple[Patch, ...]:
    """In several layers: from a run, brought along, and values from other positions; no pattern hides the rest."""
    given = torch.linspace(0, 1, end + 1)[None].repeat(2, 1) * (
        torch.arange(end + 1) <= torch.tensor([[end - 2], [end]])
    )
    width = oracles.seen_inside(model, source, "v", 0).shape[-1]
    return (
        Patch(0, (end - 1,), source, "v", 1, (2,)),
        Patch(0, (2, end - 2), torch.full((2, width), 0.5), "k", 0),
        Patch(1, (end - 2, end), given, "pattern", 3),
        Patch(1, (end,), source, "q", 0),
        Patch(1, (3,), source, "k", 1),
        Patch(2, (end,), source, "pattern", 1),
        Patch(2, (4, end - 1), source, "v", 0),
    )


def test_several_patches_are_several_edits(model: PreTrainedModel, two: tuple[Prompt, Prompt]) -> None:
    target, source = two
    patches = several(model, source, target.prediction)
    expected = by_hand(model, target, patches)
    for run in (forward, cones.forward):
        found = logits(run, model, Row(target, patches=patches))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for left_out in patches:
        fewer = by_hand(model, target, tuple(patch for patch in patches if patch is not left_out))
        assert float((fewer - expected).abs().max()) > 1e-4, left_out


@pytest.mark.parametrize("component", INSIDE)
def test_a_runs_own_values_change_nothing(model: PreTrainedModel, prompts: PromptSet, component: Component) -> None:
    rows = [
        Row(prompt, patches=(Patch(layer, tuple(range(prompt.predicting[-1] + 1)), prompt, component, 1),))
        for prompt in prompts[:4]
        for layer in range(3)
    ]
    for output in cones.forward(model, rows):
        expected = torch.cat([oracles.logits(model, row.prompt)[row.prompt.predicting] for row in output.rows])
        torch.testing.assert_close(output.logits, expected, atol=2e-5, rtol=0)


def test_keys_and_values_change_what_follows_in_their_layer(two: tuple[Prompt, Prompt]) -> None:
    """What is recomputed of the first layer: the position itself, or all from it on."""
    prompt, source = two
    last = prompt.predicting[-1]
    for component, touched in (("q", [3]), ("pattern", [3]), ("k", range(3, last + 1)), ("v", range(3, last + 1))):
        row = Row(prompt, patches=(Patch(1, (3,), source, component, 0),))
        assert list(row.touched) == list(touched) and row.suffix == range(3, last + 1)
    row = Row(prompt, patches=(Patch(1, (6,), source, "k", 0), Patch(1, (2,), source, "z", 0)))
    assert list(row.touched) == [2, *range(6, last + 1)]


@pytest.mark.parametrize("run", [forward, cones.forward])
def test_what_could_not_be_meant_is_refused(tiny_models: dict[str, LoadedModel], prompts: PromptSet, run: Any) -> None:
    model, prompt, source = tiny_models["llama"].model, prompts[0], prompts[1]
    for component in ("k", "v"):
        with pytest.raises(NotFired, match="head 2, .* lies outside"):  # 4 query heads share 2 key/value heads
            list(run(model, [Row(prompt, patches=(Patch(1, (3,), source, component, 2),))]))
    for component in INSIDE:
        with pytest.raises(NotFired, match="head None, .* lies outside"):
            list(run(model, [Row(prompt, patches=(Patch(1, (3,), source, component),))]))
    for component in ("q", "k", "pattern"):
        with pytest.raises(NotFired, match=f"a patch of {component} is taken from other positions"):
            list(run(model, [Row(prompt, patches=(Patch(1, (3,), source, component, 0, (2,)),))]))
    later, short = torch.full((1, 6), 0.1), torch.full((1, 3), 0.1)
    for values in (later, short):
        with pytest.raises(NotFired, match="lacks keys, or has weight on later ones"):
            list(run(model, [Row(prompt, patches=(Patch(1, (3,), values, "pattern", 0),))]))


def other_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a cone's own keys put a key too early."""
    placed = attend._in_places
    monkeypatch.setattr(attend, "_in_places", lambda *args: placed(*args).roll(1, -1))


def narrow_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that would change their own position alone."""
    monkeypatch.setattr("subjattn.engine.interventions._READ_LATER", frozenset())


def other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next head of the run that values are taken from."""
    taken = Base.taken
    monkeypatch.setattr(
        Base,
        "taken",
        lambda base, its, layer, runs, at, heads: taken(base, its, layer, runs, at, [h - 1 for h in heads]),
    )


@pytest.mark.parametrize(
    ("plant", "component"), [(other_slot, "pattern"), (narrow_keys, "v"), (narrow_keys, "k"), (other_heads, "q")]
)
def test_planted_faults_are_seen(
    tiny_models: dict[str, LoadedModel],
    two: tuple[Prompt, Prompt],
    plant: Any,
    component: Component,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (target, source) = tiny_models["llama"].model, two
    row = Row(target, patches=(Patch(1, (3, target.prediction), source, component, 1),))
    expected = logits(cones.forward, model, row)
    plant(monkeypatch)
    assert float((logits(cones.forward, model, row) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("run", [forward, cones.forward])
def test_a_patch_that_is_never_written_is_noticed(
    tiny_models: dict[str, LoadedModel], two: tuple[Prompt, Prompt], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: attention that shows no weights, and none of its inputs."""
    from subjattn.engine import attention

    model, (target, source) = tiny_models["llama"].model, two
    logits(run, model, Row(target, patches=(Patch(1, (3,), source),)))
    changed = attention._changed
    monkeypatch.setattr(
        attention, "_changed", lambda tap, its, *rest: rest[-1] if its in INSIDE else changed(tap, its, *rest)
    )
    monkeypatch.setattr(attention, "partial", lambda *_: None)
    for component in INSIDE:
        with pytest.raises(NotFired, match="never"):
            logits(
                run,
                model,
                Row(target, patches=(Patch(1, (3,), torch.zeros(1, 4 + 4 * (component != "pattern")), component, 1),)),
            )


def scaled_by_hand(model: PreTrainedModel, row: Row, n_heads: int = 4) -> torch.Tensor:
    """Logits with numbers added to the scores, or with weights multiplied and their rows divided by the sum."""
    edits: oracles.Edits = {}
    for edges in (row.scale, row.block):
        for layer in range(3):
            heads = () if edges is None else edges.heads_at(layer)
            for head in range(n_heads) if heads is None else heads:
                before = edits.get(("scores", layer), lambda state: state)
                edits["scores", layer] = lambda state, args=(edges, head), before=before: added(before(state), *args)
    return oracles.edited_logits(model, row.prompt, edits)[row.prompt.predicting]


def added(scores: torch.Tensor, edges: Edges, head: int) -> torch.Tensor:
    scores = scores.clone()
    for query, key in edges.edges:
        scores[0, head, query, key] += edges.add if isinstance(edges, Scale) else -1e30
    return scores


def scaled_rows(prompt: Prompt, source: Prompt) -> list[Row]:
    """Layers, heads and cells; with a block that overlaps, and with a patch."""
    queries, keys = (prompt.prediction, prompt.prediction - 2), range(3, 7)
    edges = Scale.between(queries, keys, add=0.0).edges
    cells = frozenset({(0, 3), (1, 0), (1, 2)})
    return [
        Row(prompt, scale=Scale(edges, add=1.5)),
        Row(prompt, scale=Scale(edges, (1, 2), (0, 3), add=-2.5)),
        Row(prompt, scale=Scale(edges, cells=cells, add=times(0.25))),
        Row(prompt, Block.between([prompt.prediction], [4], (1,)), scale=Scale(edges, add=times(3))),
        Row(prompt, patches=(Patch(1, (3,), source, "k", 0),), scale=Scale(edges, (1,), add=2.0)),
    ]


def test_a_scale_adds_to_scores(model: PreTrainedModel, two: tuple[Prompt, Prompt]) -> None:
    target, source = two
    rows = scaled_rows(target, source)[:4]
    plain = oracles.logits(model, target)[target.predicting]
    for row in rows:
        expected = scaled_by_hand(model, row)
        assert float((expected - plain).abs().max()) > 1e-3
        for run in (forward, cones.forward):
            torch.testing.assert_close(logits(run, model, row), expected, atol=1e-4, rtol=0)
    row = scaled_rows(target, source)[4]
    torch.testing.assert_close(logits(cones.forward, model, row), logits(forward, model, row), atol=1e-4, rtol=0)


def test_a_factor_multiplies_weights_and_the_row_renormalises(
    model: PreTrainedModel, two: tuple[Prompt, Prompt]
) -> None:
    prompt, _ = two
    scale = Scale.between([prompt.prediction], range(3, 7), (1,), add=times(0.3))

    def multiplied(pattern: torch.Tensor) -> torch.Tensor:
        pattern = pattern.clone()
        pattern[0, :, prompt.prediction, 3:7] *= 0.3
        return pattern / pattern.sum(-1, keepdim=True)

    expected = oracles.edited_logits(model, prompt, {("pattern", 1): multiplied})[prompt.predicting]
    for run in (forward, cones.forward):
        torch.testing.assert_close(logits(run, model, Row(prompt, scale=scale)), expected, atol=1e-4, rtol=0)


def test_the_ends_of_a_scale(model: PreTrainedModel, two: tuple[Prompt, Prompt]) -> None:
    """Nothing added is nothing; far down is blocked; all keys alike is nothing, as a softmax sees differences."""
    prompt, _ = two
    plain = oracles.logits(model, prompt)[prompt.predicting]
    edges = Block.between([prompt.prediction], range(3, 7), (0, 2))
    for run in (forward, cones.forward):
        zero = logits(run, model, Row(prompt, scale=Scale(edges.edges, edges.layers, add=0.0)))
        torch.testing.assert_close(zero, plain, atol=2e-5, rtol=0)
        down = logits(run, model, Row(prompt, scale=Scale(edges.edges, edges.layers, add=-1e4)))
        torch.testing.assert_close(down, logits(run, model, Row(prompt, edges)), atol=2e-5, rtol=0)
        every = Scale.between([prompt.prediction], range(prompt.prediction + 1), add=3.0)
        torch.testing.assert_close(logits(run, model, Row(prompt, scale=every)), plain, atol=5e-5, rtol=0)


@pytest.mark.parametrize("run", [forward, cones.forward])
def test_scales_that_could_not_act_are_refused(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, run: Any
) -> None:
    model, prompt = tiny_models["llama"].model, prompts[0]
    for scale in (
        Scale(frozenset(), add=1.0),
        Scale.between((3,), (1,), (9,), add=1.0),
        Scale(frozenset({(1, 3)}), add=1.0),
        Scale.between((3,), (1,), heads=(4,), add=1.0),
    ):
        with pytest.raises(NotFired, match="the scaled edges are empty, or lie outside"):
            list(run(model, [Row(prompt, scale=scale)]))
    for number in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(NotFired, match="cannot be added to scores"):
            list(run(model, [Row(prompt, scale=Scale.between((3,), (1,), add=number))]))
    for factor in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(BadInput, match="or block the edges"):
            times(factor)


def test_a_scale_before_the_soft_cap_is_seen(
    tiny_models: dict[str, LoadedModel], two: tuple[Prompt, Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: Gemma 2's cap over what was added."""
    model, (prompt, source) = tiny_models["gemma2"].model, two
    row = scaled_rows(prompt, source)[0]
    expected = logits(cones.forward, model, row)
    added_at = attend.Tokens.added_at
    monkeypatch.setattr(attend.Tokens, "added_at", lambda tokens, layer: 2 * (added_at(tokens, layer) / 2).tanh())
    assert float((logits(cones.forward, model, row) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["transformer-lens", "nnsight"])
def test_other_libraries_edit_the_same(
    arch: str, model: PreTrainedModel, two: tuple[Prompt, Prompt], name: Any
) -> None:
    target, source = two
    if (arch, name) == ("gpt_neox", "transformer-lens"):
        with pytest.raises(UnsupportedModel, match="cannot take"):
            open_backend(name, model)
        return
    backend: Backend = open_backend(name, model)
    row = Row(target, patches=several(model, source, target.prediction))
    if (arch, name) == ("phi3", "transformer-lens"):
        with pytest.raises(UnsupportedModel, match="cannot patch k, q of this model: no hook point holds"):
            logits(backend, model, row)
        row = Row(target, patches=tuple(patch for patch in row.patches if patch.component in ("v", "pattern")))
    torch.testing.assert_close(logits(backend, model, row), by_hand(model, target, row.patches), atol=1e-4, rtol=0)
    for scaled in scaled_rows(target, source)[:4]:
        expected = scaled_by_hand(model, scaled)
        torch.testing.assert_close(logits(backend, model, scaled), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("component", INSIDE)
@pytest.mark.parametrize("window", [1, 2])
def test_every_cell_of_a_grid(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, cities: pd.DataFrame, component: Component, window: int
) -> None:
    """Every layer, window, head and position, both directions; heads of keys and values are those that are shared."""
    llama = tiny_models["llama"]
    asked = make_prompts(draw(cities, 60, seed=1), llama.tokenizer, TEMPLATES["country"]["list"])
    clean, corrupt = next(iter(swap_subjects(asked, np.random.default_rng(0))))
    for direction, source, into in (("denoising", clean, corrupt), ("noising", corrupt, clean)):
        found = patch_grid(llama, [(clean, corrupt)], component, at="position", direction=direction, window=window)
        assert found.dims == ("fact", "layer", "head", "position")
        assert found.sizes["head"] == (2 if component in ("k", "v") else 4)
        plain = float(found[f"{'corrupt' if direction == 'denoising' else 'clean'}_logit_diff"][0])
        for layer in range(3):
            layers = range(max(0, layer - window // 2), layer + 1)
            for head in range(found.sizes["head"]):
                for position in range(3, clean.prediction + 1, 3):
                    patches = tuple(Patch(at, (position,), source, component, head) for at in layers)
                    logits = by_hand(llama.model, into, patches)[0]
                    expected = float(logits[clean.answer_ids[0]] - logits[corrupt.answer_ids[0]]) - plain
                    cell = float(found[0, layer, head, position])
                    assert cell == pytest.approx(expected, abs=2e-4), (layer, head, position)


def test_a_budget_bounds_the_memory_of_patterns(tiny_models: dict[str, LoadedModel], cities: pd.DataFrame) -> None:
    """Weights of every position kept and changed: the peak counted storage by storage, the numbers to rounding."""
    llama = tiny_models["llama"]
    asked = make_prompts(draw(cities, 120, seed=2), llama.tokenizer, TEMPLATES["country"]["list"])
    pairs = swap_subjects(asked, np.random.default_rng(0))[:24]
    with PeakMemory() as free:
        expected = patch_grid(llama, pairs, "pattern", at="role")
    with PeakMemory() as bounded:
        found = patch_grid(llama, pairs, "pattern", at="role", memory_budget=free.peak // 5)
    assert bounded.peak <= free.peak // 5
    np.testing.assert_allclose(found, expected, atol=5e-5)
