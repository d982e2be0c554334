"""Causal tracing, cell by cell against whole passes with plain hooks, and what its numbers and figures say."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import test_noise
import torch
import zoo
from conftest import changed
from transformers import PreTrainedModel

from subjattn.engine.noise import Noise
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.alone import measure
from subjattn.measures.patching import trivial_cells
from subjattn.measures.record import measure_of, values_of
from subjattn.measures.subject_tracing import TraceSettings
from subjattn.measures.trace import At, Traced, subject_std, trace
from subjattn.models import LoadedModel
from subjattn.plots.choose import plot
from subjattn.plots.patching import plot_trace
from subjattn.prompts import ROLES, Prompt, PromptSet, make_prompts
from subjattn.study.config import StudyConfig
from subjattn.study.files import open_run
from subjattn.study.run import run_study


DRAWS = 2


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    made = make_prompts(draw(cities, 40, seed=3), tokenizer, TEMPLATES["country"]["sentence"])
    long = [prompt for prompt in made if len(prompt.subject_positions) > 2 and len(prompt.answer_ids) > 1]
    return PromptSet(made.style, tuple(long[:3]))


def std_by_hand(model: PreTrainedModel, name: str, prompts: PromptSet) -> float:
    """Of the matrix's rows, times √d_model where Gemma scales them."""
    matrix = model.get_submodule(test_noise.EMBEDDINGS[name]).weight.detach().double().numpy()
    rows = np.concatenate([matrix[list(prompt.ids[prompt.span[0] : prompt.span[1]])] for prompt in prompts])
    return float(rows.std(ddof=1)) * (math.sqrt(32) if name == "gemma2" else 1.0)


@torch.no_grad()
def logprob(
    model: PreTrainedModel,
    name: str,
    prompt: Prompt,
    noise: torch.Tensor | None,
    places: list[tuple[str, list[int]]],
) -> float:
    """Of the answer, under noise, with clean states of some modules at some positions."""
    ids, kept = torch.tensor([prompt.ids]), dict[str, torch.Tensor]()
    with ExitStack() as stack:
        for where, _ in places:
            keep = lambda state, where=where: kept.__setitem__(where, state.clone())  # noqa: E731
            stack.enter_context(oracles.replacing(model, where, keep))
        model(ids, use_cache=False)

    def put(state: torch.Tensor, where: str, positions: list[int]) -> torch.Tensor:
        state = state.clone()
        state[0, positions] = kept[where][0, positions]
        return state

    def add(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        state[0, prompt.span[0] : prompt.span[1]] += noise
        return state

    with ExitStack() as stack:
        if noise is not None:
            stack.enter_context(oracles.replacing(model, test_noise.EMBEDDINGS[name], add))
        for where, positions in places:
            change = lambda state, where=where, positions=positions: put(state, where, positions)  # noqa: E731
            stack.enter_context(oracles.replacing(model, where, change))
        logprobs = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True))


def largest_gap(model: LoadedModel, name: str, prompts: PromptSet, component: Traced, at: At, window: int) -> float:
    """Of every value and effect of a tracing from the oracle."""
    found = trace(model, prompts, component, at=at, window=window, draws=DRAWS, seed=4)
    hf, gaps = model.model, []
    std = 3.0 * std_by_hand(hf, name, prompts)
    assert found["clean"].attrs["noise_std"] == pytest.approx(std, rel=1e-6)
    for fact, prompt in enumerate(prompts):
        clean = logprob(hf, name, prompt, None, [])
        gaps.append(float(found["clean"][fact]) - clean)
        places = (
            {role: list(prompt.role(role)) for role in ROLES}
            if at == "role"
            else {position: [position] for position in range(prompt.prediction + 1)}
        )
        effects: dict[tuple[int, Any], list[float]] = {}
        lost = []
        for n in range(DRAWS):
            noise = std / test_noise.STD * test_noise.by_hand(prompt, 4, n)
            noised = logprob(hf, name, prompt, noise, [])
            lost.append(clean - noised)
            gaps.append(float(found["noised"][fact, n]) - noised)
            for layer in range(3):
                around = range(max(0, layer - window // 2), min(3, layer - window // 2 + window))
                for place, positions in places.items():
                    cell = found["restored"].sel({at: place})[fact, n, layer]
                    assert bool(cell.isnull()) == (not positions)
                    if positions:
                        wheres = [(oracles.place(hf, component, one, zoo.parts(name)), positions) for one in around]
                        restored = logprob(hf, name, prompt, noise, wheres)
                        gaps.append(float(cell) - restored)
                        effects.setdefault((layer, place), []).append(restored - noised)
        gaps.append(float(found["total_effect"][fact]) - np.mean(lost))
        gaps.append(float(found["total_effect_se"][fact]) - abs(lost[0] - lost[1]) / 2)
        for (layer, place), (one, other) in effects.items():
            cell = found.sel({at: place}).isel(fact=fact, layer=layer)
            gaps.append(float(cell["indirect_effect"]) - (one + other) / 2)
            gaps.append(float(cell["indirect_effect_se"]) - abs(one - other) / 2)
    return float(np.abs(gaps).max())


@pytest.mark.parametrize("name", list(test_noise.EMBEDDINGS))
@pytest.mark.parametrize(
    ("component", "at", "window"),
    [("resid_post", "role", 1), ("resid_pre", "position", 1), ("mlp_out", "role", 2), ("attn_out", "role", 3)],
)
def test_every_cell_is_that_of_plain_hooks(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, name: str, component: Traced, at: At, window: int
) -> None:
    gap = largest_gap(tiny_models[name], name, prompts[:1] if at == "position" else prompts[:2], component, at, window)
    assert gap < 5e-5


def test_noise_beside_the_subject_is_seen(
    llama: LoadedModel, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the noise stands one token further on; states are restored one layer higher than asked."""
    at = Noise.at
    with monkeypatch.context() as patched:
        patched.setattr(Noise, "at", lambda noise, prompt: tuple(position + 1 for position in at(noise, prompt)))
        assert largest_gap(llama, "llama", prompts[:1], "resid_post", "role", 1) > 0.05
    monkeypatch.setattr(oracles, "place", lambda _hf, _part, layer, _names: f"model.layers.{max(layer - 1, 0)}")
    assert largest_gap(llama, "llama", prompts[:1], "resid_post", "role", 1) > 0.05


def test_other_facts_and_draws_change_nothing(llama: LoadedModel, prompts: PromptSet) -> None:
    std = subject_std(llama, prompts)
    all_ = trace(llama, prompts, draws=3, std=std)
    turned = trace(llama, PromptSet("", prompts.prompts[::-1]), draws=3, std=std).isel(fact=slice(None, None, -1))
    few = trace(llama, prompts[1:2], draws=2, std=std)
    again = trace(llama, prompts[1:2], draws=2, std=std)
    for name in ("noised", "restored"):
        np.testing.assert_allclose(turned[name], all_[name], atol=2e-4)
        np.testing.assert_allclose(few[name][0], all_[name][1, :2], atol=2e-4)
        np.testing.assert_array_equal(few[name], again[name])


def test_seeds_and_doses_give_other_noise(llama: LoadedModel, prompts: PromptSet) -> None:
    one, other, half = (
        trace(llama, prompts[:1], draws=1, at="subject", layers=[0], **settings)["noised"].item()
        for settings in ({}, {"seed": 1}, {"noise": 0.5})
    )
    assert len({round(value, 3) for value in (one, other, half)}) == 3


def test_restoring_all_that_was_noised_gives_the_clean_run(llama: LoadedModel, prompts: PromptSet) -> None:
    """The residual stream before the first layer at the subject is all that noise changes; before it nothing is."""
    found = trace(llama, prompts, "resid_pre", at="subject", draws=3)
    assert found["indirect_effect"].dims == ("fact", "layer")
    first = found.isel(layer=0)
    np.testing.assert_allclose(first["restored"], first["clean"].broadcast_like(first["restored"]), atol=5e-4)
    np.testing.assert_allclose(first["indirect_effect"], found["total_effect"], atol=5e-4)
    by_role = trace(llama, prompts, "resid_pre", draws=2)
    assert (by_role["indirect_effect"].sel(role="before_subject") == 0).all()
    alone = trace(llama, prompts, "resid_pre", at="subject_last", draws=2)
    np.testing.assert_array_equal(alone["restored"], by_role["restored"].sel(role="subject_last"))
    assert list(alone["reach"].values) == ["part"] * 3 and (alone["reach"].dims) == ("fact",)


def test_shares_are_defined_where_the_noise_takes_something(llama: LoadedModel, prompts: PromptSet) -> None:
    """By hand: a t-interval over draws; where it reaches 0 there is no share, and effects stand all the same."""
    found = trace(llama, prompts, draws=4, noise=0.02)
    lost = (found["clean"] - found["noised"]).values
    half = 3.182446305 * lost.std(1, ddof=1) / 2
    np.testing.assert_allclose(found["total_effect_interval"].sel(end="low"), lost.mean(1) - half, atol=1e-9)
    np.testing.assert_allclose(found["total_effect_interval"].sel(end="high"), lost.mean(1) + half, atol=1e-9)
    defined = lost.mean(1) > half
    assert not defined.all()
    assert found["share"][~defined].isnull().all() and found["indirect_effect"].notnull().any(["layer", "role"]).all()
    single = trace(llama, prompts, draws=1)
    assert single["share"].isnull().all() and single["total_effect_se"].isnull().all()
    strong = trace(llama, prompts, draws=6, metric=distance)
    share = strong["indirect_effect"] / strong["total_effect"]
    assert (strong["total_effect_interval"].sel(end="low") > 0).all()
    np.testing.assert_allclose(strong["share"], share, atol=1e-12)


def distance(logits: torch.Tensor, prompt: Prompt) -> float:
    """A number that any noise lowers: the first token's logits are largest where nothing is changed."""
    return float(_CLEAN[prompt.fact_id] @ logits[0])


_CLEAN: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True, scope="module")
def clean_directions(llama: LoadedModel, prompts: PromptSet) -> None:
    for prompt in prompts:
        logits = oracles.logits(llama.model, prompt)[prompt.prediction]
        _CLEAN[prompt.fact_id] = (logits - logits.mean()) / logits.norm()


def test_trivial_cells_of_windows_are_those_before_the_noise(llama: LoadedModel, prompts: PromptSet) -> None:
    single = trivial_cells(trace(llama, prompts, "mlp_out", draws=1)["indirect_effect"])
    wide = trivial_cells(trace(llama, prompts, "mlp_out", window=2, draws=1)["indirect_effect"])
    assert single.sel(role="subject_last", layer=2).all() and not single.sel(role="subject_last", layer=1).any()
    assert not wide.sel(role="subject_last").any() and wide.sel(role="before_subject").all()
    assert not wide.sel(role="prediction").any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component": "z"}, "is not one of resid_pre"),
        ({"at": "after"}, "is not one of role"),
        ({"metric": "kl"}, "has no effects to trace"),
        ({"metric": ["answer_logprob", "kl"]}, "has no effects to trace"),
        ({"noise": 0}, "above 0"),
        ({"noise": float("nan")}, "above 0"),
        ({"draws": 0}, "draws is 0: give 1 or more"),
        ({"window": 0}, "window is 0: give 1 or more"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"window": 3}, "windows are of 'attn_out' or 'mlp_out'"),
        ({"layers": [3]}, "give some of the model's"),
        ({"backend": "garcon"}, "is not one of engine"),
    ],
)
def test_arguments_that_do_not_fit(
    llama: LoadedModel, prompts: PromptSet, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        trace(llama, prompts, **settings)
    with pytest.raises(BadInput, match="there are no prompts"):
        trace(llama, [])


def test_the_measure(llama: LoadedModel, tokenizer: Any, cities: pd.DataFrame) -> None:
    """Noise in units of all subjects, few facts; its quantities by hand."""
    prompts = make_prompts(draw(cities, 12, seed=3), tokenizer, TEMPLATES["country"]["sentence"])
    found = measure("trace", llama, prompts, {"facts": 4, "draws": 2, "window": 2})
    assert found.sizes["fact"] == 4 and found["known"].dims == ("fact",)
    assert found["clean"].attrs["noise_std"] == pytest.approx(3 * std_by_hand(llama.model, "llama", prompts), rel=1e-6)
    rows = pd.DataFrame(values_of(measure_of("trace"), found), columns=["fact_id", "quantity", "part", "value", "over"])
    by_name = rows.set_index(["quantity", "fact_id"])
    effect = found["indirect_effect"].sel(role="subject_last").mean("layer")
    for i, fact in enumerate(found["fact"].values):
        total = float(found["total_effect"][i])
        assert by_name.loc[("trace_total_effect", fact), "value"] == total
        assert by_name.loc[("trace_indirect_effect", fact), "value"] == pytest.approx(float(effect[i]))
        assert by_name.loc[("trace_share", fact), "over"] == total
    settings = TraceSettings()
    assert (settings.component, settings.window, settings.noise) == ("mlp_out", 10, 3.0)


def test_figures(llama: LoadedModel, prompts: PromptSet) -> None:
    effect = trace(llama, prompts, draws=2)["indirect_effect"]
    figure = plot(effect)
    assert figure.to_json() == plot_trace(effect).to_json()
    np.testing.assert_allclose(np.array(figure.data[0].z, float), effect.mean("fact").transpose("layer", "role"))
    assert figure.layout.coloraxis.colorbar.title.text == "nats"
    crosses = np.array(figure.data[0].text) == "×"
    assert crosses[:, 0].all() and crosses[2].all() and not crosses[:2, 3].any()
    tokens = trace(llama, prompts[:2], "mlp_out", at="position", window=2, draws=2)["indirect_effect"]
    assert len(plot(tokens).data) == 2
    assert len(plot(trace(llama, prompts, "mlp_out", at="subject_last", draws=2)["indirect_effect"]).data) == 1


@pytest.mark.parametrize("backend", ["hooks", "nnsight"])
def test_other_backends_trace_the_same(llama: LoadedModel, prompts: PromptSet, backend: Any) -> None:
    one, other = (
        trace(llama, prompts[:1], "mlp_out", at="subject_last", window=2, draws=1, backend=name)
        for name in ("engine", backend)
    )
    for name in ("clean", "noised", "restored"):
        np.testing.assert_allclose(one[name], other[name], atol=5e-4)


def test_a_study_traces_every_arm(small: StudyConfig, tmp_path: Path) -> None:
    """Arms side by side, each with noise of its own embeddings, and a figure in the report."""
    config = changed(small, measures={"trace": {"facts": 2, "draws": 2, "window": 2}}, claims=[])
    summary = run_study(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    style = next(iter(config.styles))
    array = run.array("trace", "indirect_effect", style)
    assert array.dims == ("arm", "fact", "layer", "role") and array.sizes["fact"] == 2
    assert len(plot(array).data) == array.sizes["arm"]
    assert {"trace_total_effect", "trace_indirect_effect", "trace_share"} <= {
        row["measure"] for row in summary["contrasts"]
    }
    assert "causal tracing" in (tmp_path / "run" / "report.html").read_text()
