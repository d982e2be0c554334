"""Answers scored many at a time against one plain pass each."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from zoo import CONFIGS

from subjattn.engine import answers
from subjattn.engine.answers import HELD, answer_logits
from subjattn.engine.interventions import BATCH_TOKENS
from subjattn.facts import draw
from subjattn.measures.answers import answer_logprob
from subjattn.models import LoadedModel
from subjattn.prompts import PromptSet, Style, make_prompts


STYLES = {
    "shared": "In which country does the city lie? {subject} lies in",
    "short": "City: {subject}\nCountry:",
    "none": "{subject} lies in",
}


def asked(model: LoadedModel, cities: pd.DataFrame, template: str, n: int) -> PromptSet:
    return make_prompts(draw(cities, n), model.tokenizer, template)


def expected(model: LoadedModel, prompts: PromptSet) -> list[float]:
    return [oracles.answer_logprob(model.model, prompt) for prompt in prompts]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_many_answers_are_those_one_by_one(
    name: str, style: str, tiny_models: dict[str, LoadedModel], cities: pd.DataFrame
) -> None:
    """Every architecture; a beginning longer than a sliding window, a short one and none."""
    model = tiny_models[name]
    prompts = asked(model, cities, STYLES[style], 60)
    found = answer_logprob(model, prompts).values
    np.testing.assert_allclose(found, expected(model, prompts), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_few_answers(tiny: LoadedModel, cities: pd.DataFrame, n: int) -> None:
    prompts = asked(tiny, cities, STYLES["shared"], 5)[:n]
    np.testing.assert_allclose(answer_logprob(tiny, prompts).values, expected(tiny, prompts), atol=2e-5)


def test_a_number_depends_on_no_batch(tiny: LoadedModel, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the pool, small batches, another order: the same numbers to 1e-5."""
    prompts = asked(tiny, cities, STYLES["shared"], 80)
    whole = answer_logprob(tiny, prompts).values
    for shards in (2, 7):
        for shard in range(shards):
            share = answer_logprob(tiny, prompts[shard::shards]).values
            np.testing.assert_allclose(share, whole[shard::shards], atol=1e-5)
    np.testing.assert_allclose(answer_logprob(tiny, prompts[::-1]).values[::-1], whole, atol=1e-5)
    monkeypatch.setattr(answers, "BATCH_TOKENS", 50)
    np.testing.assert_allclose(answer_logprob(tiny, prompts).values, whole, atol=1e-5)


def test_smollm2_scores_as_one_by_one(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    """To the rounding of float32, which parts one pass each from float64 by 2e-5."""
    prompts = asked(smollm2, cities, STYLES["short"], 150)
    np.testing.assert_allclose(answer_logprob(smollm2, prompts).values, expected(smollm2, prompts), atol=1e-4)


def tokens_run(model: LoadedModel, prompts: PromptSet) -> list[tuple[int, int]]:
    """Shapes of the ids that the model is given, batch by batch."""
    shapes: list[tuple[int, int]] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        list(answer_logits(model.model, prompts))
    finally:
        handle.remove()
    return shapes


def test_only_what_differs_and_predicts_is_run(tiny_models: dict[str, LoadedModel], cities: pd.DataFrame) -> None:
    """The shared beginning once; of the others neither it nor the answer's last token, and nothing padded but
    batches of up to 256 tokens."""
    model = tiny_models["llama"]
    prompts = asked(model, cities, STYLES["shared"], 400)
    (one, shared), *batches = tokens_run(model, prompts)
    ids = {tuple(prompt.ids[:shared]) for prompt in prompts}
    assert one == 1 and shared >= 8 and len(ids) == 1
    needed = sum(len(prompt) - 1 - shared for prompt in prompts)
    run = sum(rows * length for rows, length in batches)
    assert needed <= run < 1.1 * needed
    assert sum(rows for rows, _ in batches) == 400
    assert all(rows * length <= BATCH_TOKENS for rows, length in batches)


def test_a_long_beginning_is_not_held_too_often(tiny_models: dict[str, LoadedModel], cities: pd.DataFrame) -> None:
    model = tiny_models["llama"]
    style = Style(template="{subject} lies in", prefix=64)
    prompts = make_prompts(draw(cities, 300), model.tokenizer, style)
    (_, shared), *batches = tokens_run(model, prompts)
    assert shared >= 64
    assert max(rows * (shared + length) for rows, length in batches) <= HELD * BATCH_TOKENS
    with torch.inference_mode():
        found = answer_logprob(model, prompts[:20]).values
    np.testing.assert_allclose(found, expected(model, prompts[:20]), atol=2e-5)
