"""Which part of a tuning's weights does it: every combination of base and tuned parts, and the share of each.

The update is split into what makes attention patterns (`qk`), what they move (`vo`), the MLP and, of whole
checkpoints, the `rest` (norms, embeddings, unembedding). Nothing is trained: a combination is a model whose chosen
parts are tuned, and all combinations of all prompts run in one batch, on one copy of the weights.

A part's share is its Shapley value (Shapley 1953): what it changes when it joins, averaged over all orders in which
the parts may join. Shares add up to the whole change. The same weights by position is dynamic weight grafting
(arXiv 2506.20746).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from math import factorial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.interventions import Arm, Part, Row
from subjattn.errors import BadInput
from subjattn.measures import check_askable, labelled, opened, shortened
from subjattn.measures.metrics import AS_THEY_ARE, Metric, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.measures.record import Asked, Measure, Quantity, Settings, one_per_fact
from subjattn.measures.temperature import FITTING, GRID, fitted_on_others, noting_losses
from subjattn.models.arms import BASE, PARTS, Arms


if TYPE_CHECKING:
    from subjattn.prompts import Prompt

THIRDS = ("early", "middle", "late")
WHERE = ("subject", "prediction", "subject and prediction", "elsewhere")
_PAPER = "Shapley values (Shapley 1953) of the parts of an update; by position: dynamic weight grafting, 2506.20746"


def swap_weights(
    arms: Arms,
    prompts: Sequence[Prompt],
    tuned: str | None = None,
    *,
    by_depth: bool = False,
    by_position: bool = False,
    calibrated: bool = False,
    metric: Metric | list[Metric] = "answer_logprob",
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """What each part of a tuned model's weights changes, by all combinations of base and tuned parts.

    Args:
        arms: a base and its tuned models, from `load_arms`.
        prompts: whom to ask.
        tuned: the arm; None: the only one.
        by_depth: also each part in each third of the layers, by itself.
        by_position: also the tuned weights at some positions only, which read the others' keys and values as they are.
        calibrated: also the answer's log-probability with every combination at its own temperature, as a model of its
            own, fitted on the other half of the facts: the metric `calibrated_logprob`. What makes answers surer and
            nothing else has no share in it.
        metric: one of `answer_logprob` (nats), `answer_logit`, `rank`, or a function of your own; or several.
        backend: what computes it; the engine alone knows arms.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        A Dataset of, for each metric: `METRIC` `(fact, weights)`, the metric under each combination, named by its tuned
        parts (`base`, `qk`, `qk+vo`, …); `METRIC_share` `(fact, part)`, Shapley values, in the metric's unit, which add
        up to tuned minus base. By depth, `METRIC_alone` and `METRIC_last` `(fact, part, third)`: what one part of one
        third changes when it alone is tuned, and when it joins last. By position, `METRIC_at` `(fact, where)`: the
        metric itself with tuned weights there alone. With `calibrated`, `temperature` `(fact, weights)`, NaN where none
        fits. Parts that the tuning leaves alone are not listed.

    Raises:
        BadInput: no prompts, no such arm, one that is the base itself, or a metric that compares with the run before an
            intervention.
        UnsupportedModel: weights that cannot be told into parts.
    """
    check_askable(prompts)
    name = only_arm(arms, tuned)
    metrics = parse_metrics(metric)
    if wrong := {*metrics} & {"kl", "logit_diff"}:
        raise BadInput(
            f"metric {min(wrong)!r} takes a foil or a run to compare with: use answer_logprob or answer_logit"
        )
    cells = arms.cells(name)
    if not cells:
        raise BadInput(f"arm {name!r} has the base's own weights: there is no update whose parts could be swapped")
    parts = [part for part in PARTS if any(own == part for _, own in cells)]
    sets = [frozenset(some) for n in range(len(parts) + 1) for some in combinations(parts, n)]
    variants: dict[tuple[str, ...], Arm | None] = {
        ("weights", named(some, parts)): arms.arm(name, parts=some) if some else None for some in sets
    }
    n_layers = len(decoder_layers(arms.base.model))
    if by_depth:
        variants |= _by_depth(arms.arm(name), cells, parts, n_layers)
    whole = calibrated or not {*metrics} <= {*AS_THEY_ARE, "answer_logit"}
    asked = list(prompts) if whole else [shortened(prompt) for prompt in prompts]
    keys = [*variants, *(("at", where) for where in WHERE if by_position)]
    rows = [
        Row(prompt, arm=variants[key] if key in variants else Arm(name, positions=_positions(prompt, key[1])))
        for prompt in asked
        for key in keys
    ]
    run = opened(backend, arms.base.model, memory_budget, asked)
    losses = np.empty((len(rows), len(GRID)))
    outputs = run.forward(rows)
    found = measure_rows(noting_losses(outputs, losses) if calibrated else outputs, rows, metrics)
    by_metric = {one: found.values[one].reshape(len(asked), -1).T for one in metrics}
    arrays: dict[str, xr.DataArray] = {}
    if calibrated:
        fitted = [fitted_on_others(of, prompts) for of in losses.reshape(len(asked), len(keys), -1).swapaxes(0, 1)]
        by_metric["calibrated_logprob"] = np.stack([at for _, at in fitted])
        own = np.stack([temperature for temperature, _ in fitted[: len(sets)]], 1)
        arrays["temperature"] = labelled(
            "temperature",
            own,
            prompts,
            ("weights",),
            unit="temperature",
            definition="temperature that fits the other half of the facts, with the named parts tuned",
        ).assign_coords(weights=[named(some, parts) for some in sets])
    for one, by_key in by_metric.items():
        values = dict(zip(keys, by_key, strict=True))
        for array in _arrays(values, prompts, parts):
            label = f"{one}{array.name}"
            words = f"{meaning_of(one)}: {array.attrs['definition']}"
            about = {"unit": unit_of(one), "definition": words, "paper": _PAPER, "tuned": name, "backend": run.name}
            arrays[label] = array.rename(label).assign_attrs(about)
    return xr.Dataset(arrays)


def only_arm(arms: Arms, tuned: str | None) -> str:
    """The tuned model asked for; None stands for the only one."""
    if not isinstance(arms, Arms):
        raise BadInput("this compares a tuned model with its base: give it what load_arms gives")
    if tuned is None and len(arms.sources) != 1:
        raise BadInput(f"there are several arms, {', '.join(arms.sources)}: name one, tuned=…")
    name = tuned if tuned is not None else next(iter(arms.sources))
    if name not in arms.sources:
        raise BadInput(f"there is no tuned model {name!r}: there are {', '.join(arms.sources)}")
    return name


def named(some: Collection[str], parts: Sequence[str]) -> str:
    """A combination by its tuned parts."""
    return "+".join(part for part in parts if part in some) or BASE


def shapley(values: Mapping[frozenset[str], np.ndarray], parts: Sequence[str]) -> np.ndarray:
    """Shapley values `[…, part]` of the parts, from a value for each of their combinations."""
    n, shares = len(parts), []
    for part in parts:
        others = [one for one in parts if one != part]
        joined = [frozenset(some) for size in range(n) for some in combinations(others, size)]
        weights = [factorial(len(some)) * factorial(n - 1 - len(some)) / factorial(n) for some in joined]
        gains = [values[some | {part}] - values[some] for some in joined]
        shares.append(sum(weight * gain for weight, gain in zip(weights, gains, strict=True)))
    return np.stack(shares, -1)


def _by_depth(
    whole: Arm | None, cells: frozenset[tuple[int, Part]], parts: Sequence[Part], n_layers: int
) -> dict[tuple[str, ...], Arm | None]:
    variants: dict[tuple[str, ...], Arm | None] = {}
    for part in parts:
        for third, layers in zip(THIRDS, np.array_split(np.arange(n_layers), 3), strict=True):
            own = frozenset((layer, one) for layer, one in cells if one == part and layer in layers)
            if whole is not None and own:
                variants["alone", part, third] = Arm(whole.name, own)
                variants["last", part, third] = Arm(whole.name, cells - own) if cells - own else None
    return variants


def _positions(prompt: Prompt, where: str) -> frozenset[int]:
    subject, predicting = set(prompt.subject_positions), set(prompt.predicting)
    chosen = (subject if "subject" in where else set()) | (predicting if "prediction" in where else set())
    return frozenset(chosen or set(range(len(prompt))) - subject - predicting)


def _arrays(
    values: Mapping[tuple[str, ...], np.ndarray], prompts: Sequence[Prompt], parts: Sequence[Part]
) -> Iterator[xr.DataArray]:
    """Of one metric, named by what follows its name."""
    every = [frozenset(some) for n in range(len(parts) + 1) for some in combinations(parts, n)]
    sets: dict[frozenset[str], np.ndarray] = {frozenset(some): values["weights", named(some, parts)] for some in every}
    names = {"weights": [named(some, parts) for some in every]}
    words = "under the weights whose named parts are tuned"
    yield labelled("", np.stack(list(sets.values()), 1), prompts, ("weights",), definition=words).assign_coords(names)
    words = "Shapley value of a tuned part, in all combinations with the others"
    shares = labelled("_share", shapley(sets, parts), prompts, ("part",), definition=words)
    yield shares.assign_coords(part=list(parts))
    base, tuned, missing = sets[frozenset()], sets[frozenset(parts)], np.full(len(prompts), np.nan)
    for label, words in (("alone", "change when this part alone is tuned"), ("last", "change when it joins last")):
        if label in {kind for kind, *_ in values}:
            cells = [values.get((label, part, third), missing) for part in parts for third in THIRDS]
            change = [cell - base if label == "alone" else tuned - cell for cell in cells]
            grid = np.stack(change, 1).reshape(len(prompts), len(parts), len(THIRDS))
            words += ", by third of the layers"
            array = labelled(f"_{label}", grid, prompts, ("part", "third"), definition=words)
            yield array.assign_coords(part=list(parts), third=list(THIRDS))
    if at := [value for (kind, *_), value in values.items() if kind == "at"]:
        words = "with tuned weights at these positions alone"
        yield labelled("_at", np.stack(at, 1), prompts, ("where",), definition=words).assign_coords(where=list(WHERE))


class SwapSettings(Settings):
    facts: PositiveInt = Field(48, description="facts in which every combination of base and tuned parts is asked")


def _run(asked: Asked, settings: SwapSettings) -> xr.Dataset:
    few = asked.few(settings.facts)
    found = swap_weights(asked.both, few, calibrated=True, **asked.computing)
    asked.tell(FITTING * float(found["answer_logprob"].size))
    return found.rename(
        answer_logprob="swapped_weights",
        answer_logprob_share="update_share",
        calibrated_logprob="calibrated_swapped_weights",
        calibrated_logprob_share="calibrated_update_share",
    )


MEASURE = Measure(
    name="swap_weights",
    title="which part of the update does it",
    paper=_PAPER,
    quantities=(
        Quantity(
            "update_share",
            "nats",
            "Shapley value of a part of the tuning's update in the answer's log-probability",
            per_fact=one_per_fact("update_share"),
            smallest_effect=0.1,
        ),
        Quantity(
            "calibrated_update_share",
            "nats",
            "update_share in the answer's log-probability with every combination at its own temperature, fitted "
            "on other facts",
            per_fact=one_per_fact("calibrated_update_share"),
            smallest_effect=0.1,
        ),
    ),
    control="No random one: shares add up to the whole change in every fact, each an average over all orders in which "
    "the parts may join. For sureness: the same with every combination at its own temperature.",
    reads="Which part of the update changes the answer, together with the others. Not what it does there. Combinations "
    "are models that nobody trained; shares may be below 0 and cancel. Nats go by sureness; a part that makes answers "
    "surer and nothing else has no `calibrated_update_share`.",
    undefined="For the base itself. A part that the tuning leaves alone is not listed; weights of which one matrix "
    "makes keys and values together are refused. `calibrated_update_share` where some combination has no temperature "
    "that fits.",
    run=_run,
    cost=lambda shape, settings: FITTING * 8 * min(settings.facts, shape.n_facts),
    settings=SwapSettings,
    needs=frozenset({"subject", "same_prompts", "base"}),
    figure="swap_weights",
    version=3,
)
