"""Architectures that were ever verified stay so; what a measure cannot do on one is refused by that measure alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import adapted, moved
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from zoo import SPLIT_MLPS, VERIFIED, config

from subjattn.errors import UnsupportedModel
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.knockout import knockout
from subjattn.measures.trace import trace
from subjattn.models import LoadedModel, load_model
from subjattn.models.arms import load_arms
from subjattn.organisms import damage_mlps
from subjattn.verify import verify, verify_facts
from subjattn.verify_arms import with_arms
from subjattn.verify_inside import with_inside


TEMPLATE = TEMPLATES["country"]["list"]
WITHOUT = {"patch_effect mlp_out", "restored mlp_out"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(name)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    "name", [*SPLIT_MLPS, *(pytest.param(name, marks=pytest.mark.slow) for name in VERIFIED if name not in SPLIT_MLPS)]
)
def test_it_is_verified(name: str, made: Callable[[str], Path], cities: pd.DataFrame) -> None:
    model = load_model(str(made(name)))
    prompts, pairs = verify_facts(model, cities, TEMPLATE)
    found = with_inside(verify(model, prompts, pairs, ("hooks",)), model, prompts, ("hooks",))
    assert found.passed, found.verdict
    refused = {refusal.quantity: refusal.reason for refusal in found.refusals}
    assert refused.keys() == (WITHOUT if name in SPLIT_MLPS else set())
    assert all("modules that could be its MLP" in reason for reason in refused.values())


@pytest.fixture(scope="module")
def opt(made: Callable[[str], Path]) -> Path:
    return made("opt")


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_arms_without_an_mlp_module_are_verified(
    kind: str, opt: Path, tmp_path: Path, cities: pd.DataFrame, tokenizer: Any
) -> None:
    base = load_model(str(opt))
    if kind == "adapter":
        path = adapted(opt, tmp_path / "t", 1, target_modules=["q_proj", "v_proj", "fc1", "fc2"], bias="all")
        tuned = load_model(str(opt), adapter=path)
    else:
        tuned = load_model(str(moved(opt, tmp_path / "t", tokenizer)))
    prompts, pairs = verify_facts(tuned, cities, TEMPLATE)
    found = with_arms(verify(tuned, prompts, pairs, ()), tuned, base, prompts, ("hooks",))
    compared = {one.quantity: one.passed for one in found.comparisons}
    assert all(compared.values()) and {"arms in one batch", "transfer resid_pre", "transfer z"} <= compared.keys()
    refused = {refusal.quantity for refusal in found.refusals}
    assert {"transfer mlp_out", "restored mlp_out of the tuned"} <= refused
    name = {"adapters": {"t": str(path)}} if kind == "adapter" else {"checkpoints": {"t": tuned}}
    arms = load_arms(base, **name)
    assert {part for _, part in arms.cells("t")} >= {"qk", "vo", "mlp"}


def test_measures_that_need_an_mlp_module_refuse_and_others_do_not(opt: Path, cities: pd.DataFrame) -> None:
    model: LoadedModel = load_model(str(opt))
    prompts, _ = verify_facts(model, cities, TEMPLATE)
    assert knockout(model, prompts, ["direct"], by="layer").notnull().all()
    assert trace(model, prompts, "attn_out", draws=1)["indirect_effect"].notnull().any()
    for asked in (
        lambda: trace(model, prompts, "mlp_out", draws=1),
        lambda: damage_mlps(model, prompts, [0], 0.5),
    ):
        with pytest.raises(
            UnsupportedModel, match="2 modules that could be its MLP.* measure attention or the residual"
        ):
            asked()
