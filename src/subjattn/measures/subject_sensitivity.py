"""Whether answers depend on the name at all: the subject swapped for another, masked, or left out.

"Answers generically" (Ghosal et al. 2024) says something of behaviour: wrong answers that stay whoever is asked about.
Whether they are those that training gave most often is another matter (Kang et al. 2024), and measured beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from pydantic import Field, PositiveInt
from torch import Tensor

from subjattn.engine.answers import answer_logits
from subjattn.errors import BadInput
from subjattn.facts.names import plain_name
from subjattn.measures import check_askable, hf_model, labelled, shortened, tokenizer_of
from subjattn.measures.accuracy import PREDICTING
from subjattn.measures.answers import predict
from subjattn.measures.pooled import pseudo_values
from subjattn.measures.record import Asked, Measure, Quantity, Settings, one_per_fact
from subjattn.measures.scoring import SCORERS, Named
from subjattn.prompts import Prompt, ablate
from subjattn.prompts.make import first_token


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.measures import Model

PAPER = "the claim is Ghosal et al.'s (2024); answers near the prior of training: Kang et al. 2024"
_UNIT = {"distance": "Jensen–Shannon distance", "excess": "nats"}
_WORDS = {
    "swap_distance": "distance of the next token's distribution from that with another subject, mean over partners",
    "mask_distance": "distance of the next token's distribution from that with every token of the subject “_”",
    "drop_distance": "distance of the next token's distribution from that without the subject's tokens",
    "swap_flips": "the answer is another one with another subject, share of partners",
    "mask_flips": "the answer is another one with every token of the subject “_”",
    "drop_flips": "the answer is another one without the subject's tokens",
    "wrong": "the answer is wrong",
    "detached": "the answer is wrong and stays with another subject, share of partners",
    "detached_masked": "the answer is wrong and stays with every token of the subject “_”",
    "entropy_excess": "entropy of the answers given minus that of the right ones (jackknife pseudo-values)",
    "modal_answer": "the answer is the relation's most frequent one in training, of facts whose right one is another",
    "prior_distance": "distance of the next token's distribution from the shares of answers in training",
    "prior_distance_masked": "distance of the next token's distribution, with every token of the subject “_”, from the "
    "shares of answers in training",
}


def subject_sensitivity(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    relations: Mapping[str, str] | None = None,
    training: pd.DataFrame | None = None,
    scorer: str = "answer_start",
    swaps: int = 8,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> xr.Dataset:
    """How far the answer depends on the subject.

    A swap asks the very same with the name of another fact. Partners are facts whose right answers are others and which
    the answer given would not fit either: that two cities of one country get one answer is no sign that the name is not
    read.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        relations: by fact id; without, all are of one relation.
        training: facts that the model was trained on, with `relation` and `answers` as it was taught them.
        scorer: what counts as right: `answer_start`, `exact_match` or `containment`.
        swaps: partners of a fact at most.
        seed: of the order in which partners are looked for, the same in every model.
        tokenizer: of a plain model.

    Returns:
        Over `fact`, in words in the attribute `definition`; distances are Jensen–Shannon's (0 to 1, to base 2):

        * `swap_distance`, `mask_distance`, `drop_distance`; `swap_flips`, `mask_flips`, `drop_flips`;
        * `wrong`, `detached`, `detached_masked`, `entropy_excess`;
        * with `training`: `modal_answer`, `prior_distance`, `prior_distance_masked`.

        NaN where a fact has no partner with the same tokens around its subject, where its relation was not trained on,
        or its right answer is the modal one. `prediction` holds the answers, `n_partners` how many partners there were.

    Raises:
        BadInput: no prompts, prompts without subjects, or a scorer that reads no text.
    """
    check_askable(prompts)
    if scorer not in SCORERS:
        raise BadInput(f"scorer {scorer!r}: what a name changes is seen in text, so give one of {', '.join(SCORERS)}")
    hf, own = hf_model(model), tokenizer_of(model, tokenizer)
    asked = {
        "own": list(prompts),
        "mask": [ablate(prompt, "masked", own) for prompt in prompts],
        "drop": [ablate(prompt, "relation_only", own) for prompt in prompts],
    }
    texts = {name: predict(model, its, scorer, tokenizer)["prediction"].tolist() for name, its in asked.items()}  # type: ignore[arg-type]
    named = Named([prompt.answers for prompt in prompts], SCORERS[scorer])
    given = {name: [named(text) for text in its] for name, its in texts.items()}
    fits = SCORERS[scorer].correct
    wrong = np.array([not fits(text, prompt.answers) for text, prompt in zip(texts["own"], prompts, strict=True)])
    partners = _partners(prompts, texts["own"], fits, swaps, seed)
    other = [[given["own"][j] != given["own"][i] for j in its] for i, its in enumerate(partners)]
    values: dict[str, Any] = {
        "wrong": wrong.astype(float),
        "swap_flips": np.array([np.mean(its) if its else np.nan for its in other]),
        "entropy_excess": _entropy_excess(
            [named.given(text, prompt.answers) for text, prompt in zip(texts["own"], prompts, strict=True)],
            [named.canonical(prompt.answers) for prompt in prompts],
        ),
    }
    for name in ("mask", "drop"):
        values[f"{name}_flips"] = np.array([a != b for a, b in zip(given["own"], given[name], strict=True)], float)
    values["detached"] = (1 - values["swap_flips"]) * wrong
    values["detached_masked"] = (1 - values["mask_flips"]) * wrong

    every = torch.stack([row for _, row in sorted(_logprobs(hf, asked["own"]), key=lambda one: one[0])])
    values["swap_distance"] = np.array(
        [_distance(every[i], every[its]).mean().item() if its else np.nan for i, its in enumerate(partners)]
    )
    priors = _priors(prompts, relations, training, own, every.shape[1])
    if training is not None:
        values["modal_answer"] = _modal(prompts, relations, training, texts["own"], fits)
        values["prior_distance"] = np.array([_from_prior(row, prior) for row, prior in zip(every, priors, strict=True)])
        values["prior_distance_masked"] = np.full(len(prompts), np.nan)
    for name in ("mask", "drop"):
        values[f"{name}_distance"] = np.empty(len(prompts))
        for i, row in _logprobs(hf, asked[name]):
            values[f"{name}_distance"][i] = _distance(every[i], row[None]).item()
            if name == "mask" and training is not None:
                values["prior_distance_masked"][i] = _from_prior(row, priors[i])
    arrays = {
        name: labelled(
            name,
            values[name],
            prompts,
            unit=_UNIT.get(name.split("_")[1] if "_" in name else "", "share of facts"),
            definition=words,
        )
        for name, words in _WORDS.items()
        if name in values
    }
    found = xr.Dataset(arrays, attrs={"paper": PAPER, "scorer": scorer})
    return found.assign(
        prediction=("fact", np.array(texts["own"], str)), n_partners=("fact", [len(its) for its in partners])
    )


def _partners(prompts: Sequence[Prompt], texts: Sequence[str], fits: Any, swaps: int, seed: int) -> list[list[int]]:
    """Of each fact up to `swaps` others with the same tokens around the subject, whom neither answer would fit."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].fact_id)
    order = [order[int(i)] for i in np.random.default_rng(seed).permutation(len(order))]
    alike: dict[tuple[int, ...], list[int]] = {}
    for i in order:
        start, stop = prompts[i].subject_span
        around = (*prompts[i].ids[:start], -1, *prompts[i].ids[stop : prompts[i].prediction + 1])
        alike.setdefault(around, []).append(i)
    names = [{plain_name(answer) for answer in prompt.answers} for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for members in alike.values():
        for at, i in enumerate(members):
            for j in members[at + 1 :] + members[:at]:
                if len(found[i]) == swaps:
                    break
                if not names[i] & names[j] and not fits(texts[i], prompts[j].answers):
                    found[i].append(j)
    return found


def _logprobs(hf: Any, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities of the next token, by the number of the prompt."""
    for output in answer_logits(hf, [shortened(prompt) for prompt in prompts]):
        yield from zip(output.index, output.logits.log_softmax(-1).cpu(), strict=True)


def _distance(one: Tensor, others: Tensor) -> Tensor:
    """Jensen–Shannon distance to base 2 between log-probabilities `[vocab]` and `[other, vocab]`."""
    p, q = one.double().exp(), others.double().exp()
    middle = (p + q) / 2
    bits = (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).sum(-1) / 2
    distance: Tensor = (bits / math.log(2)).clamp_min(0).sqrt()
    return distance


def _from_prior(row: Tensor, prior: Tensor | None) -> float:
    return np.nan if prior is None else _distance(row, prior.log()[None]).item()


def _of_relation(
    prompts: Sequence[Prompt], relations: Mapping[str, str] | None, training: pd.DataFrame
) -> list[Counter[str]]:
    """Of each fact's relation, how often each answer was taught."""
    every = Counter(str(answers[0]) for answers in training["answers"])
    if relations is None:
        return [every] * len(prompts)
    taught = {
        relation: Counter(str(answers[0]) for answers in its["answers"])
        for relation, its in training.groupby("relation")
    }
    return [taught.get(relations[prompt.fact_id], Counter()) for prompt in prompts]


def _priors(
    prompts: Sequence[Prompt],
    relations: Mapping[str, str] | None,
    training: pd.DataFrame | None,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
) -> list[Tensor | None]:
    """Shares of first tokens of the answers taught, `[vocab]`; None where a relation was not trained on."""
    if training is None:
        return [None] * len(prompts)
    tokens: dict[tuple[int, str], int] = {}
    made: dict[int, Tensor] = {}
    priors: list[Tensor | None] = []
    for prompt, counts in zip(prompts, _of_relation(prompts, relations, training), strict=True):
        if counts and id(counts) not in made:
            made[id(counts)] = torch.zeros(vocab, dtype=torch.double)
            for answer, count in counts.items():
                token = tokens.setdefault((id(counts), answer), first_token(tokenizer, prompt, answer))
                made[id(counts)][token] += count / counts.total()
        priors.append(made.get(id(counts)) if counts else None)
    return priors


def _modal(
    prompts: Sequence[Prompt],
    relations: Mapping[str, str] | None,
    training: pd.DataFrame,
    texts: Sequence[str],
    fits: Any,
) -> np.ndarray:
    values = np.full(len(prompts), np.nan)
    for i, (prompt, counts) in enumerate(zip(prompts, _of_relation(prompts, relations, training), strict=True)):
        if not counts:
            continue
        modal = min(counts, key=lambda answer: (-counts[answer], answer))
        if plain_name(modal) not in {plain_name(answer) for answer in prompt.answers}:
            values[i] = fits(texts[i], [modal])
    return values


def _entropy_excess(given: Sequence[str], right: Sequence[str]) -> np.ndarray:
    def excess(index: np.ndarray) -> float:
        return _entropy([given[i] for i in index]) - _entropy([right[i] for i in index])

    return pseudo_values(excess, len(given))


def _entropy(answers: Sequence[str]) -> float:
    shares = np.array(list(Counter(answers).values())) / len(answers)
    return float(-(shares * np.log(shares)).sum())


class SensitivitySettings(Settings):
    scorer: str = Field("answer_start", description="when an answer is right (subjattn.measures.scoring)")
    swaps: PositiveInt = Field(8, description="other subjects a fact is asked with, at most")


def _run(asked: Asked, settings: SensitivitySettings) -> xr.Dataset:
    found = subject_sensitivity(
        asked.model,
        asked.prompts,
        relations=asked.relations or None,
        training=asked.training,
        **settings.model_dump(),
    )
    asked.tell(_COST * len(asked.prompts))
    missing = {name: xr.full_like(found["wrong"], np.nan) for name in _WORDS if name not in found}
    return found.assign(missing)


_COST = 3 * (PREDICTING + 1)


def _quantity(name: str, smallest: float, **how: Any) -> Quantity:
    unit = _UNIT.get(name.split("_")[1] if "_" in name else "", "share of facts")
    bounds = None if unit == "nats" else (0.0, 1.0)
    return Quantity(name, unit, _WORDS[name], one_per_fact(name), bounds=bounds, smallest_effect=smallest, **how)


MEASURE = Measure(
    name="subject_sensitivity",
    title="whether answers depend on the name",
    paper=PAPER,
    quantities=(
        *(_quantity(f"{name}_{what}", 0.05) for what in ("distance", "flips") for name in ("swap", "mask", "drop")),
        Quantity(
            "detached_errors",
            "share of wrong answers",
            "wrong answers that stay with another subject (share of partners), of all wrong answers",
            per_fact=one_per_fact("detached"),
            over=lambda dataset: dataset["wrong"].where(dataset["detached"].notnull()),
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "detached_errors_masked",
            "share of wrong answers",
            "wrong answers that stay with every token of the subject “_”, of all wrong answers",
            per_fact=one_per_fact("detached_masked"),
            over=one_per_fact("wrong"),
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        _quantity("modal_answer", 0.05),
        _quantity("prior_distance", 0.05),
        _quantity("prior_distance_masked", 0.05),
        _quantity("entropy_excess", 0.1),
    ),
    control="Three ways to take the name away, whose artefacts differ: another name, every token “_”, no tokens. "
    "Partners of a swap are facts whose right answers are others, and which the answer given would not fit. "
    "`prior_distance_masked` beside `prior_distance`.",
    reads="Whether the answer depends on the name. A flip is no knowledge: it may lead from one wrong answer to "
    "another. An answer that stays does not say which organ fails: `detached_errors` is what “answers generically” "
    "means in behaviour, attention or not. Distances are of the next token alone, and those of masked and shortened "
    "prompts also hold the surprise at them.",
    undefined="`swap_…` and `detached_errors` for a fact without partners; `detached_errors` where nothing may be "
    "wrong; what compares with training where the training facts are not known or the relation is not among them; "
    "`modal_answer` for facts of which it is right; `entropy_excess` of one fact.",
    run=_run,
    cost=lambda shape, _: _COST * shape.n_facts,
    settings=SensitivitySettings,
    needs=frozenset({"subject", "same_prompts", "facts"}),
    version=2,
)
