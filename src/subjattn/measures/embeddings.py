"""Where a prompt lies among others: the mean of its tokens' input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from subjattn.measures import hf_model, labelled
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model
    from subjattn.models import LoadedModel


@torch.inference_mode()
def prompt_embeddings(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Mean input embedding over each prompt's tokens, the answer left out: an array `(fact, dim)`."""
    hf = hf_model(model)
    weights = hf.get_input_embeddings().weight
    means = [weights[list(prompt.ids[: prompt.prediction + 1])].float().mean(0) for prompt in prompts]  # type: ignore[index]
    definition = "mean of the model's input embeddings over the prompt's tokens"
    values = torch.stack(means).cpu().numpy()
    return labelled("prompt_embedding", values, prompts, ("dim",), unit="", definition=definition)


@torch.inference_mode()
def name_embeddings(model: LoadedModel, names: Sequence[str]) -> np.ndarray:
    """Mean input embedding over the tokens of each name, as it stands behind a space: `(name, dim)`."""
    weights = model.model.get_input_embeddings().weight
    ids = model.tokenizer([f" {name}" for name in names], add_special_tokens=False).input_ids
    return torch.stack([weights[own].float().mean(0) for own in ids]).cpu().numpy()  # type: ignore[index]
