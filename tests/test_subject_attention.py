"""Forms of attention to the subject and their controls, against `output_attentions` of prompts made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import xarray as xr

import subjattn as sa
from subjattn.backends import open_backend
from subjattn.engine.interventions import Output
from subjattn.errors import BadInput, NotDefined
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model
from subjattn.measures import subject_attention as module
from subjattn.measures.record import Asked, measure_of, values_of
from subjattn.measures.subject_attention import SINK, AttentionSettings, behind_neutral_text, controlled_attention
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, ablate, make_prompts


@pytest.fixture(scope="module")
def asked(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 10, seed=3), tokenizer, TEMPLATES["country"]["list"])


def rows_of(model: LoadedModel, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """`[layer, head, key]` of every prompt, by the model's own eager attention."""
    return [oracles.attention_weights(hf_model(model), prompt).double().numpy() for prompt in prompts]


def by_hand(
    plain: list[np.ndarray], masked: list[np.ndarray], moved: list[np.ndarray], asked: Sequence[Prompt], shift: int
) -> dict[str, np.ndarray]:
    """All forms, one number at a time, from rows of the three kinds of prompts."""

    def mean_of(rows: list[np.ndarray]) -> np.ndarray:
        length = max(row.shape[-1] for row in rows) - 1
        mean = np.zeros((*rows[0].shape[:2], length))
        for position in range(length):
            there = [row[..., position] for row in rows if position < row.shape[-1] - 1]
            mean[..., position] = np.mean(there, axis=0)
        return mean

    first, second = mean_of(masked), mean_of(moved)
    length = min(first.shape[-1], second.shape[-1])
    sink = (first[..., :length] >= SINK) & (second[..., :length] >= SINK)
    n_layers, n_heads = sink.shape[:2]
    names = ("attention_max", "attention_last", "attention_moved", "attention_in_its_place")
    names = (*names, "attention_without_sinks", "attention_over_its_place")
    found = {name: np.full((len(asked), n_layers, n_heads), np.nan) for name in names}
    for i, prompt in enumerate(asked):
        for layer in range(n_layers):
            for head in range(n_heads):
                own, far = plain[i][layer, head], moved[i][layer, head]
                at = list(prompt.subject_positions)
                there = [position + shift for position in at]
                found["attention_max"][i, layer, head] = max(own[position] for position in at)
                found["attention_last"][i, layer, head] = own[at[-1]]
                found["attention_moved"][i, layer, head] = sum(far[position] for position in there)
                found["attention_in_its_place"][i, layer, head] = sum(far[position] for position in at)
                out = {position for position in range(length) if sink[layer, head, position]}
                rest = sum(weight for position, weight in enumerate(far) if position not in out)
                subject = [far[position] / rest for position in there if position not in out]
                neutral = [far[position] / rest for position in at if position not in out]
                if subject:
                    found["attention_without_sinks"][i, layer, head] = sum(subject)
                if subject and neutral:
                    found["attention_over_its_place"][i, layer, head] = np.mean(subject) - np.mean(neutral)
    return found


def test_every_form_is_that_of_output_attentions(tiny: LoadedModel, asked: PromptSet) -> None:
    found = controlled_attention(tiny, asked)
    shift = max(prompt.subject_span[1] for prompt in asked)
    moved = behind_neutral_text(asked, tiny.tokenizer, shift)
    masked = [ablate(prompt, "masked", tiny.tokenizer) for prompt in asked]
    expected = by_hand(rows_of(tiny, asked), rows_of(tiny, masked), rows_of(tiny, moved), asked, shift)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)
    hooks = open_backend("hooks", hf_model(tiny))
    for i, prompt in enumerate(asked):
        (output,) = hooks.attention_rows([prompt], value_norms=True)
        for layer, weights in output.attention.items():
            written = (weights[0, :, 0] * output.value_norms[layer][0]).numpy()
            share = written[:, list(prompt.subject_positions)].sum(-1) / written.sum(-1)
            np.testing.assert_allclose(found["attention_value_weighted"][i, layer], share, atol=1e-4)


def test_moved_prompts_keep_their_own_tokens(asked: PromptSet, tokenizer: Any) -> None:
    shift = max(prompt.subject_span[1] for prompt in asked)
    for prompt, moved in zip(asked, behind_neutral_text(asked, tokenizer, shift), strict=True):
        assert len(moved) == len(prompt) + shift
        assert [moved.ids[i] for i in moved.subject_positions] == [prompt.ids[i] for i in prompt.subject_positions]
        assert moved.answer_ids == prompt.answer_ids
        assert moved.subject_span[0] >= prompt.subject_span[1]
        start = next(at for at, (a, b) in enumerate(zip(moved.ids, prompt.ids, strict=False)) if a != b)
        assert moved.ids[start + shift :] == prompt.ids[start:]


class WithASink:
    """A backend whose heads rest on the first positions, whatever stands there, with a share of their attention."""

    name = "engine"

    def __init__(self, model: LoadedModel, share: float, width: int) -> None:
        self.inner, self.share, self.width = open_backend("engine", hf_model(model)), share, width

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        for output in self.inner.attention_rows(prompts, value_norms=value_norms):
            for layer, weights in output.attention.items():
                weights = weights * (1 - self.share)
                weights[..., : self.width] += self.share / self.width
                output.attention[layer] = weights
            yield output


def test_a_sink_at_early_positions_moves_the_maximum_and_not_what_is_controlled(
    smollm2: LoadedModel, cities: pd.DataFrame
) -> None:
    """The planted artefact of science's caveat: two models that read the name alike, one with a wide early sink."""
    prompts = make_prompts(draw(cities, 16, seed=2), smollm2.tokenizer, TEMPLATES["country"]["list"])
    plain = controlled_attention(smollm2, prompts)
    sunk = controlled_attention(smollm2, prompts, backend=WithASink(smollm2, 0.9, 5))

    def change(name: str) -> float:
        cells = sunk[name].notnull() & plain[name].notnull()
        before, after = (float(of[name].where(cells).mean()) for of in (plain, sunk))
        return (after - before) / before

    assert change("attention_max") > 1.5
    assert abs(change("attention_without_sinks")) < 0.5
    assert sunk["sink"].values[..., :5].all() and plain["sink"].values[..., 1:5].mean() < 0.2
    assert abs(float((sunk["attention_without_sinks"] - plain["attention_without_sinks"]).mean())) < 0.05


def test_two_models_are_compared_on_one_set_of_sinks(tiny: LoadedModel, asked: PromptSet) -> None:
    base = controlled_attention(tiny, asked)
    sunk = WithASink(tiny, 0.9, 5)
    own = controlled_attention(tiny, asked, backend=sunk)
    same = controlled_attention(tiny, asked, sink=base["sink"], backend=sunk)
    assert (own["sink"] != base["sink"]).any() and (same["sink"] == base["sink"]).all()
    kept = same["attention_without_sinks"].notnull() == base["attention_without_sinks"].notnull()
    assert kept.all() and (own["attention_without_sinks"] != same["attention_without_sinks"]).any()
    reference = {"reference": base}
    through = measure_of("attention_to_subject").run(Asked(tiny, asked, **reference), AttentionSettings())
    assert (through["sink"] == base["sink"]).all()
    with pytest.raises(BadInput, match="sinks of .* layers and heads, and the model has"):
        controlled_attention(tiny, asked, sink=base["sink"].isel(layer=slice(1)))


def test_the_measure_holds_all_forms_and_can_leave_them_out(
    tiny_models: dict[str, LoadedModel], asked: PromptSet
) -> None:
    found: xr.Dataset = sa.measure("attention_to_subject", tiny_models["llama"], asked)
    names = {row[1] for row in values_of(measure_of("attention_to_subject"), found) if np.isfinite(row[3])}
    assert names == {quantity.name for quantity in measure_of("attention_to_subject").quantities}
    plain: xr.Dataset = sa.measure("attention_to_subject", tiny_models["llama"], asked, {"controls": False})
    np.testing.assert_array_equal(plain["attention_to_subject"], found["attention_to_subject"])
    assert plain["attention_max"].isnull().all() and "sink" not in plain


def test_without_neutral_text_the_other_forms_are_there(
    tiny: LoadedModel, asked: PromptSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a world whose corpus has no such words; no text of the length needed is refused, as ever."""
    whole: xr.Dataset = sa.measure("attention_to_subject", tiny, asked)

    def refused(error: type[BadInput]) -> None:
        def raising(*_: object) -> None:
            raise error("no neutral text")

        monkeypatch.setattr(module, "behind_neutral_text", raising)

    refused(NotDefined)
    found: xr.Dataset = sa.measure("attention_to_subject", tiny, asked)
    for name in ("attention_to_subject", "attention_max", "attention_last", "attention_value_weighted"):
        xr.testing.assert_allclose(found[name], whole[name])
    for name in ("attention_without_sinks", "attention_over_its_place"):
        assert found[name].isnull().all()
    assert "attention has no controls here: no neutral text" in caplog.text
    refused(BadInput)
    with pytest.raises(BadInput):
        sa.measure("attention_to_subject", tiny, asked)


def test_a_subject_of_sinks_alone_has_no_share_without_them(
    tiny_models: dict[str, LoadedModel], asked: PromptSet
) -> None:
    """Where the neutral text itself is all sink, nothing stands where the subject stood."""
    found = controlled_attention(tiny_models["llama"], asked, backend=WithASink(tiny_models["llama"], 0.99, 9))
    early = [i for i, prompt in enumerate(asked) if prompt.subject_span[1] <= 9]
    assert early
    assert found["attention_over_its_place"][early].isnull().all()
    assert found["attention_without_sinks"][early].notnull().all()
