"""Slow, independent computations: one unpadded forward at a time, by the model's own eager attention.

Nothing here imports the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.prompts import Prompt


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def answer_logprob(model: PreTrainedModel, prompt: Prompt, mask: Tensor | None = None) -> float:
    """Summed log-probability of the answer, with an optional additive `[1, 1, T, T]` mask of one's own."""
    ids = torch.tensor([prompt.ids])
    extra = {} if mask is None else {"attention_mask": mask}
    with eager(model):
        logprobs = model(ids, use_cache=False, **extra).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True))


def hand_mask(model: PreTrainedModel, prompt: Prompt, queries: list[int], keys: list[int]) -> Tensor:
    """Causal (and sliding) mask built by hand with edges taken out."""
    n, window = len(prompt), getattr(model.config, "sliding_window", None) or 10**9
    mask = torch.full((n, n), torch.finfo(torch.float32).min)
    for query in range(n):
        for key in range(n):
            if key <= query and query - key < window and not (query in queries and key in keys):
                mask[query, key] = 0.0
    return mask[None, None]


@torch.no_grad()
def attention_weights(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """`[layer, head, key]` from the prediction position, through the model's own `output_attentions`."""
    ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
    with eager(model):
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    return torch.stack(attentions)[:, 0, :, -1]


@torch.no_grad()
def patched_logit_diff(
    model: PreTrainedModel, clean: Prompt, corrupt: Prompt, layer: int, positions: list[int]
) -> float:
    """Logit difference of the corrupt prompt with the clean residual before a layer at positions, by plain hooks."""
    module = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)[layer]
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(torch.tensor([clean.ids[: clean.prediction + 1]]), use_cache=False)
    handle.remove()

    def put(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[:, positions] = kept[0][:, positions]
        return (hidden, *args[1:])

    handle = module.register_forward_pre_hook(put)
    logits = model(torch.tensor([corrupt.ids[: corrupt.prediction + 1]]), use_cache=False).logits[0, -1].double()
    handle.remove()
    return float(logits[clean.answer_ids[0]] - logits[corrupt.answer_ids[0]])
