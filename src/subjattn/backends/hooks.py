"""Whole forward passes with plain hooks, on the model itself: the oracle of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from subjattn.engine import forward
from subjattn.engine.interventions import Output, Row
from subjattn.prompts import Prompt


class Hooks:
    """See engine/forward.py."""

    name = "hooks"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:  # noqa: ARG002
        return forward.forward(self.model, rows)

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        return forward.attention_rows(self.model, prompts, value_norms=value_norms)
