"""What a model must be before the engine computes anything with it; tried out once a model.

The yardstick is the precision's own. In float32 two orders of the same sums give the same logits to 1e-4; in bfloat16
rounding adds up with depth and width, to 5 % in a model of seven billion parameters. So what must agree is compared
layer by layer from the same input, where rounding stays small and an error does not, and over the whole model only
against the distance that the model has from itself in eager attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.anatomy import attention_module, decoder_layers, on_input, on_output
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.mixture import Mixture
from subjattn.errors import NoActivations, UnsupportedModel


TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far two ways of computing the same logits may part, as a share of the largest logit; see `logit_tolerance`."""
LAYER_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 6e-3}
"""How far two ways of computing one layer from the same input may part, as a share of what the layer adds.

Between SDPA and eager attention ten times as much, and no less than float32's: eager takes its softmax in float32,
and in half precision rounds its scores before it.
"""
PROBE = 24
"""Tokens of the probe: enough for short sliding windows to matter."""
_own_distance: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
"""Of each model that was checked, how far its logits part between SDPA and eager attention."""


def check_answering(model: PreTrainedModel | Mixture) -> None:
    """Refuse a model, or a mixture of models, whose answers would not be exact; see `check_model`."""
    for one in [model.tuned, model.base] if isinstance(model, Mixture) else [model]:
        check_model(one)


def check_model(model: PreTrainedModel | Mixture) -> None:
    """Refuse a model whose numbers would not be exact, saying why.

    Raises:
        UnsupportedModel: the model is in training mode, rewritten by another library, not a causal decoder,
            recurrent in some layer, outside the attention interface, or differs from its own eager attention.
    """
    if isinstance(model, Mixture):
        raise NoActivations(
            "a mixture of two models has no attention and no states of its own: only answers are its own"
        )
    if model.training:
        raise UnsupportedModel("the model is in training mode, where dropout changes every number: call model.eval()")
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise UnsupportedModel(
            "the model was rewritten in place by a TransformerBridge, whose blocks do not attend as the model does: "
            "give each library a model instance of its own"
        )
    if model in _own_distance:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is not a causal decoder: it has an encoder")
    ids = probe_ids(model)
    other = ids.clone()
    other[0, -1] = 1
    layers, streams = decoder_layers(model), _Streams()
    with streams.kept(layers):
        ours, tap = _logits_through_tap(model, ids)
    if not ours.isfinite().all():
        raise UnsupportedModel(f"{name} gives logits that are not finite in {model.dtype}: try float32")
    moved = (_logits_through_tap(model, other)[0][:-1] - ours[:-1]).abs().max()
    if not float(moved) <= 0.1 * tolerance(model) * float(ours.abs().max()):
        raise UnsupportedModel(f"{name} is not a causal decoder: a later token changes what earlier positions predict")
    for layer, module in enumerate(layers):
        if attention_module(module) is not tap.seen[layer]:
            raise UnsupportedModel(f"layer {layer} of {name} does not attend in a module of its own")
    with eager(model), torch.inference_mode():
        theirs = model(input_ids=ids, use_cache=False).logits[0]
        again = _Streams()
        with streams.given(layers), again.kept(layers):
            model(input_ids=ids, use_cache=False)
    for layer, states in enumerate(zip(again.behind, streams.behind, streams.before, strict=True)):
        gap = float(strayed(*(state[0] for state in states)).max())
        if not gap <= 10 * max(1.0, LAYER_TOLERANCE[torch.float32] / layer_tolerance(model.dtype)):
            raise UnsupportedModel(
                f"{name}: in layer {layer} our attention function strays by {gap:.1e} times what rounding may in "
                f"{model.dtype}, against its own eager one"
            )
    _own_distance[model] = relative_gap(ours, theirs)


def probe_ids(model: PreTrainedModel) -> Int[Tensor, "one token"]:
    """Tokens spread over the vocabulary; a tokenizer's special tokens, at its beginning, are chaos in bfloat16."""
    vocab = model.config.get_text_config().vocab_size
    return torch.linspace(vocab // 8, vocab - 1, PROBE, device=model.device).long()[None]


def tolerance(model: PreTrainedModel) -> float:
    """See TOLERANCE."""
    return TOLERANCE.get(model.dtype, 5e-2)


def logit_tolerance(model: PreTrainedModel) -> float:
    """How far two ways of computing the logits of a model that was checked may part, as a share of the largest.

    That of its precision; in half precision, at least three times its own distance between two kinds of attention.
    """
    own = _own_distance.get(model, 0.0) if model.dtype.itemsize == 2 else 0.0
    return max(tolerance(model), 3 * own)


def layer_tolerance(dtype: torch.dtype) -> float:
    """See LAYER_TOLERANCE."""
    return LAYER_TOLERANCE.get(dtype, 3e-2)


def strayed(
    found: Float[Tensor, "token width"], expected: Float[Tensor, "token width"], before: Float[Tensor, "token width"]
) -> Float[Tensor, " token"]:
    """How far each token's output parts from the expected one, 1 being as far as two orders of the same sums may.

    That is the tolerance's share of what was added to `before`, and the rounding of the output itself.
    """
    own = layer_tolerance(found.dtype), torch.finfo(found.dtype).eps / 2
    found, expected, before = (state.double() for state in (found, expected, before))
    allowed = own[0] * (expected - before).norm(dim=-1) + own[1] * expected.norm(dim=-1)
    return (found - expected).norm(dim=-1) / allowed  # type: ignore[no-any-return]


class _Streams:
    """Residual streams before and behind every layer of a run, `[row, pos, d_model]`."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.behind: list[Tensor] = []

    @contextmanager
    def kept(self, layers: nn.ModuleList) -> Iterator[None]:
        """Keep them of the run inside."""
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(on_input(layer, self.before.append))
                stack.enter_context(on_output(layer, self.behind.append))
            yield

    @contextmanager
    def given(self, layers: nn.ModuleList) -> Iterator[None]:
        """Give every layer of the run inside what it was given here."""
        with ExitStack() as stack:
            for layer, before in zip(layers, self.before, strict=True):
                stack.enter_context(on_input(layer, partial(_instead, before)))
            yield


def _instead(state: Tensor, _: Tensor) -> Tensor:
    return state


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
