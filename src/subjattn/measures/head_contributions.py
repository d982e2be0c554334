"""Direct logit attribution: what every head, by the token it read, and every MLP adds to the answer's logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from subjattn.engine.budget import Budget
from subjattn.engine.contributions import Added, Reading, contributions, reading
from subjattn.measures import check_askable, hf_model, labelled
from subjattn.measures.record import Asked, Measure, PerFact, Quantity
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

SOURCES = ("first_token", "before_subject", "subject", "after_subject", "prediction")
"""Where a head reads: every token of a prompt belongs to one. `first_token`, where many heads rest, is the prompt's
first unless that belongs to the subject."""
OF = ("answer", "others")
PAPER = "Elhage et al. 2021; split by source token after Chughtai et al. 2024"


def head_contributions(model: Model, prompts: Sequence[Prompt], *, memory_budget: int | None = None) -> xr.Dataset:
    """What heads and MLPs add to the logit of the answer at the prediction position, heads by the tokens they read.

    A logit is taken minus the mean of the vocabulary's, and the final norm is kept at the scale that it had. What is
    added lies behind norms that stand behind attention and MLP (Gemma 2 and 3, OLMo 2). It is the *direct* part alone:
    what a head moves to positions that others read is counted where it is read, so a small contribution does not say
    that a head does not matter; `ablation` does.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask; their answers' first tokens are looked at.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        In logits, with `of` the first token of the `answer`, and of the `others`: the mean over the first tokens of the
        other prompts' answers, NaN where all are the same.

        * `head_contribution` `(fact, of, layer, head, source)`, query heads, sources `SOURCES`;
        * `mlp_contribution` and `bias_contribution` (of attention) `(fact, of, layer)`;
        * `embedding_contribution` and `offset` (of the final norm and the unembedding) `(fact, of)`;
        * `logit` `(fact, of)`, of which all these are the sum.

    Raises:
        BadInput: a prompt without a subject, or one that ends with it.
        UnsupportedModel: the model's residual stream is no sum of contributions.
    """
    check_askable(prompts)
    hf = hf_model(model)
    tokens = [prompt.answer_ids[0] for prompt in prompts]
    budget = Budget.of(hf, memory_budget, max(prompt.prediction + 1 for prompt in prompts))
    parts: dict[str, np.ndarray] = {}
    for added in contributions(hf, prompts, batch_tokens=budget.base_tokens):
        for number, of in enumerate(OF):
            weights = torch.stack([_weights(tokens, i, of, hf.get_output_embeddings()) for i in added.index])
            read = reading(hf, added.last, weights.to(added.last.device))
            for name, values in _along(added, read, [prompts[i] for i in added.index]).items():
                whole = parts.setdefault(name, np.full((len(prompts), len(OF), *values.shape[1:]), np.nan))
                whole[added.index, number] = values.cpu().numpy()
            capped = read.capped
    return _labelled(parts, prompts, ", before the model's soft-cap" if capped else "")


def _weights(tokens: Sequence[int], own: int, of: str, head: torch.nn.Module) -> Tensor:
    """Weights of the logits `[vocab]`: of the tokens looked at, minus the mean of the vocabulary."""
    size = int(head.weight.shape[0])  # type: ignore[union-attr, index, arg-type]
    weights = torch.full((size,), -1 / size)
    if of == "answer":
        weights[tokens[own]] += 1
        return weights
    others = sorted(set(tokens) - {tokens[own]})
    if not others:
        return torch.full((size,), np.nan)
    weights[others] += 1 / len(others)
    return weights


def _along(added: Added, read: Reading, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """All contributions of a batch along what its logits read, facts first."""
    heads, biases = zip(*(one.towards(read.direction) for one in added.heads), strict=True)
    by_token = torch.stack([one.to(read.direction) for one in heads], 1)
    owners = torch.zeros(len(prompts), len(SOURCES), by_token.shape[-1])
    for i, prompt in enumerate(prompts):
        for position, source in enumerate(sources_of(prompt)):
            owners[i, SOURCES.index(source), position] = 1
    return {
        "head_contribution": torch.einsum("rlhk,rsk->rlhs", by_token, owners.to(by_token)),
        "mlp_contribution": (added.mlp * read.direction).sum(-1).T,
        "bias_contribution": torch.stack([one.to(read.direction) for one in biases], 1),
        "embedding_contribution": (added.embed * read.direction).sum(-1),
        "offset": read.offset,
        "logit": (added.last * read.direction).sum(-1) + read.offset,
    }


def sources_of(prompt: Prompt) -> list[str]:
    """Of every position up to the prediction, its source."""
    start, stop = prompt.subject_span
    found = ["before_subject"] * start + ["subject"] * (stop - start)
    found += ["after_subject"] * (prompt.prediction - stop) + ["prediction"]
    return found if start == 0 else ["first_token", *found[1:]]


_IN_WORDS = {
    "head_contribution": (
        "what a head writes, by the token that it read, adds to the logit",
        ("layer", "head", "source"),
    ),
    "mlp_contribution": ("what an MLP adds to the logit", ("layer",)),
    "bias_contribution": ("what the biases of attention add to the logit", ("layer",)),
    "embedding_contribution": ("what the embedding at the prediction position adds to the logit", ()),
    "offset": ("what the biases of the final norm and the unembedding add to the logit", ()),
    "logit": ("logit minus the mean of the vocabulary's; the sum of all contributions", ()),
}


def _labelled(parts: dict[str, np.ndarray], prompts: Sequence[Prompt], capped: str) -> xr.Dataset:
    arrays = {}
    for name, (definition, dims) in _IN_WORDS.items():
        array = labelled(name, parts[name], prompts, ("of", *dims), unit="logits", definition=definition + capped)
        array = array.assign_coords(of=list(OF))
        arrays[name] = array.assign_coords(source=list(SOURCES)) if "source" in dims else array
    return xr.Dataset(arrays, attrs={"paper": PAPER})


def to_the_right_answer(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """A contribution to the answer over that to the others: what tells subjects apart, not what fits a relation."""
    return dataset[name].sel(of="answer", drop=True) - dataset[name].sel(of="others", drop=True)


def _from(*sources: str) -> PerFact:
    return lambda dataset: (
        to_the_right_answer(dataset, "head_contribution")
        .sel(source=list(sources))
        .sum(("source", "layer", "head"), skipna=False)
    )


def _run(asked: Asked, _: object) -> xr.Dataset:
    found = head_contributions(asked.model, asked.prompts, memory_budget=asked.memory_budget)
    asked.tell(len(asked.prompts))
    return found


_DEFINITION = "to the logit of the right answer over the mean of the other facts' answers"

MEASURE = Measure(
    name="head_contributions",
    title="direct logit attribution of heads and MLPs",
    paper=PAPER,
    quantities=(
        Quantity(
            "contribution_from_subject",
            "logits",
            f"what all heads add {_DEFINITION}, reading the subject's tokens at the prediction position",
            per_fact=_from("subject"),
            cells={"layer": "mean", "head": "mean"},
            smallest_effect=0.2,
        ),
        Quantity(
            "contribution_from_elsewhere",
            "logits",
            f"what all heads add {_DEFINITION}, reading all other tokens at the prediction position",
            per_fact=_from(*(source for source in SOURCES if source != "subject")),
            cells={"layer": "mean", "head": "mean"},
            smallest_effect=0.2,
        ),
        Quantity(
            "mlp_contribution",
            "logits",
            f"what all MLPs add {_DEFINITION} at the prediction position",
            per_fact=lambda dataset: to_the_right_answer(dataset, "mlp_contribution").sum("layer", skipna=False),
            cells={"layer": "mean"},
            smallest_effect=0.2,
        ),
    ),
    control="`contribution_from_elsewhere`: the same heads, reading all other tokens. The logit is taken over that of "
    "the other facts' answers, in which what fits the relation and not the subject cancels. A model whose "
    "contributions do not add up to its logit is refused.",
    reads="What heads and MLPs write straight into the answer, the final norm kept at the scale it had. Not all that "
    "they do: what a head moves to positions that others read is counted where it is read, so that a small "
    "contribution does not say that a head does not matter (`hypotheses`, `sa.ablation`). Contributions of both signs "
    "cancel in the sum.",
    undefined="For a fact where the answers of all others begin with the token that its own begins with.",
    run=_run,
    cost=lambda shape, _: 2 * shape.n_facts,
    needs=frozenset({"subject", "same_prompts"}),
    figure="head_contributions",
)
