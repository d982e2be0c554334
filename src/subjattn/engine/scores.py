"""Attention scores of one query with everything that makes them exchanged between two models.

A score is made of the query's residual stream, the key's, and the weights that turn them into query and key. Every
decoder layer is called on the streams of both models under the weights of both, four calls in batches of two; query
and key are taken where the attention function gets them, behind norms and rotary, and combined in all eight ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.engine.anatomy import decoder_layers, layer_device
from subjattn.engine.arms import check_arms, routed
from subjattn.engine.attention import Change, Tap, capped, tapped
from subjattn.engine.base import Base, run_base
from subjattn.engine.budget import Budget
from subjattn.engine.checks import check_model, relative_gap, tolerance
from subjattn.engine.interventions import Arm, Row, Run, batches, wide
from subjattn.errors import UnsupportedModel
from subjattn.prompts import Prompt


_Crossed = Float[Tensor, "prompt weights query keys head"]


@torch.inference_mode()
def crossed_log_odds(
    model: PreTrainedModel, prompts: Sequence[Prompt], arm: Arm, layers: Sequence[int], budget: Budget
) -> Iterator[tuple[list[int], Float[Tensor, "prompt layer weights query keys head"]]]:
    """Log-odds of attention from the prediction position to the subject against all other tokens it sees.

    Prompts come in batches, by their indices. Along `weights`, `query` and `keys` 0 is the base's and 1 the arm's. NaN
    where the layer's mask leaves the subject, or the rest, no token.

    Raises:
        UnsupportedModel: no such arm, or a layer called by itself gives other keys than in the whole pass.
    """
    check_model(model)
    check_arms(model, [Row(prompt, arm=arm) for prompt in prompts])
    for index in batches([2 * len(prompt) for prompt in prompts], budget.base_tokens):
        some = [prompts[i] for i in index]
        base = run_base(model, [Run(prompt, own) for own in (None, arm) for prompt in some], ())
        yield index, torch.stack([found.cpu() for found in _by_layer(model, base, arm, layers)], 1)


def _by_layer(model: PreTrainedModel, base: Base, arm: Arm, layers: Sequence[int]) -> Iterator[_Crossed]:
    """Of a base run whose rows are prompts under the base, then the same under the arm."""
    n = len(base.runs) // 2
    prompts, length = [run.prompt for run in base.runs[:n]], base.streams[0].shape[1]
    at = torch.tensor([prompt.prediction for prompt in prompts])
    in_subject = torch.zeros(n, length, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        in_subject[i, list(prompt.subject_positions)] = True
    seen: list[tuple[Tensor, Tensor]] = []
    scaling: list[tuple[float, float | None]] = []

    def attend(
        _layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, _: Change | None
    ) -> Tensor:
        row = torch.arange(2 * n, device=query.device)
        seen.append((query[row, :, at.repeat(2).to(query.device)].unflatten(0, (2, n)), key.unflatten(0, (2, n))))
        scaling.append((scale, softcap))
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1])

    with routed(model, [arm]) as routes, tapped(model, Tap(attend=attend), layers):
        codes = routes.of_runs(base.runs, length)
        for layer in layers:
            for given in (codes, codes.roll(n, 0)):
                routes.choose(given)
                args, kwargs = base.calls[layer]
                decoder_layers(model)[layer](base.streams[layer], *args, **kwargs)
            (own_query, own_key), (query, key) = seen
            _check_same(model, layer, own_key.flatten(0, 1), base.keys[layer])
            device = layer_device(decoder_layers(model)[layer])
            rows = torch.arange(n, device=device)
            visible = base.visible(layer, rows, at.to(device), length)
            queries, keys = _by_weights(own_query, query), _by_weights(own_key, key)
            yield _log_odds(_scores(queries, keys, *scaling[-1]), visible, in_subject.to(device))
            seen.clear()


def _by_weights(own: Float[Tensor, "stream ..."], other: Float[Tensor, "stream ..."]) -> Float[Tensor, "w stream ..."]:
    """From states under the weights of the stream's own model, and under the other's."""
    return torch.stack([torch.stack([own[0], other[1]]), torch.stack([other[0], own[1]])])


def _scores(
    query: Float[Tensor, "w stream prompt head d_head"],
    key: Float[Tensor, "w stream prompt kv_head pos d_head"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "prompt w query keys head pos"]:
    groups = wide(query).unflatten(3, (key.shape[3], -1))
    scores = torch.einsum("wqnvgd,wknvpd->nwqkvgp", groups, wide(key)).flatten(4, 5)
    return capped(scores * scale, softcap)


def _log_odds(
    scores: Float[Tensor, "prompt w query keys head pos"],
    visible: Bool[Tensor, "prompt pos"],
    in_subject: Bool[Tensor, "prompt pos"],
) -> _Crossed:
    def logsumexp(keys: Tensor) -> Tensor:
        some = keys[:, None, None, None, None]
        found = scores.masked_fill(~some, -torch.inf).logsumexp(-1)
        return found.masked_fill(~some.any(-1), torch.nan)

    return logsumexp(visible & in_subject) - logsumexp(visible & ~in_subject)


def _check_same(model: PreTrainedModel, layer: int, found: Tensor, expected: Tensor) -> None:
    gap = relative_gap(found, expected)
    if not gap <= tolerance(model):
        raise UnsupportedModel(
            f"layer {layer} of {type(model).__name__} called by itself gives keys that part by {gap:.1e} of their size "
            "from those of a whole pass, so its scores cannot be split"
        )
