"""nnsight as a reference: a copy of the model traced one row at a time.

States are read and written in place inside the trace, at the modules of a decoder layer; inside its
attention, at the operations that `.source` makes of transformers' eager attention: what the whole call
gets and returns, and what its softmax gets and gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import nnsight  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from nnsight.intervention.interleaver import OutOfOrderError  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.engine.anatomy import n_kv_heads
from subjattn.engine.arms import check_arms
from subjattn.engine.checks import PROBE, probe_ids, relative_gap, tolerance
from subjattn.engine.interventions import (
    BY_HEAD,
    COMPONENTS,
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


_NAMES = {
    "model.layers": ("self_attn", "mlp"),
    "transformer.h": ("attn", "mlp"),
    "gpt_neox.layers": ("attention", "mlp"),
}
"""Decoder layers, and the attention and the MLP inside, as architectures call them."""
_BEFORE_SCORES: tuple[Component, ...] = ("resid_pre", "q", "k", "v")
_ORDER: tuple[Component, ...] = (*_BEFORE_SCORES, "pattern", "z", "attn_out", "mlp_out", "resid_post")
"""Components of a layer as the model computes them."""
_States = dict[tuple[int, Component], Tensor]


class NNsight:
    """Runs rows and reads states by `trace`.

    Raises:
        UnsupportedModel: the model's layers or attention are not where they are looked for, or its logits differ.
    """

    name = "nnsight"

    def __init__(self, model: PreTrainedModel) -> None:
        own = copy.deepcopy(model)
        own.set_attn_implementation("eager")
        self.traced: Any = nnsight.NNsight(own)
        found = {module for module, _ in own.named_modules()}
        names = [(path, *parts) for path, parts in _NAMES.items() if {f"{path}.0.{part}" for part in parts} <= found]
        if len(names) != 1:
            raise _unsupported(model, f"its decoder layers are none of {', '.join(_NAMES)}")
        path, self.attention, self.mlp = names[0]
        self.layers: list[Any] = list(attrgetter(path)(self.traced))
        embedding = next(name for name, module in own.named_modules() if module is own.get_input_embeddings())
        self.embedding: Any = attrgetter(embedding)(self.traced)
        self.device, self.n_heads = model.device, int(model.config.get_text_config().num_attention_heads)
        self.n_kv_heads = n_kv_heads(model)
        self._check(model)

    @torch.no_grad()
    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:  # noqa: ARG002
        """Outputs of single rows, the plain ones first; see interventions.py."""
        check_rows(rows, len(self.layers), self.n_heads, self.n_kv_heads)
        check_arms(None, rows)
        wanted: dict[Run, set[tuple[int, Component]]] = {}
        for row in rows:
            for patch in row.patches:
                if (source := patch.source(row.arm)) is not None:
                    wanted.setdefault(source, set()).add((patch.layer, patch.component))
        states = {source: self._states(source, places) for source, places in wanted.items()}
        changed = [i for i, row in enumerate(rows) if not row.plain]
        for i, row in enumerate(rows):
            if row.plain:
                yield Output([i], [row], self._run(row, states))
        own, of = controls([rows[i] for i in changed])
        for number, plain in enumerate(own):
            control = Output([], [plain], self._run(plain, states))
            for i in (i for i, its in zip(changed, of, strict=True) if its == number):
                yield Output([i], [rows[i]], self._run(rows[i], states), control, [0])

    @torch.no_grad()
    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        """Outputs with the last row of what eager attention's softmax gives, `[1, head, 1, key]` by layer."""
        if value_norms:
            raise UnsupportedModel("backend nnsight does not weigh by values: use 'engine' or 'hooks'")
        for i, prompt in enumerate(prompts):
            with self._trace(prompt.ids[: prompt.prediction + 1]):
                weights = nnsight.save(
                    [self._softmax(layer).output[:, :, -1:].clone() for layer in range(len(self.layers))]
                )
            yield Output([i], [Row(prompt)], torch.empty(0), attention=dict(enumerate(map(wide, weights))))

    def _trace(self, ids: Sequence[int]) -> Any:
        return self.traced.trace(input_ids=torch.tensor([ids], device=self.device), use_cache=False)

    def _attend(self, layer: int) -> Any:
        """The call of the attention function in a layer."""
        return _operation(getattr(self.layers[layer], self.attention).source, "attention_interface_")

    def _softmax(self, layer: int) -> Any:
        """The softmax inside that call."""
        return _operation(self._attend(layer).source, "softmax")

    def _heads_of(self, component: Component) -> Sequence[int]:
        return self.n_kv_heads if component in ("k", "v") else [self.n_heads] * len(self.layers)

    def _state(self, layer: int, component: Component) -> Tensor:
        """What a component gives, to be read or written in place inside a trace."""
        if component == "resid_pre":
            return self.layers[layer].input  # type: ignore[no-any-return]
        if component in ("q", "k", "v"):
            (_, *given), _ = self._attend(layer).inputs
            return given["qkv".index(component)].transpose(1, 2)  # type: ignore[no-any-return]
        if component == "pattern":
            return self._softmax(layer).output.transpose(1, 2)  # type: ignore[no-any-return]
        if component == "z":
            return self._attend(layer).output[0]  # type: ignore[no-any-return]
        name = {"attn_out": self.attention, "mlp_out": self.mlp}.get(component)
        output = (self.layers[layer] if name is None else getattr(self.layers[layer], name)).output
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def _add_noise(self, run: Run) -> None:
        """Inside a trace, before anything else."""
        if (noise := run.noise) is not None:
            embedded = self.embedding.output
            embedded[0, list(noise.at(run.prompt))] = noise.put(run.prompt, embedded[0])

    def _states(self, run: Run, places: set[tuple[int, Component]]) -> _States:
        """States of one run, asked for in the order in which the model computes them."""
        with self._trace(run.prompt.ids):
            self._add_noise(run)
            kept = nnsight.save({})
            for place in sorted(places, key=lambda place: (place[0], _ORDER.index(place[1]))):
                kept[place] = self._state(*place).clone()
        return kept  # type: ignore[no-any-return]

    def _run(self, row: Row, states: dict[Run, _States]) -> Float[Tensor, "prediction vocab"]:
        block, patches = row.block, sorted(row.patches, key=lambda patch: _ORDER.index(patch.component))
        try:
            with self._trace(row.prompt.ids):
                self._add_noise(row.run)
                for layer in range(len(self.layers)):
                    here = [patch for patch in patches if patch.layer == layer]
                    for patch in here:
                        if patch.component in _BEFORE_SCORES:
                            self._patch(patch, row, states)
                    if row.scale is not None and row.scale.acts_at(layer):
                        self._scale(row, layer, row.scale)
                    if block is not None and block.acts_at(layer):
                        self._block(row, layer, block)
                    for patch in here:
                        if patch.component not in _BEFORE_SCORES:
                            self._patch(patch, row, states)
                logits: Tensor = nnsight.save(wide(self.traced.output.logits[0, list(row.prompt.predicting)]))
        except OutOfOrderError as error:
            raise NotFired(
                f"fact {row.prompt.fact_id}: nnsight did not reach what it was to change ({error})"
            ) from error
        return logits

    def _patch(self, patch: Patch, row: Row, states: dict[Run, _States]) -> None:
        head = () if patch.head is None else (patch.head,)
        at, taken = ((0, list(positions), *head) for positions in (patch.positions, patch.taken_at))
        state, source = self._state(patch.layer, patch.component), patch.source(row.arm)
        values = patch.values if source is None else states[source][patch.layer, patch.component][taken]
        state[at] = fitted(patch.component, values, state)  # type: ignore[arg-type]

    def _scale(self, row: Row, layer: int, scale: Scale) -> None:
        """Add to what the softmax gets."""
        heads, scores = scale.heads_at(layer), self._softmax(layer).input
        edges = edge_mask(scale, len(row.prompt)).to(scores)
        scores[0, list(range(self.n_heads) if heads is None else heads)] += scale.add * edges

    def _block(self, row: Row, layer: int, block: Block) -> None:
        """Take edges out of what the softmax gets, and look whether what it gives lost them."""
        edges = edge_mask(block, len(row.prompt)).to(self.device)
        heads_at = block.heads_at(layer)
        heads = list(range(self.n_heads) if heads_at is None else heads_at)
        softmax = self._softmax(layer)
        scores = softmax.input
        scores[0, heads] = scores[0, heads].masked_fill(edges, -torch.inf)
        if (scores.amax(-1) <= torch.finfo(scores.dtype).min / 2).any():
            raise NotFired("a query would be left without any key to attend to; block fewer edges")
        if softmax.output[0, heads][:, edges].any():
            raise NotFired(f"fact {row.prompt.fact_id}: blocked edges still have weight in layer {layer}")

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        """Compare a short probe with the model's own logits, and see that every place is there and blocking acts."""
        ids = tuple(probe_ids(model)[0].tolist())
        probe = Prompt("probe", "", "", (), ids, (), (0, 1), PROBE - 2)
        try:
            kept = self._states(
                Run(probe), {(layer, component) for layer in range(len(self.layers)) for component in COMPONENTS}
            )
            plain, blocked = (
                self._run(Row(probe, block), {}) for block in (None, Block.between([PROBE - 2], [PROBE - 3]))
            )
        except Exception as error:
            raise _unsupported(model, f"it cannot be traced as needed ({' '.join(str(error).split())})") from error
        if any(kept[layer, its].shape[2] != self._heads_of(its)[layer] for layer, its in kept if its in BY_HEAD):
            raise _unsupported(model, "what its attention gets or returns is not split into heads")
        expected = model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, PROBE - 2]
        gap = relative_gap(plain[0], expected)
        if not gap <= 10 * tolerance(model):
            raise _unsupported(model, f"the traced model's logits part from its own by {gap:.1e} of their size")
        if torch.equal(plain, blocked):
            raise _unsupported(model, "what is written to its attention scores changes nothing")


def _operation(source: Any, word: str) -> Any:
    """The last operation of a source that is named so."""
    found = [name for name in source.names if word in name]
    if not found:
        raise LookupError(f"its attention has no operation {word}")
    return getattr(source, found[-1])


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"backend nnsight cannot take {type(model).__name__}: {why}; use another backend")
