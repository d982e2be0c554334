"""Recompute only what an intervention can reach: its cone of layers and positions.

In a causal model an intervention at layer l and position p changes nothing below l and nothing before
p. Everything outside is the base run's (base.py): its residual streams, keys and values, computed once
for all rows of a run. All rows advance together, layer by layer: at layer l the rows whose cone
starts there join, so a layer's weights are visited once for a whole grid.

The tokens of all cones lie behind each other in one flat row without padding, which is all the same to
a layer's modules but attention, and there attend.py keeps the cones apart. The layers are the model's
own modules, called with the arguments the model gave them in the base run, cut to each token. Exactness
is checked when a model is first used (cones that change nothing must give what the base run has, layer
by layer and as logits) and, in the tests, cell by cell against forward.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.anatomy import decoder_layers, layer_device, n_heads, n_kv_heads, on_component
from subjattn.engine.arms import check_arms, routed
from subjattn.engine.attend import Tokens, attend
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.base import Base, run_base
from subjattn.engine.budget import Budget
from subjattn.engine.checks import check_model, logit_tolerance, relative_gap, strayed
from subjattn.engine.interventions import (
    OUTPUTS,
    Component,
    Output,
    Patch,
    Row,
    Run,
    batches,
    check_rows,
    controls,
    pieces,
)
from subjattn.engine.patches import Patches
from subjattn.engine.prefix import run_shared
from subjattn.engine.unembed import unembed
from subjattn.errors import UnsupportedModel


_checked: WeakSet[nn.Module] = WeakSet()


@dataclass
class _Cone:
    """What is recomputed of a row: `touched` positions in its first layer, its suffix in every later one."""

    row: Row
    base_row: int
    layer: int
    touched: Sequence[int]
    suffix: range

    @property
    def narrow(self) -> bool:
        return len(self.touched) < len(self.suffix)


def forward(
    model: PreTrainedModel, rows: Sequence[Row], *, only_contrast: bool = False, budget: Budget | None = None
) -> Iterator[Output]:
    """The logits of `forward.forward`, for less: rows without an intervention are the base run's.

    Rows of one run should come in one call, so that they share its base.

    Args:
        model: a causal language model in eval mode.
        rows: prompts with their interventions.
        only_contrast: unembed each row's contrast alone, `[row, 2]` at the prediction position.
        budget: how much is held at a time; None: the default.

    Raises:
        UnsupportedModel: the layers cannot be called by themselves, or would not give the same numbers.
        NotFired: see errors.py.
    """
    check_model(model)
    budget = budget or Budget()
    check_rows(rows, len(decoder_layers(model)), n_heads(model), n_kv_heads(model))
    check_arms(model, rows)
    if rows and model not in _checked:
        _check_exact(model, run_base(model, [replace(rows[0].run, noise=None)], {"z"}), budget)
        _checked.add(model)
    families = _families(rows)
    sizes = [max(len(run.prompt) for run in runs) * len(runs) for runs, _ in families]
    for chosen in batches(sizes, budget.base_tokens):
        index = [i for c in chosen for i in families[c][1]]
        patches = [patch for i in index for patch in rows[i].patches]
        components = {patch.component for patch in patches}
        queries = sorted({position for p in patches if p.component == "pattern" for position in p.taken_at})
        runs = list(dict.fromkeys(run for c in chosen for run in families[c][0]))
        base = run_shared(model, runs, components, budget, queries)
        if plain := [i for i in index if rows[i].plain]:
            yield _plain_output(base, plain, [rows[i] for i in plain], only_contrast)
        changed = [i for i in index if not rows[i].plain]
        for batch in _batches([len(rows[i].suffix) for i in changed], budget.cone_tokens):
            own = [changed[i] for i in batch]
            yield from _run_cones(model, base, own, [rows[i] for i in own], only_contrast, budget)


def _families(rows: Sequence[Row]) -> list[tuple[list[Run], list[int]]]:
    """Runs that need one base, a run and those it is patched from, with the rows that it serves."""
    members: dict[Run, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.run, []).append(i)
    sources = {
        run: list(dict.fromkeys(source for i in own for source in rows[i].sources if source != run))
        for run, own in members.items()
    }
    # A run that is only looked at and patched from has no family of its own.
    hosts = {source: run for run, some in sources.items() for source in some}
    guests = {p: host for p, host in hosts.items() if p in members and all(rows[i].plain for i in members[p])}
    families = {p: ([p, *sources[p]], list(own)) for p, own in members.items() if p not in guests}
    for guest, host in guests.items():
        families[host][1].extend(members[guest])
    return list(families.values())


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cones of the same order of length, so that the padding of attention among a cone's own tokens stays small."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i].bit_length()):
        if batch and (tokens + lengths[i] > budget or lengths[i].bit_length() > lengths[batch[0]].bit_length() + 2):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def _plain_output(base: Base, index: list[int], rows: list[Row], only_contrast: bool) -> Output:
    logits = [base.logits_of(row.run) for row in rows]
    if only_contrast:
        first = torch.stack([of[0] for of in logits])
        return Output(index, rows, first.gather(1, torch.tensor([row.contrast for row in rows], device=first.device)))
    return Output(index, rows, torch.cat(logits))


@torch.inference_mode()
def _run_cones(
    model: PreTrainedModel, base: Base, index: list[int], rows: list[Row], only_contrast: bool, budget: Budget
) -> Iterator[Output]:
    """Rows of one base run, all layers; beside them every run once more without an intervention."""
    beside, of = controls(rows)
    first_layer = min(row.first_layer for row in rows)
    starts: dict[Run, int] = {}
    for row in rows:
        starts[row.run] = min(row.suffix.start, starts.get(row.run, row.suffix.start))
    cones = []
    for row in beside:
        whole = range(starts[row.run], row.prompt.predicting[-1] + 1)
        cones.append(_Cone(row, base.row_of[row.run], first_layer, whole, whole))
    cones += [_Cone(row, base.row_of[row.run], row.first_layer, row.touched, row.suffix) for row in rows]
    hidden = _advance(model, base, cones, budget.chunk_tokens)
    sizes = [len(row.prompt.predicting) for row in (*beside, *rows)]
    ends = list(accumulate(sizes))
    split = ends[len(beside) - 1]
    parts = [
        unembed(model, hidden[ends[a] - sizes[a] : ends[b - 1]], beside[a:b], only_contrast)
        for a, b in pieces(sizes[: len(beside)], budget.predictions)
    ]
    control = Output([], beside, torch.cat(parts))
    for a, b in pieces(sizes[len(beside) :], budget.predictions):
        begin, end = (0 if i == 0 else ends[len(beside) + i - 1] - split for i in (a, b))
        logits = unembed(model, hidden[split + begin : split + end], rows[a:b], only_contrast)
        yield Output(index[a:b], rows[a:b], logits, control, of[a:b])


@torch.inference_mode()
def _advance(
    model: PreTrainedModel, base: Base, asked: list[_Cone], chunk_tokens: int
) -> Float[Tensor, "prediction d_model"]:
    """Run cones through all layers; the final residual stream where they predict answer tokens, in the order asked."""
    order = sorted(range(len(asked)), key=lambda i: (asked[i].base_row, asked[i].layer, asked[i].narrow))
    cones = [asked[i] for i in order]
    layers = decoder_layers(model)
    tokens = Tokens(
        [cone.row for cone in cones],
        [cone.base_row for cone in cones],
        [cone.suffix for cone in cones],
        length=base.streams[0].shape[1],
        n_layers=len(layers),
        n_heads=n_heads(model),
    )
    origins = [offset - cone.suffix.start for offset, cone in zip(tokens.offsets, cones, strict=False)]
    patches = Patches(base, tokens, ((origin, cone.row) for origin, cone in zip(origins, cones, strict=True)))
    first = min(cone.layer for cone in cones)
    hidden = base.streams[first].new_empty(tokens.offsets[-1], base.streams[0].shape[-1])

    def enter(numbers: list[int], layer: int) -> None:
        """Fill whole suffixes from the base run."""
        flat, stream = tokens.suffixes(numbers), base.streams[layer]
        run, position, flat = (of.to(stream.device) for of in (tokens.run[flat], tokens.position[flat], flat))
        hidden[flat] = stream[run, position]

    patterns = {layer for component, layer in patches.places if component == "pattern"}
    tap = Tap(attend=partial(attend, base, tokens), change=patches.put, patterns=patterns)
    with routed(model, [run.arm for run in base.runs]) as routes, tapped(model, tap, range(first, len(layers))):
        codes = routes.of_runs(base.runs, base.streams[0].shape[1])[tokens.run, tokens.position]
        for layer in range(first, len(layers)):
            device = layer_device(layers[layer])
            hidden = hidden.to(device)
            joining = [i for i, cone in enumerate(cones) if cone.layer == layer]
            enter([i for i in joining if not cones[i].narrow], layer)
            running = [i for i, c in enumerate(cones) if c.layer < layer or (c.layer == layer and not c.narrow)]
            sizes = [len(cones[i].suffix) for i in running]
            for a, b in pieces(sizes, chunk_tokens):
                tokens.select(tokens.suffixes(running[a:b]), sizes[a:b], device)
                routes.choose(codes[None, tokens.selected])
                hidden[tokens.flat] = _call(model, base, tokens, patches, layer, hidden[tokens.flat])
            narrow = [i for i in joining if cones[i].narrow]
            hidden = hidden.to(base.streams[layer + 1].device)
            enter(narrow, layer + 1)
            sizes = [len(cones[i].touched) for i in narrow]
            for a, b in pieces(sizes, chunk_tokens):
                flat = torch.tensor([origins[i] + p for i in narrow[a:b] for p in cones[i].touched])
                tokens.select(flat, sizes[a:b], device)
                routes.choose(codes[None, tokens.selected])
                before = base.streams[layer][tokens.run_at, tokens.position_at]
                behind = _call(model, base, tokens, patches, layer, before)
                hidden[tokens.flat.to(hidden.device)] = behind.to(hidden.device)
    patches.check_fired()
    tokens.check_some_key()
    where = dict(zip(order, origins, strict=True))
    last = [where[i] + position for i, cone in enumerate(asked) for position in cone.row.prompt.predicting]
    return hidden[torch.tensor(last, device=hidden.device)]


def _call(
    model: PreTrainedModel,
    base: Base,
    tokens: Tokens,
    patches: Patches,
    layer: int,
    hidden: Float[Tensor, "token d_model"],
) -> Float[Tensor, "token d_model"]:
    """One decoder layer over the selected tokens, their patches applied."""
    module = decoder_layers(model)[layer]
    states = hidden[None]
    if (patched := patches.put("resid_pre", layer, states)) is not None:
        states = patched
    args, kwargs = base.arguments(layer, tokens.run_at, tokens.position_at)
    with ExitStack() as stack:
        for component in OUTPUTS:
            if (component, layer) in patches.places:
                stack.enter_context(on_component(component, module, partial(patches.put, component, layer)))
        result = module(states, *args, **kwargs)
    return (result[0] if isinstance(result, tuple) else result)[0]  # type: ignore[no-any-return]


def _check_exact(model: PreTrainedModel, base: Base, budget: Budget) -> None:
    """Cones that change nothing, whole and narrow, must give what the base run has: in every layer, and as logits."""
    _check_layers(model, base)
    run, middle = base.runs[0], len(base.keys) // 2
    prompt, expected = run.prompt, base.logits_of(run)
    contrast = (int(expected[0].argmax()), prompt.answer_ids[0])
    start = max(1, prompt.prediction - 1)
    whole = tuple(range(1, prompt.prediction + 1))
    patches = [Patch(0, whole, run), Patch(middle, whole[-2:], run), Patch(middle, (start,), run, "z", 0)]
    rows = [Row(prompt, patches=(patch,), contrast=contrast, arm=run.arm) for patch in patches]
    (output,) = _run_cones(model, base, list(range(len(rows))), rows, False, budget)
    (short,) = _run_cones(model, base, list(range(len(rows))), rows, True, budget)
    found = output.logits.view(len(rows), *expected.shape)
    gap = max(relative_gap(found, expected[None]), relative_gap(short.logits, expected[0, list(contrast)][None]))
    if not gap <= logit_tolerance(model):
        raise UnsupportedModel(
            f"{type(model).__name__}: recomputing part of a run moves its logits by {gap:.1e} of their size, so "
            "the engine would not be exact on it"
        )


@torch.inference_mode()
def _check_layers(model: PreTrainedModel, base: Base) -> None:
    """Each layer by itself, from the base run's own input: a long and a short suffix, and single positions."""
    run, layers = base.runs[0], decoder_layers(model)
    end, middle = run.prompt.predicting[-1] + 1, run.prompt.prediction // 2 + 1
    chosen = [range(1, end), range(middle, end), sorted({middle, end - 1})]
    suffixes = [range(some[0], end) for some in chosen]
    tokens = Tokens(
        [Row(run.prompt, arm=run.arm)] * len(chosen),
        [0] * len(chosen),
        suffixes,
        length=base.streams[0].shape[1],
        n_layers=len(layers),
        n_heads=n_heads(model),
    )
    flat = [
        start + position - suffix.start
        for start, suffix, some in zip(tokens.offsets, suffixes, chosen, strict=False)
        for position in some
    ]
    kept: dict[int, Tensor] = {}
    gaps = []

    def keep_z(component: Component, layer: int, state: Tensor) -> None:
        if component == "z":
            kept[layer] = state

    tap = Tap(attend=partial(attend, base, tokens), change=keep_z)
    with routed(model, [run.arm]) as routes, tapped(model, tap, range(len(layers))):
        codes = routes.of_runs([run], base.streams[0].shape[1])[0]
        for layer in range(len(layers)):
            device = layer_device(layers[layer])
            tokens.select(torch.tensor(flat), [len(some) for some in chosen], device)
            routes.choose(codes[None, tokens.position[tokens.selected]])
            at = tokens.position_at
            before, expected = base.streams[layer][0, at], base.streams[layer + 1].to(device)[0, at]
            found = _call(model, base, tokens, Patches(base, tokens, ()), layer, before)
            z, wanted = kept[layer][0].flatten(1), base.parts["z", layer][0, at].flatten(1)
            gaps.append(max(float(strayed(found, expected, before).max()), float(strayed(z, wanted, 0 * z).max())))
    worst = max(range(len(gaps)), key=lambda layer: gaps[layer] if gaps[layer] == gaps[layer] else torch.inf)
    if not gaps[worst] <= 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: part of layer {worst} recomputed from the same input parts from the whole by "
            f"{gaps[worst]:.1e} times what rounding may in {model.dtype}, so the engine would not be exact on it"
        )
