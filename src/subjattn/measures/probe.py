"""Linear probes of a model's states, by layer and role, beside what would expose them: what the states hold of a label.

A probe that is right says that a label can be read from a state, not that the model reads it. So in the same result
stand a control task whose labels follow the name's last token (Hewitt & Liang 2019), a probe of the name's characters,
one of its length, which every state holds, one of the token embeddings, the most frequent label and, if asked, a twin
of the model with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr

from subjattn.engine.collect import Site
from subjattn.errors import BadInput
from subjattn.measures import labelled
from subjattn.measures.activations import Stream
from subjattn.measures.probing import (
    TRAINERS,
    Method,
    Task,
    by_characters,
    by_length,
    by_majority,
    out_of_fold,
    ranked,
    recurring,
    right,
    task_of,
)
from subjattn.models.arms import BASE, Arms
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.measures import Model

    Labels = Mapping[str, object] | pd.Series
PAPER = "Alain & Bengio 2017; control task after Hewitt & Liang 2019"
PLACES = ("subject_last", "prediction")
_DEFINED = {
    "correct": ("share right", "a linear {method} probe of {site}, trained on other subjects, gives the label"),
    "ranked": (
        "share of facts",
        "facts of other labels in the same fold to which the probe gives the fact's label a lower score; the mean is "
        "the area under the ROC curve, one label against the rest, weighted by label",
    ),
    "control": (
        "share right",
        "a probe of the same states gives a label drawn at random for the name's last token, of tokens that training "
        "facts have too; mean over draws of labels",
    ),
    "selectivity": ("difference of shares", "correct minus control, where the control is defined"),
}


def probe(
    model: Model | Arms,
    prompts: Sequence[Prompt],
    target: Literal["answer"] | Labels = "answer",
    *,
    site: Site = "resid_pre",
    roles: str | Sequence[str] = PLACES,
    layers: Sequence[int] | None = None,
    method: Method = "ridge",
    folds: int = 5,
    twin: bool = False,
    arm: str | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Whether a label can be read from a model's states by a linear probe, by layer, role and, of `z`, head.

    Every fact is tested by a probe that was trained on other subjects; penalties are chosen among training subjects.
    Read accuracy beside the control, the name's characters and its length: a label that goes with the number of a
    name's tokens is read from any model's states, and selectivity does not show it. No maximum over layers is a result:
    the layer would be chosen on the facts it is measured on.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode; or arms, with `arm`.
        prompts: whom to ask.
        target: `answer`, the first accepted one; or labels of your own by fact id, such as a column of the table of
            facts, `facts.set_index("fact_id")["relation"]`. Facts without a label take no part.
        site: of states, as `activations` takes it.
        roles: one or several; of a role of several positions the mean state.
        layers: some; None: all.
        method: `ridge`, or `logistic`, which takes many times as long.
        folds: of subjects; labels of fewer subjects are left out.
        twin: probe a twin of the model with random weights too.
        arm: which of the arms, `base` or a tuned model.
        seed: of folds, control labels and twin.
        memory_budget: bytes of working memory beyond the weights and the states.

    Returns:
        A Dataset, of each fact 1 or 0, NaN where it takes no part or lacks the role. Over
        `(fact, layer, role[, head])`: `correct`; `ranked`, whose mean is an AUROC; `control`, the control task's;
        `selectivity`, their difference, both NaN where no training fact has the name's last token; `predicted`, the
        number of a label in the attribute `classes`, -1 where there is none; with `twin` also `twin`. Over
        `(fact, role)` `embedding`, from the input of layer 0; over `(fact,)` `characters`, from the name's characters,
        `length`, from how many tokens, words and characters it has, and `majority`. Coordinates `label` and `fold`.

    Raises:
        BadInput: fewer than two labels of enough subjects, a prompt without a subject, or an argument does not fit.
        UnsupportedModel, NotFired: the model's states cannot be read.
    """
    _check(method, site)
    stream = Stream.of(model, prompts, site, roles, layers=layers, arm=arm, memory_budget=memory_budget)
    name, labels = _labels(prompts, target)
    task = task_of(prompts, labels, folds, seed)
    states = stream.in_memory()[site]
    attrs = _attrs(task, prompts, name, site, method, folds, seed) | ({} if arm is None else {"arm": arm})
    found = _dataset(_probed({"": states}, task, method), states, task, prompts, attrs).isel(
        trained_on=0, tested_on=0, drop=True
    )
    lowest = replace(stream, sites=["resid_pre"], layers=[0]).in_memory()["resid_pre"]
    found["embedding"] = _correct(lowest, task, prompts, method, "the input of layer 0").isel(layer=0, drop=True)
    names = [prompts[i].subject for i in task.kept]
    known = {
        "characters": right(by_characters(names, task, method), task.labels),
        "length": right(by_length(prompts, task, method), task.labels),
        "majority": by_majority(task),
    }
    words = {
        "characters": "a probe of the name's characters",
        "length": "a probe of how many tokens, words and characters the name has",
        "majority": "the most frequent label",
    }
    for key, what in words.items():
        values = _spread(known[key], task, len(prompts))
        found[key] = labelled(key, values, prompts, unit="share right", definition=f"{what} of the training folds")
    if twin:
        other = replace(stream, model=random_twin(stream.model, seed), arm=None).in_memory()[site]
        found["twin"] = _correct(other, task, prompts, method, f"{site} of a model at random")
    return found


def probe_across(
    arms: Arms,
    prompts: Sequence[Prompt],
    target: Literal["answer"] | Labels = "answer",
    *,
    between: Sequence[str] | None = None,
    site: Site = "resid_pre",
    roles: str | Sequence[str] = PLACES,
    layers: Sequence[int] | None = None,
    method: Method = "ridge",
    folds: int = 5,
    seed: int = 0,
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Probes trained on one model's states and tested on another's: is a label moved, or erased?

    Where the tuned model's own probe finds the label and the base's, tested on it, does not, its place in the state has
    moved; where neither does it is gone, as far as a linear probe sees.

    Args:
        arms: from `load_arms`.
        prompts, target, site, roles, layers, method, folds, seed, memory_budget: as `probe` takes them.
        between: names of models; None: the base and all tuned ones.

    Returns:
        A Dataset over `(fact, trained_on, tested_on, layer, role[, head])`: `correct`, `ranked`, `control`,
        `selectivity` and `predicted`, as `probe` gives them. All cells share folds and labels, and test a fact by a
        probe that was trained on other subjects, in whichever model; features are in the units of the training model.

    Raises:
        BadInput, UnsupportedModel, NotFired: as `probe`; fewer than two models.
    """
    _check(method, site)
    if not isinstance(arms, Arms):
        raise BadInput("probes across models take the base and its tuned ones: give what sa.load_arms(…) gives")
    names = list(dict.fromkeys(between or [BASE, *arms.sources]))
    if len(names) < 2:
        raise BadInput(f"between: probes across models take two or more of {', '.join([BASE, *arms.sources])}")
    name, labels = _labels(prompts, target)
    task = task_of(prompts, labels, folds, seed)
    states = {
        one: Stream.of(arms, prompts, site, roles, layers=layers, arm=one, memory_budget=memory_budget).in_memory()[
            site
        ]
        for one in names
    }
    attrs = _attrs(task, prompts, name, site, method, folds, seed)
    return _dataset(_probed(states, task, method), states[names[0]], task, prompts, attrs).assign_coords(
        trained_on=names, tested_on=names
    )


def random_twin(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same configuration whose weights are drawn anew, as its architecture does before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: PreTrainedModel = type(model)(deepcopy(model.config))
    return made.to(model.device, model.dtype).eval().requires_grad_(False)  # type: ignore[arg-type, no-any-return]


def _check(method: str, site: str) -> None:
    if method not in TRAINERS:
        raise BadInput(f"method {method!r} is not one of {', '.join(TRAINERS)}")
    if not isinstance(site, str):
        raise BadInput("a probe is of one site: call it for each of several")


def _labels(prompts: Sequence[Prompt], target: str | Labels) -> tuple[str, dict[str, str]]:
    """What the target is called, and its labels by fact id, those that are missing left out."""
    if isinstance(target, str):
        if target != "answer":
            raise BadInput(
                f"target {target!r}: give 'answer', or labels by fact id, such as a column of the table of facts, "
                f"facts.set_index('fact_id')[{target!r}]"
            )
        return target, {prompt.fact_id: prompt.answers[0] for prompt in prompts}
    given = target if isinstance(target, pd.Series) else pd.Series(dict(target), dtype=object)
    if not given.index.is_unique:
        raise BadInput("labels: a fact id stands there twice")
    own = given[given.notna()]
    labels = {str(fact): str(label) for fact, label in own.items()}
    if not any(prompt.fact_id in labels for prompt in prompts):
        raise BadInput("labels: none of the prompts' facts has one: index them by fact_id")
    return str(given.name or "labels"), labels


def _attrs(
    task: Task, prompts: Sequence[Prompt], target: str, site: str, method: str, folds: int, seed: int
) -> dict[str, Any]:
    return {
        "target": target,
        "site": site,
        "method": method,
        "folds": folds,
        "seed": seed,
        "classes": list(task.classes),
        "left_out": len(prompts) - len(task.kept),
        "paper": PAPER,
    }


def _probed(states: Mapping[str, xr.DataArray], task: Task, method: Method) -> dict[str, np.ndarray]:
    """Of probes trained on each model's states and tested on each, `[trained on, tested on, kept, cell]`."""
    flat = {
        name: one.values.reshape(one.sizes["fact"], -1, one.shape[-1])[task.kept].swapaxes(0, 1)
        for name, one in states.items()
    }
    n_cells, shape = len(next(iter(flat.values()))), (len(states), len(states), len(task.kept))
    found = {key: np.full((*shape, n_cells), np.nan) for key in ("correct", "ranked", "control", "predicted")}
    for cell in range(n_cells):
        tested_on = [one[cell] for one in flat.values()]
        for i, trained_on in enumerate(tested_on):
            scores = out_of_fold(trained_on, tested_on, task, task.targets, method)
            known = recurring(task, ~np.isnan(scores[i, 0]).any(-1))
            for j, of in enumerate(scores):
                defined = ~np.isnan(of[0]).any(-1)
                found["correct"][i, j, :, cell] = right(of[0], task.labels)
                found["ranked"][i, j, :, cell] = ranked(of[0], task)
                found["control"][i, j, :, cell] = np.where(known, right(of[1:], task.controls).mean(0), np.nan)
                found["predicted"][i, j, :, cell] = np.where(defined, np.nan_to_num(of[0]).argmax(-1), np.nan)
    return found | {"selectivity": found["correct"] - found["control"]}


def _dataset(
    found: Mapping[str, np.ndarray], states: xr.DataArray, task: Task, prompts: Sequence[Prompt], attrs: dict[str, Any]
) -> xr.Dataset:
    """Arrays over `fact`, `trained_on`, `tested_on` and the places of states, labelled."""
    places = [str(dim) for dim in states.dims[1:-1]]
    dataset = xr.Dataset()
    for key, values in found.items():
        shaped = values.reshape(*values.shape[:3], *(states.sizes[dim] for dim in places))
        whole = _spread(np.moveaxis(shaped, 2, 0), task, len(prompts))
        unit, definition = _DEFINED.get(key, ("label", "the label with the highest score, -1 where there is none"))
        definition = definition.format(method=attrs["method"], site=attrs["site"])
        if key == "predicted":
            whole = np.nan_to_num(whole, nan=-1).astype(int)
        dims = ("trained_on", "tested_on", *places)
        dataset[key] = labelled(key, whole, prompts, dims, unit=unit, definition=definition, **attrs)
    labels, folds = np.full(len(prompts), "", object), np.full(len(prompts), -1)
    labels[task.kept], folds[task.kept] = [task.classes[i] for i in task.labels], task.fold
    coords: dict[str, Any] = {dim: states[dim].values for dim in places}
    coords |= {"label": ("fact", labels.astype(str)), "fold": ("fact", folds)}
    ordered = dataset.assign_coords(coords).transpose("fact", "trained_on", "tested_on", *places)
    return ordered.assign_attrs(attrs)


def _correct(states: xr.DataArray, task: Task, prompts: Sequence[Prompt], method: Method, what: str) -> xr.DataArray:
    """Whether a probe of other states gives the label, without the rest."""
    places = [str(dim) for dim in states.dims[1:-1]]
    flat = states.values.reshape(states.sizes["fact"], -1, states.shape[-1])[task.kept].swapaxes(0, 1)
    each = [right(out_of_fold(one, [one], task, task.labels[None], method)[0, 0], task.labels) for one in flat]
    values = _spread(np.stack(each, 1).reshape(-1, *states.shape[1:-1]), task, len(prompts))
    definition = f"a linear {method} probe of {what}, trained on other subjects, gives the label"
    array = labelled("correct", values, prompts, places, unit="share right", definition=definition)
    return array.assign_coords({dim: states[dim].values for dim in places})


def _spread(values: np.ndarray, task: Task, n_facts: int) -> np.ndarray:
    """Values of the facts that take part among those of all, NaN of the others."""
    whole = np.full((n_facts, *values.shape[1:]), np.nan)
    whole[task.kept] = values
    return whole
