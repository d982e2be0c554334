"""Sensitivity to the subject against plain passes, one prompt at a time, and on models whose answers are planted."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.spatial.distance import jensenshannon

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model
from subjattn.measures.pooled import pseudo_values
from subjattn.measures.record import measure_of, values_of
from subjattn.measures.scoring import SCORERS, Named
from subjattn.measures.subject_sensitivity import _modal, _partners, subject_sensitivity
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, ablate, make_prompts
from subjattn.prompts.make import first_token
from subjattn.study.read import parse_study


TEMPLATE = TEMPLATES["country"]["list"]


@pytest.fixture(scope="module")
def facts(cities: pd.DataFrame) -> pd.DataFrame:
    return draw(cities, 24, seed=3)


@pytest.fixture(scope="module")
def asked(tokenizer: Any, facts: pd.DataFrame) -> PromptSet:
    return make_prompts(facts, tokenizer, TEMPLATE)


def probabilities(model: LoadedModel, prompt: Prompt) -> np.ndarray:
    with torch.no_grad():
        logits = hf_model(model)(torch.tensor([prompt.ids[: prompt.prediction + 1]])).logits[0, -1]
    return logits.double().softmax(-1).numpy()


@contextmanager
def always_says(model: LoadedModel, token: int) -> Iterator[None]:
    """The model's next token is this one, whatever is asked."""

    def says(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., token] = 100.0
        return logits

    hook = hf_model(model).get_output_embeddings().register_forward_hook(says)
    try:
        yield
    finally:
        hook.remove()


def around(prompt: Prompt) -> list[int]:
    """The tokens of a prompt without its subject's."""
    asked = list(prompt.ids[: prompt.prediction + 1])
    return [token for at, token in enumerate(asked) if at not in prompt.subject_positions]


def test_distances_are_scipys(tiny: LoadedModel, asked: PromptSet) -> None:
    found = subject_sensitivity(tiny, asked, swaps=len(asked))
    own = {prompt.fact_id: probabilities(tiny, prompt) for prompt in asked}
    for prompt in asked[:6]:
        for name, what in (("mask", "masked"), ("drop", "relation_only")):
            without = probabilities(tiny, ablate(prompt, what, tiny.tokenizer))
            expected = jensenshannon(own[prompt.fact_id], without, base=2)
            assert float(found[f"{name}_distance"].sel(fact=prompt.fact_id)) == pytest.approx(expected, abs=1e-4)
    given = dict(zip(found["fact"].values, found["prediction"].values, strict=True))
    correct = SCORERS["answer_start"].correct
    for prompt in asked[:6]:
        partners = [
            other
            for other in asked
            if not {*map(str.casefold, other.answers)} & {*map(str.casefold, prompt.answers)}
            and around(other) == around(prompt)
            and not correct(given[prompt.fact_id], other.answers)
        ]
        expected = np.mean([jensenshannon(own[prompt.fact_id], own[other.fact_id], base=2) for other in partners])
        row = found.sel(fact=prompt.fact_id)
        assert float(row["swap_distance"]) == pytest.approx(expected, abs=1e-4)
        assert int(row["n_partners"]) == len(partners) > 0


def test_a_model_that_ignores_the_name_is_seen(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    model = tiny_models["llama"]
    with always_says(model, 9):
        found = subject_sensitivity(model, asked)
    wrong = found["wrong"].values
    assert wrong.all()
    for name in ("swap", "mask", "drop"):
        np.testing.assert_allclose(found[f"{name}_distance"], 0, atol=1e-5)
        np.testing.assert_array_equal(found[f"{name}_flips"], 0)
    np.testing.assert_array_equal(found["detached"], 1)
    np.testing.assert_array_equal(found["detached_masked"], 1)
    shares = found["answer"].to_series().str.casefold().value_counts(normalize=True)
    right_entropy = float(-(shares * np.log(shares)).sum())
    assert float(found["entropy_excess"].mean()) == pytest.approx(-right_entropy, rel=0.5)


def test_right_answers_are_no_detached_errors(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    """A model that says one country is right of its cities, and these have no error to be detached."""
    model = tiny_models["llama"]
    country, names = asked[0].answers[0], {answer.casefold() for answer in asked[0].answers}
    texts = {prompt.fact_id: country for prompt in asked}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "subjattn.measures.subject_sensitivity.predict",
            lambda _model, its, *_: pd.DataFrame({"prediction": [texts[prompt.fact_id] for prompt in its]}),
        )
        found = subject_sensitivity(model, asked, swaps=len(asked))
    right = np.array([bool(names & {answer.casefold() for answer in prompt.answers}) for prompt in asked])
    assert right.any()
    np.testing.assert_array_equal(found["wrong"], ~right)
    np.testing.assert_array_equal(found["detached"], ~right)
    partners = [
        sum(
            around(other) == around(prompt)
            and not {*map(str.casefold, other.answers)} & ({*map(str.casefold, prompt.answers)} | names)
            for other in asked
        )
        for prompt in asked
    ]
    np.testing.assert_array_equal(found["n_partners"], partners)  # none whom the answer given would fit
    rows = [row for row in values_of(measure_of("subject_sensitivity"), _filled(found)) if row[1] == "detached_errors"]
    assert sum(value for *_, value, _ in rows) / sum(over for *_, over in rows) == 1.0


def _filled(found: Any) -> Any:
    return found.assign(
        dict.fromkeys(("modal_answer", "prior_distance", "prior_distance_masked"), found["wrong"] * np.nan)
    )


def test_answers_are_held_against_training(
    tiny_models: dict[str, LoadedModel], asked: PromptSet, facts: pd.DataFrame, cities: pd.DataFrame
) -> None:
    model = tiny_models["llama"]
    training = draw(cities, 30, seed=9)
    relations = dict(zip(facts["fact_id"], facts["relation"], strict=True))
    found = subject_sensitivity(model, asked, relations=relations, training=training)
    prior = np.zeros(hf_model(model).config.vocab_size)
    for answers in training["answers"]:
        prior[first_token(model.tokenizer, asked[0], answers[0])] += 1 / len(training)
    for prompt in asked[:5]:
        expected = jensenshannon(probabilities(model, prompt), prior, base=2)
        assert float(found["prior_distance"].sel(fact=prompt.fact_id)) == pytest.approx(expected, abs=1e-4)
        masked = jensenshannon(probabilities(model, ablate(prompt, "masked", model.tokenizer)), prior, base=2)
        assert float(found["prior_distance_masked"].sel(fact=prompt.fact_id)) == pytest.approx(masked, abs=1e-4)
    counts = training["answers"].str[0].value_counts()
    modal = min(counts.index, key=lambda answer: (-counts[answer], answer))
    for prompt in asked:
        value = float(found["modal_answer"].sel(fact=prompt.fact_id))
        assert np.isnan(value) == (modal.casefold() in {answer.casefold() for answer in prompt.answers})
    elsewhere = subject_sensitivity(
        model, asked, relations=dict.fromkeys(relations, "sport"), training=training.assign(relation="country")
    )
    assert np.isnan(elsewhere["prior_distance"]).all()
    assert np.isnan(elsewhere["modal_answer"]).all()


def test_the_first_token_of_an_answer_is_that_of_its_prompt(asked: PromptSet, tokenizer: Any) -> None:
    assert [first_token(tokenizer, prompt, prompt.answers[0]) for prompt in asked] == [
        prompt.answer_ids[0] for prompt in asked
    ]


def test_a_text_is_the_answer_that_it_begins_with() -> None:
    named = Named([("Guinea", "Guinée"), ("Guinea-Bissau",), ("Kenya",)], SCORERS["answer_start"])
    assert named("Kenya. The city") == named("kenya, in the east") == named.canonical(["Kenya"])
    assert named("Guinée") == named("Guinea")
    assert named("Guinea-Bissau") != named("Guinea")
    assert named("The sea, they say") == named("the sea.")
    assert named("Kenyatta") != named("Kenya")


def test_pseudo_values_of_a_mean_are_the_values_and_of_a_variance_unbiased() -> None:
    values = np.random.default_rng(0).normal(size=12)
    np.testing.assert_allclose(pseudo_values(lambda index: values[index].mean(), 12), values)
    variance = pseudo_values(lambda index: values[index].var(), 12)
    assert variance.mean() == pytest.approx(values.var(ddof=1))
    assert np.isnan(pseudo_values(lambda index: float("nan"), 3)).all()


def test_a_fact_without_partners_has_no_swap(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    found = subject_sensitivity(tiny_models["llama"], PromptSet("list", (asked[0],)))
    assert np.isnan(found["swap_distance"]).all()
    assert np.isnan(found["detached"]).all()
    assert not np.isnan(found["mask_distance"]).any()
    assert np.isnan(found["entropy_excess"]).all()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_another_spelling_of_the_answer_is_no_partner_and_no_other_answer(asked: PromptSet, form: str) -> None:
    """Two facts whose answer is São Tomé in two normal forms; the one most taught in NFC."""
    first = replace(asked[0], answers=(unicodedata.normalize(form, "São Tomé"),))
    spelled = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "são tomé")
    prompts = [first, replace(first, answers=(spelled,)), replace(first, answers=("Lima",))]
    never = lambda text, answers: False  # noqa: E731
    assert _partners(prompts, ["x"] * 3, never, 2, 0)[:2] == [[2], [2]]
    training = pd.DataFrame({"relation": "r", "answers": [["São Tomé"]] * 2})
    found = _modal(prompts, None, training, ["x"] * 3, never)
    assert np.isnan(found).tolist() == [True, True, False]


def test_bad_questions_are_refused(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    with pytest.raises(BadInput, match="seen in text"):
        subject_sensitivity(tiny_models["llama"], asked, scorer="letters")
    with pytest.raises(BadInput, match="no prompts"):
        subject_sensitivity(tiny_models["llama"], [])
    with pytest.raises(BadInput, match="it is asked"):
        sa.measure(
            "subject_sensitivity", tiny_models["llama"], asked, facts=pd.DataFrame({"fact_id": [], "relation": []})
        )


def test_a_study_knows_what_its_arms_were_taught(small: Any, tmp_path: Any) -> None:
    """Numbers of training for arms trained here, none for the base."""
    fields = small.model_dump(mode="json")
    fields["measures"] = {"accuracy": {}, "subject_sensitivity": {}}
    fields |= {"claims": [], "contrasts": []}
    study = parse_study(fields, "test")
    sa.run_study(study, tmp_path / "run")
    values = {}
    for arm in (tmp_path / "run" / "arms").iterdir():
        for path in arm.rglob("subject_sensitivity/array.nc"):
            values[arm.name] = xr.load_dataset(path, engine="h5netcdf")["prior_distance"].notnull().all().item()
    assert values == {arm: bool(of.train) for arm, of in study.arms.items()}
    assert len(set(values.values())) == 2
