"""Whole forward passes with plain hooks, on the model itself: the oracle of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from subjattn.engine import forward
from subjattn.engine.checks import check_model, eager
from subjattn.engine.interventions import Output, Row, wide
from subjattn.prompts import Prompt


class Hooks:
    """See engine/forward.py."""

    name = "hooks"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:  # noqa: ARG002
        return forward.forward(self.model, rows)

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        """Rows of the model's own `output_attentions`, one prompt at a time; norms are the engine's."""
        check_model(self.model)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.ids[: prompt.prediction + 1]], device=self.model.device)
            with eager(self.model), torch.inference_mode():
                patterns = self.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
            rows = {layer: wide(pattern)[:, :, -1:] for layer, pattern in enumerate(patterns)}
            output = Output([i], [Row(prompt)], torch.empty(0), attention=rows)
            if value_norms:
                output.value_norms = next(forward.attention_rows(self.model, [prompt], value_norms=True)).value_norms
            yield output
