"""What one model's states do in another: a component of a tuned model put into its base, and the reverse.

Both models read the same prompts, so a state can be put from a run of one into the run of the other at the same place.
One such number alone misleads: the other model's later layers meet a state that they never give themselves. So what
is returned are all four cells, state of one or the other × later layers of one or the other, in raw logits and
log-probability, and beside every place a placebo of equal size; `returned` reads shares of the gap off them.

After cross-model activation patching (CMAP; Prakash et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import xarray as xr

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads, n_kv_heads
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, Arm, Component, Patch, Row, Run
from subjattn.errors import BadInput
from subjattn.measures import check_askable, labelled, opened, shortened, some_layers, tokens_of, windows
from subjattn.measures.metrics import AS_THEY_ARE, Metric, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.measures.sets import Heads, parse_sets
from subjattn.measures.swapping import only_arm
from subjattn.models.arms import BASE, Arms
from subjattn.prompts import ROLES


if TYPE_CHECKING:
    from subjattn.prompts import Prompt

At = Literal["role", "position", "prediction", "subject", "all"]
By = Literal["layer", "head"]
_GROUPS: tuple[str, ...] = ("k", "v")
"""Components of a key/value head, which several query heads read."""
PATCHES = ("real", "placebo")


def transfer(
    arms: Arms,
    prompts: Sequence[Prompt],
    component: Component | Sequence[Component] = "resid_pre",
    tuned: str | None = None,
    *,
    at: At = "role",
    by: By | None = "layer",
    window: int = 1,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    hold: bool = False,
    random_sets: int = 0,
    seed: int = 0,
    metric: Metric | list[Metric] = ("answer_logprob", "answer_logit"),  # type: ignore[assignment]
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """A component's states of base and tuned model, each under the later layers of both.

    Args:
        arms: a base and its tuned models, from `load_arms`.
        prompts: whom to ask.
        component: `resid_pre`, `resid_post`, `attn_out`, `mlp_out`; of heads `q`, `k`, `v`, `pattern` or `z`; several
            are put together.
        tuned: the arm; None: the only one.
        at: `role` puts all positions of a role together, `position` each by itself; `prediction` (all positions that
            predict an answer token), `subject` and `all` put there alone and give no such dimension.
        by: `layer`: one layer, or `window` of them around each, all heads together; `head`: one head of one layer
            (one key/value head, of `k` and `v`); None: `layers` (None: all) or the set `heads` together.
        window: layers of a window.
        layers: those to compute; None: all.
        heads: a set `(layer, head)`, put together.
        hold: keep what is off the route at the receiving model's own values: the attention outputs of all positions
            but those put and those that predict, so that a state is read directly and not by relay.
        random_sets: of `heads`: as many random sets of the same size (see `sets.parse_sets`), its placebo.
        seed: of the random sets and of the placebo's positions.
        metric: one of `answer_logprob` (nats), `answer_logit`, `rank`, or a function of your own; or several.
        backend: what computes it; the engine alone knows arms.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        A Dataset with a variable for each metric, `(fact, patch, state, late[, layer][, head][, set][, role or
        position])`: the metric itself where the component is `state`'s and what follows is `late`'s, each `base` or
        the arm's name; where both are the same it is that model's own. `patch` is `real` or the `placebo`: as many
        other positions of the same prompt, drawn at random; NaN where there are too few, by head (where the other
        heads of the layer say it) and for sets (whose random ones do).

    Raises:
        BadInput: an argument that does not fit.
        UnsupportedModel, NotFired: the states could not be put.
    """
    check_askable(prompts)
    name = only_arm(arms, tuned)
    metrics = parse_metrics(list(metric) if isinstance(metric, tuple) else metric)
    if wrong := {*metrics} & {"kl", "logit_diff"}:
        raise BadInput(f"metric {min(wrong)!r} takes a foil or a run of one model: use answer_logprob or answer_logit")
    components = [component] if isinstance(component, str) else list(component)
    parts = parts_put(arms, components, by, window, layers, heads, random_sets, seed)
    if at not in get_args(At):
        raise BadInput(f"at {at!r} is not one of {', '.join(get_args(At))}")
    asked = list(prompts)
    if {*metrics} <= {*AS_THEY_ARE, "answer_logit"}:
        asked = [shortened(prompt) for prompt in prompts]
    models: dict[str, Arm | None] = {BASE: None, name: arms.arm(name)}
    grid = _grid(asked, models, parts, at, hold=hold, seed=seed)
    run = opened(backend, arms.base.model, memory_budget, asked, patterns="pattern" in components)
    found = measure_rows(run.forward(grid.rows), grid.rows, metrics)
    arrays = {}
    for one in metrics:
        plain, changed = np.split(found.values[one], [2 * len(asked)])
        by_model = plain.reshape(len(asked), 1, 1, 2, 1, 1)
        values = np.where(grid.own, by_model, np.nan)
        if grid.cells:
            values[tuple(np.array(grid.cells).T)] = changed
        values = values.reshape(*values.shape[:4], *parts.shape, values.shape[-1])
        dims = ("patch", "state", "late", *parts.dims, at)
        if at not in ("role", "position"):
            values, dims = values[..., 0], dims[:-1]
        array = labelled(
            one,
            values,
            prompts,
            dims,
            unit=unit_of(one),
            definition=f"{meaning_of(one)}, {' and '.join(components)} of one model at {parts.where} under the later "
            "layers of another" + (", what is off the route held" if hold else ""),
            paper="Prakash et al. 2024",
            component=" and ".join(components),
            n_layers=parts.n_layers,
            tuned=name,
            held=int(hold),
            noise_floor=found.noise_floor[one],
            backend=run.name,
        )
        coords: dict[str, Any] = {"patch": list(PATCHES), "state": list(models), "late": list(models), **parts.coords}
        if at == "role":
            coords["role"] = list(ROLES)
        elif at == "position":
            coords |= tokens_of(asked, grid.own.shape[-1])
        arrays[one] = array.assign_coords(coords)
    return xr.Dataset(arrays)


class _Cell(NamedTuple):
    component: Component
    layer: int
    head: int | None


@dataclass(frozen=True)
class _Parts:
    """What is put together: groups of (component, layer, head), in the order of the dimensions they have."""

    groups: list[list[_Cell]]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    where: str
    n_layers: int
    coords: dict[str, Any]
    placebo: bool = True


def parts_put(
    arms: Arms,
    components: Sequence[Component],
    by: By | None,
    window: int,
    layers: Sequence[int] | None,
    heads: Heads | None,
    random_sets: int,
    seed: int,
) -> _Parts:
    hf = arms.base.model
    n_layers = len(decoder_layers(hf))
    if unknown := [one for one in components if one not in COMPONENTS]:
        raise BadInput(f"component {unknown[0]!r} is not one of {', '.join(COMPONENTS)}")
    if not components:
        raise BadInput("there are no components: give at least one")
    if by not in (None, "layer", "head"):
        raise BadInput(f"by={by!r} is none of 'layer', 'head' and None")
    if window < 1:
        raise BadInput(f"window={window} is no number of layers: give 1 or more")
    if heads is not None:
        if layers is not None or by != "layer" or not {*components} <= BY_HEAD - {*_GROUPS}:
            raise BadInput("heads=[(layer, head), …] go with q, pattern and z, and without by and layers")
        sets = parse_sets(heads, None, n_layers, n_heads(hf), random_sets=random_sets, seed=seed)
        groups = [[_Cell(one, *cell) for one in components for cell in cells] for cells in sets.cells.values()]
        coords = {"set": list(sets.cells), "cells": ("set", sets.in_words)}
        return _Parts(groups, ("set",), (len(groups),), "a set of heads", n_layers, coords, placebo=False)
    if random_sets:
        raise BadInput("random_sets are compared with a set: give heads=[(layer, head), …]")
    some = some_layers(layers, n_layers)

    def every(one: Component, layer: int) -> list[int | None]:
        if one not in BY_HEAD:
            return [None]
        return list(range(n_kv_heads(hf)[layer] if one in _GROUPS else n_heads(hf)))

    if by == "head":
        counts = {len(every(one, layer)) for one in components for layer in some}
        if not {*components} <= BY_HEAD or len(counts) > 1:
            raise BadInput("by='head' goes with components of the same heads: q, pattern and z, or k and v")
        size = counts.pop()
        groups = [[_Cell(one, layer, head) for one in components] for layer in some for head in range(size)]
        held: dict[str, Any] = {"layer": some}
        return _Parts(groups, ("layer", "head"), (len(some), size), "one head", n_layers, held, placebo=False)
    around = [some] if by is None else windows(some, window, n_layers)
    groups = [[_Cell(one, at, head) for one in components for at in span for head in every(one, at)] for span in around]
    if by is None:
        return _Parts(groups, (), (), "all layers" if layers is None else "some layers together", n_layers, {})
    where = "one layer" if window == 1 else f"windows of {window} layers"
    return _Parts(groups, ("layer",), (len(some),), where, n_layers, {"layer": some})


@dataclass(frozen=True)
class _Grid:
    """Rows of a transfer: each model's own runs, and a patched one for each of `cells`.

    `own` marks the cells that are the later model's own run, `(fact, patch, state, late, group, place)`.
    """

    rows: list[Row]
    cells: list[tuple[int, ...]]
    own: np.ndarray


def _grid(
    asked: Sequence[Prompt], models: dict[str, Arm | None], parts: _Parts, at: At, *, hold: bool, seed: int
) -> _Grid:
    rng, arms = np.random.default_rng(seed), list(models.values())
    places = [places_in(prompt, at) for prompt in asked]
    shape = (len(asked), len(PATCHES), len(arms), len(arms), len(parts.groups), max(map(len, places)))
    grid = _Grid([Row(prompt, arm=arm) for prompt in asked for arm in arms], [], np.zeros(shape, bool))
    for fact, prompt in enumerate(asked):
        for place, positions in enumerate(places[fact]):
            where = [positions, elsewhere(prompt, positions, rng) if parts.placebo else ()]
            for kind, late, group in product((0, 1), range(len(arms)), range(len(parts.groups))):
                if not where[kind]:
                    continue
                grid.own[fact, kind, late, late, group, place] = True
                source, cell = Run(prompt, arms[1 - late]), (fact, kind, 1 - late, late, group, place)
                patches = tuple(patches_of(parts.groups[group], where[kind], source, prompt, parts.n_layers))
                if not patches:
                    grid.own[cell] = True
                    continue
                if hold:
                    patches += tuple(_held(patches, prompt, arms[late], parts.n_layers))
                grid.rows.append(Row(prompt, patches=patches, arm=arms[late]))
                grid.cells.append(cell)
    return grid


def places_in(prompt: Prompt, at: At) -> list[tuple[int, ...]]:
    predicting, last = tuple(prompt.predicting), prompt.predicting[-1]
    if at == "role":
        return [predicting if role == "prediction" else tuple(prompt.role(role)) for role in ROLES]
    if at == "position":
        return [(position,) for position in range(prompt.prediction + 1)]
    return [{"prediction": predicting, "subject": tuple(prompt.subject_positions), "all": tuple(range(last + 1))}[at]]


def elsewhere(prompt: Prompt, positions: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """As many other positions, none of which predicts the answer, is put, or is the subject's; none where too few.

    The subject's own would be no placebo for the prediction: what is put there may bring the answer itself.
    """
    others = [at for at in range(prompt.prediction) if at not in positions and at not in prompt.subject_positions]
    if not positions or len(others) < len(positions):
        return ()
    return tuple(sorted(int(at) for at in rng.choice(others, len(positions), replace=False)))


def patches_of(
    group: Sequence[_Cell],
    positions: Sequence[int],
    source: Run,
    prompt: Prompt,
    n_layers: int,
) -> Iterator[Patch]:
    """Patches that can change anything: the last layer's outputs do only where they predict."""
    for component, layer, head in group:
        dead = layer == n_layers - 1 and component not in ("resid_pre", "k", "v")
        at = tuple(one for one in positions if not dead or one in prompt.predicting)
        if at:
            yield Patch(layer, at, source, component, head)


def _held(patches: Sequence[Patch], prompt: Prompt, arm: Arm | None, n_layers: int) -> Iterator[Patch]:
    """The receiving model's own attention outputs, at all positions but those put and those that predict.

    Keys and values act on their own position's output as on any other's, which is off the route too.
    """
    put = {at for patch in patches if patch.component not in _GROUPS for at in patch.positions}
    first, layer = min(at for patch in patches for at in patch.positions), min(patch.layer for patch in patches)
    others = tuple(at for at in range(first, prompt.prediction) if at not in put)
    if others:
        yield from (Patch(at, others, Run(prompt, arm), "attn_out") for at in range(layer, n_layers - 1))
