"""Adapters whose moving part is known: shares of the update find it, and so do states put into the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from planting import logprobs, plant, updates

from subjattn.evidence.returned import returned
from subjattn.facts import load_facts
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.score_split import score_split
from subjattn.measures.swapping import swap_weights
from subjattn.measures.transfer import transfer
from subjattn.models import LoadedModel, load_model
from subjattn.models.arms import Arms, load_arms
from subjattn.prompts import PromptSet, make_prompts


pytestmark = pytest.mark.slow

MODEL, DROP = "smollm2-135m", 2.0
LAYER, HEADS = 3, (3, 4, 5)
"""Query heads of one key/value head, so that its keys are read by no others."""
MOVING = {
    "qk": {
        f"model.layers.{LAYER}.self_attn.q_proj": range(3 * 64, 6 * 64),
        f"model.layers.{LAYER}.self_attn.k_proj": range(64, 2 * 64),
    },
    "vo": {f"model.layers.{layer}.self_attn.{name}": None for layer in (12, 13) for name in ("v_proj", "o_proj")},
    "mlp": {f"model.layers.12.mlp.{name}": None for name in ("gate_proj", "up_proj", "down_proj")},
}
Planted = Callable[[str], tuple[Arms, Path]]


@pytest.fixture(scope="module")
def prompts(smollm2: LoadedModel) -> PromptSet:
    facts = load_facts("cities")
    known = facts[facts["subject"].isin(["Tokyo", "Toronto", "Mumbai"])].drop_duplicates("subject")
    return make_prompts(known, smollm2.tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def planted(smollm2: LoadedModel, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    made: dict[str, tuple[Arms, Path]] = {}

    def make(part: str) -> tuple[Arms, Path]:
        if part not in made:
            folder = plant(MODEL, prompts, MOVING[part], tmp_path_factory.mktemp("planted") / part, drop=DROP)
            made[part] = load_arms(smollm2, {part: str(folder)}), folder
        return made[part]

    return make


@pytest.mark.parametrize("part", MOVING)
def test_parts_are_of_one_size_and_the_answers_are_lost(part: str, planted: Planted, prompts: PromptSet) -> None:
    """By peft alone."""
    _, folder = planted(part)
    model = PeftModel.from_pretrained(load_model(MODEL).model, folder)
    sizes = updates(model)
    assert max(sizes.values()) == pytest.approx(min(sizes.values()), rel=1e-3)
    with torch.no_grad():
        tuned = logprobs(model, prompts)
        with model.disable_adapter():
            base = logprobs(model, prompts)
    assert (base - tuned >= DROP - 0.01).all()


@pytest.mark.parametrize("part", MOVING)
def test_shares_of_the_update_find_the_planted_part(part: str, planted: Planted, prompts: PromptSet) -> None:
    arms, _ = planted(part)
    found = swap_weights(arms, prompts, part)
    values, shares = found["answer_logprob"], found["answer_logprob_share"]
    whole = values.sel(weights="qk+vo+mlp") - values.sel(weights="base")
    assert (whole <= -DROP + 0.01).all()
    ratios = shares / whole
    assert (ratios.sel(part=part) >= 0.9).all(), ratios
    assert (abs(ratios.drop_sel(part=part)) <= 0.1).all(), ratios


def test_idle_parts_are_idle_on_the_planted_prompts_alone(planted: Planted, prompts: PromptSet) -> None:
    """Their updates are as large as the one that moves the answer, and another prompt feels them."""
    arms, _ = planted("mlp")
    facts = load_facts("cities")
    other = make_prompts(facts[facts["subject"] == "Nairobi"].head(1), arms.tokenizer, TEMPLATES["country"]["list"])
    for asked, least, most in ((prompts, 0, 1e-3), (other, 1e-2, 100)):
        values = swap_weights(arms, asked, "mlp")["answer_logprob"]
        moved = abs(values.sel(weights="qk+vo") - values.sel(weights="base"))
        assert (moved >= least).all() and (moved <= most).all(), moved


@pytest.mark.parametrize("where", ["all", "prediction"])
def test_patterns_of_the_planted_heads_return_the_change(where: str, planted: Planted, prompts: PromptSet) -> None:
    """At all positions they are all of it; random sets of heads of that layer return little."""
    arms, _ = planted("qk")
    chosen = [(LAYER, head) for head in HEADS]
    found = transfer(arms, prompts, "pattern", "qk", at=where, heads=chosen, random_sets=5)  # type: ignore[arg-type]
    share = returned(found)["share"].sel(patch="real", into="base")
    random = abs(share.drop_sel(set="chosen"))
    assert random.max() < 0.1, share
    if where == "all":
        assert share.sel(set="chosen") >= 0.9, share


@pytest.mark.parametrize("part, component, layers", [("mlp", "mlp_out", [12]), ("vo", "attn_out", [12, 13])])
def test_outputs_of_the_planted_layers_return_the_change(
    part: str, component: str, layers: list[int], planted: Planted, prompts: PromptSet
) -> None:
    """Those of as many other layers before return nothing."""
    arms, _ = planted(part)
    about = {"at": "all", "by": None}
    for some, returns in ((layers, True), ([layer - 4 for layer in layers], False)):
        found = transfer(arms, prompts, component, part, layers=some, **about)  # type: ignore[arg-type]
        share = float(returned(found)["share"].sel(patch="real", into="base"))
        assert share >= 0.9 if returns else abs(share) < 0.1, share


def test_scores_of_the_planted_heads_change_by_their_weights(planted: Planted, prompts: PromptSet) -> None:
    """In their layer nothing before them changed, and other heads do not."""
    arms, _ = planted("qk")
    share = score_split(arms, prompts, layers=[LAYER])["share"].isel(layer=0)
    planted_heads = share.sel(head=list(HEADS))
    assert abs(planted_heads.sel(part="weights")).min("head").max() > 0.1
    assert abs(planted_heads.sel(part=["query", "keys"])).max() < 1e-2
    assert abs(share.drop_sel(head=list(HEADS))).max() < 1e-2
