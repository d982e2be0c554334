"""TransformerLens as a reference: a TransformerBridge around a copy of the model, one row at a time.

The bridge computes attention by itself, from scores to pattern, and has a hook point for each
component; weights stay as they are (no compatibility mode, nothing folded). Where no hook point holds what the
model's own attention gets (behind norms and rotary), patches of queries or keys are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel

from subjattn.engine.anatomy import n_kv_heads
from subjattn.engine.arms import check_arms
from subjattn.engine.checks import PROBE, probe_ids, relative_gap, tolerance
from subjattn.engine.forward import states
from subjattn.engine.interventions import (
    Block,
    Component,
    Output,
    Patch,
    Row,
    Run,
    Scale,
    check_rows,
    controls,
    edge_mask,
    fitted,
    wide,
)
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.prompts import Prompt


_POINTS: dict[Component, str] = {
    "resid_pre": "hook_in",
    "resid_post": "hook_out",
    "attn_out": "attn.hook_out",
    "mlp_out": "mlp.hook_out",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
}
_INPUTS: dict[Component, tuple[str, ...]] = {
    "q": ("attn.hook_rot_q", "attn.hook_q"),
    "k": ("attn.hook_rot_k", "attn.hook_k"),
    "v": ("attn.hook_v",),
}
"""Where queries, keys and values may be as attention gets them: behind rotary, or as projected where there is none."""
_EMBEDDED = "embed.hook_out"
_SCORES, _PATTERN = "attn.hook_attn_scores", _POINTS["pattern"]
_Hook = tuple[str, Any]


class TransformerLens:
    """Runs rows by `run_with_hooks` and reads states by `run_with_cache`.

    Raises:
        UnsupportedModel: TransformerLens has no bridge for the model, lacks a hook point, or gives other logits.
    """

    name = "transformer-lens"

    def __init__(self, model: PreTrainedModel) -> None:
        own = copy.deepcopy(model)
        own.set_attn_implementation("eager")
        try:
            self.bridge: Any = build_bridge_from_module(own, type(model).__name__, hf_config=own.config)
        except Exception as error:
            raise _unsupported(model, f"it cannot be wrapped ({' '.join(str(error).split())})") from error
        self.device = model.device
        self.n_layers, self.n_heads = int(self.bridge.cfg.n_layers), int(self.bridge.cfg.n_heads)
        self.n_kv_heads, self.points = n_kv_heads(model), dict(_POINTS)
        self._check(model)

    @torch.no_grad()
    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:  # noqa: ARG002
        """Outputs of single rows, the plain ones first; see interventions.py."""
        check_rows(rows, self.n_layers, self.n_heads, self.n_kv_heads)
        check_arms(None, rows)
        if lacking := {patch.component for row in rows for patch in row.patches} - {*self.points}:
            raise UnsupportedModel(
                f"backend transformer-lens cannot patch {', '.join(sorted(lacking))} of this model: no hook point "
                "holds what its attention gets, or none that acts; use another backend"
            )
        if not self.embeds and any(run.noise for row in rows for run in (row.run, *row.sources)):
            raise UnsupportedModel(
                f"backend transformer-lens adds no noise to embeddings: its {_EMBEDDED} is not what the model's own "
                "embedding gives; use another backend"
            )
        taken = self._taken(rows)
        changed = [i for i, row in enumerate(rows) if not row.plain]
        for i, row in enumerate(rows):
            if row.plain:
                yield Output([i], [row], self._run(row, taken))
        own, of = controls([rows[i] for i in changed])
        for number, plain in enumerate(own):
            control = Output([], [plain], self._run(plain, taken))
            for i in (i for i, its in zip(changed, of, strict=True) if its == number):
                yield Output([i], [rows[i]], self._run(rows[i], taken), control, [0])

    @torch.no_grad()
    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        """Outputs with the pattern's last row, `[1, head, 1, key]` by layer."""
        if value_norms:
            raise UnsupportedModel("backend transformer-lens does not weigh by values: use 'engine' or 'hooks'")
        names = [_name(layer, _PATTERN) for layer in range(self.n_layers)]
        for i, prompt in enumerate(prompts):
            _, kept = self._cached(prompt.ids[: prompt.prediction + 1], names)
            last = {layer: wide(kept[name])[:, :, -1:] for layer, name in enumerate(names)}
            yield Output([i], [Row(prompt)], torch.empty(0), attention=last)

    def _cached(
        self, ids: Sequence[int], names: list[str], hooks: Sequence[_Hook] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = torch.tensor([ids], device=self.device)
        with self.bridge.hooks(fwd_hooks=list(hooks)):
            return self.bridge.run_with_cache(tokens, names_filter=names, return_cache_object=False)  # type: ignore[no-any-return]

    def _taken(self, rows: Sequence[Row]) -> dict[Run, dict[str, Tensor]]:
        """What the prompts patched from give, one run each, at the hook points that are asked for."""
        wanted: dict[Run, set[str]] = {}
        for row in rows:
            for patch in row.patches:
                if (source := patch.source(row.arm)) is not None:
                    wanted.setdefault(source, set()).add(_name(patch.layer, self.points[patch.component]))
        found = {}
        for source, names in wanted.items():
            fired: list[str] = []
            hooks = _noising(source, fired)
            found[source] = self._cached(source.prompt.ids, sorted(names), hooks)[1]
            _check_fired(source.prompt, hooks, fired)
        return found

    def _run(self, row: Row, taken: dict[Run, dict[str, Tensor]]) -> Float[Tensor, "prediction vocab"]:
        fired: list[str] = []
        hooks = _noising(row.run, fired)
        hooks += [] if row.block is None else self._blocking(row, row.block, fired)
        hooks += [] if row.scale is None else self._scaling(row, row.scale, fired)
        for patch in row.patches:
            source = patch.source(row.arm)
            name = _name(patch.layer, self.points[patch.component])
            hooks.append(_patching(name, patch, None if source is None else taken[source], fired))
        logits = self.bridge.run_with_hooks(torch.tensor([row.prompt.ids], device=self.device), fwd_hooks=hooks)
        _check_fired(row.prompt, hooks, fired)
        return wide(logits[0, list(row.prompt.predicting)])

    def _blocking(self, row: Row, block: Block, fired: list[str]) -> list[_Hook]:
        """Hooks that take edges out of the scores, and look whether the pattern lost them."""
        edges = edge_mask(block, len(row.prompt)).to(self.device)

        def heads_at(layer: int) -> list[int]:
            heads = block.heads_at(layer)
            return list(range(self.n_heads) if heads is None else heads)

        def block_scores(scores: Tensor, hook: Any, heads: list[int]) -> Tensor:
            fired.append(hook.name)
            scores = scores.clone()
            scores[0, heads] = scores[0, heads].masked_fill(edges, -torch.inf)
            if (scores.amax(-1) <= torch.finfo(scores.dtype).min / 2).any():
                raise NotFired("a query would be left without any key to attend to; block fewer edges")
            return scores

        def check_pattern(pattern: Tensor, hook: Any, heads: list[int]) -> None:
            fired.append(hook.name)
            if pattern[0, heads][:, edges].any():
                raise NotFired(f"fact {row.prompt.fact_id}: blocked edges still have weight at {hook.name}")

        layers = [layer for layer in range(self.n_layers) if block.acts_at(layer)]
        return [
            (_name(layer, point), partial(act, heads=heads_at(layer)))
            for point, act in ((_SCORES, block_scores), (_PATTERN, check_pattern))
            for layer in layers
        ]

    def _scaling(self, row: Row, scale: Scale, fired: list[str]) -> list[_Hook]:
        """Hooks that add to the scores."""
        edges = edge_mask(scale, len(row.prompt)).to(self.device)

        def add(scores: Tensor, hook: Any, heads: tuple[int, ...] | None) -> Tensor:
            fired.append(hook.name)
            scores = scores.clone()
            scores[0, list(range(self.n_heads) if heads is None else heads)] += scale.add * edges.to(scores)
            return scores

        layers = [layer for layer in range(self.n_layers) if scale.acts_at(layer)]
        return [(_name(layer, _SCORES), partial(add, heads=scale.heads_at(layer))) for layer in layers]

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        """Compare a short probe with the model's own logits, and see that every hook point is there and acts."""
        ids = tuple(probe_ids(model)[0].tolist())
        probe = Prompt("probe", "", "", (), ids, (), (0, 1), PROBE - 2)
        points = (*_POINTS.values(), _SCORES)
        names = [_EMBEDDED, *(_name(layer, point) for layer in range(self.n_layers) for point in points)]
        try:
            found, kept = self._cached(ids, names)
            plain, blocked = (
                self._run(Row(probe, block), {}) for block in (None, Block.between([PROBE - 2], [PROBE - 3]))
            )
        except Exception as error:
            raise _unsupported(model, f"it does not run there ({' '.join(str(error).split())})") from error
        if missing := [name for name in names if name not in kept]:
            raise _unsupported(model, f"hook points {', '.join(missing)} are never reached")
        if any(kept[_name(layer, _POINTS["z"])].shape[2:3] != (self.n_heads,) for layer in range(self.n_layers)):
            raise _unsupported(model, "its hook_z is not split into heads")
        gap = relative_gap(
            found[0], model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0]
        )
        if not gap <= 10 * tolerance(model):
            raise _unsupported(model, f"the wrapped model's logits part from its own by {gap:.1e} of their size")
        if torch.equal(plain, blocked):
            raise _unsupported(model, "what is written to its attention scores changes nothing")
        embedded = model.get_input_embeddings()(torch.tensor([ids], device=self.device))
        self.embeds = relative_gap(kept[_EMBEDDED], embedded) <= tolerance(model)
        self._look_inside(model, probe, plain)

    def _look_inside(self, model: PreTrainedModel, probe: Prompt, plain: Tensor) -> None:
        """Find the hook points of queries, keys and values by what they hold; drop those that do not act."""
        layers = range(self.n_layers)
        maybe = [_name(layer, point) for layer in layers for points in _INPUTS.values() for point in points]
        _, kept = self._cached(probe.ids, maybe)
        for component, points in _INPUTS.items():
            (expected,) = states(model, [probe], component)
            for point in points:
                found = [kept[name] for layer in layers if (name := _name(layer, point)) in kept]
                if len(found) == self.n_layers and _same(torch.cat(found), expected, 10 * tolerance(model)):
                    self.points.setdefault(component, point)
        for component in (*_INPUTS, "pattern"):
            if component in self.points and torch.equal(plain, self._turned(probe, self.points[component])):
                del self.points[component]

    def _turned(self, probe: Prompt, point: str) -> Float[Tensor, "prediction vocab"]:
        """Logits with the other way round what stands at a hook point of every layer."""
        hooks = [(_name(layer, point), lambda state, hook: state.flip(-1)) for layer in range(self.n_layers)]  # noqa: ARG005
        logits = self.bridge.run_with_hooks(torch.tensor([probe.ids], device=self.device), fwd_hooks=hooks)
        return wide(logits[0, list(probe.predicting)])


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return found.shape == expected.shape and relative_gap(found, expected) <= tolerance


def _name(layer: int, point: str) -> str:
    return f"blocks.{layer}.{point}"


def _check_fired(prompt: Prompt, hooks: list[_Hook], fired: list[str]) -> None:
    if sorted(fired) != sorted(name for name, _ in hooks):
        raise NotFired(f"fact {prompt.fact_id}: TransformerLens did not reach every hook point once: {fired}")


def _noising(run: Run, fired: list[str]) -> list[_Hook]:
    """A hook that adds a run's noise; none where it has none."""
    if (noise := run.noise) is None:
        return []

    def add(embedded: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        fired.append(_EMBEDDED)
        embedded = embedded.clone()
        embedded[0, list(noise.at(run.prompt))] = noise.put(run.prompt, embedded[0])
        return embedded

    return [(_EMBEDDED, add)]


def _patching(name: str, patch: Patch, states: dict[str, Tensor] | None, fired: list[str]) -> _Hook:
    """A hook that writes a patch's values, or those of its source's states."""
    head = () if patch.head is None else (patch.head,)
    at, taken = ((0, list(positions), *head) for positions in (patch.positions, patch.taken_at))

    def by_token(state: Tensor) -> Tensor:
        return state.transpose(1, 2) if patch.component == "pattern" else state

    def put(state: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        fired.append(name)
        state = state.clone()
        values = patch.values if states is None else by_token(states[name])[taken]
        by_token(state)[at] = fitted(patch.component, values, state)  # type: ignore[arg-type]
        return state

    return name, put


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"backend transformer-lens cannot take {type(model).__name__}: {why}; use another backend")
