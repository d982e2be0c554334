"""Temperatures, and a knock-out that a model's sureness alone cannot move; relays against hand-made masks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.optimize import minimize_scalar
from transformers import AutoModelForCausalLM

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model
from subjattn.measures.knockout import edges_of, knockout
from subjattn.measures.record import VALUE_COLUMNS, measure_of, values_of
from subjattn.measures.subject_knockout import answered_rightly, relay_drop
from subjattn.measures.temperature import GRID, at_temperature, fit_temperature, fitted_on_others
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts


@pytest.fixture(scope="module")
def asked(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 24, seed=3), tokenizer, TEMPLATES["country"]["sentence"])


@pytest.fixture(scope="module")
def knowing(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> LoadedModel:
    """A random model that gives the answers of these facts some weight, so that a temperature fits it."""
    model = deepcopy(tiny_models["llama"])
    hf = hf_model(model)
    old = hf.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features)
    spread = torch.stack([answer_logits(model, prompt)[0] for prompt in asked]).std()
    with torch.no_grad():
        head.weight.copy_(old.weight / spread)
        head.bias.zero_()
        head.bias[sorted({prompt.answer_ids[0] for prompt in asked})] = 2.0
    hf.set_output_embeddings(head)
    return model


@contextmanager
def sharpened(model: LoadedModel, factor: float) -> Iterator[None]:
    """The same model, surer of everything."""
    head = hf_model(model).get_output_embeddings()
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            parameter.mul_(factor)
        yield
        for parameter in (head.weight, head.bias):
            parameter.div_(factor)


def answer_logits(model: LoadedModel, prompt: Prompt) -> torch.Tensor:
    with torch.no_grad():
        return hf_model(model)(torch.tensor([prompt.ids])).logits[0, list(prompt.predicting)].double()


def test_the_temperature_is_scipys_minimum_on_the_other_half(knowing: LoadedModel, asked: PromptSet) -> None:
    found = fit_temperature(knowing, asked)
    logits = [answer_logits(knowing, prompt) for prompt in asked]

    def logprob(i: int, t: float) -> float:
        answers = torch.tensor(asked[i].answer_ids)[:, None]
        return float((logits[i] / t).log_softmax(-1).gather(1, answers).sum())

    values = found["temperature"].values
    assert len(set(values.tolist())) == 2
    for own in set(values.tolist()):
        others = [i for i in range(len(asked)) if values[i] != own]
        best = minimize_scalar(
            lambda log_t, others=others: -np.mean([logprob(i, np.exp(log_t)) for i in others]),
            bounds=(-2, 2.7),
            method="bounded",
        )
        assert own == pytest.approx(np.exp(best.x), rel=2e-3)
    for i in range(4):
        assert float(found["calibrated_logprob"][i]) == pytest.approx(logprob(i, values[i]), abs=1e-2)
    whole = minimize_scalar(
        lambda log_t: -np.mean([logprob(i, np.exp(log_t)) for i in range(len(asked))]),
        bounds=(-2, 2.7),
        method="bounded",
    )
    assert found.attrs["temperature"] == pytest.approx(np.exp(whole.x), rel=2e-3)
    assert float(found["fitted"].mean()) == pytest.approx(np.exp(whole.x), rel=0.3)


def test_sureness_alone_moves_nats_and_nothing_else(knowing: LoadedModel, asked: PromptSet) -> None:
    """The planted confounder: logits times 2.2, as training on known facts makes them."""
    plain = sa.measure("knockout", knowing, asked)
    with sharpened(knowing, 2.2):
        surer = sa.measure("knockout", knowing, asked)
        hot = fit_temperature(knowing, asked)
    np.testing.assert_allclose(hot["temperature"], 2.2 * fit_temperature(knowing, asked)["temperature"], rtol=1e-3)
    falls = [float(abs(one["knockout_drop"].sel(route="total")).mean()) for one in (plain, surer)]
    assert falls[1] > 1.4 * falls[0] > 0.1
    for name in ("knockout_calibrated_drop", "knockout_rank_rise", "knockout_lost"):
        np.testing.assert_allclose(surer[name], plain[name], atol=2e-3)


@pytest.mark.parametrize(
    ("name", "settings", "quantities"),
    [
        ("rescale", {"doses": [-2.0, 2.0]}, ["rescale_slope", "rescale_change"]),
        ("trace", {"facts": 12, "draws": 2, "window": 2}, ["trace_total_effect", "trace_indirect_effect"]),
        ("hypotheses", {"sets": {"heads": {"heads": [[1, 1]]}, "route": {"route": "direct"}}}, ["necessity"]),
    ],
)
def test_calibrated_effects_are_not_moved_by_sureness(
    knowing: LoadedModel, asked: PromptSet, name: str, settings: dict[str, Any], quantities: list[str]
) -> None:
    """The planted confounder in what other measures give."""
    settings = settings | ({"random_sets": 2} if name == "hypotheses" else {})
    plain = sa.measure(name, knowing, asked, settings)
    with sharpened(knowing, 2.2):
        surer = sa.measure(name, knowing, asked, settings)
    np.testing.assert_allclose(surer["temperature"], 2.2 * plain["temperature"], rtol=1e-3)
    sides = [
        pd.DataFrame(values_of(measure_of(name), one), columns=VALUE_COLUMNS)
        .set_index("fact_id")
        .loc[plain["fact"].values]
        for one in (plain, surer)
    ]
    for quantity in quantities:
        stem, _, rest = quantity.partition("_")
        calibrated = f"{stem}_calibrated_{rest}" if rest else f"calibrated_{stem}"
        moved, still = (
            [side[side["quantity"] == one]["value"].to_numpy() for side in sides] for one in (quantity, calibrated)
        )
        assert np.nanmean(abs(moved[1])) > 1.3 * np.nanmean(abs(moved[0])) > 0
        np.testing.assert_allclose(still[1], still[0], atol=3e-3)
        assert np.isfinite(still[0]).mean() == np.isfinite(moved[0]).mean() > 0


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_share_of_patching_is_one_of_logits(knowing: LoadedModel, asked: PromptSet, direction: str) -> None:
    """Differences of logits are all divided by a temperature, so that their share needs none."""
    settings = {"pairs": 4, "direction": direction}
    plain = sa.measure("patching", knowing, asked, settings)
    with sharpened(knowing, 2.2):
        surer = sa.measure("patching", knowing, asked, settings)
    np.testing.assert_allclose(surer["patch_effect"], 2.2 * plain["patch_effect"], atol=1e-3)
    rows = [values_of(measure_of("patching"), one) for one in (plain, surer)]
    for own, hot in zip(*rows, strict=True):
        np.testing.assert_allclose(hot[3:], [2.2 * of for of in own[3:]], atol=1e-3)
    assert len(rows[0]) == 4 and float(abs(plain["patch_effect"]).max()) > 0.1


def test_what_tuning_changed_in_sureness_alone_is_told_apart(knowing: LoadedModel, asked: PromptSet) -> None:
    surer = deepcopy(knowing)
    head = hf_model(surer).get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(2.2)
        head.bias.mul_(2.2)
    tested = sa.test_hypothesis(surer, asked, route="last", random_sets=2, base=knowing, smallest_effect=0.01)
    change, calibrated = (tested.intervals[name] for name in ("change", "calibrated_change"))
    before = tested.arrays["base_drop"] - tested.arrays["base_random_drop"]
    assert change.estimate == pytest.approx(float(1.2 * before.mean()), rel=0.5) and abs(change.estimate) > 0.01
    assert calibrated.estimate == pytest.approx(0, abs=1e-3)


def test_a_part_that_only_makes_answers_surer_has_no_calibrated_share(
    tiny_folders: dict[str, Path], tokenizer: Any, asked: PromptSet, tmp_path: Path
) -> None:
    """Tuned are an MLP, which changes answers, and the final norm, which multiplies logits; ends are models apart."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]).eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        states = [model.model(torch.tensor([p.ids])).last_hidden_state[0, p.prediction] for p in asked]
        common = torch.stack(states).mean(0)
        head.div_(torch.stack([head @ state for state in states]).std())
        head[sorted({prompt.answer_ids[0] for prompt in asked})] += 2 * common / (common @ common)
    for folder in ("base", "tuned"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.3)
            model.model.norm.weight.mul_(2.2)
    arms = sa.load_arms(str(tmp_path / "base"), None, {"tuned": str(tmp_path / "tuned")})
    found = sa.swap_weights(arms, asked, calibrated=True)
    plain, own = (found[f"{metric}_share"].sel(part="rest") for metric in ("answer_logprob", "calibrated_logprob"))
    assert float(abs(plain).mean()) > 0.3
    np.testing.assert_allclose(own, 0, atol=2e-2)
    ends = [fit_temperature(sa.load_model(str(tmp_path / folder)), asked) for folder in ("base", "tuned")]
    change = ends[1]["calibrated_logprob"] - ends[0]["calibrated_logprob"]
    np.testing.assert_allclose(found["calibrated_logprob_share"].sum("part"), change, atol=1e-3)
    assert float(abs(found["calibrated_logprob_share"].sel(part="mlp")).mean()) > 0.05
    for weights, end in zip(("base", "mlp+rest"), ends, strict=True):
        np.testing.assert_allclose(found["temperature"].sel(weights=weights), end["temperature"], rtol=1e-3)
    dataset = sa.measure("swap_weights", arms, asked)
    rows = pd.DataFrame(values_of(measure_of("swap_weights"), dataset), columns=VALUE_COLUMNS)
    means = rows.groupby(["quantity", "part"])["value"].mean()
    assert means["calibrated_update_share", "rest"] == pytest.approx(float(own.mean()), abs=1e-4)
    assert means["update_share", "rest"] == pytest.approx(float(plain.mean()), abs=1e-4)


def test_rank_and_right_answers_are_those_of_masks_by_hand(knowing: LoadedModel, asked: PromptSet) -> None:
    found = sa.measure("knockout", knowing, asked)
    model = hf_model(knowing)
    for i, prompt in enumerate(asked[:6]):
        mask = oracles.hand_mask(model, len(prompt), set(edges_of("total", prompt)))
        logits = {
            "plain": oracles.logits(model, prompt)[list(prompt.predicting)],
            "blocked": oracles.logits(model, prompt, mask)[list(prompt.predicting)],
        }
        answers = torch.tensor(prompt.answer_ids)
        right = {name: float((of.argmax(-1) == answers).all()) for name, of in logits.items()}
        rank = {name: float((of[0] > of[0, answers[0]]).sum()) + 1 for name, of in logits.items()}
        row = found.isel(fact=i).sel(route="total")
        assert float(row["knockout_rank_rise"]) == pytest.approx(np.log2(rank["blocked"] / rank["plain"]), abs=1e-6)
        assert float(row["knockout_lost"]) == right["plain"] * (right["plain"] - right["blocked"])
        assert answered_rightly(logits["plain"], prompt) == right["plain"]


def test_relays_are_blocked_on_either_side(tiny: LoadedModel, asked: PromptSet) -> None:
    found = relay_drop(tiny, asked[:6])
    model = hf_model(tiny)
    for i, prompt in enumerate(asked[:6]):
        start, stop = prompt.subject_span
        plain = oracles.answer_logprob(model, prompt)
        for relay in range(found.sizes["relay"]):
            position = stop + relay
            if position >= prompt.prediction:
                assert found[i, :, relay].isnull().all()
                continue
            legs = {
                "reads": {(position, key) for key in range(start, stop)},
                "passes_on": {(query, position) for query in prompt.predicting},
            }
            for leg, edges in legs.items():
                blocked = oracles.answer_logprob(model, prompt, oracles.hand_mask(model, len(prompt), edges))
                assert float(found.sel(leg=leg)[i, relay]) == pytest.approx(plain - blocked, abs=1e-4)
            assert found["token"].values[i, relay] == prompt.tokens[position]


def test_total_edges_are_direct_and_relayed_ones(asked: PromptSet) -> None:
    for prompt in asked:
        direct, relayed = set(edges_of("direct", prompt)), set(edges_of("relayed", prompt))
        assert not direct & relayed
        assert direct | relayed == set(edges_of("total", prompt))


def test_a_calibrated_metric_is_taken_by_other_measures(tiny: LoadedModel, asked: PromptSet) -> None:
    cold = knockout(tiny, asked[:3], metric=at_temperature(1.0))
    np.testing.assert_allclose(cold, knockout(tiny, asked[:3]), atol=1e-5)
    hot = knockout(tiny, asked[:3], ["total"], metric=at_temperature(4.0))
    for i, prompt in enumerate(asked[:3]):
        model = hf_model(tiny)
        mask = oracles.hand_mask(model, len(prompt), set(edges_of("total", prompt)))
        answers = torch.tensor(prompt.answer_ids)[:, None]
        plain, blocked = (
            (oracles.logits(model, prompt, one)[list(prompt.predicting)].double() / 4)
            .log_softmax(-1)
            .gather(1, answers)
            .sum()
            for one in (None, mask)
        )
        assert float(hot[i, 0]) == pytest.approx(float(plain - blocked), abs=1e-4)


def test_several_metrics_are_those_of_one_at_a_time(tiny: LoadedModel, asked: PromptSet) -> None:
    """Doses with their controls, ablations and traces; a temperature of 1 changes nothing."""
    hot = at_temperature(3.0)
    several: Any = ["answer_logprob", hot, "rank"]
    doses = sa.rescale(tiny, asked[:3], [-1.0, 2.0], metric=several)
    lost = sa.ablation(tiny, asked[:3], heads=[(1, 1)], to="zero", metric=several)
    for metric, name in zip(several, ("answer_logprob", "calibrated_logprob", "rank"), strict=True):
        one = sa.rescale(tiny, asked[:3], [-1.0, 2.0], metric=metric)
        np.testing.assert_allclose(doses[name], one, atol=1e-4)
        if name != "rank":  # whose prompts end with the answer's first token, so that other edges are drawn
            np.testing.assert_allclose(doses[f"control_{name}"], one["control"], atol=1e-4)
        np.testing.assert_allclose(doses[f"baseline_{name}"], one[f"baseline_{name}"], atol=1e-4)
        assert doses[name].attrs["unit"] == one.attrs["unit"] == ("rank" if name == "rank" else "nats")
        alone = sa.ablation(tiny, asked[:3], heads=[(1, 1)], to="zero", metric=metric)
        np.testing.assert_allclose(lost[name], alone, atol=1e-4)
    traced = sa.trace(tiny, asked[:2], draws=2, metric=several[:2])
    for metric, name in zip(several[:2], ("answer_logprob", "calibrated_logprob"), strict=True):
        for effect, array in sa.trace(tiny, asked[:2], draws=2, metric=metric).items():
            np.testing.assert_allclose(traced[f"{name}_{effect}"], array, atol=1e-4)
    plain = sa.rescale(tiny, asked[:3], [2.0], metric=at_temperature(1.0))
    np.testing.assert_allclose(plain, doses["answer_logprob"][:, 1:], atol=1e-4)


def test_one_fact_has_effects_and_no_calibrated_ones(tiny: LoadedModel, asked: PromptSet) -> None:
    one = PromptSet(asked.style, asked.prompts[:1])
    for name, settings in (("rescale", {}), ("trace", {"draws": 2})):
        rows = values_of(measure_of(name), sa.measure(name, tiny, one, settings))
        for _, quantity, _, value, _ in rows:
            assert np.isnan(value) if "calibrated" in quantity else np.isfinite(value) or "control" in quantity


def test_where_nothing_fits_there_is_no_temperature(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    """A random model is the less wrong the less sure it is."""
    found = fit_temperature(tiny_models["gpt2"], asked)
    assert np.isnan(found["temperature"]).all() and np.isnan(found["calibrated_logprob"]).all()
    halves = [[one for one in asked if zlib.crc32(one.fact_id.encode()) % 2 == half] for half in (0, 1)]
    for few in (asked.prompts[:1], [*halves[0], *halves[1][:4]]):
        with pytest.raises(BadInput, match="in one half, too few to fit a temperature on"):
            fit_temperature(tiny_models["gpt2"], PromptSet("s", tuple(few)))
    uneven = [*halves[0], *halves[1][:4]]
    losses = np.tile((np.log(GRID) - 0.3) ** 2, (len(uneven), 1))
    own, _ = fitted_on_others(losses, uneven)
    np.testing.assert_array_equal(np.isnan(own), [one in halves[0] for one in uneven])
    one = sa.measure("knockout", tiny_models["gpt2"], PromptSet("s", asked.prompts[:1]))
    assert np.isnan(one["knockout_calibrated_drop"]).all()
    assert np.isfinite(one["knockout_drop"].sel(route="direct")).all()


def test_every_quantity_of_the_knockout_has_a_value(knowing: LoadedModel, asked: PromptSet) -> None:
    found: xr.Dataset = sa.measure("knockout", knowing, asked)
    names = {row[1] for row in values_of(measure_of("knockout"), found) if np.isfinite(row[3])}
    assert names == {quantity.name for quantity in measure_of("knockout").quantities} - {"knockout_drop_in_parts"}


def test_where_nothing_stands_between_there_are_no_relays(tiny: LoadedModel, asked: PromptSet, tmp_path: Path) -> None:
    """And the measure can be stored as a run stores it."""
    short = []
    for prompt in asked[:6]:
        stop = prompt.subject_span[1]
        ids, tokens = (of[: stop + 1] + of[prompt.prediction + 1 :] for of in (prompt.ids, prompt.tokens))
        short.append(replace(prompt, ids=ids, tokens=tokens, prediction=stop))
    found: xr.Dataset = sa.measure("knockout", tiny, PromptSet("short", tuple(short)))
    assert found["relay_drop"].shape == (6, 2, 0)
    assert found["knockout_drop_beside"].sel(beside="relayed").isnull().all()
    found.to_netcdf(tmp_path / "array.nc", engine="h5netcdf")
    assert xr.load_dataset(tmp_path / "array.nc", engine="h5netcdf")["relay_drop"].shape == (6, 2, 0)


def test_a_drop_over_its_control_is_of_the_facts_that_have_both() -> None:
    """Planted: the half of the facts without a control falls by much more than the other."""
    drop, beside = np.r_[np.full(10, 5.0), np.full(10, 1.0)], np.r_[np.full(10, np.nan), np.full(10, 4.0)]
    dataset = xr.Dataset(
        {
            "knockout_drop": (("fact", "route"), drop[:, None]),
            "knockout_drop_beside": (("fact", "beside"), beside[:, None]),
        },
        {"fact": [f"f{i}" for i in range(20)], "route": ["direct"], "beside": ["direct_control"]},
    )
    wanted = ("knockout_drop", "knockout_control", "knockout_over_control")
    quantities = [quantity for quantity in measure_of("knockout").quantities if quantity.name in wanted]
    own = {quantity.name: quantity.per_fact(dataset) for quantity in quantities}
    assert float(own["knockout_drop"].mean()) == 3 and float(own["knockout_control"].mean()) == 4
    assert float(own["knockout_over_control"].mean()) == -3 and int(own["knockout_over_control"].notnull().sum()) == 10
