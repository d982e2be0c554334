"""The measure `raised_accuracy`: how many answers that tuning lost come right when more is read of the subject.

A dose in nats is added to the tuned model's attention scores of the subject's edges, behind scaling and soft-cap and
before the softmax, also from the positions of the answer as it grows. If tuning made the model look away from a name
that it still knows, answers return; what any attention moved from elsewhere would do stands beside it: the same dose on
as many other edges, as `rescale` chooses them, to the same keys whatever is generated, and in random heads. So does the
base with the same dose, which may answer more itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.interventions import Arm, Row, Scale
from subjattn.errors import BadInput
from subjattn.measures import check_askable
from subjattn.measures.beside import OWN, Intervened, answers_beside, change_of
from subjattn.measures.knockout import IN_WORDS, ROUTES, Route, edges_in_order, edges_of
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape
from subjattn.measures.rescale import PAPER, Doses, Edges, parse_doses
from subjattn.measures.scoring import ScorerName
from subjattn.measures.sets import Heads, Sets, parse_sets
from subjattn.measures.swapping import only_arm
from subjattn.models.arms import BASE, Arms


if TYPE_CHECKING:
    from subjattn.prompts import Prompt

DOSES = (0.5, 1.0, 2.0, 4.0)
CELLS = ("raised", "placebo", "base_raised")
"""Whose answer, beside both models': the tuned model's with a dose on the subject's edges, and on as many others; the
base's on the subject's."""
PASSES = 2.5
"""Forward passes of a prompt that the answers at a dose cost, roughly."""


def raised_accuracy(
    arms: Arms,
    prompts: Sequence[Prompt],
    doses: Sequence[float] = DOSES,
    tuned: str | None = None,
    *,
    route: Route = "direct",
    heads: Heads | None = None,
    random_sets: int = 0,
    scorer: ScorerName = "answer_start",
    seed: int = 0,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Whether base and tuned model answer rightly, and the tuned model with attention scores to the subject raised.

    Args:
        arms: a base and its tuned models, from `load_arms`.
        prompts: whom to ask.
        doses: added to the scores, in nats, each once; below 0 they lower them.
        tuned: the arm; None: the only one.
        route: the edges, by the name that `knockout` has for them; `direct` is from every position that predicts the
            answer, as it grows, to the subject.
        heads: in these `(layer, head)` alone, all together; None: in all.
        random_sets: of `heads`, beside them so many random ones of the same size (see `sets.parse_sets`).
        scorer: when an answer is right, as in `predict`.
        seed: of the other edges and the random sets.
        backend: what computes it; the engine alone knows arms.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        A Dataset `(fact, dose, cell)` over doses and whose answer it is, `base`, `tuned`, `raised`, `placebo` or
        `base_raised`, the base's with the dose, and `random 0`, … with random sets, the subject's edges in their heads:
        `correct`, 1 or 0, and `prediction`, the answer as far as it takes to judge it. The placebo is the same dose in
        the same heads on as many other edges of the same queries, to keys of the prompt that are neither the subject's
        nor the query's own nor the first token, drawn once for each fact. NaN where a prompt has none of the route's
        edges, or too few others. `returned_accuracy` reads the share of the accuracy gap off it. The coordinate `heads`
        `(cell,)` says in which heads a dose is; attributes: `route`, `matched`, what random sets have in common with
        `heads`.

    Raises:
        BadInput: a prompt ends with its subject, or an argument does not fit.
        UnsupportedModel, NotFired: the scores could not be changed.
    """
    check_askable(prompts)
    name, asked_for = only_arm(arms, tuned), parse_doses(doses, "add")
    if route not in ROUTES:
        raise BadInput(f"route {route!r} is not one of {', '.join(ROUTES)}")
    sets = _sets(arms, heads, random_sets, seed)
    chosen, *drawn = [None] if sets is None else map(frozenset, sets.cells.values())
    rng, arm, base = np.random.default_rng(seed), arms.arm(name), arms.arm(BASE)
    rows: list[Intervened] = []
    for fact, prompt in enumerate(prompts):
        order = rng.permutation(prompt.prediction).tolist()
        own, others = partial(_edges, route=route), partial(_edges, route=route, order=order)
        cells = [(own, chosen, arm), (others, chosen, arm), (own, chosen, base), *((own, of, arm) for of in drawn)]
        rows += [
            (fact, number, cell, partial(_raised, edges=edges, heads=of, dose=dose, arm=whose))
            for cell, (edges, of, whose) in enumerate(cells, len(OWN))
            if edges(prompt)
            for number, dose in enumerate(asked_for)
        ]
    chosen_words, *drawn_words = ["all"] if sets is None else sets.in_words
    places = [""] * len(OWN) + [chosen_words] * len(CELLS) + drawn_words
    found = answers_beside(
        arms,
        name,
        prompts,
        rows,
        "dose",
        asked_for,
        [*CELLS, *(f"random {number}" for number in range(len(drawn)))],
        scorer,
        backend,
        memory_budget,
        f"a dose is added to the attention scores of the edges {IN_WORDS[route]} ({route}), also while the answer "
        f"grows, in heads: {chosen_words}",
        paper=PAPER,
        route=route,
        matched=sets.matched if sets else "",
    )
    return found.assign_coords(heads=("cell", places))


def _sets(arms: Arms, heads: Heads | None, random_sets: int, seed: int) -> Sets | None:
    if heads is None:
        if random_sets:
            raise BadInput("random_sets are compared with a set: give heads=[(layer, head), …]")
        return None
    hf = arms.base.model
    return parse_sets(heads, None, len(decoder_layers(hf)), n_heads(hf), random_sets=random_sets, seed=seed)


def _edges(prompt: Prompt, route: Route, order: Sequence[int] | None = None) -> Edges:
    """The route's edges; or as many others, to the first keys of an order that fit."""
    own = frozenset(edge for edge in edges_of(route, prompt) if edge[0] <= prompt.predicting[-1])
    return own if order is None else edges_in_order(prompt, own, order)


def _raised(
    prompt: Prompt,
    edges: Callable[[Prompt], Edges],
    heads: frozenset[tuple[int, int]] | None,
    dose: float,
    arm: Arm | None,
) -> Row:
    return Row(prompt, arm=arm, scale=Scale(edges(prompt), cells=heads, add=dose))


class RaisedSettings(Settings):
    facts: PositiveInt = Field(20, description="facts answered with scores raised")
    doses: Doses = Field(DOSES, description="nats added to the scores, such as 1,2,4")
    route: Route = Field("direct", description="the edges, as knockout names them")
    scorer: ScorerName = Field("answer_start", description="when an answer is right (subjattn.measures.scoring)")


def _run(asked: Asked, settings: RaisedSettings) -> xr.Dataset:
    few, how = asked.few(settings.facts), {"route": settings.route, "scorer": settings.scorer, **asked.computing}
    found = raised_accuracy(asked.both, few, settings.doses, **how)
    asked.tell(len(few) * len(settings.doses) * PASSES)
    return found


def _changed(cell: str, model: str = "tuned") -> Callable[[xr.Dataset], xr.DataArray]:
    """By dose, whose parts are called as one writes them: 0.5, 1, 2."""

    def change(dataset: xr.Dataset) -> xr.DataArray:
        found = change_of(dataset, cell, model)
        return found.assign_coords(part=[np.format_float_positional(dose, trim="-") for dose in found["part"].values])

    return change


def _cost(shape: Shape, settings: RaisedSettings) -> float:
    return min(settings.facts, shape.n_facts) * len(settings.doses) * PASSES


MEASURE = Measure(
    name="raised_accuracy",
    title="answers of the tuned model with attention to the subject raised",
    paper=PAPER,
    quantities=(
        Quantity(
            "accuracy_raised",
            "share correct",
            "change of the tuned model's accuracy when a dose in nats is added to the attention scores of the route's "
            "edges in all heads, also while its answer grows",
            per_fact=_changed("raised"),
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "accuracy_raised_placebo",
            "share correct",
            "the same of as many other edges of the same queries, that lead neither to the subject nor to the first "
            "token",
            per_fact=_changed("placebo"),
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "accuracy_raised_base",
            "share correct",
            "change of the base's accuracy by the same doses on the route's edges",
            per_fact=_changed("base_raised", "base"),
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
    ),
    control="`accuracy_raised_placebo`: the same doses on as many other edges of the same queries, which also turn "
    "some answers. `accuracy_raised_base`: the base itself may answer more with a dose. For chosen heads, in Python, "
    "as many random ones of the same layers.",
    reads="How many answers turn right, less those that turn wrong, when more is read of the subject. Above the "
    "placebo and above what the base gains, what the name gives is still there and was read too little. Sureness does "
    "not move it. Not that tuning took attention from the name: answers lost elsewhere may return too. Nothing gained "
    "may mean that the heads or the dose are wrong ones; large doses take attention from everything else. "
    "`returned_accuracy` gives the share of the accuracy gap, where there is one.",
    undefined="For a prompt that has none of the route's edges; the placebo where there are too few others.",
    run=_run,
    cost=_cost,
    settings=RaisedSettings,
    needs=frozenset({"subject", "same_prompts", "base"}),
    version=2,
)
