"""Activation patching: states of one run put into another whose subject was swapped.

Clean and corrupt prompts differ only in the subject (symmetric token replacement, Zhang & Nanda 2023)
and have different answers. Denoising puts clean states into the corrupt run and asks how far the clean
answer comes back; noising puts corrupt states into the clean run and asks what it loses.

Some cells say nothing of the model, because the way they are made decides them (`trivial_cells`): what is reported
and drawn leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args, overload

import numpy as np
import xarray as xr

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads, n_kv_heads
from subjattn.engine.checks import check_model
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, Component, Patch, Row
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, shortened, some_layers, tokens_of, windows
from subjattn.measures.metrics import AS_THEY_ARE, Metric, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.prompts import ROLES, Prompt, aligned


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.measures import Model

At = Literal["role", "position", "prediction", "subject"]
Direction = Literal["denoising", "noising"]
NOTE = (
    "Patching tells which heads move the answer from one subject's to the other's, not which of them read the name: "
    "knockout(by='head') tells that."
)
_NAMES: dict[Component, str] = {
    "resid_pre": "residual stream before one layer",
    "resid_post": "residual stream after one layer",
    "attn_out": "attention output of one layer",
    "mlp_out": "MLP output of one layer",
    "z": "output of one head before W_O",
    "q": "queries of one head",
    "k": "keys of one key/value head",
    "v": "values of one key/value head",
    "pattern": "attention weights of one head",
}
_READ_ELSEWHERE: frozenset[Component] = frozenset({"resid_pre", "k", "v"})
"""Components of the last layer that more than their own position sees."""


@overload
def patch_grid(
    model: Model,
    pairs: Sequence[tuple[Prompt, Prompt]],
    component: Component = ...,
    *,
    at: At = ...,
    direction: Direction = ...,
    layers: Sequence[int] | None = ...,
    window: int = ...,
    metric: Metric = ...,
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.DataArray: ...
@overload
def patch_grid(
    model: Model,
    pairs: Sequence[tuple[Prompt, Prompt]],
    component: Component = ...,
    *,
    at: At = ...,
    direction: Direction = ...,
    layers: Sequence[int] | None = ...,
    window: int = ...,
    metric: list[Metric],
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.Dataset: ...
def patch_grid(
    model: Model,
    pairs: Sequence[tuple[Prompt, Prompt]],
    component: Component = "resid_pre",
    *,
    at: At = "role",
    direction: Direction = "denoising",
    layers: Sequence[int] | None = None,
    window: int = 1,
    metric: Metric | list[Metric] = "logit_diff",
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.DataArray | xr.Dataset:
    """Effect of patching one component, by layer and position (and head).

    Cells that cannot do anything are exactly 0 without a pass: positions before the first token in which
    the prompts differ, and whatever the last layer computes for its own position alone, anywhere but at the
    prediction position.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        pairs: clean and corrupt prompts, from `swap_subjects`.
        component: `resid_pre` or `resid_post`, the residual stream before or after a layer, `attn_out`, `mlp_out`; or
            of each head, `z`, its output before W_O, `q`, its queries, or `pattern`, its attention weights, which then
            meet the patched run's own values; or of each key/value head, `k` or `v`, its keys or values. Queries and
            keys are those behind rotary and norms.
        at: `role` patches all positions of a role together, `position` each by itself; `prediction` and
            `subject` patch there alone and give no such dimension.
        direction: `denoising` puts clean states into the corrupt run, `noising` corrupt ones into the clean.
        layers: those to compute (of windows, their centres); None: all.
        window: layers that are patched together around each, cut off at the first and last layer; Meng et al. (2022)
            take 10 for attention and MLP outputs.
        metric: one of `logit_diff` (clean answer minus corrupt answer, first tokens), `answer_logprob` (of
            the clean answer, nats), `kl` (nats), `rank` (of the clean answer), or a function of your own from the
            logits that predict the clean answer's tokens, `[answer, vocab]`, and the prompt to a number; or several.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, layer[, head][, role or position])`; of `k` and `v`, `head` counts key/value heads. `kl` and `rank` are
        those of the patched run, all others changes from the unpatched one; coordinates `clean_METRIC` and
        `corrupt_METRIC` `(fact,)` hold the runs that nothing was patched in, and the attribute
        `noise_floor` how far a row without a patch strays from them. A role or position that a prompt lacks
        is NaN. The coordinate `reach` `(fact[, role or position])` says what a place holds: `before` the first
        token that differs, the `same` tokens, a `part` or the `whole` of those that differ, or the `prediction`
        position; empty where a prompt lacks it. By position, `token` and `in_subject` hold the clean prompts' tokens.
        `recovery` turns effects into shares of what the swap destroyed.
        Several metrics give a Dataset, as `dataset[[…]]` does.

    Raises:
        BadInput: no pairs, a pair whose positions do not align, or an argument that does not fit.
        UnsupportedModel, NotFired: the patch could not be applied.
    """
    metrics = parse_metrics(metric)
    for name, value, known in (
        ("component", component, COMPONENTS),
        ("at", at, get_args(At)),
        ("direction", direction, get_args(Direction)),
    ):
        if value not in known:
            raise BadInput(f"{name} {value!r} is not one of {', '.join(known)}")
    if window < 1:
        raise BadInput(f"a window of {window} layers: give 1 or more")
    runs = answered_pairs(pairs, whole_answer=not {*metrics} <= {"answer_logit", "logit_diff", "kl", "rank"})
    sides = [clean for clean, _, _ in runs], [corrupt for _, corrupt, _ in runs]
    contrasts = [contrast for _, _, contrast in runs]
    hf = hf_model(model)
    n_layers = len(decoder_layers(hf))
    places = some_layers(layers, n_layers)
    heads = _heads(hf, component)

    n_place = {"role": len(ROLES), "position": max(clean.prediction for clean, _, _ in runs) + 1}.get(at, 1)
    rows = [Row(p, contrast=contrast) for side in sides for p, contrast in zip(side, contrasts, strict=True)]
    around = windows(places, window, n_layers)
    shared = [min((heads[layer] for layer in layers_here), key=len) for layers_here in around]
    dead = np.full((len(runs), len(places), max(map(len, shared)), n_place), np.nan)
    reach = np.full((len(runs), n_place), "", dtype="<U10")
    cells: list[tuple[int, int, int, int]] = []
    for fact, (clean, corrupt, contrast) in enumerate(runs):
        into, source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
        differs = next(i for i, (a, b) in enumerate(zip(clean.ids, corrupt.ids, strict=False)) if a != b)
        for place, positions in enumerate(_positions(clean, at)):
            reach[fact, place] = _reach(clean, corrupt, positions)
            live = tuple(position for position in positions if position >= differs)
            for index, layers_here in enumerate(around):
                where = {}
                for layer in layers_here:
                    last = component not in _READ_ELSEWHERE and layer == n_layers - 1
                    if some := tuple(position for position in live if not last or position == clean.prediction):
                        where[layer] = some
                if not where:
                    dead[fact, index, : len(shared[index]), place] = 0.0 if positions else np.nan
                    continue
                for head in shared[index]:
                    patches = tuple(Patch(layer, some, source, component, head) for layer, some in where.items())
                    rows.append(Row(into, patches=patches, contrast=contrast))
                    cells.append((fact, index, head or 0, place))
    every = [prompt for clean, corrupt, _ in runs for prompt in (clean, corrupt)]
    run = opened(backend, hf, memory_budget, every, patterns=component == "pattern")
    found = measure_rows(run.forward(rows, only_contrast=list(metrics) == ["logit_diff"]), rows, metrics)

    dims = ("layer", *(("head",) if component in BY_HEAD else ()), *((at,) if at in ("role", "position") else ()))
    keep = tuple(slice(None) if dim in dims else 0 for dim in ("layer", "head", at))
    held = ("fact", at) if at in ("role", "position") else ("fact",)
    arrays = {}
    for name in metrics:
        grid = dead.copy()
        if name in AS_THEY_ARE:
            side = (
                found.values[name][len(runs) : 2 * len(runs)]
                if direction == "denoising"
                else found.values[name][: len(runs)]
            )
            grid = np.where(grid == 0, side[:, None, None, None], grid)
        if cells:
            grid[tuple(np.array(cells).T)] = found.effect(name)[-len(cells) :]
        array = labelled(
            f"patch_{name}" if name in AS_THEY_ARE else "patch_effect",
            grid[(slice(None), *keep)],
            [clean for clean, _ in pairs],
            dims,
            unit=unit_of(name),
            definition=_definition(name, component, direction, at, window),
            paper="Meng et al. 2022; subject swap and logit difference after Zhang & Nanda 2023",
            component=component,
            n_layers=n_layers,
            direction=direction,
            noise_floor=found.noise_floor[name],
            backend=run.name,
            **({"note": NOTE} if component == "z" else {}),
            **({"window": window} if window > 1 else {}),
        )
        array = array.assign_coords(
            {
                "reach": (held, reach if len(held) == 2 else reach[:, 0]),
                "layer": places,
                "corrupt_subject": ("fact", [corrupt.subject for _, corrupt in pairs]),
                f"clean_{name}": ("fact", found.values[name][: len(runs)]),
                f"corrupt_{name}": ("fact", found.values[name][len(runs) : 2 * len(runs)]),
            }
        )
        if at == "position":
            array = array.assign_coords(tokens_of([clean for clean, _, _ in runs], n_place))
        arrays[name] = array.assign_coords(role=list(ROLES)) if at == "role" else array
    return xr.Dataset(arrays) if isinstance(metric, list) else next(iter(arrays.values()))


def recovery(effect: xr.DataArray) -> xr.DataArray:
    """Mean share of what the swap destroyed that a cell brings back (noising: destroys), `(layer, …)`.

    The ratio of means over facts, not the mean of ratios, which a pair that the swap hardly moves would
    dominate: denoising, 0 is the corrupt run and 1 the clean one; noising, the other way round. Facts that
    lack a role do not count for it.

    Raises:
        BadInput: the array holds no change (`kl`, `rank`).
    """
    lost = destroyed(effect)
    if effect.attrs.get("direction") == "noising":
        lost = -lost
    share = effect.mean("fact") / lost.where(effect.notnull()).mean("fact")
    return share.rename("recovery").assign_attrs(
        unit="share of the destroyed difference", definition="mean effect over mean destroyed difference"
    )


def destroyed(effect: xr.DataArray) -> xr.DataArray:
    """What the swap takes from each pair: the metric of the clean run minus that of the corrupt one, `(fact,)`.

    Raises:
        BadInput: the array holds no change (`kl`, `rank`).
    """
    held = [str(name).removeprefix("clean_") for name in effect.coords if str(name).startswith("clean_")]
    named = [name for name in held if name not in AS_THEY_ARE]
    named = [str(effect.name)] if effect.name in (*named, *AS_THEY_ARE) else named
    if effect.name in ("patch_kl", "patch_rank", *AS_THEY_ARE) or len(named) != 1:
        raise BadInput("recovery needs a patch_grid of 'logit_diff' or 'answer_logprob'; of a Dataset, one variable")
    return effect[f"clean_{named[0]}"] - effect[f"corrupt_{named[0]}"]


def trivial_cells(effect: xr.DataArray) -> xr.DataArray:
    """Cells of a `patch_grid`, a `trace` or a part of one that its making decides, the last kind all but: booleans.

    * before the first token that differs: exactly nothing;
    * what the last layer computes for its own position alone, anywhere but at the prediction position: exactly nothing;
    * the residual stream before the first layer: exactly nothing where the tokens are the same, exactly all where they
      are the whole of those that differ; queries, keys and values of the first layer: nothing where the tokens are the
      same;
    * the residual stream before the last layer, or after the one before it, at the prediction position: whatever came
      there earlier is in it, and one layer's attention alone can still read elsewhere, so most of the effect stands
      there in any model; after the last layer, all of it.

    A window does nothing where all of its layers do nothing, and all where one of its layers does all.

    Raises:
        BadInput: an array that does not say what its places hold (not from `patch_grid` or `trace`, or from an earlier
            version).
    """
    if "reach" not in effect.coords or not {"component", "n_layers"} <= set(effect.attrs):
        raise BadInput("which cells are trivial is not known: give an array of patch_grid, made by this version")
    component, n_layers = effect.attrs["component"], int(effect.attrs["n_layers"])
    around = windows(effect["layer"].values.tolist(), int(effect.attrs.get("window", 1)), n_layers)
    reach = effect["reach"]
    lowest, highest = (xr.DataArray([some[end] for some in around], dims="layer") for end in (0, -1))
    same, prediction = reach.isin(["same", "prediction"]), reach == "prediction"
    elsewhere = (lowest == n_layers - 1) & (reach != "") & ~prediction
    if component == "resid_pre":
        trivial = ((highest == 0) & same) | ((lowest == 0) & (reach == "whole"))
        trivial = trivial | ((highest == n_layers - 1) & prediction)
    elif component == "resid_post":
        trivial = elsewhere | ((highest >= n_layers - 2) & prediction)
    elif component in ("q", "k", "v"):
        trivial = ((highest == 0) & same) | (elsewhere & (component == "q"))
    else:
        trivial = elsewhere
    held = effect.notnull().reset_coords(drop=True)
    trivial = (trivial | (reach == "before")).reset_coords(drop=True)
    return (trivial & held).transpose(*effect.dims).rename("trivial").drop_attrs()


def mostly_trivial(effect: xr.DataArray) -> xr.DataArray:
    """Cells of `recovery` that are trivial in at least half of the facts that have them: booleans `(layer, …)`."""
    held = effect.notnull().reset_coords(drop=True)
    return (trivial_cells(effect).sum("fact") * 2 >= held.sum("fact")).rename("trivial").drop_attrs()


def answered_pairs(
    pairs: Sequence[tuple[Prompt, Prompt]], *, whole_answer: bool
) -> list[tuple[Prompt, Prompt, tuple[int, int]]]:
    """Clean and corrupt prompts, both followed by the clean answer, and the answers' first tokens."""
    if not pairs:
        raise BadInput("there are no pairs of prompts to patch: ask more facts, so that subjects can be swapped")
    check_askable([prompt for pair in pairs for prompt in pair])
    runs = []
    for clean, corrupt in pairs:
        if not aligned(clean, corrupt) or clean.answer_ids[0] == corrupt.answer_ids[0]:
            raise BadInput(
                f"facts {clean.fact_id} and {corrupt.fact_id}: positions do not align or their answers start alike"
            )
        contrast = (clean.answer_ids[0], corrupt.answer_ids[0])
        end = corrupt.prediction + 1
        asked = replace(
            corrupt,
            ids=corrupt.ids[:end] + clean.answer_ids,
            tokens=corrupt.tokens[:end] + clean.tokens[end:],
            answers=clean.answers,
        )
        runs.append((clean, asked, contrast) if whole_answer else (shortened(clean), shortened(asked), contrast))
    return runs


def _heads(hf: PreTrainedModel, component: Component) -> list[list[int | None]]:
    """Of every layer, the heads whose component can be patched; None: it belongs to no head."""
    if component not in BY_HEAD:
        return [[None]] * len(decoder_layers(hf))
    if component in ("k", "v"):
        check_model(hf)
        return [list(range(n)) for n in n_kv_heads(hf)]
    return [list(range(n_heads(hf)))] * len(decoder_layers(hf))


def _positions(prompt: Prompt, at: At) -> list[range]:
    """The positions that each place of a grid patches."""
    if at == "role":
        return [prompt.role(role) for role in ROLES]
    if at == "position":
        return [range(position, position + 1) for position in range(prompt.prediction + 1)]
    return [prompt.role("prediction") if at == "prediction" else prompt.subject_positions]


def _reach(clean: Prompt, corrupt: Prompt, positions: range) -> str:
    """What a place holds; see `patch_grid`."""
    if not positions:
        return ""
    if clean.prediction in positions:
        return "prediction"
    end = clean.prediction + 1
    differing = {i for i, (a, b) in enumerate(zip(clean.ids[:end], corrupt.ids[:end], strict=True)) if a != b}
    if positions[-1] < min(differing):
        return "before"
    held = differing & set(positions)
    return "whole" if held == differing else "part" if held else "same"


def _definition(metric: str, component: Component, direction: Direction, at: At, window: int) -> str:
    source, into = ("clean", "corrupt") if direction == "denoising" else ("corrupt", "clean")
    where = {"role": "all positions of a role", "position": "one position"}.get(at, f"the {at}")
    change = meaning_of(metric) if metric in AS_THEY_ARE else f"change in the {meaning_of(metric)}"
    together = f", {window} layers together" if window > 1 else ""
    return f"{change}, when the {source} run's {_NAMES[component]} is put into the {into} run at {where}{together}"
