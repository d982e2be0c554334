"""Verify what runs within one model, and attention scores of two: causal tracing, scores scaled, scores split.

The references are whole passes with plain hooks (see verify_hooks.py). Noise is drawn by the same generator; compared
is all that follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.backends import BACKENDS, Backend, BackendName
from subjattn.engine import checks
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.noise import Noise
from subjattn.errors import BadInput, NotFired, UnsupportedModel
from subjattn.measures import hf_model, opened
from subjattn.measures.rescale import rescale
from subjattn.measures.score_split import COMBINATIONS, score_split
from subjattn.measures.trace import Traced, trace
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms
from subjattn.prompts import ROLES, Prompt
from subjattn.verify import Comparison, Refusal, Verification
from subjattn.verify_hooks import Put, States, run


NOISED = "noised runs"
SCALED, SCALED_HEADS = "scores scaled", "scores scaled in heads"
RESTORED, SPLIT = "restored mlp_out of the tuned", "scores split"
DOSES = (-1.0, 1.0)
_Measure = Callable[[Backend], dict[str, xr.DataArray]]
_ByHand = Callable[[dict[str, xr.DataArray]], dict[str, xr.DataArray]]


def with_inside(
    found: Verification,
    model: LoadedModel,
    prompts: Sequence[Prompt],
    backends: Sequence[BackendName] = BACKENDS,
) -> Verification:
    """What `verify` found, and how tracing and scaled attention scores compare with the same by hand.

    Quantities, in nats of the answer's log-probability: runs with noise on the subject's embeddings; each component's
    clean states restored into them, by role, in the first, the middle and the last layer; and a dose added to the
    scores from all positions that predict the answer to the subject, in all heads and in every other. A scale is what
    noise, a restored state or a dose moves.

    Args:
        found: of the model, from `verify`.
        model: the same.
        prompts: few; the reference by hooks makes some hundred passes of each.
        backends: what to compare; `hooks` are those of verify_hooks.py.

    Raises:
        UnsupportedModel: the engine itself refuses the model.
    """
    hf = hf_model(model)
    engine = opened("engine", hf, None, prompts)
    allowed = checks.logit_tolerance(hf) * found.largest_logit
    comparisons: list[Comparison] = []
    refusals: list[Refusal] = []
    measures: list[tuple[_Measure, str, _ByHand]] = [
        (_tracing(model, prompts, component), f"restored {component}", partial(_traced_by_hand, hf, prompts))
        for component in get_args(Traced)
    ]
    measures.append((_scaling(model, prompts), SCALED, partial(_scaled_by_hand, hf, prompts)))
    asked: list[tuple[_Measure, dict[str, xr.DataArray], _ByHand]] = []
    for measured, quantity, by_hand in measures:
        try:
            ours = measured(engine)
        except UnsupportedModel as error:
            refusals.append(Refusal("engine", quantity, str(error)))
        else:
            asked.append((measured, {key: of for key, of in ours.items() if not asked or key != NOISED}, by_hand))
    for name in (name for name in dict.fromkeys(backends) if name != "engine"):
        try:
            backend = None if name == "hooks" else opened(name, hf, None, prompts)
        except (UnsupportedModel, BadInput) as error:
            refusals.append(Refusal(name, None, str(error)))
            continue
        for measured, ours, by_hand in asked:
            try:
                theirs = by_hand(ours) if backend is None else measured(backend)
            except UnsupportedModel as error:
                refusals += [Refusal(name, quantity, str(error)) for quantity in ours]
            except NotFired as error:
                fault = str(error)
                comparisons += [Comparison(name, key, "nats", 0, None, allowed, None, fault=fault) for key in ours]
            else:
                comparisons += [_compared(name, key, of, theirs[key], allowed) for key, of in ours.items()]
        del backend
    quantities = [quantity for _, ours, _ in asked for quantity in ours]
    refusals = [refusal for refusal in refusals if refusal not in found.refusals]
    return _more(found, quantities, comparisons, refusals)


def with_scores(found: Verification, arms: Arms, tuned: LoadedModel, prompts: Sequence[Prompt]) -> Verification:
    """What `verify` found, and how tracing and attention scores across two models compare with plain hooks.

    The tuned model's MLP outputs restored into the base's noised runs, in nats of the answer's log-probability; and
    log-odds of attention to the subject, in nats, for all eight combinations of weights, query and keys of the two, in
    every layer and head: their tolerance is a share of the largest, their scale what a combination moves.

    Args:
        found: of the tuned model, from `verify`.
        arms: both, the tuned one alone beside its base.
        tuned: the tuned model by itself.
        prompts: few.
    """
    base, share = hf_model(arms.base), checks.logit_tolerance(arms.base.model)
    (name,) = arms.sources
    layers = _some_layers(base)
    crossed, refusals = [], []
    try:
        traced = trace(arms, prompts, "mlp_out", states=name, layers=layers, draws=1)["indirect_effect"]
    except UnsupportedModel as error:
        refusals.append(Refusal("engine", RESTORED, str(error)))
    else:
        by_hand = _traced_by_hand(base, prompts, {RESTORED: traced}, hf_model(tuned))[RESTORED]
        crossed.append(_compared("hooks", RESTORED, traced, by_hand, share * found.largest_logit))
    ours = score_split(arms, prompts)["log_odds"]
    theirs = _split_by_hand({"base": base, "tuned": hf_model(tuned)}, prompts, ours)
    allowed = checks.tolerance(base) * float(np.nanmax(np.abs(ours.values)))
    split = _compared("hooks", SPLIT, ours, theirs, allowed, ours - ours.sel(combination="base"))
    quantities = [*(one.quantity for one in crossed), SPLIT]
    return _more(found, quantities, [*crossed, split], refusals)


def _more(
    found: Verification, quantities: Sequence[str], comparisons: Sequence[Comparison], refusals: Sequence[Refusal]
) -> Verification:
    return replace(
        found,
        quantities=[*found.quantities, *quantities],
        comparisons=[*found.comparisons, *comparisons],
        refusals=[*found.refusals, *refusals],
    )


def _compared(
    backend: BackendName,
    quantity: str,
    ours: xr.DataArray,
    theirs: xr.DataArray,
    allowed: float,
    moved: xr.DataArray | None = None,
) -> Comparison:
    """Arrays cell by cell; where one has no number, the other must have none."""
    scale = float(np.nanmax(np.abs((ours if moved is None else moved).values)))
    known = np.isfinite(ours.values)
    cells, unit = int(known.sum()), str(ours.attrs["unit"])
    if not np.array_equal(known, np.isfinite(theirs.values)):
        fault = "a number is missing, or stands where none belongs"
        return Comparison(backend, quantity, unit, cells, scale, allowed, None, fault=fault)
    gaps = np.where(known, np.abs(theirs.values - ours.values), -np.inf)
    at = np.unravel_index(int(gaps.argmax()), gaps.shape)
    place = {str(dim): ours[dim].values[i].item() for dim, i in zip(ours.dims, at, strict=True)}
    return Comparison(backend, quantity, unit, cells, scale, allowed, None, float(gaps[at]), place)


def _some_layers(model: PreTrainedModel) -> list[int]:
    n_layers = len(decoder_layers(model))
    return sorted({0, n_layers // 2, n_layers - 1})


def _tracing(model: LoadedModel, prompts: Sequence[Prompt], component: Traced) -> _Measure:
    layers = _some_layers(hf_model(model))

    def measured(backend: Backend) -> dict[str, xr.DataArray]:
        found = trace(model, prompts, component, layers=layers, draws=1, backend=backend)
        return {NOISED: found["total_effect"], f"restored {component}": found["indirect_effect"]}

    return measured


def _traced_by_hand(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    ours: dict[str, xr.DataArray],
    giving: PreTrainedModel | None = None,
) -> dict[str, xr.DataArray]:
    """The same arrays, with clean states of the model itself, or of the one `giving` them."""
    found = {name: xr.full_like(array, np.nan) for name, array in ours.items()}
    noise = Noise(next(iter(ours.values())).attrs["noise_std"])
    for i, prompt in enumerate(prompts):
        logits, clean = run(model, prompt)
        at, values = list(prompt.subject_positions), noise.values(prompt, clean["resid_pre", 0].shape[-1])
        noised = _logprob(run(model, prompt, noise=(at, values))[0], prompt)
        given = clean if giving is None else run(giving, prompt)[1]
        for name, array in found.items():
            if name == NOISED:
                array[i] = _logprob(logits, prompt) - noised
                continue
            component, places = array.attrs["component"], list(map(prompt.role, ROLES))
            for (j, layer), (k, place) in product(enumerate(array["layer"].values.tolist()), enumerate(places)):
                if place:
                    put = [(component, layer, place, given[component, layer][list(place)])]
                    restored = _logprob(run(model, prompt, noise=(at, values), put=put)[0], prompt)
                    array[i, j, k] = restored - noised
    return found


def _scaling(model: LoadedModel, prompts: Sequence[Prompt]) -> _Measure:
    def measured(backend: Backend) -> dict[str, xr.DataArray]:
        every = rescale(model, prompts, DOSES, backend=backend)
        some = _heads(hf_model(model))
        return {SCALED: every, SCALED_HEADS: rescale(model, prompts, DOSES, heads=some, backend=backend)}

    return measured


def _heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Every other one, as on a chessboard of layers and heads."""
    every = product(range(len(decoder_layers(model))), range(n_heads(model)))
    return [(layer, head) for layer, head in every if (layer + head) % 2]


def _scaled_by_hand(
    model: PreTrainedModel, prompts: Sequence[Prompt], ours: dict[str, xr.DataArray]
) -> dict[str, xr.DataArray]:
    n_layers, heads = len(decoder_layers(model)), n_heads(model)
    cells = {SCALED: list(product(range(n_layers), range(heads))), SCALED_HEADS: _heads(model)}
    found = {name: xr.full_like(array, np.nan) for name, array in ours.items()}
    for i, prompt in enumerate(prompts):
        plain = _logprob(run(model, prompt)[0], prompt)
        queries, keys = torch.tensor(list(prompt.predicting)), torch.tensor(list(prompt.subject_positions))
        for (name, some), (j, dose) in product(cells.items(), enumerate(DOSES)):
            added: dict[int, Tensor] = {}
            for layer, head in some:
                scores = added.setdefault(layer, torch.zeros(heads, len(prompt), len(prompt)))
                scores[head][queries[:, None], keys] = dose
            found[name][i, j] = _logprob(run(model, prompt, added=added)[0], prompt) - plain
    return found


def _split_by_hand(models: dict[str, PreTrainedModel], prompts: Sequence[Prompt], ours: xr.DataArray) -> xr.DataArray:
    """Two passes a combination: queries of one model's streams, then attention over keys of another's, same weights."""
    found = xr.full_like(ours, np.nan)
    for i, prompt in enumerate(prompts):
        streams = {name: run(model, prompt)[1] for name, model in models.items()}
        for number, some in enumerate(COMBINATIONS):
            weights = models["tuned" if "weights" in some else "base"]
            query, keys = (streams["tuned" if part in some else "base"] for part in ("query", "keys"))
            asked = _given(weights, prompt, query)
            queries = {layer: asked["q", layer][None] for layer in ours["layer"].values.tolist()}
            read = _given(weights, prompt, keys, queries)
            found[i, number] = np.stack([_log_odds(read["pattern", layer], prompt) for layer in queries])
    return found


def _given(model: PreTrainedModel, prompt: Prompt, streams: States, queries: dict[int, Tensor] | None = None) -> States:
    """What every layer makes of the residual streams of some model."""
    every = list(range(len(prompt)))
    put: list[Put] = [("resid_pre", layer, every, of) for (name, layer), of in streams.items() if name == "resid_pre"]
    return run(model, prompt, put=put, queries=queries)[1]


def _log_odds(pattern: Tensor, prompt: Prompt) -> np.ndarray:
    """Of the subject against the rest, from attention `[head, query, key]`; NaN where one of the two has none."""
    row = pattern[:, prompt.prediction, : prompt.prediction + 1].double().cpu()
    inside = row[:, list(prompt.subject_positions)].sum(-1)
    rest = row[:, [at for at in range(prompt.prediction + 1) if at not in prompt.subject_positions]].sum(-1)
    odds = inside.log() - rest.log()
    return odds.masked_fill((inside == 0) | (rest == 0), torch.nan).numpy()


def _logprob(logits: Tensor, prompt: Prompt) -> float:
    """Of the answer."""
    chosen = logits[list(prompt.predicting)].float().log_softmax(-1).double()
    return float(chosen[range(len(prompt.answer_ids)), list(prompt.answer_ids)].sum())
