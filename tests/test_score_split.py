"""Why heads look elsewhere: every combination of weights, query and keys against models apart with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from conftest import adapted
from torch import Tensor
from transformers import AutoModelForCausalLM

from subjattn.engine import scores
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import shortened
from subjattn.measures.alone import measure
from subjattn.measures.record import measure_of, values_of
from subjattn.measures.score_split import PLAYERS, score_split
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms, load_arms
from subjattn.prompts import Prompt, PromptSet, make_prompts


Made = Callable[[str], tuple[Arms, dict[str, LoadedModel]]]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 3, seed=3), tokenizer, TEMPLATES["country"]["list"])


def log_odds(row: Tensor, prompt: Prompt) -> Tensor:
    """From attention `[head, key]`, of the prediction position; NaN where one of the two is masked out."""
    rest = [at for at in range(prompt.prediction + 1) if at not in prompt.subject_positions]
    inside, outside = (row[:, at].double().sum(-1) for at in (list(prompt.subject_positions), rest))
    odds = inside.log() - outside.log()
    return odds.masked_fill((inside == 0) | (outside == 0), torch.nan)


@torch.no_grad()
def by_hooks(weights: LoadedModel, query: LoadedModel, keys: LoadedModel, prompt: Prompt, layer: int) -> Tensor:
    """Attention `[head, key]` of one model fed with the residual streams of two others, one for the queries."""
    where, streams = oracles.place(weights.model, "resid_pre", layer, ("", "", "")), {}
    for name, model in (("query", query.model), ("keys", keys.model)):
        with oracles.replacing(model, where, lambda state, name=name: streams.__setitem__(name, state.clone())):
            model(torch.tensor([prompt.ids]), use_cache=False)
    kept: dict[str, Tensor] = {}
    first = {("q", layer): lambda state: kept.setdefault("q", state)}
    second = {
        ("q", layer): lambda _: kept["q"],
        ("pattern", layer): lambda state: kept.setdefault("pattern", state),
    }
    for stream, edits in (("query", first), ("keys", second)):
        with oracles.replacing(weights.model, where, lambda _, stream=stream: streams[stream]):
            oracles.edited_logits(weights.model, prompt, edits)
    return kept["pattern"][0, :, prompt.prediction]


@pytest.mark.parametrize("arm", ["one", "other"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox"])
def test_combinations_are_those_of_models_apart(name: str, arm: str, tuned: Made, prompts: PromptSet) -> None:
    arms, apart = tuned(name)
    found = score_split(arms, prompts, arm)
    masked = 0
    for fact, prompt in enumerate(map(shortened, prompts)):
        for label, model in (("base", "base"), ("+".join(PLAYERS), arm)):
            rows = oracles.attention_weights(apart[model].model, prompt)
            wanted = torch.stack([log_odds(row, prompt) for row in rows])
            own = found["log_odds"].isel(fact=fact).sel(combination=label)
            np.testing.assert_allclose(own, wanted, atol=1e-4)
            masked += int(wanted.isnan().sum())
        for layer, bits in product(range(3), product((0, 1), repeat=3)):
            of = [apart[arm if bit else "base"] for bit in bits]
            wanted = log_odds(by_hooks(*of, prompt, layer), prompt)
            label = "+".join(player for player, bit in zip(PLAYERS, bits, strict=True) if bit) or "base"
            own = found["log_odds"].isel(fact=fact).sel(combination=label, layer=layer)
            np.testing.assert_allclose(own, wanted, atol=1e-4)
    change = found["log_odds"].sel(combination="+".join(PLAYERS)) - found["log_odds"].sel(combination="base")
    np.testing.assert_allclose(found["share"].sum("part", skipna=False), change.transpose("fact", ...), atol=1e-4)
    assert abs(found["share"]).max("fact").max(("layer", "head")).min() > 1e-2
    assert masked == 0 or name == "gemma2"


def test_a_window_without_the_subject_has_no_log_odds(tuned: Made, tokenizer: Any, cities: pd.DataFrame) -> None:
    """Planted: windows of six tokens, and more than that behind the subject; layer 1 of three sees all."""
    arms, _ = tuned("gemma2")
    asked = make_prompts(draw(cities, 2, seed=3), tokenizer, "{subject} is a city in a country whose name is")
    found = score_split(arms, asked, "one")
    gone = found["log_odds"].isnull().all(("fact", "combination", "head"))
    assert gone.values.tolist() == [True, False, True]
    assert found["share"].sel(layer=1).notnull().all()


@pytest.mark.parametrize("what", ["q_proj", "k_proj"])
def test_planted_weights_of_one_layer(what: str, tiny_folders: dict[str, Path], tmp_path: Path, prompts: Any) -> None:
    """Only one projection of layer 1 is tuned: before it nothing changes, in it the weights are all, after it none."""
    folder = tiny_folders["llama"]
    adapter = adapted(folder, tmp_path / "one", 0, target_modules=[what], layers_to_transform=[1])
    share = score_split(load_arms(str(folder), {"one": str(adapter)}), prompts)["share"]
    own, others = share.sel(part="weights"), share.sel(part=["query", "keys"])
    assert abs(share.sel(layer=0)).max() < 1e-5
    assert abs(own.sel(layer=1)).max() > 0.1 and abs(others.sel(layer=1)).max() < 1e-4
    assert abs(own.sel(layer=2)).max() < 1e-4 and abs(others.sel(layer=2)).max() > 1e-2


def test_a_norm_belongs_to_the_weights(
    tiny_folders: dict[str, Path], tmp_path: Path, tokenizer: Any, prompts: PromptSet
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"])
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(torch.linspace(0.5, 1.5, 32))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arms = load_arms(str(tiny_folders["llama"]), checkpoints={"other": str(tmp_path)})
    share = score_split(arms, prompts, layers=[1])["share"]
    assert abs(share.sel(part="weights")).max() > 0.1 and abs(share.sel(part=["query", "keys"])).max() < 1e-4


def test_batches_and_layers_make_no_difference(tuned: Made, prompts: PromptSet, monkeypatch: Any) -> None:
    arms, _ = tuned("llama")
    whole = score_split(arms, prompts, "one")
    monkeypatch.setattr(scores, "batches", lambda lengths, _: [[i] for i in range(len(lengths))])
    alone = score_split(arms, prompts, "one", layers=[2])
    np.testing.assert_allclose(alone["share"].sel(layer=2), whole["share"].sel(layer=2), atol=1e-5)
    assert alone["log_odds"]["layer"].values.tolist() == [2]


def test_a_layer_that_goes_another_way_by_itself_is_refused(tuned: Made, prompts: PromptSet, monkeypatch: Any) -> None:
    """Planted: the layer is called with positions that are not those of the whole pass."""
    arms, _ = tuned("llama")
    run_base = scores.run_base

    def shifted(*args: Any) -> Any:
        base = run_base(*args)
        for _, kwargs in base.calls:
            kwargs["position_embeddings"] = tuple(part.roll(1, 1) for part in kwargs["position_embeddings"])
        return base

    monkeypatch.setattr(scores, "run_base", shifted)
    with pytest.raises(UnsupportedModel, match="layer 0 of LlamaForCausalLM called by itself gives keys"):
        score_split(arms, prompts, "one")


def test_what_makes_no_sense_is_refused(tuned: Made, prompts: PromptSet) -> None:
    arms, _ = tuned("llama")
    with pytest.raises(BadInput, match="several arms, one, two, other: name one"):
        score_split(arms, prompts)
    with pytest.raises(BadInput, match="which are 0 to 2"):
        score_split(arms, prompts, "one", layers=[3])


def test_as_a_measure(tiny_folders: dict[str, Path], tmp_path: Path, prompts: PromptSet) -> None:
    """Means over layers and heads that have log-odds, one for each part and fact."""
    folder = tiny_folders["gemma2"]
    adapter = adapted(folder, tmp_path / "one", 0, target_modules="all-linear")
    arms = load_arms(str(folder), {"one": str(adapter)})
    found = measure("score_split", arms, prompts, {"facts": 2})
    rows = values_of(measure_of("score_split"), found)
    assert len(rows) == 2 * 3 and {part for _, _, part, *_ in rows} == set(PLAYERS)
    share = score_split(arms, prompts)["share"]
    for fact, _, part, value, _ in rows:
        assert value == pytest.approx(float(np.nanmean(share.sel(fact=fact, part=part))), abs=1e-5)
