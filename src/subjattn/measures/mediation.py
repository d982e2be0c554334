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
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from subjattn.errors import BadInput
from subjattn.measures import check_askable, labelled, opened, shortened
from subjattn.measures.first_tokens import Margin, telling
from subjattn.measures.put_back import NEEDS
from subjattn.measures.record import Asked, Measure, Quantity, Settings
from subjattn.measures.swapping import only_arm
from subjattn.measures.transfer import PATCHES, elsewhere, transfer
from subjattn.models.arms import BASE, Arms


if TYPE_CHECKING:
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
    known: Collection[str] | None = None,
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
        known: ids of facts that the base answers rightly when asked in another way; None: all facts count. Chosen by
            its answers here, facts on which it was right by chance would look lost.
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
        prior is NaN for relations of fewer than 2 facts in a half. All is NaN for facts that are not `known`, and those
        whose answers' first tokens begin other facts' answers too. Coordinates `has_placebo` and `has_prior` `(fact,)`
        say whether a fact could have them.

    Raises:
        BadInput: an argument that does not fit, or logits that are not finite.
        NotDefined: no answer is told from the others by its first token.
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
    counted = telling(asked, [margin.accepted[prompt.fact_id] for prompt in asked], relations)
    if known is not None:
        counted &= np.array([prompt.fact_id in known for prompt in asked])
    plain = [np.where(counted, one, np.nan) for one in plain]
    margins = np.full((len(asked), len(MEDIATORS), len(PATCHES), 2, 2), np.nan)
    lost, shifted_by = np.flatnonzero((plain[0] > 0) & (plain[1] <= 0)), _shifts(logits, prompts, relations or {})
    if some := [asked[i] for i in lost]:
        for mediator, component in _STATES.items():
            how: dict[str, Any] = {"metric": [margin], "seed": seed, "memory_budget": memory_budget}
            put = transfer(arms, some, component, name, at="subject", by=None, **how)["margin"]
            margins[lost, MEDIATORS.index(mediator)] = put.transpose("fact", "patch", "state", "late")
        margins[lost, MEDIATORS.index(ATTENTION)] = _by_attention(arms, run, some, models, margin, seed)
        for late, sign in enumerate((1, -1)):
            shifted = logits[late][lost] + sign * shifted_by[lost]
            margins[lost, MEDIATORS.index(PRIOR), 0, 1 - late, late] = margin.of(shifted, some)
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
    room = [prompt.prediction >= 2 * len(prompt.subject_positions) for prompt in asked]
    could = {"has_placebo": ("fact", np.array(room)), "has_prior": ("fact", ~np.isnan(shifted_by[:, 0]))}
    return array.assign_coords(coords | could).to_dataset()


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

    The rest is scaled so that all sum to 1; where a head has no weight there, it is shared out as by the others, or
    evenly where these have none either. Where what is kept leaves too little, less is taken.
    """
    taken, held = (_inside(some, weights) for some in (positions, kept))
    own, left = (torch.where(held, weights, 0.0), (1 - (weights * held).sum(-1, keepdim=True)).clamp_min(0))
    put = torch.where(taken, others, 0.0)
    put = put * (left / put.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    rest, instead = (torch.where(taken | held, 0.0, one) for one in (weights, others))
    free = (~(taken | held)).to(weights.dtype) if bool((~(taken | held)).any()) else taken.to(weights.dtype)
    for fallback in (instead, free.expand_as(rest)):
        rest = torch.where(rest.sum(-1, keepdim=True) < 1e-9, fallback, rest)
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


def _shifts(
    logits: Float[np.ndarray, "model fact vocab"], prompts: Sequence[Prompt], relations: Mapping[str, str]
) -> Float[np.ndarray, "fact vocab"]:
    """Mean difference between the two models' logits in other facts of the relation; NaN where these are too few."""
    half = np.array([zlib.crc32(prompt.subject.encode()) % 2 for prompt in prompts])
    relation = np.array([relations.get(prompt.fact_id, "") for prompt in prompts])
    difference = logits[1] - logits[0]
    shift: np.ndarray = np.full_like(difference, np.nan)
    for one, side in product(set(relation.tolist()), (0, 1)):
        others = (relation == one) & (half != side)
        if others.sum() >= LEAST:
            shift[(relation == one) & (half == side)] = difference[others].mean(0)
    return shift


class MediationSettings(Settings):
    facts: PositiveInt = Field(
        100, description="facts asked; states are put from one model into the other in those lost"
    )
    seed: int = Field(0, ge=0, description="of the placebo's positions")


PASSES = 5.0
"""Forward passes of a prompt that a fact costs, roughly, where one answer in six is lost."""


def _run(asked: Asked, settings: MediationSettings) -> xr.Dataset:
    few = asked.few(settings.facts)
    relations, budget = asked.relations or None, asked.memory_budget
    known = asked.known_elsewhere
    found = mediation(asked.both, few, relations=relations, known=known, seed=settings.seed, memory_budget=budget)
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


def _lost(dataset: xr.Dataset) -> xr.DataArray:
    """Which facts lost their answer, of all that count."""
    base, tuned = _own(dataset)
    return ((base > 0) & (tuned <= 0)).where(base.notnull()).astype(float)


def _won(dataset: xr.Dataset) -> xr.DataArray:
    base, tuned = _own(dataset)
    return ((base <= 0) & (tuned > 0)).where(base.notnull()).astype(float)


def _right(dataset: xr.Dataset) -> xr.DataArray:
    base, _ = _own(dataset)
    return (base > 0).where(base.notnull()).astype(float)


def _margin_lost(dataset: xr.Dataset) -> xr.DataArray:
    """Of the margin, by the facts that lost their answer; 0 of the others: which they are may differ by draw."""
    base, tuned = _own(dataset)
    return (base - tuned) * _lost(dataset)


def _carried(dataset: xr.Dataset, patch: str) -> xr.DataArray:
    """What a mediator moves the margin by, `(fact, part)`, averaged over both directions; 0 where nothing was lost."""
    cells = {which: cell.sel(patch=patch, drop=True) for which, cell in _cells(dataset).items()}
    back = cells["base", "tuned"] - cells["tuned", "tuned"]
    forth = cells["base", "base"] - cells["tuned", "base"]
    lost = _lost(dataset)
    found = ((back + forth) / 2).where(lost != 0, 0.0).where(lost.notnull())
    there = found["mediator"] != PRIOR if patch == "placebo" else True
    if "has_placebo" in dataset.coords:
        able = dataset["has_placebo"] if patch == "placebo" else (found["mediator"] != PRIOR) | dataset["has_prior"]
        found = found.where(able)
    return found.where(there).rename(mediator="part").transpose("fact", "part").assign_attrs(definition="")


MEASURE = Measure(
    name="mediation",
    title="through what the answers were lost",
    paper=PAPER,
    quantities=(
        Quantity(
            "answers_changed",
            "difference of shares",
            "answers that the tuned model starts rightly minus those that the base does, over all facts",
            lambda dataset: _won(dataset) - _lost(dataset),
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "answers_lost",
            "share of the base's right answers",
            "answers that the base starts rightly and the tuned model does not, over those that the base does",
            _lost,
            over=_right,
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "answers_won",
            "share of the base's wrong answers",
            "answers that the tuned model starts rightly and the base does not, over those that the base does not",
            _won,
            over=lambda dataset: 1 - _right(dataset),
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "margin_lost",
            "standard deviations",
            "margin of the right answer's first token over the best other one, in standard deviations of the logits: "
            "the base's minus the tuned model's, in answers lost",
            _margin_lost,
            over=_lost,
            smallest_effect=0.1,
        ),
        Quantity(
            "mediated",
            "share of the margin lost",
            "what one thing put back into the tuned model returns of the margin lost, and the tuned model's costs the "
            "base, averaged",
            lambda dataset: _carried(dataset, "real"),
            over=_margin_lost,
        ),
        Quantity(
            "values_over_mlps",
            "share of the margin lost",
            "what values at the subject carry of the margin lost beyond what MLP outputs there carry",
            lambda dataset: (
                _carried(dataset, "real").sel(part=VALUES, drop=True)
                - _carried(dataset, "real").sel(part=MLPS, drop=True)
            ),
            over=_margin_lost,
        ),
        Quantity(
            "mediated_placebo",
            "share of the margin lost",
            "the same at as many other positions of the prompt, drawn at random",
            lambda dataset: _carried(dataset, "placebo"),
            over=_margin_lost,
        ),
    ),
    control="`mediated_placebo`: the two models' states exchanged at as many other positions of the prompt, drawn at "
    "random; of attention, weights on other tokens, those on the subject left as they are. The prior is taken from one "
    "half of the facts for the other, and has none.",
    reads="`answers_changed` is the net change. Read `answers_lost` beside `answers_won`: an arm that wins more than "
    "it loses has lost nothing overall. Of the margin by which answers were lost, the share that goes through one "
    "thing, all else being one model's or the other's. Shares need not add up to 1: attention, values and MLP outputs "
    "stand on one path. What the MLPs lost is lost in the values too, and what values lost within the name in the "
    "MLPs in part; `values_over_mlps` tells which carries more. A temperature moves none of it. Not which heads or "
    "layers: all are exchanged together (`transfer`). Of the answer's first token alone.",
    undefined="Facts whose answer shares its first token with another fact's different answer (years, numbers): the "
    "first token does not tell them apart. In a study with several styles, facts that the base does not answer "
    "correctly in the next style: facts selected by the answers that are measured would regress to the mean. Shares "
    "whose denominator is not distinguishable from 0. The prior for relations of fewer than two facts in a half; "
    "placebos where a prompt has too few other positions.",
    run=_run,
    cost=lambda shape, settings: PASSES * min(settings.facts, shape.n_facts),
    settings=MediationSettings,
    needs=NEEDS | {"facts", "known_elsewhere"},
    version=2,
)
