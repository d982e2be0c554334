"""Metrics, routes, places, directions and budgets of grids, each against a computation by hand."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
import zoo

import subjattn.engine.cones as cones
from subjattn.engine.budget import Budget
from subjattn.engine.interventions import COMPONENTS, Block, Row
from subjattn.engine.memory import PeakMemory
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import shortened
from subjattn.measures.attention import subject_attention
from subjattn.measures.knockout import ROUTES, knockout
from subjattn.measures.metrics import METRICS
from subjattn.measures.patching import At, patch_grid, recovery
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts, swap_subjects


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 60, seed=1), tokenizer, TEMPLATES["country"]["sentence"])


@pytest.fixture(scope="module")
def pairs(prompts: PromptSet) -> list[tuple[Prompt, Prompt]]:
    found = swap_subjects(prompts, np.random.default_rng(0))[:3]
    assert any(len(clean.answer_ids) > 1 for clean, _ in found)
    return found


def by_hand(logits: torch.Tensor, base: torch.Tensor, prompt: Prompt, foil: int) -> dict[str, float]:
    """Metrics of one run from its raw logits; the answer's tokens are predicted from `prompt.prediction` on."""
    logprobs, base = logits.double().log_softmax(-1), base.double().log_softmax(-1)
    first = logprobs[prompt.prediction]
    answer = prompt.answer_ids[0]
    expected = base[prompt.prediction]
    return {
        "answer_logprob": sum(
            float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True)
        ),
        "logit_diff": float(logits[prompt.prediction, answer] - logits[prompt.prediction, foil]),
        "answer_logit": float(logits[prompt.prediction, answer]),
        "kl": float((expected.exp() * (expected - first)).sum()),
        "rank": float((first > first[answer]).sum() + 1),
    }


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("component", [its for its in COMPONENTS if its not in ("q", "k", "v", "pattern")])
def test_every_cell_of_a_grid_by_position(
    llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], component: Any, direction: Any
) -> None:
    """All metrics from one pass, both directions: plain hooks on a prompt that ends in the clean answer."""
    model = llama.model
    found = patch_grid(llama, pairs[:2], component, at="position", direction=direction, metric=list(METRICS))
    assert found["kl"].dims == (
        ("fact", "layer", "head", "position") if component == "z" else ("fact", "layer", "position")
    )
    for i, (clean, other) in enumerate(pairs[:2]):
        end = clean.prediction + 1
        corrupt = Prompt(**vars(other) | {"ids": other.ids[:end] + clean.answer_ids, "answers": clean.answers})
        into, source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
        base = oracles.logits(model, into)
        raw = by_hand(base, base, clean, other.answer_ids[0])
        for layer in range(3):
            where = oracles.place(model, component, layer, zoo.parts("llama"))
            for position in range(end):
                columns = slice(8, 16) if component == "z" else slice(None)  # head 1, d_head 8
                patched = oracles.patched_logits(model, source, into, where, [position], columns)
                expected = by_hand(patched, base, clean, other.answer_ids[0])
                cell = found.isel(fact=i, layer=layer, position=position)
                cell = cell.isel(head=1) if component == "z" else cell
                for name in METRICS:
                    change = raw[name] if name not in ("kl", "rank") else 0.0
                    assert float(cell[name]) == pytest.approx(expected[name] - change, abs=5e-4), (
                        name,
                        layer,
                        position,
                    )
        side = "corrupt" if direction == "denoising" else "clean"
        assert float(found["logit_diff"][f"{side}_logit_diff"][i]) == pytest.approx(raw["logit_diff"], abs=2e-4)
        assert np.isnan(found["logit_diff"].isel(fact=i, position=slice(end, None))).all()
    assert float(abs(found["logit_diff"]).max()) > 0.05


def test_places_of_a_grid_are_those_of_its_positions(llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]]) -> None:
    """`prediction` is the position of that name, `subject` all of its positions, a role of one position that one."""
    by_position = patch_grid(llama, pairs, "z", at="position")
    at_prediction = patch_grid(llama, pairs, "z", at="prediction")
    by_role = patch_grid(llama, pairs, "z", at="role")
    at_subject = patch_grid(llama, pairs, "z", at="subject")
    assert at_prediction.dims == at_subject.dims == ("fact", "layer", "head")
    for i, (clean, _) in enumerate(pairs):
        np.testing.assert_allclose(at_prediction[i], by_position[i, ..., clean.prediction], atol=1e-5)
        np.testing.assert_allclose(by_role.sel(role="prediction")[i], at_prediction[i], atol=1e-5)
        last = clean.subject_span[1] - 1
        np.testing.assert_allclose(by_role.sel(role="subject_last")[i], by_position[i, ..., last], atol=1e-5)
    assert float(abs(at_subject - by_role.sel(role="subject_last")).max()) > 1e-4


def test_dead_cells_are_zero_without_a_pass(
    llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    run = cones.forward
    monkeypatch.setattr(cones, "forward", lambda m, rows, **rest: asked.append(len(rows)) or run(m, rows, **rest))
    clean, corrupt = pairs[0]
    grid = patch_grid(llama, pairs[:1], "attn_out", at="position")
    first = next(i for i, (a, b) in enumerate(zip(clean.ids, corrupt.ids, strict=False)) if a != b)
    assert first >= clean.subject_span[0] > 0
    assert (grid[0, :, :first] == 0).all()
    assert (grid[0, -1, : clean.prediction] == 0).all()
    live = 2 * (clean.prediction + 1 - first) + 1
    assert asked == [2 + live]
    assert int((grid != 0).sum()) == live


def test_recovery_of_both_directions(llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]]) -> None:
    """Patching everything at layer 0 recovers, or destroys, all of it."""
    for direction in ("denoising", "noising"):
        grid = patch_grid(
            llama, pairs, at="subject", direction=direction, metric=["logit_diff", "answer_logprob", "kl"]
        )
        for name in ("logit_diff", "answer_logprob"):
            assert float(recovery(grid[name])[0]) == pytest.approx(1.0, abs=1e-4)
        with pytest.raises(BadInput, match="recovery needs"):
            recovery(grid["kl"])


def edges_by_hand(prompt: Prompt, route: str) -> set[tuple[int, int]]:
    start, stop = prompt.subject_span
    everything = {(query, key) for query in range(len(prompt)) for key in range(query + 1)}
    return {
        "direct": {(q, k) for q, k in everything if q >= prompt.prediction and start <= k < stop},
        "total": {(q, k) for q, k in everything if q >= stop and start <= k < stop},
        "relayed": {(q, k) for q, k in everything if stop <= q < prompt.prediction and start <= k < stop},
        "non_subject": {(q, k) for q, k in everything if q >= prompt.prediction and k != q and not start <= k < stop},
        "last": {(q, q) for q in range(prompt.prediction, len(prompt))},
        "subject_to_earlier": {(q, k) for q, k in everything if start <= q < stop and k < start},
    }[route]


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_with_every_metric(llama: LoadedModel, prompts: PromptSet, route: str) -> None:
    foils = [7] * 3
    found = knockout(llama, prompts[:3], [route], metric=list(METRICS), foils=foils)
    for i, prompt in enumerate(prompts[:3]):
        base = oracles.logits(llama.model, prompt)
        mask = oracles.hand_mask(llama.model, len(prompt), edges_by_hand(prompt, route))
        expected = by_hand(oracles.logits(llama.model, prompt, mask), base, prompt, 7)
        raw = by_hand(base, base, prompt, 7)
        for name in METRICS:
            value = raw[name] - expected[name] if name not in ("kl", "rank") else expected[name]
            assert float(found[name][i, 0]) == pytest.approx(value, abs=3e-4), name
            assert float(found[name][f"baseline_{name}"][i]) == pytest.approx(raw[name], abs=2e-4)


def test_edges_of_ones_own(llama: LoadedModel, prompts: PromptSet) -> None:
    own = {"mine": lambda p: edges_by_hand(p, "direct"), "none": lambda p: []}
    found = knockout(llama, prompts[:3], own)
    np.testing.assert_allclose(found.sel(route="mine"), knockout(llama, prompts[:3], ["direct"])[:, 0], atol=1e-5)
    assert found.sel(route="none").isnull().all()


def test_windows_and_heads_add_up(llama: LoadedModel, prompts: PromptSet) -> None:
    """A window of one layer is that layer, one of all layers is all, and all heads together are the layer."""
    few = prompts[:3]
    layer = knockout(llama, few, by="layer")
    np.testing.assert_allclose(knockout(llama, few, by="window", window=1), layer, atol=1e-5)
    np.testing.assert_allclose(knockout(llama, few, by="window", window=5)[..., 1], knockout(llama, few), atol=1e-5)
    middle = {"edges": lambda p: edges_by_hand(p, "direct")}
    three = knockout(llama, few, middle, by="window", window=3)
    assert float(abs(three[..., 0] - three[..., 1]).max()) > 1e-4, "the first window is cut off, the second is whole"
    heads = knockout(llama, few, ["direct"], by="head")
    assert heads.dims == ("fact", "route", "layer", "head")
    one_layer = copy.deepcopy(llama.model)
    one_layer.model.layers = one_layer.model.layers[:1]
    one_layer.config.num_hidden_layers = 1
    found = knockout(one_layer, few, ["direct"], by="head")
    for i, prompt in enumerate(few):
        base = oracles.answer_logprob(one_layer, prompt)
        for head in range(4):
            mask = oracles.hand_mask(one_layer, len(prompt), edges_by_hand(prompt, "direct"), [head])
            expected = base - oracles.answer_logprob(one_layer, prompt, mask)
            assert float(found[i, 0, 0, head]) == pytest.approx(expected, abs=2e-4)
    assert float(abs(found).max()) > 1e-2


@pytest.mark.parametrize("reduce", ["sum", "max", "last"])
def test_reductions_over_the_subject(llama: LoadedModel, prompts: PromptSet, reduce: Any) -> None:
    found = subject_attention(llama, prompts[:4], reduce=reduce)
    for i, prompt in enumerate(prompts[:4]):
        inside = oracles.attention_weights(llama.model, prompt)[..., list(prompt.subject_positions)]
        expected = {"sum": inside.sum(-1), "max": inside.amax(-1), "last": inside[..., -1]}[reduce]
        np.testing.assert_allclose(found[i], expected, atol=1e-5)


@torch.no_grad()
def test_value_weighted_attention(llama: LoadedModel, prompts: PromptSet) -> None:
    """Weight times ‖value·W_O‖ from the model's own matrices, query head by query head."""
    prompt = prompts[0]
    found = subject_attention(llama, [prompt], value_weighted=True)
    weights = oracles.attention_weights(llama.model, prompt)
    ids = torch.tensor([prompt.ids])
    states = llama.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer, module in enumerate(llama.model.model.layers):
        values = module.self_attn.v_proj(module.input_layernorm(states[layer]))[0]
        for head in range(4):
            group = head // 2
            of_head = (
                values[:, 8 * group : 8 * group + 8] @ module.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8].T
            )
            expected = sum(weights[layer, head, at] * of_head[at].norm() for at in prompt.subject_positions)
            assert float(found[0, layer, head]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_a_budget_bounds_memory_and_changes_nothing(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    """Under a tenth of what the grid takes of itself; the peak counted storage by storage, the numbers to rounding."""
    made = make_prompts(draw(cities, 120, seed=2), smollm2.tokenizer, TEMPLATES["country"]["list"])
    pairs = swap_subjects(made, np.random.default_rng(0))[:24]
    with PeakMemory() as free:
        expected = patch_grid(smollm2, pairs, "z", at="prediction", metric="answer_logprob")
    budget = free.peak // 11
    with PeakMemory() as bounded:
        found = patch_grid(smollm2, pairs, "z", at="prediction", metric="answer_logprob", memory_budget=budget)
    assert bounded.peak <= budget
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_attention_takes_memory_that_grows_with_the_prompt(llama: LoadedModel, tokenizer: Any) -> None:
    """Four times the tokens, at most five times the memory; scores of all queries would take sixteen."""
    peaks = []
    for n in (30, 120):
        ids = tuple(int(i) for i in np.random.default_rng(0).integers(2, 512, n))
        prompt = Prompt("a", "s", "t", ("x",), ids, ("",) * n, (5, 8), n - 2)
        subject_attention(llama, [prompt])
        with PeakMemory() as memory:
            subject_attention(llama, [prompt])
        peaks.append(memory.peak)
    assert peaks[1] < 5 * peaks[0]


def test_a_budget_that_is_too_small_says_how_much(llama: LoadedModel, prompts: PromptSet) -> None:
    with pytest.raises(BadInput, match="give at least") as refused:
        knockout(llama, prompts[:2], memory_budget=1000)
    least = int(str(refused.value).split("at least ")[1].replace(",", ""))
    np.testing.assert_allclose(
        knockout(llama, prompts[:2], memory_budget=least), knockout(llama, prompts[:2]), atol=1e-5
    )


def test_the_noise_floor_is_what_nothing_changes(llama: LoadedModel, prompts: PromptSet) -> None:
    """Tiny in float32, and seen to grow where rows of a batch are made to stray."""
    floor = knockout(llama, prompts[:6], by="layer").attrs["noise_floor"]
    assert 0 < floor < 1e-4
    half = copy.deepcopy(llama.model).bfloat16()
    assert knockout(half, prompts[:6], by="layer").attrs["noise_floor"] > 100 * floor


def test_the_noise_floor_of_kl_is_a_controls_distance_from_the_plain_run(
    llama: LoadedModel, prompts: PromptSet
) -> None:
    """By hand in numpy, from the logits of plain rows and of the controls beside the changed ones."""
    half = copy.deepcopy(llama.model).bfloat16()
    few = [shortened(prompt) for prompt in prompts[:6]]
    rows = [Row(prompt) for prompt in few]
    rows += [Row(p, Block.between(p.predicting, p.subject_positions, (layer,))) for p in few for layer in range(3)]
    plain: dict[str, np.ndarray] = {}
    gaps: list[float] = []
    for output in cones.forward(half, rows):
        for its in filter(None, (output, output.control)):
            counts = [len(row.prompt.predicting) for row in its.rows]
            for row, logits in zip(its.rows, its.logits.split(counts), strict=True):
                found = logits[0].double().log_softmax(-1).numpy()
                if its is output.control:
                    base = plain[row.prompt.fact_id]
                    gaps.append(float((np.exp(base) * (base - found)).sum()))
                elif row.plain:
                    plain[row.prompt.fact_id] = found
    floor = knockout(half, few, ["direct"], by="layer", metric="kl").attrs["noise_floor"]
    assert floor > 1e-6
    assert floor == pytest.approx(max(map(abs, gaps)), rel=1e-2)
    assert knockout(llama, few, ["direct"], by="layer", metric="kl").attrs["noise_floor"] < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routes": "direct"}, "give a list of"),
        ({"routes": ["indirect"]}, "give a list of"),
        ({"by": "position"}, "by='position' is none of 'layer', 'window', 'head' and None"),
        ({"by": "window", "window": 0}, "window=0 is no number of layers: give 1 or more"),
        ({"metric": "accuracy"}, "is not among"),
        ({"metric": "logit_diff"}, "needs foils"),
        ({"metric": "kl", "foils": [1]}, "one for every prompt"),
        ({"backend": "garcon"}, "is not one of engine"),
    ],
)
def test_arguments_that_do_not_fit(llama: LoadedModel, prompts: PromptSet, settings: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        knockout(llama, prompts[:2], **settings)


@pytest.mark.parametrize(
    "settings", [{"component": "w"}, {"at": "end"}, {"direction": "sideways"}, {"metric": []}, {"metric": "loss"}]
)
def test_patching_arguments_that_do_not_fit(
    llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], settings: Any
) -> None:
    with pytest.raises(BadInput, match="is not (one of|among)"):
        patch_grid(llama, pairs, **settings)
    assert len(get_args(At)) == 4


def test_budgets_split_as_they_say(llama: LoadedModel) -> None:
    small, large = (Budget.of(llama.model, memory, 20) for memory in (2_000_000, 200_000_000))
    for part in ("base_tokens", "cone_tokens", "chunk_tokens", "predictions"):
        assert getattr(small, part) * 50 < getattr(large, part)


def test_one_metric_is_an_array_and_several_a_dataset(llama: LoadedModel, prompts: PromptSet) -> None:
    assert isinstance(knockout(llama, prompts[:1], metric="kl"), xr.DataArray)
    both = knockout(llama, prompts[:1], metric=["kl", "rank"])
    assert isinstance(both, xr.Dataset)
    assert both["rank"].attrs["unit"] == "rank"
