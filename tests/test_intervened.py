"""What a model answers under interventions, against a loop of whole passes with plain hooks and no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import oracles
import pandas as pd
import pytest
import test_noise
import torch
import zoo

from subjattn.engine.interventions import Block, Patch, Row, Run
from subjattn.engine.noise import Noise
from subjattn.errors import BadInput, NotFired
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import intervened
from subjattn.measures.answers import longest_answers, predict, predict_rows
from subjattn.measures.scoring import SCORERS, ScorerName
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 8, seed=3), tokenizer, TEMPLATES["country"]["list"])


Mask = Callable[[int], oracles.Mask | None]


def slowly(model: LoadedModel, prompt: Prompt, scorer: ScorerName, mask: Mask = lambda _: None) -> str:
    """The greedy text, one whole pass a token; the mask by the length of the text so far."""
    rule, ids, text = SCORERS[scorer], list(prompt.ids[: prompt.prediction + 1]), list[int]()
    for step in range(*longest_answers(rule, model.tokenizer, [prompt])):
        logits = oracles.logits(model.model, replace(prompt, ids=tuple(ids + text)), mask(len(ids) + step))
        text.append(int(logits[-1].argmax()))
        line_ends = rule.one_line and step > 0 and "\n" in model.tokenizer.decode(text[-1:])
        if text[-1] == model.tokenizer.eos_token_id or line_ends:
            break
    found = model.tokenizer.decode(text, skip_special_tokens=True).strip()
    return found.splitlines()[0].strip() if found and rule.one_line else found


@pytest.mark.parametrize("scorer", [*SCORERS, "letters"])
def test_nothing_changed_is_what_the_model_predicts(tiny: LoadedModel, prompts: PromptSet, scorer: ScorerName) -> None:
    few = PromptSet("", tuple(replace(prompt, choice_ids=(40, 41, 42), answers=("B",)) for prompt in prompts))
    expected = predict(tiny, few, scorer)
    pd.testing.assert_frame_equal(predict(tiny, few, scorer, interventions=Row), expected)
    pd.testing.assert_frame_equal(predict_rows(tiny, [Row(prompt) for prompt in few], scorer), expected)
    if scorer != "letters":
        assert list(expected["prediction"]) == [slowly(tiny, prompt, scorer) for prompt in few]


@pytest.mark.parametrize("scorer", ["answer_start", "containment"])
def test_a_block_that_grows_with_the_text(tiny: LoadedModel, prompts: PromptSet, scorer: ScorerName) -> None:
    """From every position that predicts the text to the subject; and from the prediction position alone."""

    def masks(prompt: Prompt, end: int | None) -> Mask:
        subject = range(*prompt.span)
        return lambda n: oracles.hand_mask(
            tiny.model, n, {(q, k) for q in range(prompt.prediction, end or n) for k in subject}
        )

    growing = predict(
        tiny, prompts, scorer, interventions=lambda p: Row(p, Block.between(p.predicting, p.subject_positions))
    )
    assert list(growing["prediction"]) == [slowly(tiny, p, scorer, masks(p, None)) for p in prompts]
    rows = [Row(p, Block.between([p.prediction], p.subject_positions)) for p in prompts]
    fixed = predict_rows(tiny, rows, scorer)
    assert list(fixed["prediction"]) == [slowly(tiny, p, scorer, masks(p, p.prediction + 1)) for p in prompts]
    plain = predict(tiny, prompts, scorer)
    for one, other in ((growing, plain), (fixed, plain), (growing, fixed)):
        assert (one["prediction"] != other["prediction"]).any(), "else the one could pass for the other"


def test_a_block_of_whole_answers_stays_for_its_queries(llama: LoadedModel, prompts: PromptSet) -> None:
    """Rows as `knockout` makes them, the answer's tokens among the queries: as long as text stands there."""
    long = [prompt for prompt in prompts if len(prompt.answer_ids) > 1]
    rows = [Row(p, Block.between(p.predicting, p.subject_positions)) for p in long]
    later = [Row(p, Block.between(p.predicting[1:], p.subject_positions)) for p in long]
    for some, first in ((rows, 0), (later, 1)):
        expected = [
            slowly(
                llama,
                p,
                "containment",
                lambda n, p=p, first=first: oracles.hand_mask(
                    llama.model, n, {(q, k) for q in p.predicting[first:] if q < n for k in range(*p.span)}
                ),
            )
            for p in long
        ]
        assert list(predict_rows(llama, some, "containment")["prediction"]) == expected


@contextmanager
def changed(
    model: LoadedModel, name: str, prompt: Prompt, other: Prompt, component: str, columns: slice, noise: bool
) -> Iterator[None]:
    """Plain hooks: states of another prompt at the subject's last token, in layer 1, and noise on the subject."""
    kept: list[torch.Tensor] = []
    where, last = oracles.place(model.model, component, 1, zoo.parts(name)), prompt.span[1] - 1
    with torch.no_grad(), oracles.replacing(model.model, where, lambda state: kept.append(state.clone())):
        model.model(torch.tensor([other.ids]), use_cache=False)

    def put(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        state[0, last, columns] = kept[0][0, other.span[1] - 1, columns]
        return state

    with ExitStack() as stack:
        if noise:
            stack.enter_context(test_noise.noised(model.model, name, prompt))
        stack.enter_context(oracles.replacing(model.model, where, put))
        yield


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("component", ["resid_pre", "mlp_out", "z"])
def test_patches_and_noise_stay(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, name: str, component: Any
) -> None:
    model, noise = tiny_models[name], Noise(test_noise.STD)
    d_head = getattr(model.model.config, "head_dim", None) or 8
    columns = slice(d_head, 2 * d_head) if component == "z" else slice(None)
    other = {one.fact_id: two for one, two in zip(prompts, [*prompts[1:], prompts[0]], strict=True)}

    def patched(prompt: Prompt) -> Row:
        source = other[prompt.fact_id]
        at, taken = (prompt.span[1] - 1,), (source.span[1] - 1,)
        patch = Patch(1, at, Run(source), component, 1 if component == "z" else None, taken)
        return Row(prompt, patches=(patch,), noise=noise)

    found = predict(model, prompts, "containment", interventions=patched)
    assert list(found["prediction"]) == list(
        predict_rows(model, [patched(p) for p in prompts], "containment")["prediction"]
    )
    plain = [slowly(model, prompt, "containment") for prompt in prompts]
    expected = []
    for prompt in prompts:
        with changed(model, name, prompt, other[prompt.fact_id], component, columns, True):
            expected.append(slowly(model, prompt, "containment"))
    assert list(found["prediction"]) == expected != plain


def test_the_letters_of_a_changed_run(llama: LoadedModel, prompts: PromptSet) -> None:
    few = [replace(prompt, choice_ids=(40, 41, 42, 43), answers=("B",)) for prompt in prompts]
    block = lambda p: Row(p, Block.between(p.predicting, p.subject_positions))  # noqa: E731
    expected = []
    for prompt in few:
        n = prompt.prediction + 1
        mask = oracles.hand_mask(llama.model, n, {(n - 1, key) for key in range(*prompt.span)})
        logits = oracles.logits(llama.model, replace(prompt, ids=prompt.ids[:n]), mask)[-1]
        expected.append("ABCD"[int(logits[[40, 41, 42, 43]].argmax())])
    found = predict(llama, few, "letters", interventions=block)
    assert list(found["prediction"]) == expected
    assert list(found["correct"]) == [letter == "B" for letter in expected]
    with pytest.raises(BadInput, match="has no choices"):
        predict(llama, prompts, "letters", interventions=Row)


def test_what_is_right_is_counted(llama: LoadedModel, prompts: PromptSet) -> None:
    block = lambda p: Row(p, Block.between(p.predicting, p.subject_positions))  # noqa: E731
    texts = predict(llama, prompts, interventions=block)["prediction"]
    right = [
        replace(p, answers=(text,)) if i % 2 else p for i, (p, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    found = predict(llama, right, "exact_match", interventions=block)
    rule = SCORERS["exact_match"]
    expected = [rule.correct(text, p.answers) for text, p in zip(found["prediction"], right, strict=True)]
    assert list(found["correct"]) == expected and set(found["scorer"]) == {"exact_match"}


def test_an_intervention_that_ends_with_the_prompt_is_seen(
    llama: LoadedModel, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: after the first token the rows run plain."""
    block = lambda p: Row(p, Block.between(p.predicting, p.subject_positions))  # noqa: E731
    expected = predict(llama, prompts, "containment", interventions=block)
    own = intervened.row_of
    monkeypatch.setattr(
        intervened, "row_of", lambda of, prompt: own(of if len(prompt.predicting) == 1 else Row, prompt)
    )
    found = predict(llama, prompts, "containment", interventions=block)
    assert (found["prediction"] != expected["prediction"]).any()


@pytest.mark.parametrize("backend", ["hooks", "nnsight"])
def test_backends_generate_the_same(llama: LoadedModel, prompts: PromptSet, backend: Any) -> None:
    block = lambda p: Row(p, Block.between(p.predicting, p.subject_positions), noise=Noise(0.5))  # noqa: E731
    one, other = (
        predict(llama, prompts[:2], interventions=block, backend=name, memory_budget=memory)
        for name, memory in (("engine", 50_000_000), (backend, None))
    )
    pd.testing.assert_frame_equal(one, other)


def test_what_cannot_be_is_refused(llama: LoadedModel, prompts: PromptSet) -> None:
    one, other = prompts[0], prompts[1]
    with pytest.raises(BadInput, match="interventions gave the row of another prompt"):
        predict(llama, prompts[:1], interventions=lambda _: Row(other))
    with pytest.raises(BadInput, match="interventions gave a NoneType: return Row"):
        predict(llama, prompts[:1], interventions=lambda _: None)
    with pytest.raises(BadInput, match="lies behind the prompt, where the text is generated"):
        predict_rows(llama, [Row(one, patches=(Patch(1, (one.prediction + 1,), torch.zeros(1, 32)),))])
    with pytest.raises(NotFired, match="the blocked edges are empty, or lie outside"):
        predict_rows(llama, [Row(one, Block.between([500], [1]))])
    with pytest.raises(NotFired, match="the blocked edges are empty, or lie outside"):
        predict_rows(llama, [Row(one, Block(frozenset()))])
    with pytest.raises(NotFired, match="the blocked edges are empty, or lie outside"):
        predict_rows(llama, [Row(one, Block.between([one.prediction], [1], layers=(3,)))])
    with pytest.raises(BadInput, match="scorer 'bleu' is not one of"):
        predict(llama, prompts[:1], "bleu", interventions=Row)
    for settings in ({"backend": "hooks"}, {"memory_budget": 10**8}):
        with pytest.raises(BadInput, match="without interventions the model itself generates"):
            predict(llama, prompts[:1], **settings)
    assert predict_rows(llama, []).empty and predict(llama, [], interventions=Row).empty
