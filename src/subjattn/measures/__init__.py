"""Measures: a model and prompts in, an `xarray.DataArray` with named dimensions out.

Every array says in its attributes what it is: `unit`, `definition` and the `paper` it comes from.
The dimension `fact` carries fact ids, with subject and answer beside it as coordinates (facts of
one answer are clusters to `subjattn.interval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from subjattn.backends import Backend, BackendName, open_backend
from subjattn.engine.budget import Budget
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subjattn.prompts import Prompt

    Model = LoadedModel | PreTrainedModel


def hf_model(model: Model) -> PreTrainedModel:
    """The Hugging Face model inside; a peft wrapper is opened, its adapter stays live, and nnsight's too.

    Raises:
        BadInput: no model at all.
        UnsupportedModel: a model of TransformerLens, one of nnsight without weights, or an adapter of prompt tokens.
    """
    if isinstance(model, Arms):
        raise BadInput(
            "this takes one model: give the arms' base, or load a tuned one by itself, sa.load_model(…, adapter=…)"
        )
    inner: Any = model.model if isinstance(model, LoadedModel) else model
    library = type(inner).__module__.partition(".")[0]
    if library == "transformer_lens":
        raise UnsupportedModel(
            f"a {type(inner).__name__} does not attend as the model does (a TransformerBridge rewrites it in place): "
            "give the Hugging Face model, loaded anew by AutoModelForCausalLM.from_pretrained(…) or sa.load_model(…)"
        )
    if library == "nnsight":
        inner = inner._module
        if any(parameter.is_meta for parameter in inner.parameters()):
            raise UnsupportedModel("this nnsight model has no weights yet: make it with dispatch=True")
    if not hasattr(inner, "config"):
        raise BadInput(f"the model is {type(model).__name__} {str(model)[:40]!r}: load one by sa.load_model(…)")
    if not hasattr(inner, "get_base_model"):
        return inner  # type: ignore[no-any-return]
    if inner.active_peft_config.is_prompt_learning:
        raise UnsupportedModel("an adapter that adds prompt tokens moves every position: use a LoRA-like one")
    return inner.get_base_model()  # type: ignore[no-any-return]


def tokenizer_of(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer given, else a loaded model's own; BadInput where there is none."""
    if tokenizer is not None:
        return tokenizer
    if isinstance(model, LoadedModel):
        return model.tokenizer
    raise BadInput("a plain Hugging Face model brings no tokenizer: give tokenizer=…, or load it by load_model")


def labelled(
    name: str, values: np.ndarray, prompts: Sequence[Prompt], dims: Sequence[str] = (), **attrs: Any
) -> xr.DataArray:
    """An array over facts and `dims`, with its definition in its attributes."""
    coords: dict[str, Any] = {
        "fact": [prompt.fact_id for prompt in prompts],
        "subject": ("fact", [prompt.subject for prompt in prompts]),
        "answer": ("fact", [prompt.answers[0] for prompt in prompts]),
    }
    coords |= {dim: np.arange(size) for dim, size in zip(dims, values.shape[1:], strict=True)}
    return xr.DataArray(values, coords, ("fact", *dims), name, attrs)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse what is no prompts, such as text or facts."""
    from subjattn.prompts import Prompt

    each = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(each, Sequence):
        raise BadInput(f"prompts are a PromptSet or a list, not one {type(prompts).__name__}: {MADE_BY}")
    if text := next((one for one in each if isinstance(one, str)), None):
        raise BadInput(f"a prompt is text ({text[:40]!r}), whose subject is not known: {MADE_BY}")
    if wrong := [type(one).__name__ for one in each if not isinstance(one, Prompt)]:
        raise BadInput(f"a prompt is of type {wrong[0]}: {MADE_BY}")


MADE_BY = "make them by sa.make_prompts(facts, model.tokenizer, 'The capital of {subject} is')"


def check_askable(prompts: Sequence[Prompt]) -> None:
    """Refuse what is no prompts, and prompts whose prediction position belongs to the subject itself."""
    check_prompts(prompts)
    if not prompts:
        raise BadInput("there are no prompts to measure")
    for prompt in prompts:
        if prompt.prediction < prompt.subject_span[1]:
            raise BadInput(
                f"fact {prompt.fact_id}: the prompt {prompt.text!r} ends with its subject, so attention from the "
                "prediction position to it is attention to itself: use a template that goes on after the subject"
            )


def shortened(prompt: Prompt) -> Prompt:
    """The prompt with only the first token of its answer, where the rest is not asked for."""
    end = prompt.prediction + 2
    return replace(prompt, ids=prompt.ids[:end], tokens=prompt.tokens[:end])


def some_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """The layers asked for, each once and in their order; None: all.

    Raises:
        BadInput: none, or one that the model has not.
    """
    found = list(range(n_layers)) if layers is None else sorted({int(layer) for layer in layers})
    if not found or not 0 <= found[0] <= found[-1] < n_layers:
        raise BadInput(f"layers {layers!r}: give some of the model's, which are 0 to {n_layers - 1}")
    return found


def windows(centres: Sequence[int], size: int, n_layers: int) -> list[range]:
    """Of each centre, `size` layers around it, cut off at the first and the last layer."""
    return [range(max(0, c - size // 2), min(n_layers, c - size // 2 + size)) for c in centres]


def tokens_of(prompts: Sequence[Prompt], length: int) -> dict[str, Any]:
    """Coordinates `(fact, position)`: the prompts' tokens, empty behind their ends, and which belong to the subject."""
    tokens = [[*p.tokens[: p.prediction + 1], *[""] * (length - p.prediction - 1)] for p in prompts]
    inside = [[position in p.subject_positions for position in range(length)] for p in prompts]
    return {"token": (("fact", "position"), tokens), "in_subject": (("fact", "position"), inside)}


def opened(
    backend: BackendName | Backend,
    model: PreTrainedModel,
    memory_budget: int | None,
    prompts: Sequence[Prompt],
    *,
    patterns: bool = False,
) -> Backend:
    """The backend that a measure runs on, its batches fitting the budget; one that is open is taken as it is.

    `patterns` says whether attention weights of whole prompts are kept.
    """
    if not isinstance(backend, str):
        return backend
    return open_backend(backend, model, Budget.of(model, memory_budget, max(map(len, prompts)), patterns=patterns))
