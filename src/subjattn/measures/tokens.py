"""The measure `token_attention`: single prompts, looked at token by token."""

from __future__ import annotations

import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.measures.attention import token_attention
from subjattn.measures.record import Asked, Measure, Settings


class TokensSettings(Settings):
    facts: PositiveInt = Field(4, description="prompts that are shown, known facts first")


def _run(asked: Asked, settings: TokensSettings) -> xr.Dataset:
    chosen = sorted(asked.order, key=lambda fact_id: fact_id not in asked.known)[: settings.facts]
    array = token_attention(asked.model, asked.by_id(chosen))
    asked.tell(len(chosen))
    return array.to_dataset()


MEASURE = Measure(
    name="token_attention",
    title="attention over the tokens of single prompts",
    paper="Ghosal et al. 2024 (figs. 3b and 7)",
    quantities=(),
    control="None: it is looked at. The first token is a sink, and lies beyond the figure's scale where it would hide "
    "the rest.",
    reads="Examples, mean over heads, of facts that the model knows where there are any. No evidence: it has no "
    "interval, and a weight says where a head reads, not what it moves.",
    undefined="It has no numbers per fact.",
    run=_run,
    cost=lambda _, settings: settings.facts,
    settings=TokensSettings,
    needs=frozenset({"subject", "same_prompts", "known"}),
    figure="tokens",
)
