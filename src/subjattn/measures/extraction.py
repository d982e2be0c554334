"""Attribute extraction: in which layers what attention or an MLP adds at the prediction position is the answer already.

A layer's update is read by itself, through the model's final norm and unembedding; an extraction event is one whose
likeliest token is the one that the model gives in the end (Geva et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from subjattn.engine.budget import Budget
from subjattn.engine.contributions import contributions
from subjattn.engine.interventions import Row
from subjattn.engine.unembed import unembed
from subjattn.errors import BadInput
from subjattn.measures import check_prompts, hf_model, labelled, shortened
from subjattn.measures.first_tokens import raise_undefined, shared_first_tokens
from subjattn.measures.record import Asked, Measure, PerFact, Quantity
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

PAPER = "Geva et al. 2023"
COMPONENTS = ("attn", "mlp")
_OF = {"attn": "attention", "mlp": "an MLP"}


def extraction(model: Model, prompts: Sequence[Prompt], *, memory_budget: int | None = None) -> xr.Dataset:
    """The token that every layer's attention and MLP add most of at the prediction position, and the model's answer.

    What is added lies behind norms that follow attention and MLP (Gemma 2 and 3, OLMo 2).

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask; what the model answers counts, right or wrong.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        * `extracted` `(fact, layer, component)`, components `attn` and `mlp`: 1 where the update's likeliest token is
          the model's answer, 0 elsewhere. Its mean over facts is the extraction rate of a layer;
        * `extracted_others` of the same shape: the share of the other facts whose answer that token is: the rate of
          updates that go by no fact of their own; NaN where one fact alone is asked;
        * `update_token` `(fact, layer, component)` and `answer_token` `(fact,)`: ids of the tokens.

        The first two are NaN where the model's answer begins with a token that begins several of the facts' right
        answers, and so says nothing of which it gives.

    Raises:
        BadInput: no prompts.
        NotDefined: that is so of every fact.
        UnsupportedModel: the model's residual stream is no sum of what attention and MLPs add.
    """
    check_prompts(prompts)
    if not prompts:
        raise BadInput("there are no prompts to measure")
    hf, short = hf_model(model), [shortened(prompt) for prompt in prompts]
    budget = Budget.of(hf, memory_budget, max(map(len, short)))
    answers, tokens = np.empty(len(short), int), np.empty(0, int)
    for added in contributions(hf, short, batch_tokens=budget.base_tokens):
        rows = [Row(short[i]) for i in added.index]

        def likeliest(states: torch.Tensor, rows: list[Row] = rows) -> np.ndarray:
            logits = unembed(hf, states.to(hf.dtype), rows, only_contrast=False)
            found: np.ndarray = logits.argmax(-1).cpu().numpy()
            return found

        if not tokens.size:
            tokens = np.empty((len(short), len(added.attn), len(COMPONENTS)), int)
        answers[added.index] = likeliest(added.last)
        for layer, each in enumerate(zip(added.attn, added.mlp, strict=True)):
            for number, states in enumerate(each):
                tokens[added.index, layer, number] = likeliest(states)
    shared = {token for _, token in shared_first_tokens(prompts)}
    tells = ~np.isin(answers, list(shared))
    if not tells.any():
        raise_undefined(prompts)
    return _labelled(tokens, answers, tells, prompts)


def _labelled(tokens: np.ndarray, answers: np.ndarray, tells: np.ndarray, prompts: Sequence[Prompt]) -> xr.Dataset:
    words = "the likeliest token of what attention or an MLP adds at the prediction position is the {}"
    own = tokens == answers[:, None, None]
    given = np.bincount(answers, minlength=int(tokens.max()) + 1)
    others = (given[tokens] - own) / (len(prompts) - 1) if len(prompts) > 1 else np.full(own.shape, np.nan)
    of_fact = np.where(tells, 1.0, np.nan)[:, None, None]
    arrays = {
        "extracted": (own * of_fact, "share of facts", words.format("model's answer, its first token")),
        "extracted_others": (
            others * of_fact,
            "share of facts",
            words.format("model's answer to another fact, share of these"),
        ),
        "update_token": (tokens, "token id", "the likeliest token of what attention or an MLP adds"),
        "answer_token": (answers, "token id", "the likeliest token of the model"),
    }
    found = {}
    for name, (values, unit, definition) in arrays.items():
        dims = ("layer", "component")[: values.ndim - 1]
        found[name] = labelled(name, values, prompts, dims, unit=unit, definition=definition, paper=PAPER)
    return xr.Dataset(found).assign_coords(component=list(COMPONENTS))


def _any(component: str) -> PerFact:
    """Whether some layer's update is the answer, of the layers that the dataset has."""
    return lambda dataset: dataset["extracted"].sel(component=component, drop=True).max("layer", skipna=False)


def _any_of_others(component: str) -> PerFact:
    """Of other facts, the share whose answer some layer's update is."""

    def value(dataset: xr.Dataset) -> xr.DataArray:
        tokens = dataset["update_token"].sel(component=component, drop=True).transpose("fact", "layer").values
        answers = dataset["answer_token"].values
        inside = np.array([np.isin(answers, its) for its in tokens])
        n = len(answers) - 1
        shares = (inside.sum(1) - np.diag(inside)) / n if n else np.full(1, np.nan)
        tells = dataset["extracted"].sel(component=component, drop=True).isel(layer=0, drop=True).notnull()
        return dataset["answer_token"].copy(data=shares).where(tells).assign_attrs(unit="share of facts", definition="")

    return value


def _run(asked: Asked, _: object) -> xr.Dataset:
    found = extraction(asked.model, asked.prompts, memory_budget=asked.memory_budget)
    asked.tell(PASSES * len(asked.prompts))
    return found


PASSES = 4.0
"""Forward passes of a prompt that this costs, roughly: one, its parts, and the vocabulary twice a layer."""


def _over_others(component: str) -> PerFact:
    own, others = _any(component), _any_of_others(component)
    return lambda dataset: (own(dataset) - others(dataset)).assign_attrs(definition="")


def _quantities(component: str, suffix: str = "") -> tuple[Quantity, ...]:
    what = f"in some layer the likeliest token of what {_OF[component]} adds at the prediction position"
    return (
        Quantity(
            f"extraction_rate{suffix}",
            "share of facts",
            f"{what} is the model's answer",
            per_fact=_any(component),
            bounds=(0, 1),
            cells={"layer": "mean"},
            smallest_effect=0.05,
        ),
        Quantity(
            f"extraction_control{suffix}",
            "share of facts",
            f"{what} is the model's answer to another fact, share of the others",
            per_fact=_any_of_others(component),
            bounds=(0, 1),
            cells={"layer": "mean"},
        ),
        Quantity(
            f"extraction_over_control{suffix}",
            "difference of shares",
            f"{what} is the model's answer, minus the share of the other facts whose answer it is",
            per_fact=_over_others(component),
            bounds=(-1, 1),
            cells={"layer": "mean"},
            smallest_effect=0.05,
        ),
    )


MEASURE = Measure(
    name="extraction",
    title="where the answer is read out",
    paper=PAPER,
    quantities=(*_quantities("attn"), *_quantities("mlp", "_mlp")),
    control="`extraction_control`: the answers of the other facts in the place of the fact's own. Updates that write "
    "one frequent answer whoever is asked about have these on top as often; `extraction_over_control` takes them off.",
    reads="In how many facts attention (an MLP) writes the model's answer, right or wrong, so plainly that it is the "
    "likeliest token of what one layer adds; a claim names layers, and the array has each. Between arms read it over "
    "its control: an arm that gives one answer to many raises both. Not how much is added: a large update along other "
    "tokens may bring more of the answer (`head_contributions`). Not that the answer depends on it (`knockout`), nor "
    "that nothing was extracted where no single layer has it on top, as in most facts of small models (SmolLM2-135M: "
    "0.07 of the cities).",
    undefined="`extraction_control` and `extraction_over_control` where one fact alone is asked. Everything for facts "
    "in which the model's answer begins with a token that several correct answers share.",
    run=_run,
    cost=lambda shape, _: PASSES * shape.n_facts,
    needs=frozenset({"same_prompts"}),
    figure="extraction",
    version=2,
)
