"""Dose–response of attention: what the answer gains or loses as an edge set is attended to more or less.

A dose is added to the attention scores of the edges (behind scaling and soft-cap, before the softmax), or multiplies
their weights before the row renormalises, which is the same with its logarithm added. Far down, edges are knocked out;
nothing added is nothing changed; what lies between says how much the model makes of a little more attention.

Beside it, the same doses on as many other edges: of the same queries, to keys that are neither the subject's nor the
query's own nor the first token, which is a sink. They tell what any edges would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import numpy as np
import xarray as xr
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.interventions import Block, Row, Scale, times
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, shortened
from subjattn.measures.knockout import ROUTES, Route, edges_of, other_edges
from subjattn.measures.metrics import AS_THEY_ARE, Metric, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.measures.record import Asked, Measure, PerFact, Quantity, Settings
from subjattn.measures.sets import Heads, parse_sets
from subjattn.measures.temperature import FITTING, calibrated
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.measures import Model

What = Literal["add", "times"]
Edges = frozenset[tuple[int, int]]
DOSES = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
PAPER = "Geva et al. 2023 (edges and knock-out); weights rescaled and renormalised after Zhang et al. 2024 (PASTA)"


@overload
def rescale(
    model: Model,
    prompts: Sequence[Prompt],
    doses: Sequence[float] = ...,
    *,
    what: What = ...,
    route: Route = ...,
    layers: Sequence[int] | None = ...,
    heads: Heads | None = ...,
    seed: int = ...,
    metric: Metric = ...,
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.DataArray: ...
@overload
def rescale(
    model: Model,
    prompts: Sequence[Prompt],
    doses: Sequence[float] = ...,
    *,
    what: What = ...,
    route: Route = ...,
    layers: Sequence[int] | None = ...,
    heads: Heads | None = ...,
    seed: int = ...,
    metric: list[Metric],
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.Dataset: ...
def rescale(
    model: Model,
    prompts: Sequence[Prompt],
    doses: Sequence[float] = DOSES,
    *,
    what: What = "add",
    route: Route = "direct",
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    seed: int = 0,
    metric: Metric | list[Metric] = "answer_logprob",
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.DataArray | xr.Dataset:
    """How the answer changes as the edges of a route are attended to more or less.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        doses: numbers, each once.
        what: `add` each dose to the edges' scores, or multiply their weights `times` each, 0 being a knock-out.
        route: the edges, by the name that `knockout` has for them; `direct` is from every answer-predicting position
            to the subject.
        layers: in these layers only.
        heads: or in these `(layer, head)` only.
        seed: of the choice of other edges.
        metric: `answer_logprob` (nats), `kl` (nats), `rank`, or a function of your own, as `knockout` takes it; or
            several.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, dose)`, changes from the run without a dose; `kl` and `rank` are those of the changed run. The
        coordinate `control` `(fact, dose)` holds the same of as many other edges of the same queries (see the module's
        text), NaN where a prompt has too few; `baseline_METRIC` `(fact,)` the value without a dose. NaN where a prompt
        has none of the route's edges. Attributes: `what`, `route`, `noise_floor`. Several metrics give a Dataset, in
        which the controls are `control_METRIC`.

    Raises:
        BadInput: a prompt ends with its subject, or an argument does not fit.
        UnsupportedModel, NotFired: the scores could not be changed.
    """
    check_askable(prompts)
    metrics = parse_metrics(metric)
    if "logit_diff" in metrics:
        raise BadInput("rescale has no foils: its metrics are answer_logprob, kl, rank or a function of your own")
    asked_for = parse_doses(doses, what)
    if route not in ROUTES:
        raise BadInput(f"route {route!r} is not one of {', '.join(ROUTES)}")
    hf = hf_model(model)
    where, place = _where(hf, layers, heads)
    asked = [shortened(prompt) for prompt in prompts] if {*metrics} <= {*AS_THEY_ARE} else list(prompts)
    rows, cells = [Row(prompt) for prompt in asked], []
    rng = np.random.default_rng(seed)
    for fact, prompt in enumerate(asked):
        own = frozenset(edge for edge in edges_of(route, prompt) if edge[0] <= prompt.predicting[-1])
        for number, edges in enumerate((own, other_edges(prompt, own, rng))):
            rows += [_row(prompt, edges, where, dose, what) for dose in asked_for if edges]
            cells += [(number, fact, dose) for dose in range(len(asked_for)) if edges]
    run = opened(backend, hf, memory_budget, asked)
    found = measure_rows(run.forward(rows), rows, metrics)
    done = "is added to the scores" if what == "add" else "multiplies the weights"
    arrays: dict[str, xr.DataArray] = {}
    for name in metrics:
        grid = np.full((2, len(asked), len(asked_for)), np.nan)
        if cells:
            grid[tuple(np.array(cells).T)] = found.effect(name)[-len(cells) :]
        change = meaning_of(name) if name in AS_THEY_ARE else f"change in the {meaning_of(name)}"
        array = labelled(
            f"rescale_{name}" if name in AS_THEY_ARE else "rescale_change",
            grid[0],
            prompts,
            ("dose",),
            unit=unit_of(name),
            definition=f"{change}, when a dose {done} of the edges of the route {route} before the softmax in {place}",
            paper=PAPER,
            what=what,
            route=route,
            noise_floor=found.noise_floor[name],
            backend=run.name,
        )
        coords: dict[str, Any] = {"dose": asked_for, f"baseline_{name}": ("fact", found.values[name][: len(asked)])}
        control = f"control_{name}" if isinstance(metric, list) else "control"
        arrays[name] = array.assign_coords(coords | {control: (("fact", "dose"), grid[1])})
    return xr.Dataset(arrays) if isinstance(metric, list) else next(iter(arrays.values()))


def slope_at_nothing(change: xr.DataArray) -> xr.DataArray:
    """Change per unit of score where nothing is added, `(fact,)`: between the nearest doses below and above.

    Where there are none on one side, from no dose to the nearest on the other; NaN where there is none at all. Weights
    multiplied are scores raised by the logarithm.
    """
    with np.errstate(divide="ignore"):
        scores = np.log(change["dose"].values) if change.attrs["what"] == "times" else change["dose"].values
    zero = xr.zeros_like(change.isel(dose=0, drop=True))
    nearest = [
        (float(scores[at]), change.isel(dose=int(at), drop=True))
        for side in (scores < 0, scores > 0)
        if len(some := np.flatnonzero(side & np.isfinite(scores)))
        for at in [some[np.abs(scores[some]).argmin()]]
    ]
    (a, below), (b, above) = [*nearest, (0.0, zero), (0.0, zero)][:2]
    return zero * np.nan if a == b else (above - below) / (b - a)


def parse_doses(doses: Sequence[float], what: str) -> list[float]:
    """Doses as numbers; BadInput where they are none, not finite or given twice."""
    if what not in ("add", "times"):
        raise BadInput(f"what {what!r} is neither 'add', to scores, nor 'times', of weights")
    found = [float(dose) for dose in doses]
    wrong = [dose for dose in found if not np.isfinite(dose) or (what == "times" and dose < 0)]
    if not found or wrong or len(set(found)) < len(found):
        raise BadInput(
            f"doses {list(doses)}: give numbers, each once; they are added to scores, or as factors of weights not "
            "below 0"
        )
    return found


def _where(hf: PreTrainedModel, layers: Sequence[int] | None, heads: Heads | None) -> tuple[tuple[Any, ...], str]:
    """What `Block` and `Scale` are told of layers and heads, and in words."""
    if layers is None and heads is None:
        return (None, None, None), "all layers"
    sets = parse_sets(heads, layers, len(decoder_layers(hf)), n_heads(hf), random_sets=0, seed=0)
    chosen, (words,) = sets.cells["chosen"], sets.in_words
    if heads is not None:
        return (None, None, frozenset(chosen)), f"heads {words}"
    return (tuple(layer for layer, _ in chosen), None, None), f"layers {words}"


def _row(prompt: Prompt, edges: Edges, where: tuple[Any, ...], dose: float, what: What) -> Row:
    if what == "times" and dose == 0:
        return Row(prompt, Block(edges, *where))
    return Row(prompt, scale=Scale(edges, *where, add=times(dose) if what == "times" else dose))


CELL = 0.25
"""Forward passes of a prompt that a dose costs, roughly."""


def _read(doses: Any) -> Any:
    return [part for part in doses.strip("()[] ").split(",") if part.strip()] if isinstance(doses, str) else doses


def _checked(doses: tuple[float, ...]) -> tuple[float, ...]:
    if not doses or len(set(doses)) < len(doses):
        raise ValueError("give at least one dose, and each once")
    return doses


Doses = Annotated[tuple[float, ...], BeforeValidator(_read), AfterValidator(_checked)]


class RescaleSettings(Settings):
    doses: Doses = Field(DOSES, description="added to scores, or factors of weights, such as --doses=-2,-1,1,2")
    what: What = Field("add", description="add to the scores, or weights times the dose")
    route: Route = Field("direct", description="the edges, as knockout names them")
    facts: PositiveInt = Field(24, description="facts that get doses")


def _run(asked: Asked, settings: RescaleSettings) -> xr.Dataset:
    few = asked.by_id((asked.order or [prompt.fact_id for prompt in asked.prompts])[: settings.facts])
    at_own, temperature = calibrated(asked.model, asked.prompts)
    both = rescale(
        asked.model,
        few,
        settings.doses,
        what=settings.what,
        route=settings.route,
        metric=["answer_logprob", at_own],
        **asked.computing,
    )
    asked.tell(_cost_of(len(asked.prompts), settings))
    bare = both.drop_vars([name for name in both.coords if str(name).startswith("control_")])
    change = bare["answer_logprob"]
    definition = change.attrs["definition"].replace(
        "the edges of the route", "as many others as the edges of the route"
    )
    control = change.copy(data=both["control_answer_logprob"].values).assign_attrs(definition=definition)
    return xr.Dataset(
        {
            "rescale_change": change,
            "rescale_control": control,
            "rescale_calibrated_change": bare["calibrated_logprob"],
            "temperature": temperature.sel(fact=bare["fact"].values),
        }
    )


def _slope(variable: str) -> PerFact:
    return lambda dataset: slope_at_nothing(dataset[variable]).assign_attrs(unit="nats per unit of score")


def _at_most(variable: str) -> PerFact:
    """At the largest dose, or at the one that a claim names."""
    return lambda dataset: dataset[variable].isel(dose=int(dataset["dose"].values.argmax()), drop=True)


def _cost_of(n_facts: int, settings: RescaleSettings) -> float:
    return FITTING * n_facts + min(n_facts, settings.facts) * (1 + 2 * CELL * len(settings.doses))


MEASURE = Measure(
    name="rescale",
    title="dose–response of attention to the subject",
    paper=PAPER,
    quantities=(
        Quantity(
            "rescale_slope",
            "nats per unit of score",
            "change of the answer's log-probability per unit added to the scores of the route's edges, where nothing "
            "is added yet: between the nearest doses below and above",
            per_fact=_slope("rescale_change"),
        ),
        Quantity(
            "rescale_control_slope",
            "nats per unit of score",
            "the same of as many other edges of the same queries, that lead neither to the subject nor to the first "
            "token",
            per_fact=_slope("rescale_control"),
        ),
        Quantity(
            "rescale_change",
            "nats",
            "change of the answer's log-probability at the largest dose; a claim may name another",
            per_fact=_at_most("rescale_change"),
            cells={"dose": "one"},
        ),
        Quantity(
            "rescale_calibrated_slope",
            "nats per unit of score",
            "rescale_slope of the answer's log-probability at the model's own temperature, fitted on other facts",
            per_fact=_slope("rescale_calibrated_change"),
            smallest_effect=0.1,
        ),
        Quantity(
            "rescale_calibrated_change",
            "nats",
            "rescale_change of the answer's log-probability at the model's own temperature, fitted on other facts",
            per_fact=_at_most("rescale_calibrated_change"),
            cells={"dose": "one"},
            smallest_effect=0.1,
        ),
    ),
    control="`rescale_control_slope`: the same doses on as many other edges of the same queries, that lead neither to "
    "the subject nor to the first token. For sureness: the same at the model's own temperature.",
    reads="What a little more attention to these edges would gain. A slope above its control says that what is read "
    "there helps the answer and more of it would help more. Not that tuning took attention away, nor how much there "
    "is. Large doses take attention from everything else. Nats go by sureness: between arms read the calibrated forms.",
    undefined="For a prompt that has none of the route's edges; the control where there are too few others; calibrated "
    "forms where no temperature fits.",
    run=_run,
    cost=lambda shape, settings: _cost_of(shape.n_facts, settings),
    settings=RescaleSettings,
    needs=frozenset({"subject", "same_prompts"}),
    any_backend=True,
    figure="rescale",
    version=3,
)
