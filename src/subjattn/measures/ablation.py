"""Ablation of sets of heads, attention layers or MLPs: what the answer loses when their outputs are replaced.

Outputs are replaced by zeros, by their mean over the prompts, or by those of a run with another subject (resample
ablation). The mean is taken over the prompts at the same place: counted from the prompt's beginning before the subject,
over all tokens of a role within it, counted from the prompt's end behind it, and over all tokens of the answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args, overload

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.checks import check_model
from subjattn.engine.forward import states
from subjattn.engine.interventions import Patch, Row
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, shortened
from subjattn.measures.metrics import AS_THEY_ARE, Metric, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.measures.patching import answered_pairs
from subjattn.measures.sets import Heads, parse_sets
from subjattn.prompts import ROLES, Prompt, swap_subjects


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.measures import Model

Ablated = Literal["z", "attn_out", "mlp_out"]
To = Literal["zero", "mean", "resample"]
At = Literal["all", "prediction", "subject"]
_Value = Callable[[int, int], Float[Tensor, "position width"] | Prompt]
"""What a fact's outputs in a layer (and head) become, at all positions that are ablated."""
_PAPERS = {
    "zero": "Olsson et al. 2022",
    "mean": "Wang et al. 2023",
    "resample": "Chan et al. 2022; subject swap after Zhang & Nanda 2023",
}
_NAMES = {"z": "outputs before W_O of heads", "attn_out": "outputs of attention layers", "mlp_out": "outputs of MLPs"}
_AT = {"all": "all positions", "prediction": "the positions that predict the answer", "subject": "the subject"}
_BY = {
    "zero": "zeros",
    "mean": "their mean over the prompts at the same place",
    "resample": "those of a run with another subject",
}


@overload
def ablation(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    heads: Heads | None = ...,
    layers: Sequence[int] | None = ...,
    component: Ablated = ...,
    to: To = ...,
    at: At = ...,
    random_sets: int = ...,
    seed: int = ...,
    metric: Metric = ...,
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.DataArray: ...
@overload
def ablation(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    heads: Heads | None = ...,
    layers: Sequence[int] | None = ...,
    component: Ablated = ...,
    to: To = ...,
    at: At = ...,
    random_sets: int = ...,
    seed: int = ...,
    metric: list[Metric],
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.Dataset: ...
def ablation(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    heads: Heads | None = None,
    layers: Sequence[int] | None = None,
    component: Ablated = "z",
    to: To = "mean",
    at: At = "all",
    random_sets: int = 0,
    seed: int = 0,
    metric: Metric | list[Metric] = "answer_logprob",
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.DataArray | xr.Dataset:
    """How far the answer falls when the outputs of a set of heads or layers are replaced, all together.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask; the mean and the other subjects are theirs.
        heads: the set, as `(layer, head)`; component `z`.
        layers: or a set of whole layers; component `attn_out` or `mlp_out`.
        component: `z`, the output of each head before W_O, `attn_out` or `mlp_out`.
        to: `zero`; `mean`, over the prompts at the same place (see the module's text); `resample`, the output of a run
            whose subject is another's, drawn with `seed`, with the same tokens everywhere else.
        at: at which positions: `all`, the `subject`'s, or `prediction`, those that predict an answer token.
        random_sets: beside the set, so many random ones of the same size (see `sets.parse_sets`).
        seed: of the random sets and of the other subjects.
        metric: `answer_logprob` (nats), `kl` (nats), `rank`, or a function of your own, as `knockout` takes it; or
            several.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, set)`: "chosen", "random 0", …; baseline minus ablated; `kl` and `rank` are those of the ablated run.
        Coordinates `baseline_METRIC` `(fact,)` and `cells` `(set,)`; attributes `matched`, what random sets have in
        common with the chosen one, and `noise_floor`. NaN where a fact has nothing to put there: no other subject fits,
        or a mean would be over its own output alone. Several metrics give a Dataset.

    Raises:
        BadInput: an argument that does not fit, or no fact has anything to put there.
        UnsupportedModel, NotFired: the outputs could not be replaced.
    """
    check_askable(prompts)
    _check(heads, component, to, at)
    metrics = parse_metrics(metric)
    if "logit_diff" in metrics:
        raise BadInput("ablation has no foils: its metrics are answer_logprob, kl, rank or a function of your own")
    hf = hf_model(model)
    check_model(hf)
    sets = parse_sets(heads, layers, len(decoder_layers(hf)), n_heads(hf), random_sets=random_sets, seed=seed)
    asked = [shortened(prompt) for prompt in prompts] if {*metrics} <= {*AS_THEY_ARE} else list(prompts)
    where = [_positions(prompt, at) for prompt in asked]
    rows, cells = [Row(prompt) for prompt in asked], []
    for fact, value in enumerate(_values(hf, asked, where, component, to, seed)):
        for number, members in enumerate(sets.cells.values() if value is not None else ()):
            patches = tuple(
                Patch(layer, where[fact], value(layer, head), component, None if head < 0 else head)  # type: ignore[misc]
                for layer, head in members
            )
            rows.append(Row(asked[fact], patches=patches))
            cells.append((fact, number))
    if not cells:
        raise BadInput(
            f"to={to!r}: no fact has anything to put there, as no two prompts are alike but for their subjects"
        )
    run = opened(backend, hf, memory_budget, asked)
    found = measure_rows(run.forward(rows), rows, metrics)
    arrays = {}
    for name in metrics:
        grid, effect = np.full((len(asked), len(sets.cells)), np.nan), found.effect(name)[-len(cells) :]
        grid[tuple(np.array(cells).T)] = effect if name in AS_THEY_ARE else -effect
        fall = meaning_of(name) if name in AS_THEY_ARE else f"fall in the {meaning_of(name)}"
        array = labelled(
            f"ablation_{name}" if name in AS_THEY_ARE else "ablation_drop",
            grid,
            prompts,
            ("set",),
            unit=unit_of(name),
            definition=f"{fall}, when the {_NAMES[component]} of a set, all together, are replaced by {_BY[to]}, at "
            f"{_AT[at]}",
            paper=_PAPERS[to],
            noise_floor=found.noise_floor[name],
            backend=run.name,
            matched=sets.matched,
        )
        coords = {"set": list(sets.cells), "cells": ("set", sets.in_words)}
        arrays[name] = array.assign_coords(coords | {f"baseline_{name}": ("fact", found.values[name][: len(asked)])})
    return xr.Dataset(arrays) if isinstance(metric, list) else next(iter(arrays.values()))


def _check(heads: Heads | None, component: str, to: str, at: str) -> None:
    known = {"component": get_args(Ablated), "to": get_args(To), "at": get_args(At)}
    for name, value in (("component", component), ("to", to), ("at", at)):
        if value not in known[name]:
            raise BadInput(f"{name} {value!r} is not one of {', '.join(known[name])}")
    if (heads is None) == (component == "z"):
        raise BadInput(
            f"component {component!r} does not fit: heads=[(layer, head), …] go with 'z', layers=[layer, …] with "
            "'attn_out' or 'mlp_out'"
        )


def _positions(prompt: Prompt, at: At) -> tuple[int, ...]:
    if at == "subject":
        return tuple(prompt.subject_positions)
    return tuple(prompt.predicting if at == "prediction" else range(prompt.predicting[-1] + 1))


def _values(
    hf: PreTrainedModel, prompts: list[Prompt], where: list[tuple[int, ...]], component: Ablated, to: To, seed: int
) -> list[_Value | None]:
    """What each fact's outputs become; None where there is nothing to put there."""
    if to == "zero":
        kept = states(hf, prompts[:1], component)[0]
        return [_zeros(kept.new_zeros(len(positions), kept.shape[-1])) for positions in where]
    if to == "mean":
        return _means(states(hf, prompts, component), prompts, where)
    if len({prompt.fact_id for prompt in prompts}) < len(prompts):
        raise BadInput(
            "to='resample' takes prompts of one style, and a fact stands twice among these: ablate them apart"
        )
    pairs = swap_subjects(prompts, np.random.default_rng(seed))
    runs = answered_pairs(pairs, whole_answer=True) if pairs else []
    others = {clean.fact_id: other for clean, other, _ in runs}
    return [_taken(others[prompt.fact_id]) if prompt.fact_id in others else None for prompt in prompts]


def _zeros(nothing: Tensor) -> _Value:
    return lambda _layer, _head: nothing


def _taken(other: Prompt) -> _Value:
    return lambda _layer, _head: other


def _means(
    kept: list[Float[Tensor, "layer pos ..."]], prompts: list[Prompt], where: list[tuple[int, ...]]
) -> list[_Value | None]:
    """Means of all prompts by place; a fact with a place that no other prompt has, has none."""
    sums: dict[tuple[str, int], Tensor] = {}
    tokens: dict[tuple[str, int], int] = defaultdict(int)
    of: dict[tuple[str, int], set[int]] = defaultdict(set)
    for i, (state, prompt, positions) in enumerate(zip(kept, prompts, where, strict=True)):
        for position in positions:
            place, here = _place(prompt, position), state[:, position].double()
            sums[place] = here if place not in sums else sums[place] + here
            tokens[place] += 1
            of[place].add(i)

    def value(stacked: Float[Tensor, "position layer ..."]) -> _Value:
        return lambda layer, head: stacked[:, layer] if head < 0 else stacked[:, layer, head]

    found: list[_Value | None] = []
    for state, prompt, positions in zip(kept, prompts, where, strict=True):
        places = [_place(prompt, position) for position in positions]
        alone = any(len(of[place]) < 2 for place in places)
        means = None if alone else torch.stack([sums[place] / tokens[place] for place in places]).to(state.dtype)
        found.append(None if means is None else value(means))
    return found


def _place(prompt: Prompt, position: int) -> tuple[str, int]:
    """What a position has in common with those of other prompts."""
    if position > prompt.prediction:
        return "answer", 0
    role = next(role for role in ROLES if position in prompt.role(role))
    if role == "before_subject":
        return role, position
    return role, prompt.prediction - position if role == "after_subject" else 0
