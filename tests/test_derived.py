"""Mixtures of two models and updates partly undone, against the same done by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import subjattn as sa
from subjattn.errors import BadInput, NoActivations
from subjattn.facts import draw
from subjattn.measures.answers import longest_answers
from subjattn.measures.record import measures
from subjattn.measures.scoring import SCORERS
from subjattn.models import LoadedModel
from subjattn.models.derived import largest_of, merged, mixed, restored
from subjattn.prompts import PromptSet, Style, make_prompts


LIST = "City: {subject}\nCountry:"


@pytest.fixture(scope="module")
def pair(tiny_folders: dict[str, Path], adapter: Path) -> tuple[LoadedModel, LoadedModel]:
    """A tuned model and its base."""
    return sa.load_model(str(tiny_folders["llama"]), adapter=adapter), sa.load_model(str(tiny_folders["llama"]))


@pytest.fixture(scope="module")
def prompts(cities: pd.DataFrame, pair: tuple[LoadedModel, LoadedModel]) -> PromptSet:
    return make_prompts(draw(cities, 30), pair[0].tokenizer, LIST)


def by_hand(
    models: tuple[LoadedModel, LoadedModel], inputs: tuple[list[int], list[int]], weight: float, form: str
) -> Any:
    """Log-probabilities of the next token, in double precision and from probabilities themselves."""
    with torch.no_grad():
        p, q = (
            one.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            for one, ids in zip(models, inputs, strict=True)
        )
    if form == "linear":
        return (weight * p + (1 - weight) * q).log()
    together = p**weight * q ** (1 - weight)
    return (together / together.sum()).log()


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mixture_answers_as_the_mixed_probabilities_do(
    pair: tuple[LoadedModel, LoadedModel], prompts: PromptSet, weight: float, form: Any
) -> None:
    model = mixed(*pair, weight, form)
    logprobs = sa.answer_logprob(model, prompts).values
    texts = sa.predict(model, prompts)["prediction"].tolist()
    eos = {1}
    for i in (0, 7, 29):
        ids, total = list(prompts[i].ids[: prompts[i].prediction + 1]), 0.0
        for token in prompts[i].answer_ids:
            total += float(by_hand(pair, (ids, ids), weight, form)[token])
            ids.append(token)
        assert logprobs[i] == pytest.approx(total, rel=1e-4)
        ids, written = list(prompts[i].ids[: prompts[i].prediction + 1]), []
        for step in range(*longest_answers(SCORERS["answer_start"], pair[0].tokenizer, [prompts[i]])):
            token = int(by_hand(pair, (ids, ids), weight, form).argmax())
            written.append(token)
            ids.append(token)
            if token in eos or (step and "\n" in pair[0].tokenizer.decode([token])):
                break
        text = pair[0].tokenizer.decode(written, skip_special_tokens=True).strip()
        assert texts[i] == (text.splitlines()[0].strip() if text else "")


def test_the_ends_of_a_mixture_are_its_models(pair: tuple[LoadedModel, LoadedModel], prompts: PromptSet) -> None:
    tuned, base = pair
    for weight, one in ((1.0, tuned), (0.0, base)):
        model = mixed(tuned, base, weight)
        np.testing.assert_allclose(sa.answer_logprob(model, prompts), sa.answer_logprob(one, prompts), rtol=1e-4)
        assert sa.predict(model, prompts).equals(sa.predict(one, prompts))


def test_a_base_that_is_shown_demonstrations(
    pair: tuple[LoadedModel, LoadedModel], cities: pd.DataFrame, prompts: PromptSet
) -> None:
    """With weight 0 the mixture answers as the base does behind demonstrations; mixed, as both by hand."""
    facts, others = draw(cities, 30), draw(cities[~cities["fact_id"].isin(draw(cities, 30)["fact_id"])], 60)
    few = make_prompts(facts, pair[0].tokenizer, Style(template=LIST, shots=2), demonstrations=others)
    model = mixed(*pair, 0.0, prompts=prompts, shown=few)
    np.testing.assert_allclose(sa.answer_logprob(model, prompts), sa.answer_logprob(pair[1], few), rtol=1e-4)
    assert sa.predict(model, prompts)["prediction"].tolist() == sa.predict(pair[1], few)["prediction"].tolist()
    model = mixed(*pair, 0.4, prompts=prompts, shown=few)
    found, i = sa.answer_logprob(model, prompts).values, 3
    ours, theirs = (list(one[i].ids[: one[i].prediction + 1]) for one in (prompts, few))
    total = 0.0
    for token in prompts[i].answer_ids:
        total += float(by_hand(pair, (ours, theirs), 0.4, "linear")[token])
        ours.append(token)
        theirs.append(token)
    assert found[i] == pytest.approx(total, rel=1e-4)
    sensitivity = sa.subject_sensitivity(model, prompts)
    assert np.isfinite(sensitivity["mask_distance"]).all(), "names swapped and masked are asked behind the same"
    other = make_prompts(facts, pair[0].tokenizer, Style(template="{subject} is in", shots=2), demonstrations=others)
    with pytest.raises(BadInput, match="not the same behind demonstrations"):
        mixed(*pair, 0.4, prompts=prompts, shown=other)


def test_a_mixture_has_no_activations(pair: tuple[LoadedModel, LoadedModel], prompts: PromptSet) -> None:
    """Every measure of one model gives numbers of the mixture, or says that there are none."""
    model, answering = mixed(*pair, 0.5), set()
    for name, measure in measures().items():
        if measure.needs & {"base", "trained"} or name in ("hypotheses", "probe"):
            continue
        try:
            sa.measure(name, model, prompts)
            answering.add(name)
        except NoActivations as error:
            assert "mixture of two models" in str(error)
    assert answering == {"accuracy", "answer_logprob", "subject_sensitivity", "temperature"}
    with pytest.raises(BadInput, match="give 0 to 1"):
        mixed(*pair, 1.5)


def test_an_adapter_is_merged_as_peft_merges_it(
    tiny_folders: dict[str, Path], adapter: Path, pair: tuple[LoadedModel, LoadedModel]
) -> None:
    from peft import PeftModel

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]), adapter)
    expected = plain.merge_and_unload().state_dict()
    found = merged(pair[0]).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert "lora_A" in "".join(pair[0].model.state_dict()), "the tuned model stays as it was"


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_update_is_undone(pair: tuple[LoadedModel, LoadedModel], which: Any, share: float) -> None:
    """Against a sort of all moves in one vector."""
    tuned, base = merged(pair[0]).state_dict(), pair[1].model.state_dict()
    found = restored(*pair, share, which).model.state_dict()
    names = [name for name, _ in pair[1].model.named_parameters()]
    a, b, c = (torch.cat([of[name].flatten() for name in names]) for of in (tuned, base, found))
    changed = a != b
    back, left = changed & (c == b), changed & (c == a)
    assert (back ^ left)[changed].all() and torch.equal(c[~changed], a[~changed])
    assert int(back.sum()) == round(share * int(changed.sum()))
    moves = (a - b).abs()
    if which != "random" and 0 < share < 1:
        more, less = (back, left) if which == "top" else (left, back)
        assert float(moves[more].min()) >= float(moves[less].max())
    if which == "random" and share == 0.1:
        again, other = (restored(*pair, share, which, seed=seed).model.state_dict() for seed in (0, 1))
        assert all(torch.equal(found[name], again[name]) for name in names)
        assert not all(torch.equal(found[name], other[name]) for name in names)
        assert abs(float(moves[back].mean() / moves[changed].mean()) - 1) < 0.1


@settings(deadline=None)
@given(
    parts=st.lists(st.lists(st.floats(0, 100, width=32), max_size=12), min_size=1, max_size=4), share=st.floats(0, 1)
)
def test_the_largest_of_all_parts(parts: list[list[float]], share: float) -> None:
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    every = torch.cat(tensors)
    n = round(share * len(every))
    masks = [*largest_of(lambda i: tensors[i], len(tensors), n)]
    chosen = torch.cat(masks)
    assert [len(mask) for mask in masks] == [len(part) for part in parts] and int(chosen.sum()) == n
    if 0 < n < len(every):
        assert float(every[chosen].min()) >= float(every[~chosen].max())


def test_a_model_with_its_update_undone_is_measured(pair: tuple[LoadedModel, LoadedModel], prompts: PromptSet) -> None:
    back, half = restored(*pair, 1.0), restored(*pair, 0.5)
    np.testing.assert_allclose(sa.answer_logprob(back, prompts), sa.answer_logprob(pair[1], prompts), rtol=1e-5)
    arms = sa.load_arms(sa.load_model(pair[1].name), checkpoints={"half": half})
    assert sa.measure("swap_weights", arms, PromptSet("list", tuple(prompts[:4]))).sizes["fact"] == 4
    other = LoadedModel(copy.deepcopy(pair[1].model), pair[1].tokenizer, "other")
    other.model.lm_head = torch.nn.Linear(32, 7, bias=False)
    with pytest.raises(BadInput, match="other shapes"):
        restored(pair[0], other, 0.5)
    with pytest.raises(BadInput, match="give 0 to 1"):
        restored(*pair, -0.1)
