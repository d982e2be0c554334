"""Why a head looks more or less at the subject after tuning: other weights, another question, or other keys.

The softmax ignores what is added to all scores of a query, so what is split is the log-odds of the subject against
everything else that the prediction position sees. It depends on the weights of the layer up to the scores, the
residual stream at the prediction position and those at the keys, each the base's or the tuned model's. Each one's share
is its Shapley value (Shapley 1953) over the eight combinations; shares add up to the whole change.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.budget import Budget
from subjattn.engine.scores import crossed_log_odds
from subjattn.measures import check_askable, labelled, shortened, some_layers
from subjattn.measures.record import Asked, Measure, Quantity, Settings
from subjattn.measures.swapping import named, only_arm, shapley
from subjattn.models.arms import Arms


if TYPE_CHECKING:
    from subjattn.prompts import Prompt

PLAYERS = ("weights", "query", "keys")
COMBINATIONS = tuple(frozenset(some) for n in range(4) for some in combinations(PLAYERS, n))
_PAPER = "Shapley values (Shapley 1953) of what an attention score is made of"


def score_split(
    arms: Arms,
    prompts: Sequence[Prompt],
    tuned: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Why heads of a tuned model look more or less at the subject than the base's do.

    Weights are those of the layer up to the scores: projections of queries and keys, with their biases and the norms
    before and behind them. Residual streams are those before the layer; rotary positions belong to them. The share of
    `query` and `keys` is what earlier layers did.

    Args:
        arms: a base and its tuned models, from `load_arms`.
        prompts: whom to ask.
        tuned: the arm; None: the only one.
        layers: those to compute; None: all.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        A Dataset: `log_odds` `(fact, combination, layer, head)`, nats, log of attention from the prediction position to
        the subject minus log of attention to all other tokens, with what the combination names from the tuned model
        (`base`, `weights`, `query`, `keys`, `weights+query`, …) and the rest from the base; and `share` `(fact, part,
        layer, head)`, nats, of `weights`, `query` and `keys`, which add up to the tuned model's log-odds minus the
        base's. NaN where a layer's window leaves the subject, or the rest, no token.

    Raises:
        BadInput: no prompts, no such arm or layer, or a prompt that ends with its subject.
        UnsupportedModel: the model's attention cannot be read exactly.
    """
    check_askable(prompts)
    name = only_arm(arms, tuned)
    arm, model = arms.arm(name), arms.base.model
    assert arm is not None
    chosen = some_layers(layers, len(decoder_layers(model)))
    asked = [shortened(prompt) for prompt in prompts]
    budget = Budget.of(model, memory_budget, max(map(len, asked)))
    found: dict[int, np.ndarray] = {}
    for index, crossed in crossed_log_odds(model, asked, arm, chosen, budget):
        found |= zip(index, crossed.double().numpy(), strict=True)
    every = np.stack([found[i] for i in range(len(asked))])
    by_player = np.moveaxis(every, (2, 3, 4), (0, 1, 2))
    values = {some: by_player[tuple(int(player in some) for player in PLAYERS)] for some in COMBINATIONS}
    words = "log-odds of the subject against all other tokens, from the prediction position"
    odds = np.stack([*values.values()], 1)
    arrays: dict[str, tuple[np.ndarray, str, str]] = {
        "log_odds": (odds, "combination", f"{words}, with what is named from the tuned model"),
        "share": (np.moveaxis(shapley(values, PLAYERS), -1, 1), "part", f"Shapley value in the change of the {words}"),
    }
    names = {"combination": [named(some, PLAYERS) for some in COMBINATIONS], "part": list(PLAYERS)}
    about = {"unit": "nats", "paper": _PAPER, "tuned": name}
    return xr.Dataset(
        {
            label: labelled(
                label, array, prompts, (dim, "layer", "head"), definition=definition, **about
            ).assign_coords({dim: names[dim], "layer": chosen})
            for label, (array, dim, definition) in arrays.items()
        }
    )


class SplitSettings(Settings):
    facts: PositiveInt = Field(16, description="facts whose attention scores are split")


def _run(asked: Asked, settings: SplitSettings) -> xr.Dataset:
    few = asked.few(settings.facts)
    found = score_split(asked.both, few, memory_budget=asked.memory_budget)
    asked.tell(6.0 * len(few))
    return found.rename(share="score_share", log_odds="subject_log_odds")


def _shares(dataset: xr.Dataset) -> xr.DataArray:
    array = dataset["score_share"]
    return array.mean(("layer", "head")).transpose("fact", "part").assign_attrs(array.attrs)


MEASURE = Measure(
    name="score_split",
    title="why heads look elsewhere",
    paper=_PAPER,
    quantities=(
        Quantity(
            "score_share",
            "nats",
            "Shapley value of the layer's weights, the prediction position's state and the keys' states in the change "
            "of the log-odds of the subject against all other tokens, mean over layers and heads",
            per_fact=_shares,
            cells={"layer": "mean", "head": "mean"},
            smallest_effect=0.05,
        ),
    ),
    control="No random one: the three shares add up to the whole change in every fact and head, and each is an average "
    "over all orders.",
    reads="Which of three things moved a head's log-odds of the subject: its own weights, or what earlier layers made "
    "of the query or the keys. Not that the answer depends on it (`transfer` of `q`, `k` and `pattern`). A mean over "
    "heads hides heads that go opposite ways: a claim names some.",
    undefined="Layers whose window leaves the subject, or all else, no token are left out of the mean.",
    run=_run,
    cost=lambda shape, settings: 6.0 * min(settings.facts, shape.n_facts),
    settings=SplitSettings,
    needs=frozenset({"subject", "same_prompts", "base"}),
)
