"""Attention from the prediction position: to the subject, and to every token of single prompts.

Only one row of each head's pattern is computed beside the model's own attention; `[head, T, T]` is
never held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr
from torch import Tensor

from subjattn.backends import Backend, BackendName
from subjattn.engine.forward import attention_rows
from subjattn.engine.interventions import Output
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, tokens_of
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda row: row.sum(-1),
    "max": lambda row: row.max(-1),
    "last": lambda row: row[..., -1],
}
PAPER = "Ghosal et al. 2024 (app. B.3), after Yuksekgonul et al. 2024; they take the maximum over subject tokens"


def subject_attention(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    reduce: Literal["sum", "max", "last"] = "sum",
    value_weighted: bool = False,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.DataArray:
    """Attention from the prediction position to the subject.

    A weight says where a head reads, not what it moves: where the subject arrives by relay through the
    words in between, this number means little. Read it beside `knockout`. Weighted by values, a head that
    reads a token whose value is small counts for little (Kobayashi et al. 2020).

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        reduce: over the subject's tokens, `sum`, `max` (Ghosal et al. 2024) or `last` (its last token alone).
        value_weighted: weight × ‖value·W_O‖, the length of what the head writes for a token, W_O's bias and
            norms behind it left out.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, layer, head)`, query heads, each a share of 1 or, weighted, a length in the residual stream.

    Raises:
        BadInput: a prompt ends with its subject, or an argument does not fit.
        UnsupportedModel: the model's attention cannot be read exactly.
    """
    check_askable(prompts)
    if reduce not in REDUCTIONS:
        raise BadInput(f"reduce {reduce!r} is not one of {', '.join(REDUCTIONS)}")
    values: np.ndarray | None = None
    run = opened(backend, hf_model(model), memory_budget, prompts)
    for output in run.attention_rows(prompts, value_norms=value_weighted):
        rows = prediction_rows(output)
        if value_weighted:
            rows = rows * by_layer(output.value_norms)
        if values is None:
            values = np.empty((len(prompts), *rows.shape[1:3]), np.float32)
        for i, row in zip(output.index, rows, strict=True):
            values[i] = REDUCTIONS[reduce](row[..., list(prompts[i].subject_positions)])
    assert values is not None
    weight = "attention weight × ‖value·W_O‖" if value_weighted else "attention weight"
    over = {"sum": "summed over the subject's tokens", "max": "largest of the subject's tokens"}
    return labelled(
        "attention_to_subject",
        values,
        prompts,
        ("layer", "head"),
        unit="length in the residual stream" if value_weighted else "share of attention",
        definition=f"{weight} from the prediction position, {over.get(reduce, 'to the last subject token')}",
        paper=f"{PAPER}; weighting after Kobayashi et al. 2020" if value_weighted else PAPER,
        backend=run.name,
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
    for output in attention_rows(hf_model(model), prompts):
        rows = prediction_rows(output).mean(2)
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
    return array.assign_coords(tokens_of(prompts, length))


def prediction_rows(output: Output) -> np.ndarray:
    """`[row, layer, head, key]` of the prediction position."""
    return by_layer({layer: weights[:, :, 0] for layer, weights in output.attention.items()})


def by_layer(each: dict[int, Tensor]) -> np.ndarray:
    """`[row, layer, …]` of arrays by layer."""
    return np.stack([each[layer].cpu().numpy() for layer in sorted(each)], axis=1)
