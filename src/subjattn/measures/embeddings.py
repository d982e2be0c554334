"""Where a prompt lies among others: the mean of its tokens' input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import xarray as xr

from subjattn.measures import hf_model, labelled
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model


@torch.inference_mode()
def prompt_embeddings(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Mean input embedding over each prompt's tokens, the answer left out: an array `(fact, dim)`."""
    hf = hf_model(model)
    weights = hf.get_input_embeddings().weight
    means = [weights[list(prompt.ids[: prompt.prediction + 1])].float().mean(0) for prompt in prompts]  # type: ignore[index]
    definition = "mean of the model's input embeddings over the prompt's tokens"
    values = torch.stack(means).cpu().numpy()
    return labelled("prompt_embedding", values, prompts, ("dim",), unit="", definition=definition)
