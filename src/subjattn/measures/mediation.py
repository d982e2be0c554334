"""The measure `mediation`: through what tuning lost the answers that the base model gives rightly.

Four things that an answer can be lost by, each put back into the tuned model as the base has it, and the tuned model's
put into the base: how much the prediction attends to the subject, in every head; the values that it reads there; what
the MLPs add there; and what is added to a token's logit whoever is asked about. A thing's share is what it moves the
margin by, averaged over both directions, over the margin lost: natural indirect effects in causal mediation analysis
(Robins & Greenland 1992; Vig et al. 2020), between two models (Prakash et al. 2024). Shares need not add up to 1: MLP
outputs at the subject are upstream of its values, so what the MLPs lost shows in both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor

from subjattn.backends import Backend
from subjattn.engine.forward import states
from subjattn.engine.interventions import Arm, Patch, Row, Run, wide
from subjattn.errors import BadInput, SpanNotFound
from subjattn.measures import check_askable, labelled, opened, shortened
from subjattn.measures.put_back import NEEDS
from subjattn.measures.record import Asked, Measure, Quantity, Settings
from subjattn.measures.swapping import only_arm
from subjattn.measures.transfer import PATCHES, elsewhere, transfer
from subjattn.models.arms import BASE, Arms
from subjattn.prompts.make import first_token


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.engine.interventions import Component
    from subjattn.prompts import Prompt

PAPER = "Vig et al. 2020; Prakash et al. 2024"
ATTENTION, VALUES, MLPS, PRIOR = MEDIATORS = (
    "attention to the subject",
    "values at the subject",
    "MLP outputs at the subject",
    "answer prior",
)
_STATES: dict[str, Component] = {VALUES: "v", MLPS: "mlp_out"}
LEAST = 2
"""Facts of a relation in a half, from which an answer prior is taken for the other."""
AT_ONCE = 16
"""Prompts whose attention patterns are held together."""


def mediation(
    arms: Arms,
    prompts: Sequence[Prompt],
    tuned: str | None = None,
    *,
    relations: Mapping[str, str] | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> xr.Dataset:
    """What lost the answers that a tuned model no longer starts rightly: how far each of four things carries it.

    The margin is the largest logit of a first token of an accepted answer minus the largest other one, over the
    standard deviation of all logits at that position: above 0 the answer starts rightly, and a temperature does not
    move it. An answer is lost where the base's margin is above 0, and the tuned model's is not.

    Args:
        arms: a base and its tuned models, from `load_arms`.
        prompts: whom to ask.
        tuned: the arm; None: the only one.
        relations: by fact id; without, all are of one relation.
        seed: of the placebo's positions.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `mediation` `(fact, mediator, patch, state, late)`, margins in standard deviations of the logits: where the
        mediator is `state`'s and all else is `late`'s, each `base` or the arm's name; where both are the same it is
        that model's own. Where they are not, it is NaN for answers that are not lost. Mediators: `attention to the
        subject`, weights of the prediction position on the subject's tokens in every head, the others' scaled so that
        all sum to 1; `values at the subject`; `MLP outputs at the subject`; and `answer prior`, the mean logits of
        other facts of the relation, of one half of all subjects taken for the other. `patch` is `real` or `placebo`,
        as many other positions, drawn at random; NaN where there are too few, and of the prior, which has none. The
        prior is NaN for relations of fewer than 2 facts in a half.

    Raises:
        BadInput: an argument that does not fit, or logits that are not finite.
        UnsupportedModel, NotFired: states could not be put.
    """
    check_askable(prompts)
    name = only_arm(arms, tuned)
    models = {BASE: None, name: arms.arm(name)}
    asked = [shortened(prompt) for prompt in prompts]
    margin = Margin(arms.tokenizer, asked)
    run = opened("engine", arms.base.model, memory_budget, asked, patterns=True)
    own = _logits(run, [Row(prompt, arm=arm) for arm in models.values() for prompt in asked])
    logits = own.reshape(len(models), len(asked), -1)
    plain = [margin.of(one, asked) for one in logits]
    if wrong := np.flatnonzero(~np.isfinite(plain).all(0)).tolist():
        raise BadInput(
            f"fact {asked[wrong[0]].fact_id}: logits are not finite: a model's weights are broken, or overflow in this "
            "precision; load it in bfloat16 or float32"
        )
    margins = np.full((len(asked), len(MEDIATORS), len(PATCHES), 2, 2), np.nan)
    lost = np.flatnonzero((plain[0] > 0) & (plain[1] <= 0))
    if some := [asked[i] for i in lost]:
        for mediator, component in _STATES.items():
            how: dict[str, Any] = {"metric": [margin], "seed": seed, "memory_budget": memory_budget}
            put = transfer(arms, some, component, name, at="subject", by=None, **how)["margin"]
            margins[lost, MEDIATORS.index(mediator)] = put.transpose("fact", "patch", "state", "late")
        margins[lost, MEDIATORS.index(ATTENTION)] = _by_attention(arms, run, some, models, margin, seed)
        for late, shifted in enumerate(_by_prior(logits, prompts, relations or {})):
            margins[lost, MEDIATORS.index(PRIOR), 0, 1 - late, late] = margin.of(shifted[lost], some)
    for late in range(2):
        margins[..., late, late] = plain[late][:, None, None]
    array = labelled(
        "mediation",
        margins,
        prompts,
        ("mediator", "patch", "state", "late"),
        unit="standard deviations of the logits",
        definition="largest logit of a first token of an accepted answer minus the largest other one, over the "
        "standard deviation of all logits; the mediator is one model's, and all else the other's",
        paper=PAPER,
        tuned=name,
    )
    coords = {"mediator": list(MEDIATORS), "patch": list(PATCHES), "state": list(models), "late": list(models)}
    return array.assign_coords(coords).to_dataset()


class Margin:
    """A metric: of the accepted answers' first tokens over the best other one, in standard deviations of the logits."""

    __name__ = "margin"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
        self._accepted = {prompt.fact_id: _first_tokens(tokenizer, prompt) for prompt in prompts}

    def __call__(self, logits: Float[Tensor, "answer vocab"], prompt: Prompt) -> float:
        return float(self.of(logits[:1].cpu().numpy(), [prompt])[0])

    def of(self, logits: Float[np.ndarray, "fact vocab"], prompts: Sequence[Prompt]) -> Float[np.ndarray, " fact"]:
        """Of each prompt's next token; NaN where logits are."""
        found = np.full(len(logits), np.nan)
        for i, (own, prompt) in enumerate(zip(logits, prompts, strict=True)):
            others = own.copy()
            others[self._accepted[prompt.fact_id]] = -np.inf
            found[i] = (own[self._accepted[prompt.fact_id]].max() - others.max()) / own.std()
        return found


def _first_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Of all accepted answers, but those whose tokens merge with the prompt's."""
    found = {prompt.answer_ids[0]}
    for answer in prompt.answers[1:]:
        with suppress(SpanNotFound):
            found.add(first_token(tokenizer, prompt, answer))
    return sorted(found)


def _logits(run: Backend, rows: Sequence[Row]) -> Float[np.ndarray, "row vocab"]:
    """Of every row's next token."""
    found: np.ndarray | None = None
    for output in run.forward(rows):
        some = wide(output.logits).cpu().numpy()
        if found is None:
            found = np.empty((len(rows), some.shape[1]), some.dtype)
        found[output.index] = some
    assert found is not None
    return found


def _by_attention(
    arms: Arms,
    run: Backend,
    asked: Sequence[Prompt],
    models: Mapping[str, Arm | None],
    margin: Margin,
    seed: int,
) -> Float[np.ndarray, "fact patch state late"]:
    """Margins with weights on the subject, or on as many other tokens, of one model among those of the other."""
    found, rng = np.full((len(asked), len(PATCHES), 2, 2), np.nan), np.random.default_rng(seed)
    for start in range(0, len(asked), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(asked)))
        weights = [
            [one[:, asked[i].prediction] for i, one in zip(some, states(arms.base.model, runs, "pattern"), strict=True)]
            for runs in ([Run(asked[i], arm) for i in some] for arm in models.values())
        ]
        rows, cells = [], []
        for i, fact in enumerate(some):
            prompt, at = asked[fact], tuple(asked[fact].subject_positions)
            others = elsewhere(prompt, at, rng)
            for patch, (put, kept) in enumerate([(at, ()), (others, at)]):
                for late, arm in enumerate(models.values() if put else ()):
                    its = exchanged(weights[late][i], weights[1 - late][i], put, kept)
                    rows.append(Row(prompt, patches=tuple(_patches(prompt, its)), arm=arm))
                    cells.append((fact, patch, 1 - late, late))
        values = margin.of(_logits(run, rows), [row.prompt for row in rows])
        for cell, value in zip(cells, values, strict=True):
            found[cell] = value
    return found


def exchanged(
    weights: Float[Tensor, "layer head key"],
    others: Float[Tensor, "layer head key"],
    positions: Sequence[int],
    kept: Sequence[int] = (),
) -> Float[Tensor, "layer head key"]:
    """Attention weights with those on some positions taken from others, those on `kept` as they are.

    The rest is scaled so that all sum to 1; where a head has no weight there, it is shared out as by the others. Where
    what is kept leaves too little, less is taken.
    """
    taken, held = (_inside(some, weights) for some in (positions, kept))
    own, left = (torch.where(held, weights, 0.0), 1 - (weights * held).sum(-1, keepdim=True))
    put = torch.where(taken, others, 0.0)
    put = put * (left / put.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    rest, instead = (torch.where(taken | held, 0.0, one) for one in (weights, others))
    rest = torch.where(rest.sum(-1, keepdim=True) < 1e-9, instead, rest)
    left = (left - put.sum(-1, keepdim=True)).clamp_min(0)
    return own + put + rest * left / rest.sum(-1, keepdim=True).clamp_min(1e-30)


def _inside(positions: Sequence[int], weights: Tensor) -> Bool[Tensor, " key"]:
    mask = torch.zeros(weights.shape[-1], dtype=torch.bool, device=weights.device)
    mask[list(positions)] = True
    return mask


def _patches(prompt: Prompt, weights: Float[Tensor, "layer head key"]) -> Iterator[Patch]:
    at = (prompt.prediction,)
    for layer, head in product(range(weights.shape[0]), range(weights.shape[1])):
        yield Patch(layer, at, weights[layer, head][None], "pattern", head)


def _by_prior(
    logits: Float[np.ndarray, "model fact vocab"], prompts: Sequence[Prompt], relations: Mapping[str, str]
) -> Iterator[Float[np.ndarray, "fact vocab"]]:
    """Logits of either model, moved by the mean difference between the two in other facts of the relation."""
    half = np.array([zlib.crc32(prompt.subject.encode()) % 2 for prompt in prompts])
    relation = np.array([relations.get(prompt.fact_id, "") for prompt in prompts])
    difference = logits[1] - logits[0]
    shift = np.full_like(difference, np.nan)
    for one, side in product(set(relation.tolist()), (0, 1)):
        others = (relation == one) & (half != side)
        if others.sum() >= LEAST:
            shift[(relation == one) & (half == side)] = difference[others].mean(0)
    yield logits[0] + shift
    yield logits[1] - shift


class MediationSettings(Settings):
    facts: PositiveInt = Field(
        100, description="facts asked; states are put from one model into the other in those lost"
    )
    seed: int = Field(0, ge=0, description="of the placebo's positions")


PASSES = 5.0
"""Forward passes of a prompt that a fact costs, roughly, where one answer in six is lost."""
FEW = 5
"""Answers lost, below which it is not said by what."""


def _run(asked: Asked, settings: MediationSettings) -> xr.Dataset:
    few = asked.few(settings.facts)
    relations, budget = asked.relations or None, asked.memory_budget
    found = mediation(asked.both, few, relations=relations, seed=settings.seed, memory_budget=budget)
    asked.tell(PASSES * len(few))
    return found


def _cells(dataset: xr.Dataset) -> dict[tuple[str, str], xr.DataArray]:
    """Margins by whose mediator and whose all else, base or tuned."""
    array = dataset["mediation"]
    names = dict(zip(("base", "tuned"), array["state"].values, strict=True))
    return {
        (state, late): array.sel(state=names[state], late=names[late], drop=True)
        for state, late in product(names, names)
    }


def _own(dataset: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """The base's and the tuned model's own margins."""
    cells = _cells(dataset)
    first = {"mediator": 0, "patch": 0}
    return cells["base", "base"].isel(first, drop=True), cells["tuned", "tuned"].isel(first, drop=True)


def _answers_lost(dataset: xr.Dataset) -> xr.DataArray:
    base, tuned = _own(dataset)
    return (tuned <= 0).where(base > 0).astype(float)


def _lost(dataset: xr.Dataset) -> xr.DataArray:
    """Of the margin, in answers lost; NaN where they are few."""
    base, tuned = _own(dataset)
    lost = (base > 0) & (tuned <= 0)
    return (base - tuned).where(lost & (lost.sum() >= FEW))


def _carried(dataset: xr.Dataset, patch: str) -> xr.DataArray:
    """What a mediator moves the margin by in answers lost, `(fact, part)`, averaged over both directions."""
    cells = {which: cell.sel(patch=patch, drop=True) for which, cell in _cells(dataset).items()}
    back = cells["base", "tuned"] - cells["tuned", "tuned"]
    forth = cells["base", "base"] - cells["tuned", "base"]
    found = ((back + forth) / 2).where(_lost(dataset).notnull())
    return found.rename(mediator="part").transpose("fact", "part").assign_attrs(definition="")


MEASURE = Measure(
    name="mediation",
    title="through what the answers were lost",
    paper=PAPER,
    quantities=(
        Quantity(
            "answers_lost",
            "share",
            "of the answers that the base starts rightly, those that the tuned model does not",
            _answers_lost,
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "margin_lost",
            "standard deviations",
            "margin of the right answer's first token over the best other one, in standard deviations of the logits: "
            "the base's minus the tuned model's, in answers lost",
            _lost,
            smallest_effect=0.1,
        ),
        Quantity(
            "mediated",
            "share of the margin lost",
            "what one thing put back into the tuned model returns of the margin lost, and the tuned model's costs the "
            "base, averaged",
            lambda dataset: _carried(dataset, "real"),
            over=_lost,
        ),
        Quantity(
            "values_over_mlps",
            "share of the margin lost",
            "what values at the subject carry of the margin lost beyond what MLP outputs there carry",
            lambda dataset: (
                _carried(dataset, "real").sel(part=VALUES, drop=True)
                - _carried(dataset, "real").sel(part=MLPS, drop=True)
            ),
            over=_lost,
        ),
        Quantity(
            "mediated_placebo",
            "share of the margin lost",
            "the same at as many other positions of the prompt, drawn at random",
            lambda dataset: _carried(dataset, "placebo"),
            over=_lost,
        ),
    ),
    control="`mediated_placebo`: the two models' states exchanged at as many other positions of the prompt, drawn at "
    "random; of attention, weights on other tokens, those on the subject left as they are. The prior is taken from one "
    "half of the facts for the other, and has none.",
    reads="Of the margin by which answers were lost, the share that goes through one thing, all else being one model's "
    "or the other's. Shares need not add up to 1: attention, values and MLP outputs stand on one path. What the MLPs "
    "lost is lost in the values too, and what values lost within the name in the MLPs in part; `values_over_mlps` "
    "tells which carries more. A temperature moves none of it. Not which heads or layers: all are exchanged together "
    "(`transfer`). Of the answer's first token alone.",
    undefined="For facts that the base does not start rightly: they have nothing to lose. Shares where fewer than five "
    "answers are lost. The prior for relations of fewer than two facts in a half; placebos where a prompt has too few "
    "other positions.",
    run=_run,
    cost=lambda shape, settings: PASSES * min(settings.facts, shape.n_facts),
    settings=MediationSettings,
    needs=NEEDS | {"facts"},
)
