"""The base run of some prompts, each under its arm and noise: all outside an intervention's cone, computed once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from subjattn.engine.anatomy import (
    decoder_layers,
    layer_device,
    on_component,
    on_output,
    only_positions,
    padded_ids,
)
from subjattn.engine.arms import routed
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.forward import predicting_positions
from subjattn.engine.interventions import OUTPUTS, Component, Row, Run, wide
from subjattn.engine.noise import noised
from subjattn.errors import UnsupportedModel


@dataclass
class Base:
    """One pass of some runs, and all that cones need of it, by layer.

    `streams` are the residual streams before every layer and behind the last; `parts` what patches
    take from components; `calls` a layer's arguments besides its hidden states. Each lies on its layer's device.
    Patterns are kept of the positions `queries` alone.
    """

    runs: list[Run]
    streams: list[Float[Tensor, "row pos d_model"]] = field(default_factory=list)
    keys: list[Float[Tensor, "row kv_head pos d_head"]] = field(default_factory=list)
    values: list[Float[Tensor, "row kv_head pos d_head"]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    parts: dict[tuple[Component, int], Float[Tensor, "row pos ..."]] = field(default_factory=dict)
    queries: list[int] = field(default_factory=list)
    logits: Float[Tensor, "prediction vocab"] = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.row_of = {run: i for i, run in enumerate(self.runs)}
        ends = torch.tensor([len(run.prompt.predicting) for run in self.runs]).cumsum(0)
        self._first_prediction = [0, *ends[:-1].tolist()]

    def logits_of(self, run: Run) -> Float[Tensor, "answer vocab"]:
        """Logits that predict a run's answer tokens."""
        first = self._first_prediction[self.row_of[run]]
        return self.logits[first : first + len(run.prompt.predicting)]

    def taken(
        self, component: Component, layer: int, runs: list[Run], positions: list[int], heads: list[int] | None
    ) -> Float[Tensor, "patch width"]:
        """What a component gave in some runs at some positions (and heads)."""
        if component == "pattern":
            positions = [self.queries.index(position) for position in positions]
        part = self._part(component, layer)
        rows = [self.row_of[run] for run in runs]
        return part[tuple(torch.tensor(at, device=part.device) for at in (rows, positions, heads) if at is not None)]

    def _part(self, component: Component, layer: int) -> Float[Tensor, "row pos ..."]:
        if component == "resid_pre":
            return self.streams[layer]
        if component in ("k", "v"):
            return (self.keys if component == "k" else self.values)[layer].transpose(1, 2)
        return self.parts[component, layer]

    def arguments(
        self, layer: int, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's other arguments for chosen tokens in one flat row. Masks are the attention function's affair."""
        length = self.streams[0].shape[1]

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            if value.ndim == 4 and value.shape[-1] == value.shape[-2] == length:
                return None
            if value.ndim >= 2 and value.shape[1] == length:
                return value[rows if len(value) > 1 else torch.zeros_like(rows), positions][None]
            raise UnsupportedModel(f"a layer takes a tensor of shape {tuple(value.shape)} whose positions are unknown")

        args, kwargs = self.calls[layer]
        return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}

    def visible(self, layer: int, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"], n_key: int) -> Tensor:
        """Which of the first keys each token may see by the model's own mask: `[token, key]`."""
        mask = self.masks[layer]
        if mask is None:
            return torch.arange(n_key, device=positions.device) <= positions[:, None]
        seen = mask[rows if len(mask) > 1 else torch.zeros_like(rows), 0, positions, :n_key]
        return seen if seen.dtype == torch.bool else seen == 0


@torch.inference_mode()
def run_base(
    model: PreTrainedModel, runs: list[Run], components: Collection[Component], queries: Sequence[int] = ()
) -> Base:
    """Run prompts without interventions, keeping `components` beside what cones always need.

    The pattern is kept of the positions `queries`.
    """
    base, prompts = Base(runs, queries=list(queries)), [run.prompt for run in runs]

    def keep(_layer: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        base.keys.append(key)
        base.values.append(value)
        base.masks.append(mask)

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *args = args if args else (kwargs["hidden_states"],)  # type: ignore[assignment]
        device = layer_device(module)
        base.streams.append(hidden.to(device))  # type: ignore[attr-defined]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        base.calls.append(tree_map_only(Tensor, lambda value: value.to(device), (tuple(args), rest)))

    def keep_part(component: Component, layer: int, state: Tensor) -> None:
        if component in components and component not in ("k", "v"):
            base.parts[component, layer] = state

    layers = decoder_layers(model)
    predicting = predicting_positions([Row(prompt) for prompt in prompts])
    with ExitStack() as stack:
        routes = stack.enter_context(routed(model, [run.arm for run in runs]))
        codes = routes.of_runs(runs, max(map(len, prompts)))
        routes.choose(codes, codes[predicting][None])
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(keep_call, with_kwargs=True).remove)
            for component in OUTPUTS & set(components):
                stack.enter_context(on_component(component, layer, partial(keep_part, component, i)))
        stack.enter_context(on_output(layers[-1], base.streams.append))
        stack.enter_context(only_positions(model, *predicting))
        tap = Tap(keep=keep, change=keep_part)
        if queries:
            tap.keep_queries = torch.tensor(base.queries).expand(len(runs), -1)
        stack.enter_context(tapped(model, tap, range(len(layers))))
        stack.enter_context(noised(model, runs))
        base.logits = wide(model(input_ids=padded_ids(prompts, model.device), use_cache=False).logits[0])
    base.parts |= {("pattern", layer): weights.transpose(1, 2) for layer, weights in tap.weights.items()}
    return base
