"""Hidden knowledge against plain passes and scikit-learn, and on models whose inside and outside were planted."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model, probing
from subjattn.measures.activations import Stream
from subjattn.measures.candidates import NOBODY, deal, same_answers
from subjattn.measures.hidden_knowledge import hidden_knowledge
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, ablate, make_prompts


TEMPLATE = TEMPLATES["country"]["list"]
States = Callable[[Any, int], np.ndarray]


@pytest.fixture(scope="module")
def asked(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 40, seed=3), tokenizer, TEMPLATE)


def passed(model: LoadedModel, ids: tuple[int, ...], answer: tuple[int, ...]) -> tuple[float, np.ndarray]:
    """Log-probability of an answer behind a prompt, and the states after each layer at its last token."""
    with torch.no_grad():
        output = hf_model(model)(torch.tensor([[*ids, *answer]]), output_hidden_states=True)
    found = output.logits[0].double().log_softmax(-1)
    logprob = sum(float(found[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
    return logprob, np.stack([states[0, -1] for states in output.hidden_states[1:]])


def k(right: float, wrong: list[float]) -> float:
    return float(np.mean([1.0 if right > other else 0.5 if right == other else 0.0 for other in wrong]))


def test_k_is_the_share_of_pairs_ranked_right(
    tiny_models: dict[str, LoadedModel], asked: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models["gpt2"]
    monkeypatch.setattr(probing, "PENALTIES", np.array([0.1]))
    found = hidden_knowledge(model, asked, wrong=4, folds=3, layers=[0, 1])
    dealt = deal(asked, None, 4, 3, 0)
    prompt_ids = [prompt.ids[: prompt.prediction + 1] for prompt in asked]
    masked = [ablate(prompt, "masked", model.tokenizer).ids[: prompt.prediction + 1] for prompt in asked]
    states = {}
    for i in np.flatnonzero(dealt.paired):
        its = [asked[i].answer_ids, *(asked[j].answer_ids for j in dealt.wrong[i])]
        own = [passed(model, prompt_ids[i], answer) for answer in its]
        states[int(i)] = np.stack([inside for _, inside in own])
        outside, prior, swapped = (
            [passed(model, ids, answer)[0] for answer in its]
            for ids in (prompt_ids[i], masked[i], prompt_ids[dealt.other[i]])
        )
        row = found.isel(fact=int(i))
        assert float(row["external_k"]) == k(outside[0], outside[1:])
        without = [a - b for a, b in zip(outside, prior, strict=True)]
        assert float(row["external_k_prior"]) == pytest.approx(k(without[0], without[1:]))
        assert float(row["swapped_k"]) == k(swapped[0], swapped[1:])
        assert float(row["hidden"]) == pytest.approx(float(row["internal_k"]) - float(row["external_k"]))
    subjects = [prompt.subject for prompt in asked]
    for fold in range(3):
        test, train = ([i for i in states if (dealt.fold[i] == fold) == own] for own in (True, False))
        errors = []
        for layer in (0, 1):
            rows = np.concatenate([states[i][[0, 0, 1, 2], layer] for i in train]).astype(float)
            labels, groups = np.tile([1.0, 1, -1, -1], len(train)), np.repeat([subjects[i] for i in train], 4)
            scaled = StandardScaler().fit(rows)
            probe = make_pipeline(scaled, Ridge(alpha=0.1 * len(rows))).fit(rows, labels)
            for i in test:
                right, *wrong = probe.predict(states[i][:, layer].astype(float))
                by_layer = found["internal_k_by_layer"].sel(layer=layer).isel(fact=i)
                assert float(by_layer) == pytest.approx(k(right, wrong))
            left_out = cross_val_predict(
                Ridge(alpha=0.1 * len(rows)), scaled.transform(rows), labels, groups=groups, cv=LeaveOneGroupOut()
            )
            errors.append(((left_out - labels) ** 2).mean())
        assert set(found["probed"].values[test]) == {int(np.argmin(errors))}
        chosen = found["internal_k_by_layer"].isel(layer=int(np.argmin(errors)), fact=test)
        np.testing.assert_array_equal(found["internal_k"].isel(fact=test), chosen)


@pytest.mark.parametrize("excess", [0, 30])
def test_a_score_of_the_answer_alone_ranks_half_of_the_pairs_right(tokenizer: Any, excess: int) -> None:
    """However frequent some answers are; those of one that has no others to meet have no pairs."""
    facts = sa.load_facts("cities", n=90, seed=4)
    facts["relation"] = np.where(np.arange(90) < 50, "one", "other")
    if excess:
        facts["answers"] = [("India",) if i < excess else answers for i, answers in enumerate(facts["answers"])]
    prompts = make_prompts(facts, tokenizer, "City: {subject}\nCountry:")
    relations = dict(zip(facts["fact_id"], facts["relation"], strict=True))
    dealt, same = deal(prompts, relations, 6, 5, 1), same_answers(prompts)
    score = np.random.default_rng(0).normal(size=same.max() + 1)[same]
    some = np.flatnonzero(dealt.paired)
    values = [k(score[i], score[dealt.wrong[i]].tolist()) for i in some]
    assert np.mean(values) == pytest.approx(0.5, abs=1e-12)
    for i in some:
        assert relations[prompts[i].fact_id] == relations[prompts[dealt.wrong[i][0]].fact_id]
        for j in dealt.wrong[i]:
            assert dealt.fold[j] == dealt.fold[i]
            assert not {*map(str.casefold, prompts[i].answers)} & {*map(str.casefold, prompts[j].answers)}
        if dealt.other[i] != NOBODY:
            assert same[dealt.other[i]] not in {same[i], *same[dealt.wrong[i]]}
    for j in np.unique(same):
        right, wrong = int((same[some] == j).sum()) * 6, int((same[dealt.wrong[some]] == j).sum())
        assert right == wrong
    assert (len(some) < 90) == bool(excess)
    by_subject = pd.Series(dealt.fold).groupby([prompt.subject for prompt in prompts]).nunique()
    assert (by_subject == 1).all()


def test_answers_are_the_same_by_way_of_others(asked: PromptSet) -> None:
    names = [("A", "b"), ("B",), ("C",), ("c", "D"), ("E",)]
    found = same_answers([replace(asked[0], answers=own) for own in names])
    assert found[0] == found[1] and found[2] == found[3] and len(set(found)) == 3


@pytest.mark.parametrize("name", ["São Tomé", "Кёнигсберг", "Άργος", "서울", "ガーナ", "दिल्ली क़", "İzmir"])
def test_spellings_of_one_answer_are_one_answer(asked: PromptSet, name: str) -> None:
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC")]
    found = same_answers([replace(asked[0], answers=(own,)) for own in (*forms, f"{name}\u200b", "Lima")])
    assert len(set(found[:-1])) == 1 and found[-1] not in found[:-1]


@contextmanager
def offset(model: LoadedModel, size: float) -> Iterator[None]:
    """The model's logits are moved by a number drawn for each token, whatever is asked."""
    head = hf_model(model).get_output_embeddings()
    moved = size * torch.randn(head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    hook = head.register_forward_hook(lambda _module, _args, logits: logits + moved)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.slow
def test_a_biased_output_hides_what_the_states_hold(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 120, seed=1), smollm2.tokenizer, TEMPLATE)
    options: dict[str, Any] = {"wrong": 2, "layers": [12]}
    plain = hidden_knowledge(smollm2, prompts, **options).mean()
    with offset(smollm2, 30.0):
        biased = hidden_knowledge(smollm2, prompts, **options).mean()
    assert plain["external_k"] > 0.7 and plain["internal_k"] > 0.65
    assert biased["internal_k"] == plain["internal_k"]
    assert abs(biased["external_k"] - 0.5) < 0.1
    assert biased["hidden"] > plain["hidden"] + 0.15
    assert abs(plain["swapped_k"] - 0.5) < 0.1


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[States], None]:
    """Gives states of one's own, `[row, d_model]` by layer, in the place of the model's."""

    def with_states(states: States) -> None:
        def in_memory(stream: Stream) -> xr.Dataset:
            values = np.stack([states(stream.prompts, layer) for layer in stream.layers], 1)[:, :, None]
            site = stream.sites[0]
            return stream.labels({site: values}).copy(data={site: values.astype(np.float32)})

        monkeypatch.setattr(Stream, "in_memory", in_memory)

    return with_states


@pytest.mark.parametrize("size, low, high", [(0.0, 0.4, 0.6), (8.0, 0.99, 1.0)])
def test_a_probe_finds_what_states_hold_and_nothing_in_noise(
    tiny_models: dict[str, LoadedModel],
    cities: pd.DataFrame,
    tokenizer: Any,
    plant: Any,
    size: float,
    low: float,
    high: float,
) -> None:
    """States tell the answer apart in any case, and whether it is right only in the second layer."""
    facts = draw(cities, 150, seed=2)
    prompts = make_prompts(facts, tokenizer, TEMPLATE)
    right = {prompt.fact_id: prompt.answers[0] for prompt in prompts}
    names = sorted({*right.values()})

    def states(rows: list[Prompt], layer: int) -> np.ndarray:
        rng = np.random.default_rng(layer)
        of_answer = np.random.default_rng(9).normal(size=(len(names), 24))
        own = np.stack([of_answer[names.index(row.answers[0])] for row in rows])
        held = np.array([row.answers[0] == right[row.fact_id] for row in rows])
        noise = rng.normal(size=own.shape)
        noise[:, 0] += size * held * (layer == 1)
        return own + noise

    plant(states)
    found = hidden_knowledge(tiny_models["llama"], prompts, layers=[0, 1])
    assert low <= float(found["internal_k"].mean()) <= high
    assert 0.4 < float(found["internal_k_by_layer"].sel(layer=0).mean()) < 0.6
    if size:
        assert set(found["probed"].values) <= {1, -1}


def test_what_is_not_defined_is_said(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    model = tiny_models["llama"]
    answers = pd.Series([prompt.answers[0] for prompt in asked])
    one = [prompt for prompt in asked if prompt.answers[0] == answers.mode()[0]]
    with pytest.raises(BadInput, match="two facts with different answers"):
        hidden_knowledge(model, one, folds=2)
    with pytest.raises(BadInput, match="even number"):
        hidden_knowledge(model, asked, wrong=3)
    with pytest.raises(BadInput, match="folds is 1"):
        hidden_knowledge(model, asked, folds=1)
    two = [prompt for prompt in asked if prompt.answers[0] in answers.value_counts().index[:2]]
    few = hidden_knowledge(model, two, wrong=2, folds=2)
    assert few["external_k"].notnull().any()
    assert np.isnan(few["swapped_k"]).all()


def test_broken_log_probabilities_are_refused(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    model = tiny_models["llama"]
    head = hf_model(model).get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _args, logits: logits * float("nan"))
    try:
        with pytest.raises(BadInput, match="not finite"):
            hidden_knowledge(model, asked)
    finally:
        hook.remove()
