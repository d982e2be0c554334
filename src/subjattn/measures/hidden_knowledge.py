"""Hidden knowledge: does a model know more inside than its answers say?

Of all pairs of a right and a wrong answer to a question, K is the share that a score ranks right (Gekhman et al. 2025,
"Inside-Out"). "Ignored, not erased" predicts that tuning lowers the K of the model's own probabilities, and leaves that
of a probe on its states. A base model hides facts too, so read a tuned model's gap beside its base's. A probe says what
the states hold, and not that a model can use it: what comes back when the base's states are put back, or the subject's
scores are raised, is told by `transfer_accuracy` and `raised_accuracy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from pydantic import Field
from threadpoolctl import threadpool_limits

from subjattn.errors import BadInput
from subjattn.measures import check_askable, labelled, tokenizer_of
from subjattn.measures.activations import Stream
from subjattn.measures.answers import answer_logprob
from subjattn.measures.candidates import NOBODY, Candidates, deal
from subjattn.measures.probing import Linear, Ridge
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape, one_per_fact
from subjattn.prompts import Prompt, ablate
from subjattn.prompts.make import with_answer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.measures import Model

PAPER = "Gekhman et al. 2025 (Inside-Out)"
_RANKED = "pairs of a right and a wrong answer that are ranked right by"
_WORDS = {
    "external_k": f"{_RANKED} the answer's log-probability",
    "external_k_prior": f"{_RANKED} the answer's log-probability minus that with every token of the subject “_”",
    "internal_k": f"{_RANKED} a linear probe of the state at the answer's last token, trained on other subjects, after "
    "the layer that errs least of training subjects left out",
    "swapped_k": f"{_RANKED} the answer's log-probability behind another subject, for which neither is right",
    "hidden": "internal_k minus external_k",
    "hidden_prior": "internal_k minus external_k_prior",
}
TRAINED = 2
"""Wrong answers of a fact, one deal's, that a probe is trained on; its right answer stands beside each."""


def hidden_knowledge(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    relations: Mapping[str, str] | None = None,
    wrong: int = 8,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    memory_budget: int | None = None,
) -> xr.Dataset:
    """K, the share of pairs of a right and a wrong answer that a score ranks right, from outside and from inside.

    Wrong answers are right ones of other facts of the relation. Of two answers that meet each is the right one as
    often as the other, in training as in testing, so that a score of the answer alone has a K of exactly 1/2 (over
    facts), and a probe cannot learn which answers are frequent.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        relations: by fact id; without, all are of one relation.
        wrong: wrong answers of a fact, an even number; one may come twice.
        layers: that a probe may be of, after each; None: all.
        folds: of subjects; a fact's probe, and its layer, are chosen without the facts of its fold.
        seed: of folds and wrong answers, the same in every model.
        tokenizer: of a plain model.
        memory_budget: bytes of working memory beyond the weights and the states of all candidates.

    Returns:
        Over `fact`, shares of its pairs, ties half: `external_k`, `external_k_prior`, `internal_k`, `swapped_k`, and
        the differences `hidden` and `hidden_prior`; over `(fact, layer)` `internal_k_by_layer`. Coordinates `fold` and
        `probed`, the layer chosen (-1: none). NaN where a fact has no pair in its fold, no other fold could train a
        probe, or, for `swapped_k`, no fact of its relation has yet another answer.

    Raises:
        BadInput: no pairs, prompts without subjects, or log-probabilities that are not finite.
        SpanNotFound: an answer's tokens merge with those of another prompt.
        UnsupportedModel, NotFired: the model's states cannot be read.
    """
    check_askable(prompts)
    own = tokenizer_of(model, tokenizer)
    dealt = deal(prompts, relations, wrong, folds, seed)
    asked = np.flatnonzero(dealt.paired)
    facts = np.column_stack([asked, dealt.wrong[asked]])
    each = [(its[0], of) for its in facts.tolist() for of in its]
    pairs = list(dict.fromkeys(each))
    number = {pair: at for at, pair in enumerate(pairs)}
    rows = np.array([number[pair] for pair in each]).reshape(facts.shape)
    candidates = [with_answer(own, prompts[fact], prompts[of].answers[0]) for fact, of in pairs]
    external = _logprobs(model, candidates)
    prior = _logprobs(model, [ablate(one, "masked", own) for one in candidates])
    by_layer, probed, kept = _internal(model, candidates, rows, dealt, prompts, layers, memory_budget)
    values = {
        "external_k": _share(external[rows]),
        "external_k_prior": _share((external - prior)[rows]),
        "internal_k": np.where(probed >= 0, by_layer[np.arange(len(asked)), probed], np.nan),
        "swapped_k": _swapped(model, prompts, facts, dealt, own),
    }
    values |= {"hidden": values["internal_k"] - values["external_k"]}
    values |= {"hidden_prior": values["internal_k"] - values["external_k_prior"]}

    def spread(of_asked: np.ndarray, missing: float = np.nan) -> np.ndarray:
        whole = np.full((len(prompts), *of_asked.shape[1:]), missing)
        whole[asked] = of_asked
        return whole

    found = xr.Dataset(
        {
            name: labelled(name, spread(values[name]), prompts, unit=_unit(name), definition=words)
            for name, words in _WORDS.items()
        },
        attrs={"paper": PAPER, "wrong": wrong, "folds": folds, "seed": seed},
    )
    definition = f"{_RANKED} a linear probe of the state at the answer's last token, trained on other subjects"
    found["internal_k_by_layer"] = labelled(
        "internal_k_by_layer", spread(by_layer), prompts, ("layer",), unit="share of pairs", definition=definition
    ).assign_coords(layer=kept)
    chosen = np.where(probed >= 0, np.array(kept)[probed], -1)
    return found.assign_coords(fold=("fact", dealt.fold), probed=("fact", spread(chosen, -1).astype(int)))


def _unit(name: str) -> str:
    return "difference of shares" if name.startswith("hidden") else "share of pairs"


def _share(scores: Float[np.ndarray, "fact candidate *layer"]) -> Float[np.ndarray, "fact *layer"]:
    """Of each fact, the share of wrong candidates with a lower score than the right one, which is the first."""
    right, wrong = scores[:, :1], scores[:, 1:]
    return np.where(np.isnan(right[:, 0]), np.nan, ((right > wrong) + 0.5 * (right == wrong)).mean(1))


def _logprobs(model: Model, prompts: Sequence[Prompt]) -> np.ndarray:
    """Log-probabilities of the prompts' answers, equal ones computed once."""
    each = {(prompt.ids, prompt.prediction): prompt for prompt in prompts}
    found = dict(zip(each, answer_logprob(model, list(each.values())).values, strict=True))
    values = np.array([found[prompt.ids, prompt.prediction] for prompt in prompts])
    if not np.isfinite(values).all():
        at = prompts[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise BadInput(
            f"fact {at.fact_id}: the log-probability of {at.answers[0]!r} is not finite: the model's weights are "
            "broken, or overflow in this precision; load it in bfloat16 or float32"
        )
    return values


def _swapped(
    model: Model, prompts: Sequence[Prompt], facts: np.ndarray, dealt: Candidates, tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """K of the same pairs behind another subject."""
    found = np.full(len(facts), np.nan)
    there = np.flatnonzero(dealt.other[facts[:, 0]] != NOBODY)
    if len(there):
        swapped = [
            with_answer(tokenizer, prompts[int(dealt.other[its[0]])], prompts[of].answers[0])
            for its in facts[there].tolist()
            for of in its
        ]
        found[there] = _share(_logprobs(model, swapped).reshape(len(there), -1))
    return found


def _internal(
    model: Model,
    candidates: Sequence[Prompt],
    rows: np.ndarray,
    dealt: Candidates,
    prompts: Sequence[Prompt],
    layers: Sequence[int] | None,
    memory_budget: int | None,
) -> tuple[np.ndarray, np.ndarray, Sequence[int]]:
    """K by layer, `[fact, layer]`, of every fact the number of the layer chosen (-1: none), and which layers."""
    ended = [replace(one, prediction=len(one.ids) - 1) for one in candidates]
    stream = Stream.of(model, ended, "resid_post", "prediction", layers=layers, memory_budget=memory_budget)
    states = stream.in_memory()["resid_post"].values[:, :, 0]
    asked = np.flatnonzero(dealt.paired)
    subjects = np.unique([prompts[int(i)].subject for i in asked], return_inverse=True)[1]
    found, probed = np.full((len(asked), states.shape[1]), np.nan), np.full(len(asked), -1)
    for fold in np.unique(dealt.fold[asked]):
        test, train = dealt.fold[asked] == fold, dealt.fold[asked] != fold
        if not train.any():
            continue
        trained_on = [0] * TRAINED + list(range(1, TRAINED + 1))
        errors = []
        for layer in range(states.shape[1]):
            probe = _trained(states[rows[train][:, trained_on], layer], subjects[train])
            found[test, layer] = _share(probe.scores(states[rows[test].ravel(), layer])[:, 1].reshape(test.sum(), -1))
            errors.append(probe.error)
        probed[test] = int(np.argmin(errors))
    return found, probed, stream.layers


def _trained(states: Float[np.ndarray, "fact candidate d_model"], subjects: np.ndarray) -> Linear:
    """A probe of class 1, right, the first half of the candidates, against class 0, wrong."""
    n_facts, each = states.shape[:2]
    labels = np.tile(np.arange(each) < each // 2, n_facts).astype(int)
    with threadpool_limits(torch.get_num_threads()):
        return Ridge(states.reshape(n_facts * each, -1), np.repeat(subjects, each)).probe(labels, 2)


class HiddenSettings(Settings):
    wrong: int = Field(8, ge=2, multiple_of=2, description="wrong answers of a fact, an even number")
    folds: int = Field(5, ge=2, description="of subjects")
    seed: int = Field(0, ge=0, description="of folds and wrong answers")


FIT = 0.02
"""Forward passes of a prompt that training a layer's probes costs for each fact, roughly."""


def _cost(shape: Shape, settings: HiddenSettings) -> float:
    return shape.n_facts * (3 * (1 + settings.wrong) + FIT * shape.n_layers)


def _run(asked: Asked, settings: HiddenSettings) -> xr.Dataset:
    found = hidden_knowledge(
        asked.model,
        asked.prompts,
        relations=asked.relations or None,
        memory_budget=asked.memory_budget,
        **settings.model_dump(),
    )
    asked.tell(_cost(Shape(len(asked.prompts), found.sizes["layer"], 1), settings))
    return found


def _quantity(name: str, **how: Any) -> Quantity:
    bounds = (-1.0, 1.0) if name.startswith("hidden") else (0.0, 1.0)
    return Quantity(name, _unit(name), _WORDS[name], one_per_fact(name), bounds=bounds, smallest_effect=0.05, **how)


MEASURE = Measure(
    name="hidden_knowledge",
    title="what the model knows inside and what its answers say",
    paper=PAPER,
    quantities=tuple(map(_quantity, _WORDS)),
    control="`swapped_k`, behind another subject, is 1/2 where the name is what ranks the answers. Wrong answers are "
    "dealt out so that a score of the answer alone ranks half of the pairs right. `external_k_prior` takes the "
    "answer's prior off. A base model hides facts too: read its `hidden` beside a tuned model's.",
    reads="`hidden` that rises with tuning while `internal_k` stays: what right answers have in the states is still "
    "there, and the model's answers follow it less. Not that the model can use it: see `transfer_accuracy` and "
    "`raised_accuracy` for how many answers come back.",
    undefined="For facts that have no wrong answer in their fold, as where most facts of a relation have one answer; "
    "`internal_k` where no other fold could train a probe; `swapped_k` where no fact of the relation has yet another "
    "answer. No pairs at all are refused.",
    run=_run,
    cost=_cost,
    settings=HiddenSettings,
    needs=frozenset({"subject", "same_prompts", "facts"}),
    version=2,
)
