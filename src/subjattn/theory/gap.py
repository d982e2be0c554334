"""Fine-tuning on popular or unpopular facts of a one-layer world: accuracy, attention and errors of every fact.

The design of Ghosal et al. (2024, sec. 3): pre-training meets facts by their subjects' popularity as (subject,
relation), fine-tuning and test ask them as (subject, prompt token). The paper states neither sizes nor optimisers;
ours are settings. Replicates and arms train at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
import xarray as xr
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from subjattn.theory.onelayer import Facts, OneLayer, Optimiser, train
from subjattn.worlds.abstract import Prior, World, make_world


ARMS = ("top", "bottom", "random", "whole")
ERRORS = ("right", "subject", "relation", "else")
"""What is answered: the right answer, the subject's to another relation, another of the relation's, or else."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldSettings(Section):
    """How large a world is; see `make_world`."""

    n_subjects: PositiveInt = 100
    n_relations: PositiveInt = 5
    n_answers: PositiveInt = 20
    prior: Prior = "zipf"

    def make(self, zipf: float, seed: int) -> World:
        return make_world(self.n_subjects, self.n_relations, self.n_answers, zipf, prior=self.prior, seed=seed)


class Steps(Section):
    """Optimiser steps on the loss summed over a batch, after which of them the model is looked at or used."""

    optimiser: Literal["sgd", "adam"]
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    batch: PositiveInt
    steps: Annotated[list[PositiveInt], Field(min_length=1, description="the last is how long training is")]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.steps != sorted(set(self.steps)):
            raise ValueError(f"steps {self.steps} are not in order, each once")
        return self

    def optimiser_of(self, *, freeze_values: bool = False) -> Optimiser:
        return Optimiser(self.optimiser, self.learning_rate, self.weight_decay, freeze_values)


class Pretraining(Steps):
    """On (subject, relation), facts met by popularity."""

    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: PositiveFloat = 0.03
    batch: PositiveInt = 128
    steps: Annotated[list[PositiveInt], Field(min_length=1)] = [1500, 2000, 2500, 4000]
    init: Literal["zeros", "normal"] = Field("zeros", description="`normal`: of variance 0.001 (app. C.1)")


class Finetuning(Steps):
    """On (subject, prompt token), epochs over an arm's facts."""

    optimiser: Literal["sgd", "adam"] = "adam"
    learning_rate: PositiveFloat = 0.01
    batch: PositiveInt = 32
    steps: Annotated[list[PositiveInt], Field(min_length=1)] = [10, 30, 100, 200]
    prompt: Literal["empty", "copied"] = Field(
        "empty", description="the prompt token's column of W_V before: as pre-training leaves it, or its relation's"
    )
    freeze_values: bool = Field(False, description="train W_KQ alone")
    known: bool = Field(True, description="only facts that are recalled from (subject, relation), trained and tested")


def pretrain(world: WorldSettings, zipf: float, settings: Pretraining, seeds: Sequence[int]) -> dict[int, OneLayer]:
    """Models after the steps asked for, a replicate for each seed, which makes its world, weights and draws."""
    worlds = [world.make(zipf, seed) for seed in seeds]
    tokens = worlds[0].tokens
    answers = np.stack([own.answer_tokens for own in worlds])
    met = np.stack(
        [
            own.meet(settings.steps[-1] * settings.batch, np.random.default_rng([seed, 1]))
            for own, seed in zip(worlds, seeds, strict=True)
        ]
    )
    facts = met.reshape(len(seeds), -1, settings.batch, 2)
    kept: dict[int, OneLayer] = {}

    def look(step: int, model: OneLayer) -> None:
        if step in settings.steps:
            kept[step] = model.copy()

    start = OneLayer.normal(tokens, seeds) if settings.init == "normal" else OneLayer.zeros(tokens, len(seeds))
    train(start, _batches(facts, answers, tokens.n_subjects), settings.optimiser_of(), look)
    return kept


def _batches(facts: np.ndarray, answers: np.ndarray, first_last: int) -> Iterator[tuple[Facts, Facts, Facts]]:
    """Batches of facts `(replicate, step, n, 2)`, with the first of their last tokens given."""
    rows = np.arange(len(facts))[:, None]
    for step in range(facts.shape[1]):
        subjects, relations = facts[:, step, :, 0], facts[:, step, :, 1]
        arrays = (subjects, first_last + relations, answers[rows, subjects, relations])
        yield tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)  # type: ignore[misc]


def finetune(
    world: WorldSettings, zipf: float, model: OneLayer, settings: Finetuning, seeds: Sequence[int]
) -> xr.Dataset:
    """Fine-tune every arm of every replicate, and ask all facts by their prompt tokens before and along the way.

    Subjects are dealt to training and test in pairs of neighbours in popularity, by seed. `top` and `bottom` are the
    halves of the training facts by popularity, `random` a half drawn at random, `whole` all.

    Returns:
        Arrays `(replicate, arm, step, subject, relation)`: `answer` (number in `ERRORS`) and `attention` to the
        subject; `(replicate, subject, relation)`: `known` (recalled from subject and relation before), `salience`,
        `asked` (tested, by `settings.known` where known); `(replicate, arm, subject, relation)`: `trained`;
        `(replicate, arm)`: `n_facts`, and `modal_share`, that of each relation's most frequent answer among them.
        Step 0 is before fine-tuning. Numbers of an arm without facts mean nothing.
    """
    worlds = [world.make(zipf, seed) for seed in seeds]
    answers = np.stack([own.answer_tokens for own in worlds])
    before = ask(model, answers, prompts=False)
    known = before["answer"].values == 0
    tested = np.stack([_dealt(world.n_subjects, seed) for seed in seeds])
    start = _ready(model, settings.prompt)
    arms = [
        own[arm]
        for number, seed in enumerate(seeds)
        for own in [_arms(~tested[number][:, None] & (known[number] | (not settings.known)), seed)]
        for arm in ARMS
    ]
    many = start.take(np.repeat(np.arange(len(seeds)), len(ARMS)).tolist())
    own_answers = np.repeat(answers, len(ARMS), axis=0)
    n = settings.steps[-1] * settings.batch
    order = [_epochs(chosen, n, np.random.default_rng([seeds[i // 4], 2, i % 4])) for i, chosen in enumerate(arms)]
    facts = np.stack(order).reshape(len(arms), -1, settings.batch, 2)
    found: dict[int, xr.Dataset] = {}

    def look(step: int, now: OneLayer) -> None:
        if step == 0 or step in settings.steps:
            found[step] = ask(now, own_answers, prompts=True)

    first = world.n_subjects + world.n_relations
    batches = _batches(facts, own_answers, first)
    train(many, batches, settings.optimiser_of(freeze_values=settings.freeze_values), look)
    along = xr.concat(found.values(), dim="step").assign_coords(step=list(found))
    return _folded(along, len(seeds)).assign(
        known=(("replicate", "subject", "relation"), known),
        salience=(("replicate", "subject", "relation"), before["salience"].values),
        asked=(("replicate", "subject", "relation"), tested[:, :, None] & (known | (not settings.known))),
        trained=(("replicate", "arm", "subject", "relation"), _masks(arms, answers.shape)),
        n_facts=(("replicate", "arm"), np.array([len(chosen) for chosen in arms]).reshape(-1, len(ARMS))),
        modal_share=(
            ("replicate", "arm"),
            np.array([_modal_share(*pair) for pair in zip(arms, own_answers, strict=True)]).reshape(-1, len(ARMS)),
        ),
    )


def ask(model: OneLayer, answers: np.ndarray, *, prompts: bool) -> xr.Dataset:
    """All facts of every replicate: `answer` (number in `ERRORS`), `attention` to the subject, `salience`.

    Args:
        model: of as many replicates.
        answers: tokens, `(replicate, subject, relation)`.
        prompts: asked by prompt tokens, or as in pre-training.
    """
    n, n_subjects, n_relations = answers.shape
    subjects, relations = (torch.from_numpy(axis.ravel()).expand(n, -1) for axis in np.indices(answers.shape[1:]))
    last = relations + n_subjects + (n_relations if prompts else 0)
    own = torch.from_numpy(answers.reshape(n, -1))
    logits = model.logits(subjects, last)
    given = logits.argmax(-1)
    of_subject = torch.from_numpy(answers)[torch.arange(n)[:, None], subjects]
    kinds = torch.full_like(given, 3)
    kinds[(given - model.tokens.n_read).div(model.tokens.n_answers, rounding_mode="floor") == relations] = 2
    kinds[(of_subject == given.unsqueeze(-1)).any(-1)] = 1
    kinds[given == own] = 0
    salience = model._values(subjects).gather(-1, own.unsqueeze(-1)).squeeze(-1)
    arrays = {"answer": kinds.to(torch.int8), "attention": model.attention(subjects, last), "salience": salience}
    shape = (n, n_subjects, n_relations)
    dims = ("replicate", "subject", "relation")
    return xr.Dataset({name: (dims, array.view(shape).numpy()) for name, array in arrays.items()})


def _ready(model: OneLayer, prompt: str) -> OneLayer:
    """A copy whose prompt tokens' columns of W_V are as asked."""
    model, (n_subjects, n_relations) = model.copy(), (model.tokens.n_subjects, model.tokens.n_relations)
    if prompt == "copied":
        model.values[:, n_subjects + n_relations :] = model.values[:, n_subjects : n_subjects + n_relations]
    return model


def _dealt(n_subjects: int, seed: int) -> np.ndarray:
    """Whether each subject is tested: one of every two neighbours in popularity."""
    first = np.random.default_rng([seed, 3]).integers(0, 2, (n_subjects + 1) // 2)
    return np.stack([first == 0, first == 1], axis=1).ravel()[:n_subjects]


def _arms(trainable: np.ndarray, seed: int) -> Mapping[str, np.ndarray]:
    """Facts of every arm, `(n, 2)`, of a mask over subjects and relations, by popularity and then relation."""
    facts = np.argwhere(trainable)
    half = len(facts) // 2
    drawn = np.random.default_rng([seed, 4]).permutation(len(facts))[:half]
    return {"top": facts[:half], "bottom": facts[len(facts) - half :], "random": facts[drawn], "whole": facts}


def _epochs(facts: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` facts in epochs of random order; of no facts, the first subject's over and over, which nobody reads."""
    if not len(facts):
        return np.zeros((n, 2), int)
    return np.asarray(facts[np.concatenate([rng.permutation(len(facts)) for _ in range(-(-n // len(facts)))])[:n]])


def _masks(arms: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Facts of every arm, `(replicate, arm, subject, relation)`."""
    masks = np.zeros((len(arms), *shape[1:]), bool)
    for mask, chosen in zip(masks, arms, strict=True):
        mask[tuple(chosen.T)] = True
    return masks.reshape(shape[0], len(ARMS), *shape[1:])


def _modal_share(facts: np.ndarray, answers: np.ndarray) -> float:
    """Share of facts whose answer is their relation's most frequent one among them."""
    counts = [np.unique(answers[of, r], return_counts=True)[1].max() for r, of in _by_relation(facts) if len(of)]
    return float(sum(counts) / len(facts)) if len(facts) else float("nan")


def _by_relation(facts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for relation in np.unique(facts[:, 1]):
        yield int(relation), facts[facts[:, 1] == relation, 0]


def _folded(along: xr.Dataset, n: int) -> xr.Dataset:
    """Replicates and arms apart, which training has one after another; an arm without facts has no numbers."""
    index = {"replicate": np.repeat(np.arange(n), len(ARMS)), "arm": np.tile(np.array(ARMS), n)}
    stacked = along[["answer", "attention"]].assign_coords({name: ("replicate", of) for name, of in index.items()})
    parts = [stacked.sel(replicate=stacked["arm"] == arm).drop_vars(["arm", "replicate"]) for arm in ARMS]
    return xr.concat(parts, dim=xr.IndexVariable("arm", list(ARMS))).transpose("replicate", "arm", "step", ...)
