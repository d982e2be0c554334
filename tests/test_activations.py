"""Activations against `output_hidden_states` and plain hooks, one unpadded prompt at a time, on every architecture."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zoo
from transformers import PreTrainedModel

import subjattn as sa
from subjattn.engine.collect import SITES
from subjattn.engine.memory import PeakMemory
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import activations as module
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms
from subjattn.prompts import ROLES, Prompt, PromptSet, make_prompts


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 10, seed=3), tokenizer, TEMPLATES["country"]["list"])


@torch.no_grad()
def by_hand(model: PreTrainedModel, arch: str, prompt: Prompt) -> dict[str, np.ndarray]:
    """Of a prompt without its answer, `[layer, position, width]` by site, taken by hooks of torch."""
    attention, mlp, projection = zoo.parts(arch)
    base = model.get_decoder()
    layers = base.h if hasattr(base, "h") else base.layers
    found: dict[str, list[torch.Tensor]] = {"attn_out": [], "mlp_out": [], "z": [], "resid_post": []}

    def out(site: str) -> Callable[..., None]:
        return lambda _m, _i, output: found[site].append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(out("resid_post")) for layer in layers]
    for layer in layers:
        handles.append(layer.get_submodule(attention).register_forward_hook(out("attn_out")))
        handles.append(layer.get_submodule(mlp).register_forward_hook(out("mlp_out")))
        into = layer.get_submodule(projection)
        handles.append(into.register_forward_pre_hook(lambda _m, given: found["z"].append(given[0])))
    ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    found["resid_pre"] = list(states[:-1])
    return {
        site: torch.stack([one.view(1, ids.shape[1], -1)[0] for one in some]).numpy() for site, some in found.items()
    }


@pytest.mark.parametrize("arch", list(zoo.CONFIGS))
def test_activations_are_those_of_plain_hooks(
    arch: str, tiny_models: dict[str, LoadedModel], prompts: PromptSet
) -> None:
    found = sa.activations(tiny_models[arch], prompts, SITES, ROLES)
    assert found["z"].dims == ("fact", "layer", "role", "head", "d_head")
    for prompt in prompts:
        expected = by_hand(tiny_models[arch].model, arch, prompt)
        for site in SITES:
            for role in ROLES:
                values = found[site].sel(fact=prompt.fact_id, role=role).values.reshape(3, -1)
                positions = list(prompt.role(role))
                if positions:
                    np.testing.assert_allclose(values, expected[site][:, positions].mean(1), 1e-4, 1e-4)
                else:
                    assert np.isnan(values).all()


def test_batches_and_layers_change_nothing(tiny: LoadedModel, prompts: PromptSet) -> None:
    whole = sa.activations(tiny, prompts, SITES)
    alone = xr.concat([sa.activations(tiny, prompts[i : i + 1], SITES) for i in range(len(prompts))], "fact")
    xr.testing.assert_allclose(alone, whole, atol=2e-5)
    few = sa.activations(tiny, prompts, "resid_pre", "prediction", layers=[1])
    xr.testing.assert_allclose(few["resid_pre"], whole["resid_pre"].sel(layer=[1], role=["prediction"]), atol=2e-5)


def test_a_pass_ends_with_the_last_layer_asked_for(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    model, ran = tiny_models["llama"].model, []
    sa.activations(model, prompts)  # the first use looks at all of the model
    handles = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_hook(lambda *_: ran.append("head")))
    sa.activations(model, prompts, "resid_pre", layers=[0, 1])
    assert set(ran) == {0}
    sa.activations(model, prompts, "mlp_out", layers=[1])
    assert set(ran) == {0, 1}
    for handle in handles:
        handle.remove()
    assert model.config._attn_implementation != "subjattn"


def test_each_arm_has_the_states_of_its_own_model(
    tuned: Callable[[str], tuple[Arms, dict[str, LoadedModel]]], prompts: PromptSet
) -> None:
    arms, apart = tuned("llama")
    for name, model in apart.items():
        xr.testing.assert_allclose(
            sa.activations(arms, prompts, SITES, arm=name), sa.activations(model, prompts, SITES), atol=1e-4
        )


def test_a_store_holds_what_memory_would(
    tiny: LoadedModel, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written three facts at a time."""
    expected = sa.activations(tiny, prompts, ["resid_pre", "z"], ("subject_first", "subject_last"))
    monkeypatch.setattr(module, "BLOCK_BYTES", 3 * 4 * (32 + 32) * 3 * 2)
    sa.activations(tiny, prompts, ["resid_pre", "z"], ("subject_first", "subject_last"), to=tmp_path / "states")
    found = xr.open_zarr(tmp_path / "states", chunks=None)
    assert found["resid_pre"].encoding["chunks"] == (3, 1, 1, 32)
    xr.testing.assert_allclose(found.load(), expected, atol=2e-5)
    assert found["z"].attrs == expected["z"].attrs
    assert json.loads(found.attrs["provenance"])["weights_sha256"] == tiny.provenance()["weights_sha256"]
    with pytest.raises(BadInput, match="there is something already: name another folder"):
        sa.activations(tiny, prompts, to=tmp_path / "states")


def test_a_budget_is_kept_and_gives_the_same_states(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 40, seed=1), smollm2.tokenizer, TEMPLATES["country"]["list"])
    with PeakMemory() as usual:
        whole = sa.activations(smollm2, prompts)["resid_pre"]
    with PeakMemory() as little:
        small = sa.activations(smollm2, prompts, memory_budget=24_000_000)["resid_pre"]
    assert little.peak < 24_000_000 < usual.peak
    assert float(abs(whole - small).max() / abs(whole).max()) < 1e-5


def test_what_cannot_be_asked_is_refused(
    tiny: LoadedModel, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (
        ({"sites": "resid"}, "site 'resid' is not one of resid_pre, "),
        ({"roles": ["subject"]}, "role 'subject' is not one of before_subject, "),
        ({"roles": []}, "roles: give at least one of "),
        ({"layers": [3]}, r"layers \[3\]: give some of the model's, which are 0 to 2"),
        ({"arm": "tuned"}, "arm='tuned' is one of several: give all of them, from load_arms"),
        ({"to": tmp_path / "no" / "states"}, "there is no folder"),
    ):
        with pytest.raises(BadInput, match=message):
            sa.activations(tiny, prompts, **given)
    one_token = [replace(prompt, span=(prompt.span[1] - 1, prompt.span[1])) for prompt in prompts if prompt.span]
    with pytest.raises(BadInput, match="role 'subject_first': none of the 10 prompts has it"):
        sa.activations(tiny, one_token, "resid_pre", "subject_first")
    without = [replace(prompts[0], span=None)]
    assert sa.activations(tiny, without, roles="prediction")["resid_pre"].notnull().all()
    with pytest.raises(BadInput, match="has no subject"):
        sa.activations(tiny, without, roles="subject_last")
    broken = copy.deepcopy(tiny.model)
    sa.activations(broken, prompts)
    next(broken.parameters()).data.fill_(torch.nan)
    with pytest.raises(BadInput, match=r"resid_pre of the model is not finite: its weights are broken"):
        sa.activations(broken, prompts)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(BadInput, match=r"zarr, which is not installed: pip install 'subjattn\[zarr\]'"):
        sa.activations(tiny, prompts, to=tmp_path / "states")
