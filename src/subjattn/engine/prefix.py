"""Base runs of prompts that begin alike, such as few-shot prompts: the common beginning is computed once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.engine.anatomy import decoder_layers, layer_device, n_heads, on_component
from subjattn.engine.arms import routed
from subjattn.engine.attend import Tokens, attend
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.base import Base, run_base
from subjattn.engine.budget import Budget
from subjattn.engine.interventions import OUTPUTS, Component, Row, Run, pieces
from subjattn.engine.unembed import embed, unembed
from subjattn.prompts import Prompt


def run_shared(
    model: PreTrainedModel,
    runs: list[Run],
    components: Collection[Component],
    budget: Budget,
    queries: Sequence[int] = (),
) -> Base:
    """`run_base`, the tokens that all prompts begin with computed once where that saves half of the work.

    Two arms have nothing in common, whatever their prompts begin with, and a noised run nothing from its noise on.
    """
    shared = shared_tokens([run.prompt for run in runs]) if len({run.arm for run in runs}) == 1 else 0
    shared = min([shared, *(min(run.noise.at(run.prompt)) for run in runs if run.noise)])
    if 2 * shared * (len(runs) - 1) < sum(len(run.prompt) for run in runs):
        return run_base(model, runs, components, queries)
    return _run_suffixes(model, runs, components, budget, shared, queries)


def shared_tokens(prompts: list[Prompt]) -> int:
    """Tokens at the beginning that all prompts have in common, short of any prompt's last."""
    shared = 0
    for tokens in zip(*(prompt.ids[: prompt.prediction] for prompt in prompts), strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


@torch.inference_mode()
def _run_suffixes(
    model: PreTrainedModel,
    runs: list[Run],
    components: Collection[Component],
    budget: Budget,
    shared: int,
    queries: Sequence[int],
) -> Base:
    """One run whole, of the others only what follows the shared tokens."""
    root = run_base(model, [max(runs, key=lambda run: len(run.prompt))], components, queries)
    prompts = [run.prompt for run in runs]
    base = Base(runs, masks=root.masks, calls=root.calls, queries=root.queries)
    for name in ("streams", "keys", "values"):
        setattr(base, name, [kept.repeat(len(prompts), *[1] * (kept.ndim - 1)) for kept in getattr(root, name)])
    base.parts = {at: kept.repeat(len(prompts), *[1] * (kept.ndim - 1)) for at, kept in root.parts.items()}

    layers = decoder_layers(model)
    rows, suffixes = [Row(run.prompt, arm=run.arm) for run in runs], [range(shared, len(prompt)) for prompt in prompts]
    tokens = Tokens(
        rows,
        [0] * len(prompts),
        suffixes,
        length=len(root.runs[0].prompt),
        n_layers=len(layers),
        n_heads=n_heads(model),
    )
    sizes = [len(suffix) for suffix in suffixes]
    hidden = embed(model, runs)
    hidden = hidden[tokens.cone.to(hidden.device), tokens.position.to(hidden.device)]

    query_at = torch.full((len(root.runs[0].prompt),), -1)
    query_at[base.queries] = torch.arange(len(base.queries))

    def at() -> tuple[Tensor, Tensor]:
        return tokens.cone[tokens.selected].to(tokens.device), tokens.position_at

    def keep(layer: int, key: Tensor, value: Tensor, _mask: Tensor | None) -> None:
        row, position = at()
        base.keys[layer][row, :, position] = key[0].transpose(0, 1)
        base.values[layer][row, :, position] = value[0].transpose(0, 1)

    def keep_part(component: Component, layer: int, state: Tensor) -> None:
        if component == "pattern":
            slot = query_at[tokens.position[tokens.selected]]
            kept = (slot >= 0).nonzero()[:, 0]
            row, slot = (of.to(state.device) for of in (tokens.cone[tokens.selected][kept], slot[kept]))
            base.parts[component, layer][row, slot] = state[0, kept.to(state.device)]
        elif (component, layer) in base.parts:
            base.parts[component, layer][at()] = state[0]

    tap = Tap(keep=keep, attend=partial(attend, root, tokens), change=keep_part)
    if queries:
        tap.patterns = range(len(layers))
    with ExitStack() as stack:
        routes = stack.enter_context(routed(model, [run.arm for run in runs]))
        codes = routes.of_runs(runs, max(map(len, prompts)))
        for i, layer in enumerate(layers):
            for component in OUTPUTS & set(components):
                stack.enter_context(on_component(component, layer, partial(keep_part, component, i)))
        stack.enter_context(tapped(model, tap, range(len(layers))))
        for i, layer in enumerate(layers):
            device = layer_device(layer)
            hidden = hidden.to(device)
            base.streams[i][tokens.cone.to(device), tokens.position.to(device)] = hidden
            for a, b in pieces(sizes, budget.chunk_tokens):
                tokens.select(tokens.suffixes(list(range(a, b))), sizes[a:b], device)
                routes.choose(codes[tokens.cone, tokens.position][None, tokens.selected])
                args, kwargs = root.arguments(i, tokens.run_at, tokens.position_at)
                result = layer(hidden[tokens.flat][None], *args, **kwargs)
                hidden[tokens.flat] = (result[0] if isinstance(result, tuple) else result)[0]
    base.streams[-1][tokens.cone.to(device), tokens.position.to(device)] = hidden
    starts = tokens.offsets
    last = [starts[i] + p - shared for i, prompt in enumerate(prompts) for p in prompt.predicting]
    base.logits = unembed(model, hidden[torch.tensor(last, device=hidden.device)], rows, only_contrast=False)
    return base
