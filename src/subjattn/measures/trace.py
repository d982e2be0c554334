"""Causal tracing (ROME, Meng et al. 2022): which states, restored into a run with a noised subject, return the answer.

Gaussian noise on the embeddings of the subject's tokens takes the answer away: the total effect. Clean states are then
put back, one place at a time, and what returns of the answer is their indirect effect. Both are differences in a metric
and stand beside the values that they come from; a share of the total is given only where the draws of noise tell it
from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from scipy.stats import t as student

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.interventions import Arm, Patch, Row, Run
from subjattn.engine.noise import Noise
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, some_layers, tokens_of, windows
from subjattn.measures.metrics import Measured, Own, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.models.arms import Arms
from subjattn.prompts import ROLES, Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

Traced = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
At = Literal["role", "position", "subject", "subject_last", "prediction"]
Traceable = Literal["answer_logprob"] | Own
PAPER = "Meng et al. 2022 (there: of the answer's probability; windows of 10 for attention and MLPs)"
CONFIDENCE = 0.95
"""Of the interval of the total effect over draws."""
_INTERVAL = "95 % t-interval of total_effect over draws of noise"
_SHARE = "indirect_effect over total_effect of the fact; NaN, not defined, where total_effect_interval reaches 0"
_NAMES: dict[Traced, str] = {
    "resid_pre": "residual stream before",
    "resid_post": "residual stream after",
    "attn_out": "attention output of",
    "mlp_out": "MLP output of",
}


def trace(
    model: Model | Arms,
    prompts: Sequence[Prompt],
    component: Traced = "resid_post",
    *,
    states: str | None = None,
    at: At = "role",
    layers: Sequence[int] | None = None,
    window: int = 1,
    noise: float = 3.0,
    std: float | None = None,
    draws: int = 10,
    seed: int = 0,
    metric: Traceable | list[Traceable] = "answer_logprob",
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """What restoring clean states gives back of an answer that noise on the subject takes away.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode; or, with `states`, what `load_arms`
            gives, whose base is traced.
        prompts: whom to ask; facts that the model knows.
        component: `resid_pre` or `resid_post`, the residual stream before or after a layer, `attn_out` or `mlp_out`.
        states: the arm whose clean states are restored into the base's noised run; None: the model's own.
        at: `role` restores all positions of a role together, `position` each by itself; `subject`, `subject_last` and
            `prediction` restore there alone and give no such dimension.
        layers: those to compute, of windows their centres; None: all.
        window: of `attn_out` and `mlp_out`, layers restored together, cut off at the first and last; Meng et al. take
            10, from 5 before the centre to 4 behind it.
        noise: standard deviation of the noise, in units of `std`.
        std: of this model's embeddings of subjects; None: of those of these prompts (`subject_std`).
        draws: of the noise, for each fact.
        seed: of the draws; a fact's own do not depend on the others.
        metric: `answer_logprob` (nats), or a function of your own, as `knockout` takes it; or several.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        A Dataset. Values of the metric: `clean` `(fact,)`, `noised` `(fact, noise_draw)` and `restored`
        `(fact, noise_draw, layer[, role or position])`. Means over draws: `total_effect` `(fact,)`, clean minus noised,
        and `indirect_effect` `(fact, layer[, …])`, restored minus noised, each with its standard error over draws,
        `…_se`. `total_effect_interval` `(fact, end)` is the 95 % t-interval over draws; `share` is the indirect effect
        over the total one where that interval lies above 0, and NaN elsewhere. States before the first noised token
        have an indirect effect of exactly 0 (another arm's have not), as have outputs of the last layer but at the
        prediction position; NaN where a prompt lacks a place. The coordinate `reach` is `patch_grid`'s, so that
        `trivial_cells` knows them. Attributes: `noise_std`, the noise in units of the embeddings, and `noise_floor`. Of
        several metrics all of these are there, each named `METRIC_clean`, `METRIC_noised` and so on.

    Raises:
        BadInput: a prompt ends with its subject, or an argument does not fit.
        UnsupportedModel, NotFired: noise or states could not be put there.
    """
    check_askable(prompts)
    _check(component, at, metric, noise, {"window": (window, 1), "draws": (draws, 1), "seed": (seed, 0)})
    if window > 1 and component not in ("attn_out", "mlp_out"):
        raise BadInput(f"windows are of 'attn_out' or 'mlp_out': the {_NAMES[component]} a layer holds all below it")
    metrics = parse_metrics(metric)  # type: ignore[arg-type]
    one, source = _sides(model, states)
    hf = hf_model(one)
    n_layers = len(decoder_layers(hf))
    chosen = some_layers(layers, n_layers)
    std = noise * (subject_std(hf, prompts) if std is None else std)
    noises = [Noise(std, seed, draw) for draw in range(draws)]
    grid = _grid(prompts, source, component, at, windows(chosen, window, n_layers), n_layers, noises)
    run = opened(backend, hf, memory_budget, prompts)
    found = measure_rows(run.forward(grid.rows), grid.rows, metrics)
    where = {"role": "all positions of a role", "position": "one position"}.get(at, f"the {at}".replace("_", "'s "))
    part = "one layer" if window == 1 else f"windows of {window} layers"
    back = f"clean {_NAMES[component]} {part} restored at {where}"
    arrays: dict[str, xr.DataArray] = {}
    for name in metrics:
        for label, array in _dataset(found, grid, prompts, draws, name, back, at).items():
            label = f"{name}_{label}" if isinstance(metric, list) else str(label)
            arrays[label] = array.rename(label).assign_attrs(noise_floor=found.noise_floor[name])
    dataset = xr.Dataset(arrays).assign_coords(layer=chosen)
    if at == "position":
        dataset = dataset.assign_coords(tokens_of(prompts, grid.reach.shape[1]))
    attrs: dict[str, Any] = {"component": component, "n_layers": n_layers, "window": window, "seed": seed}
    attrs |= {
        "noise": noise,
        "noise_std": std,
        "paper": PAPER,
        "backend": run.name,
        "states": states or "the model's own",
    }
    for array in dataset.data_vars.values():
        array.attrs |= attrs
    return dataset


@torch.inference_mode()
def subject_std(model: Model, prompts: Sequence[Prompt]) -> float:
    """Standard deviation of all entries of the input embeddings of the prompts' subjects, as the model scales them.

    As in Meng et al.: each prompt's subject counts, about the mean of all entries.
    """
    hf = hf_model(model)
    ids = [prompt.ids[position] for prompt in prompts for position in prompt.subject_positions]
    embedded = hf.get_input_embeddings()(torch.tensor([ids], device=hf.device))
    return float(embedded.double().std())


def _sides(model: Model | Arms, states: str | None) -> tuple[Model, Arm | None]:
    """The model that is traced, and the arm whose states are restored into it."""
    if isinstance(model, Arms):
        if states is None:
            raise BadInput(f"states: name the arm whose states are restored, of {', '.join(model.sources)}")
        return model.base, model.arm(states)
    if states is not None:
        raise BadInput(f"states={states!r} are another model's: give both models, from load_arms")
    return model, None


@dataclass
class _Grid:
    """Rows of a tracing: clean runs, noised runs by fact and draw, and a restored run for each of `cells`.

    `dead` is 0 in cells that cannot do anything and NaN elsewhere, `(fact, layer, place)`.
    """

    rows: list[Row]
    cells: list[tuple[int, int, int, int]]
    dead: np.ndarray
    reach: np.ndarray


def _check(component: str, at: str, metric: object, noise: float, counts: dict[str, tuple[int, int]]) -> None:
    for name, value, known in (("component", component, get_args(Traced)), ("at", at, get_args(At))):
        if value not in known:
            raise BadInput(f"{name} {value!r} is not one of {', '.join(known)}")
    each = metric if isinstance(metric, list) else [metric]
    if wrong := [one for one in each if not callable(one) and one != "answer_logprob"]:
        raise BadInput(
            f"metric {wrong[0]!r} has no effects to trace: give 'answer_logprob' or a function of your own from the "
            "logits and the prompt to a number"
        )
    if not (np.isfinite(noise) and noise > 0):
        raise BadInput(f"noise={noise!r}: give a number of standard deviations above 0, such as 3")
    for name, (count, least) in counts.items():
        if count < least:
            raise BadInput(f"{name} is {count}: give {least} or more")


def _grid(
    prompts: Sequence[Prompt],
    source: Arm | None,
    component: Traced,
    at: At,
    around: list[range],
    n_layers: int,
    noises: list[Noise],
) -> _Grid:
    n_place = {"role": len(ROLES), "position": max(prompt.prediction for prompt in prompts) + 1}.get(at, 1)
    rows = [Row(prompt) for prompt in prompts] + [Row(prompt, noise=noise) for prompt in prompts for noise in noises]
    dead = np.full((len(prompts), len(around), n_place), np.nan)
    grid = _Grid(rows, [], dead, np.full((len(prompts), n_place), "", dtype="<U10"))
    for fact, prompt in enumerate(prompts):
        for place, positions in enumerate(_positions(prompt, at)):
            reach = _reach(prompt, positions)
            grid.reach[fact, place] = "same" if reach == "before" and source is not None else reach
            for index, some in enumerate(around):
                patches = tuple(_patches(Run(prompt, source), positions, some, component, n_layers))
                if not patches:
                    grid.dead[fact, index, place] = 0.0 if positions else np.nan
                    continue
                grid.rows += [Row(prompt, patches=patches, noise=noise) for noise in noises]
                grid.cells += [(fact, draw, index, place) for draw in range(len(noises))]
    return grid


def _patches(run: Run, positions: range, layers: range, component: Traced, n_layers: int) -> Iterator[Patch]:
    """Clean states that can do something: not the model's own before the noise, nor what no later layer reads."""
    start = run.prompt.subject_span[0] if run.arm is None else 0
    live = tuple(position for position in positions if position >= start)
    for layer in layers:
        last = component != "resid_pre" and layer == n_layers - 1
        if where := tuple(position for position in live if not last or position == run.prompt.prediction):
            yield Patch(layer, where, run, component)


def _positions(prompt: Prompt, at: At) -> list[range]:
    """The positions that each place restores."""
    if at == "role":
        return [prompt.role(role) for role in ROLES]
    if at == "position":
        return [range(position, position + 1) for position in range(prompt.prediction + 1)]
    return [prompt.subject_positions if at == "subject" else prompt.role(at)]


def _reach(prompt: Prompt, positions: range) -> str:
    """What a place holds; see `patch_grid`."""
    if not positions:
        return ""
    if prompt.prediction in positions:
        return "prediction"
    if positions[-1] < prompt.subject_span[0]:
        return "before"
    held = {*positions} & {*prompt.subject_positions}
    return "whole" if held == {*prompt.subject_positions} else "part" if held else "same"


def _dataset(
    found: Measured, grid: _Grid, prompts: Sequence[Prompt], draws: int, name: str, back: str, at: At
) -> xr.Dataset:
    """Values, effects and what draws tell of them."""
    n, values, changes = len(prompts), found.values[name], found.effect(name)
    clean, noised = values[:n], values[n : n + n * draws].reshape(n, draws)
    effect = np.repeat(grid.dead[:, None], draws, 1)
    restored = effect + noised[:, :, None, None]
    if grid.cells:
        index = tuple(np.array(grid.cells).T)
        effect[index], restored[index] = changes[-len(grid.cells) :], values[-len(grid.cells) :]
    total, total_se = _spread(clean[:, None] - noised)
    indirect, indirect_se = _spread(effect)
    reach = student.ppf((1 + CONFIDENCE) / 2, max(draws - 1, 1)) * total_se
    defined = (total - reach > 0)[:, None, None]
    share = np.divide(indirect, total[:, None, None], where=defined, out=np.full_like(indirect, np.nan))

    what, unit, noisy = meaning_of(name), unit_of(name), "Gaussian noise on the embeddings of the subject's tokens"
    rise = f"rise in the {what}, under {noisy}, with the {back}"
    place = (at,) if at in ("role", "position") else ()
    cut = (lambda of: of) if place else (lambda of: of[..., 0])
    arrays = {
        "clean": (clean, (), unit, what),
        "noised": (noised, ("noise_draw",), unit, f"{what}, under {noisy}"),
        "restored": (cut(restored), ("noise_draw", "layer", *place), unit, f"{what}, under {noisy}, with the {back}"),
        "total_effect": (total, (), unit, f"fall in the {what}, by {noisy}, mean over draws"),
        "total_effect_se": (total_se, (), unit, "standard error of total_effect over draws of noise"),
        "total_effect_interval": (np.stack([total - reach, total + reach], 1), ("end",), unit, _INTERVAL),
        "indirect_effect": (cut(indirect), ("layer", *place), unit, f"{rise}, mean over draws"),
        "indirect_effect_se": (cut(indirect_se), ("layer", *place), unit, f"standard error over draws of the {rise}"),
        "share": (cut(share), ("layer", *place), "share of the total effect", _SHARE),
    }
    dataset = xr.Dataset(
        {
            key: labelled(key, of, prompts, dims, unit=own, definition=definition)
            for key, (of, dims, own, definition) in arrays.items()
        }
    )
    coords: dict[str, Any] = {"end": ["low", "high"], "reach": (("fact", *place), cut(grid.reach))}
    return dataset.assign_coords(coords | ({"role": list(ROLES)} if at == "role" else {}))


def _spread(by_draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over draws, the second dimension, and its standard error; NaN of a single draw."""
    draws = by_draw.shape[1]
    se = by_draw.std(1, ddof=1) / np.sqrt(draws) if draws > 1 else np.full_like(by_draw[:, 0], np.nan)
    return by_draw.mean(1), se
