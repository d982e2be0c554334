"""Heads chosen on some facts, so that a hypothesis about them is tested on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.top import halves, top
from subjattn.measures import check_prompts, labelled
from subjattn.measures.attention import subject_attention
from subjattn.measures.head_contributions import head_contributions
from subjattn.prompts import Prompt, PromptSet


if TYPE_CHECKING:
    from subjattn.measures import Model

ChosenBy = Literal["head_contributions", "attention_to_subject"]


def choose_heads(
    model: Model,
    prompts: PromptSet,
    n: int = 5,
    *,
    by: ChosenBy = "head_contributions",
    split: int = 0,
    memory_budget: int | None = None,
) -> tuple[list[tuple[int, int]], PromptSet]:
    """The heads that do most with the subject in one half of the facts, and the other half, to test them on.

    A set that is chosen on the facts it is tested on looks needed by choice alone. Chosen on the base model and on
    other facts, it is the same set for every arm: `test_hypothesis(tuned, left, heads=heads, base=base)`, or named in
    the settings of the measure `hypotheses` in a study that asks other facts than these.

    Args:
        model: who chooses, such as the base: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: facts asked in one style.
        n: how many heads.
        by: what is largest, mean over the facts: `head_contributions`, what a head writes, reading the subject, into
            the answer over the other facts' answers (direct logit attribution); or `attention_to_subject`, summed over
            its tokens.
        split: seed of the random halving; facts of one answer stay together.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        The heads `(layer, head)`, the largest first, and the prompts that had no say in it.

    Raises:
        BadInput: too few facts to halve, or fewer heads than `n` that have a value.
        UnsupportedModel: the model's heads cannot be read exactly.
    """
    check_prompts(prompts)
    if by not in get_args(ChosenBy):
        raise BadInput(f"by {by!r} is not one of {', '.join(get_args(ChosenBy))}")
    every = labelled("facts", np.zeros(len(prompts)), prompts)
    deciding = set(halves(every, split)[0]["fact"].values.tolist())
    sides = [[prompt for prompt in prompts if (prompt.fact_id in deciding) == chosen] for chosen in (True, False)]
    table = top(_by_head(model, sides[0], by, memory_budget), n, by="highest")
    if len(table) < n:
        raise BadInput(f"n={n}: {len(table)} heads have a value by {by} in {len(sides[0])} facts")
    heads = [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]
    return heads, PromptSet(prompts.style, tuple(sides[1]))


def _by_head(model: Model, prompts: Sequence[Prompt], by: ChosenBy, memory_budget: int | None) -> xr.DataArray:
    """What heads are chosen by, `(fact, layer, head)`."""
    if by == "attention_to_subject":
        return subject_attention(model, prompts, memory_budget=memory_budget)
    array = head_contributions(model, prompts, memory_budget=memory_budget)["head_contribution"]
    array = array.sel(source="subject", drop=True)
    return array.sel(of="answer", drop=True) - array.sel(of="others", drop=True)
