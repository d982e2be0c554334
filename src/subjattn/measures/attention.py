"""Attention from the prediction position: to the subject, and to every token of single prompts.

Only one row of each head's pattern is computed beside the model's own attention; `[head, T, T]` is
never held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from subjattn.engine.forward import forward
from subjattn.engine.interventions import Output, Row
from subjattn.measures import check_askable, hf_model, labelled
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

PAPER = "Ghosal et al. 2024 (app. B.3), after Yuksekgonul et al. 2024; they take the maximum over subject tokens"


def subject_attention(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Attention weight from the prediction position, summed over the subject's tokens.

    A weight says where a head reads, not what it moves: where the subject arrives by relay through the
    words in between, this number means little. Read it beside `knockout`.

    Returns:
        `(fact, layer, head)`, query heads, each a share of 1.

    Raises:
        BadInput: a prompt ends with its subject.
        UnsupportedModel: the model's attention cannot be read exactly.
    """
    check_askable(prompts)
    values: np.ndarray | None = None
    for output in forward(hf_model(model), [Row(prompt) for prompt in prompts], keep_prediction_row=True):
        rows = _prediction_rows(output)
        if values is None:
            values = np.empty((len(prompts), *rows.shape[1:3]), np.float32)
        for i, row in zip(output.index, rows, strict=True):
            values[i] = row[..., list(prompts[i].subject_positions)].sum(-1)
    assert values is not None
    return labelled(
        "attention_to_subject",
        values,
        prompts,
        ("layer", "head"),
        unit="share of attention",
        definition="attention weight from the prediction position, summed over the subject's tokens",
        paper=PAPER,
    )


def token_attention(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Attention weight from the prediction position to every token, mean over heads.

    Returns:
        `(fact, layer, position)`, NaN behind a prompt's end; coordinate `token` `(fact, position)` holds
        the tokens' text and `in_subject` marks those of the subject.
    """
    check_askable(prompts)
    length = max(prompt.prediction + 1 for prompt in prompts)
    values: np.ndarray | None = None
    for output in forward(hf_model(model), [Row(prompt) for prompt in prompts], keep_prediction_row=True):
        rows = _prediction_rows(output).mean(2)
        if values is None:
            values = np.full((len(prompts), rows.shape[1], length), np.nan, np.float32)
        for i, row in zip(output.index, rows, strict=True):
            n = prompts[i].prediction + 1
            values[i, :, :n] = row[:, :n]
    assert values is not None
    array = labelled(
        "token_attention",
        values,
        prompts,
        ("layer", "position"),
        unit="share of attention",
        definition="attention weight from the prediction position to each token, mean over heads",
        paper="Ghosal et al. 2024 (figs. 3b and 7)",
    )
    tokens = [[*p.tokens[: p.prediction + 1], *[""] * (length - p.prediction - 1)] for p in prompts]
    inside = [[position in p.subject_positions for position in range(length)] for p in prompts]
    return array.assign_coords(token=(("fact", "position"), tokens), in_subject=(("fact", "position"), inside))


def _prediction_rows(output: Output) -> np.ndarray:
    """`[row, layer, head, key]` of the prediction position."""
    weights = output.attention
    return np.stack([weights[layer][:, :, 0].cpu().numpy() for layer in sorted(weights)], axis=1)
