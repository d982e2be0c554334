"""Frequency shock: answers given more often than they are right, because tuning showed them more than the world does.

An answer that is rare in pre-training and frequent in tuning is said to be given too often, a common one that tuning
hardly showed too seldom (Kazemi et al. 2023). Their formulas are not public; the regression here is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import Field

from subjattn.errors import BadInput
from subjattn.measures import check_prompts, labelled
from subjattn.measures.accuracy import PREDICTING
from subjattn.measures.answers import predict
from subjattn.measures.poisson import Slope, poisson_slope
from subjattn.measures.record import Asked, Measure, Quantity, Settings, one_per_fact
from subjattn.measures.scoring import SCORERS, Named
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.measures import Model

PAPER = "after Kazemi et al. 2023"
SMOOTHING = 0.5
"""Added to the counts in the pool and in training, of which a logarithm is taken."""
_SLOPE = (
    "slope of the log ratio of times given to times right, per answer, on log prior minus log fine-tuning count "
    "(quasi-Poisson, a level for each relation)"
)
_WORDS = {
    "shock": f"{_SLOPE}; below 0, what tuning showed more than the prior is given too often",
    "shock_control": f"{_SLOPE}, had wrong answers been dealt evenly among the relation's others",
    "times_given": "facts of the relation to which the fact's right answer was given",
    "times_right": "facts of the relation of which it is the right answer",
    "prior_count": "facts of the relation that are not asked of which it is the right answer",
    "training_count": "facts of the relation that the model was trained on of which it is the answer",
    "log_prior_over_training": f"log of prior_count + {SMOOTHING} minus log of training_count + {SMOOTHING}",
}
_UNITS = {"shock": "log ratio per log ratio", "shock_control": "log ratio per log ratio"}


Answer = tuple[str, str]
"""A relation, and the name of one of its answers."""


def frequency_shock(
    model: Model,
    prompts: Sequence[Prompt],
    training: pd.DataFrame,
    pool: pd.DataFrame,
    *,
    relations: Mapping[str, str] | None = None,
    scorer: str = "answer_start",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> xr.Dataset:
    """Whether answers are given too often that tuning showed more often than the world does.

    Over the answers that are right for some fact asked, times given are regressed on log prior minus log fine-tuning
    count, with the logarithm of the times they are right as offset and a level for each relation. A model that is
    always right, or errs in proportion to what is right, has the slope 0; one that answers by frequency in tuning has
    a slope below 0, one that answers by the prior above 0.

    Rare answers may also be given too seldom because they are known less, and all errors draw counts together. So
    `shock_control` is the slope had each wrong answer been another of the relation's, all alike: what the accuracy of
    each answer alone makes.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        training: facts that the model was trained on, with `relation` and `answers` as it was taught them.
        pool: facts that are not asked, a table as `load_facts` gives it, whose answers' counts are the prior: it stands
            for the text that the model was pretrained on.
        relations: by fact id; without, all are of one relation.
        scorer: when an answer is right and which one is given: `answer_start`, `exact_match` or `containment`.
        tokenizer: of a plain model.

    Returns:
        Over `fact`, each fact with the numbers of its right answer; in words in the attribute `definition`:

        * `shock`, `shock_control`: values whose means are the slopes, and whose scatter is that of a regression whose
          errors belong to answers: of each answer one fact brings what the answer moves the slope by.
        * `times_given`, `times_right`, `prior_count`, `training_count`, `log_prior_over_training`: the curve.
        * `prediction`: the answers.

        NaN for facts of relations that training or pool lack, and throughout where no slope is defined: attributes
        `undefined_shock` and `undefined_shock_control` then say why. Others: `slope_…` and `dispersion_…` of both,
        `n_answers` that they rest on, and `given_others`, the share of answers given that are right for no fact asked
        and so do not count.

    Raises:
        BadInput: no prompts, a scorer that reads no text, a table without facts, or a pool with facts that are asked.
    """
    check_prompts(prompts)
    if not prompts:
        raise BadInput("there are no prompts to measure")
    if scorer not in SCORERS:
        raise BadInput(f"scorer {scorer!r}: which answer is given is seen in text, so give {', '.join(SCORERS)}")
    for name, table in (("training", training), ("pool", pool)):
        if not len(table):
            raise BadInput(f"{name}: there are no facts in it to count answers of")
    asked = {(prompt.fact_id, prompt.subject) for prompt in prompts}
    if inside := sorted(asked & {*zip(pool["fact_id"], pool["subject"], strict=True)}):
        raise BadInput(f"pool: {len(inside)} of its facts are asked ({inside[0][0]}): a prior is of other facts")
    texts = predict(model, prompts, scorer, tokenizer)["prediction"].tolist()  # type: ignore[arg-type]
    of = ["" if relations is None else relations[prompt.fact_id] for prompt in prompts]
    named = _named(prompts, of, scorer)
    right = [
        (relation, named[relation].canonical(prompt.answers)) for prompt, relation in zip(prompts, of, strict=True)
    ]
    given = [
        (relation, named[relation].given(text, prompt.answers))
        for text, prompt, relation in zip(texts, prompts, of, strict=True)
    ]
    prior, taught = (_counts(table, named, by_relation=relations is not None) for table in (pool, training))
    curve = _curve(right, given, prior, taught)
    known = {relation for relation, _ in prior} & {relation for relation, _ in taught}
    kept = curve[curve.index.get_level_values("relation").isin(known)]
    attrs: dict[str, float | str] = {
        "paper": PAPER,
        "scorer": scorer,
        "n_answers": len(kept),
        "given_others": float(np.mean([own not in curve.index for own in given])),
    }
    of_fact = kept.reindex(pd.MultiIndex.from_tuples(right))
    values = {name: of_fact[name].to_numpy(float) for name in _WORDS if name in curve}
    for name, counts in (("shock", "times_given"), ("shock_control", "dealt_evenly")):
        values[name] = np.full(len(prompts), np.nan)
        found = _slope(kept, counts)
        if isinstance(found, str):
            attrs |= {f"undefined_{name}": found}
            continue
        values[name] = _per_fact(found, dict(zip(kept.index, found.moved.tolist(), strict=True)), prompts, right)
        attrs |= {f"slope_{name}": found.slope, f"dispersion_{name}": found.dispersion}
    arrays = {
        name: labelled(name, values[name], prompts, unit=_UNITS.get(name, "facts"), definition=words)
        for name, words in _WORDS.items()
    }
    return xr.Dataset(arrays, attrs=attrs).assign(prediction=("fact", np.array(texts, str)))


def _named(prompts: Sequence[Prompt], of: Sequence[str], scorer: str) -> dict[str, Named]:
    """What answers are called, by relation."""
    accepted: dict[str, list[Sequence[str]]] = {}
    for prompt, relation in zip(prompts, of, strict=True):
        accepted.setdefault(relation, []).append(prompt.answers)
    return {relation: Named(its, SCORERS[scorer]) for relation, its in accepted.items()}


def _counts(table: pd.DataFrame, named: Mapping[str, Named], *, by_relation: bool) -> Counter[Answer]:
    """How often each answer is right in a table, in relations that are asked."""
    of = table["relation"].astype(str) if by_relation else [""] * len(table)
    return Counter(
        (relation, named[relation].of_alias(str(answers[0])))
        for relation, answers in zip(of, table["answers"], strict=True)
        if relation in named
    )


def _curve(
    right: Sequence[Answer], given: Sequence[Answer], prior: Counter[Answer], taught: Counter[Answer]
) -> pd.DataFrame:
    """A row for each answer that is right for some fact."""
    answers = sorted(set(right))
    times_right, times_given = Counter(right), Counter(given)
    hits = Counter(own for own, said in zip(right, given, strict=True) if own == said)
    among = set(answers)
    missed = Counter(own for own, said in zip(right, given, strict=True) if own != said and said in among)
    in_relation, wrong = Counter(relation for relation, _ in answers), Counter[str]()
    for (relation, _), n in missed.items():
        wrong[relation] += n
    rows = [
        {
            "times_given": times_given[own],
            "times_right": times_right[own],
            "dealt_evenly": hits[own] + (wrong[own[0]] - missed[own]) / max(1, in_relation[own[0]] - 1),
            "prior_count": prior[own],
            "training_count": taught[own],
            "log_prior_over_training": np.log(prior[own] + SMOOTHING) - np.log(taught[own] + SMOOTHING),
        }
        for own in answers
    ]
    return pd.DataFrame(rows, pd.MultiIndex.from_tuples(answers, names=["relation", "answer"]), dtype=float)


def _slope(curve: pd.DataFrame, counts: str) -> Slope | str:
    if not len(curve):
        return "training or the pool lack the relations asked"
    given, right, on = (curve[name].to_numpy() for name in (counts, "times_right", "log_prior_over_training"))
    return poisson_slope(given, right, on, curve.index.get_level_values("relation").to_numpy())


def _per_fact(
    found: Slope, moved: Mapping[Answer, float], prompts: Sequence[Prompt], right: Sequence[Answer]
) -> np.ndarray:
    """Values whose mean is the slope. Of each answer the fact of the lowest id brings what the answer moves it by.

    So their scatter is the slope's whether or not facts of one answer are taken together: shared out evenly, answers
    of many facts would seem to be many findings where they are not.
    """
    values = np.array([0.0 if own in moved else np.nan for own in right])
    n, left = int((~np.isnan(values)).sum()), dict(moved)
    for i in sorted(range(len(right)), key=lambda i: prompts[i].fact_id):
        values[i] += n * left.pop(right[i], 0.0)
    centred: np.ndarray = values - np.nanmean(values) + found.slope
    return centred


class ShockSettings(Settings):
    scorer: Literal["answer_start", "exact_match", "containment"] = Field(
        "answer_start", description="when an answer is right (subjattn.measures.scoring)"
    )


def _run(asked: Asked, settings: ShockSettings) -> xr.Dataset:
    if asked.training is None or asked.pool is None:
        raise BadInput("frequency_shock takes the facts trained on and others whose answers are the prior: give both")
    found = frequency_shock(
        asked.model,
        asked.prompts,
        asked.training,
        asked.pool,
        relations=asked.relations or None,
        scorer=settings.scorer,
    )
    asked.tell(PREDICTING * len(asked.prompts))
    return found


MEASURE = Measure(
    name="frequency_shock",
    title="answers given too often because tuning showed them often",
    paper=PAPER,
    quantities=tuple(
        Quantity(name, _UNITS[variable], _WORDS[variable], one_per_fact(variable), smallest_effect=smallest)
        for name, variable, smallest in (
            ("frequency_shock", "shock", 0.1),
            ("frequency_shock_control", "shock_control", None),
        )
    ),
    control="`frequency_shock_control`: the slope of the same right answers, had each wrong one been another of the "
    "relation's, all alike. In Python also the base with the tuned model's training facts: what slope was there "
    "before.",
    reads="As far as it lies below its control: answers that tuning showed more often than the prior are given too "
    "often. Not that tuning caused it: the pool's counts stand for a pre-training that nobody counted. It is of "
    "answers that some fact asked has; the attribute `given_others` says how many answers given are others.",
    undefined="For relations that training or the pool lack. For all facts where there is no slope, and the attribute "
    "`undefined_shock` says why: one answer, a predictor that does not vary, answers of which none is ever given, or "
    "those at one end alone, a slope that rests on one answer.",
    run=_run,
    cost=lambda shape, _: PREDICTING * shape.n_facts,
    settings=ShockSettings,
    needs=frozenset({"facts", "trained"}),
    figure="frequency_shock",
    version=2,
)
