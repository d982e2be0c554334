"""What a model must be before the engine computes anything with it; tried out once a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.anatomy import attention_module, decoder_layers
from subjattn.engine.attention import Tap, tapped
from subjattn.errors import UnsupportedModel


TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far two ways of computing the same logits may part, as a share of the largest logit.

Between SDPA and eager attention ten times as much, and no less than float32's: eager takes its softmax in float32.
"""
PROBE = 24
"""Tokens of the probe: enough for short sliding windows to matter."""
_checked: WeakSet[nn.Module] = WeakSet()


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose numbers would not be exact, saying why.

    Raises:
        UnsupportedModel: the model is in training mode, rewritten by another library, not a causal decoder,
            recurrent in some layer, outside the attention interface, or differs from its own eager attention.
    """
    if model.training:
        raise UnsupportedModel("the model is in training mode, where dropout changes every number: call model.eval()")
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise UnsupportedModel(
            "the model was rewritten in place by a TransformerBridge, whose blocks do not attend as the model does: "
            "give each library a model instance of its own"
        )
    if model in _checked:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is not a causal decoder: it has an encoder")
    ids = probe_ids(model)
    other = ids.clone()
    other[0, -1] = 1
    ours, tap = _logits_through_tap(model, ids)
    if not ours.isfinite().all():
        raise UnsupportedModel(f"{name} gives logits that are not finite in {model.dtype}: try float32")
    moved = (_logits_through_tap(model, other)[0][:-1] - ours[:-1]).abs().max()
    if not float(moved) <= 0.1 * tolerance(model) * float(ours.abs().max()):
        raise UnsupportedModel(f"{name} is not a causal decoder: a later token changes what earlier positions predict")
    for layer, module in enumerate(decoder_layers(model)):
        if attention_module(module) is not tap.seen[layer]:
            raise UnsupportedModel(f"layer {layer} of {name} does not attend in a module of its own")
    with eager(model), torch.inference_mode():
        theirs = model(input_ids=ids, use_cache=False).logits[0]
    gap = relative_gap(ours, theirs)
    if not gap <= 10 * max(tolerance(model), TOLERANCE[torch.float32]):
        raise UnsupportedModel(
            f"{name}: our attention function moves its logits by {gap:.1e} of their size against its own eager one"
        )
    _checked.add(model)


def probe_ids(model: PreTrainedModel) -> Int[Tensor, "one token"]:
    """Tokens spread over the vocabulary; a tokenizer's special tokens, at its beginning, are chaos in bfloat16."""
    vocab = model.config.get_text_config().vocab_size
    return torch.linspace(vocab // 8, vocab - 1, PROBE, device=model.device).long()[None]


def tolerance(model: PreTrainedModel) -> float:
    """See TOLERANCE."""
    return TOLERANCE.get(model.dtype, 5e-2)


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@torch.inference_mode()
def _logits_through_tap(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tap]:
    layers, tap = range(len(decoder_layers(model))), Tap()
    with tapped(model, tap, None):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    missing = [layer for layer in layers if layer not in tap.seen]
    if missing:
        raise UnsupportedModel(
            f"layers {missing} of {type(model).__name__} do not attend through transformers' attention interface "
            "(recurrent or linear attention, or code of its own)"
        )
    return logits, tap


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend by its own plain arithmetic for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
