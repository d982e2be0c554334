"""The measure `transfer_accuracy`: how many answers that tuning lost return with the base's states.

The put holds for the text that is generated: states at the positions that predict it are those of the base's run of the
same text so far, which is the tuned model's own. Layer by layer this would take as many generations as there are layers
for every place, so that the states of all layers are put back together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
import xarray as xr
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.interventions import COMPONENTS, Component, Row, Run
from subjattn.errors import BadInput
from subjattn.measures import check_askable
from subjattn.measures.beside import Intervened, answers_beside, change_of
from subjattn.measures.put_back import NEEDS, PAPER, PLACES, places_of
from subjattn.measures.record import Asked, Measure, Quantity, Settings
from subjattn.measures.scoring import ScorerName
from subjattn.measures.swapping import only_arm
from subjattn.measures.transfer import At, parts_put, patches_of, places_in
from subjattn.models.arms import BASE, Arms


if TYPE_CHECKING:
    from subjattn.prompts import Prompt

CELLS = ("put_back", "placebo")
"""Whose answer, beside both models': the tuned model's with the base's states, and with the placebo's."""
PASSES = 2.5
"""Forward passes of a prompt that the answers at a place cost, roughly."""


def put_back_accuracy(
    arms: Arms,
    prompts: Sequence[Prompt],
    components: str | Sequence[str] = tuple(PLACES),
    tuned: str | None = None,
    *,
    at: At | None = None,
    scorer: ScorerName = "answer_start",
    seed: int = 0,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Whether base and tuned model answer rightly, and the tuned model with the base's states of all layers put back.

    Args:
        arms: a base and its tuned models, from `load_arms`.
        prompts: whom to ask.
        components: each is put back by itself: `resid_pre`, `resid_post`, `attn_out`, `mlp_out`, or of all heads `q`,
            `k`, `v`, `pattern`, `z`; or a component at a place, such as `mlp_out at prediction`. All that `transfer`
            has in a study, where nothing is said.
        tuned: the arm; None: the only one.
        at: `prediction` (all positions that predict the answer, as it grows), `subject` or `all`; None: each where it
            is made or read: `k` and `v` at the subject, `mlp_out` there and at the prediction, others at the latter.
        scorer: when an answer is right, as in `predict`.
        seed: of the placebo's positions.
        backend: what computes it; the engine alone knows arms.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        A Dataset `(fact, put, cell)` over places and whose answer it is, `base`, `tuned`, `put_back` or `placebo`:
        `correct`, 1 or 0, and `prediction`, the answer as far as it takes to judge it. The placebo is as many other
        positions of the same prompt, drawn once in an order that stays while the answer grows, and all of them once it
        has outgrown them; NaN where there are too few for the prompt itself. `returned_accuracy` reads the share of the
        accuracy gap off it.

    Raises:
        BadInput: an argument that does not fit.
        UnsupportedModel, NotFired: the states could not be put.
    """
    check_askable(prompts)
    name = only_arm(arms, tuned)
    if at not in (None, "prediction", "subject", "all"):
        raise BadInput(f"at {at!r}: answers are generated with states put at the prediction, the subject, or all")
    places = places_of([components] if isinstance(components, str) else components, at)
    rng = np.random.default_rng(seed)
    rows: list[Intervened] = []
    for fact, prompt in enumerate(prompts):
        for place, (component, where) in enumerate(places.values()):
            putting = _Put(arms, name, component, where)
            rows.append((fact, place, 2, putting))
            if (elsewhere := _others(prompt, where, rng)) is not None:
                rows.append((fact, place, 3, partial(putting, elsewhere=elsewhere)))
    return answers_beside(
        arms,
        name,
        prompts,
        rows,
        "put",
        list(places),
        CELLS,
        scorer,
        backend,
        memory_budget,
        "the base's states of all layers put back into the tuned model, those of its run of the same text so far",
        patterns=any(component == "pattern" for component, _ in places.values()),
        paper=PAPER,
    )


class _Put:
    """The base's states of one component at a place, or elsewhere, in the row of the tuned model."""

    def __init__(self, arms: Arms, name: str, component: Component, at: At) -> None:
        self._base, self._own, self._at = arms.arm(BASE), arms.arm(name), at
        self._cells = parts_put(arms, [component], None, 1, None, None, 0, 0).groups[0]
        self._n_layers = len(decoder_layers(arms.base.model))

    def __call__(self, prompt: Prompt, elsewhere: Sequence[int] | None = None) -> Row:
        (positions,) = places_in(prompt, self._at)
        if elsewhere is not None:
            positions = tuple(sorted(elsewhere[: len(positions)]))
        patches = patches_of(self._cells, positions, Run(prompt, self._base), prompt, self._n_layers)
        return Row(prompt, patches=tuple(patches), arm=self._own)


def _others(prompt: Prompt, at: At, rng: np.random.Generator) -> list[int] | None:
    """Positions that are not put, do not predict and are not the subject's, in a random order; None where too few."""
    own = [position for position in places_in(prompt, at)[0] if position <= prompt.prediction]
    others = sorted(set(range(prompt.prediction)) - set(own) - set(prompt.subject_positions))
    return rng.permutation(others).tolist() if len(others) >= len(own) else None


def _read(given: object) -> object:
    """Names separated by commas, as on the command line."""
    if not isinstance(given, str):
        return given
    return tuple(name for part in given.split(",") if (name := part.strip(" ()[]'")))


def _known(components: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [one for one in components if one not in (*COMPONENTS, *PLACES)]:
        raise ValueError(f"{wrong[0]!r} is not one of {', '.join([*COMPONENTS, *PLACES])}")
    return components


class AccuracySettings(Settings):
    facts: PositiveInt = Field(20, description="facts answered with the base's states put back")
    components: Annotated[tuple[str, ...], BeforeValidator(_read), AfterValidator(_known)] = Field(
        tuple(PLACES),
        min_length=1,
        description="what is put back, each by itself: components, or places such as `mlp_out at prediction`",
    )
    scorer: ScorerName = Field("answer_start", description="when an answer is right (subjattn.measures.scoring)")


def _run(asked: Asked, settings: AccuracySettings) -> xr.Dataset:
    few = asked.few(settings.facts)
    found = put_back_accuracy(asked.both, few, settings.components, scorer=settings.scorer, **asked.computing)
    asked.tell(len(few) * found.sizes["put"] * PASSES)
    return found


def _gap(dataset: xr.Dataset) -> xr.DataArray:
    correct = dataset["correct"].isel(put=0, drop=True)
    return correct.sel(cell="tuned", drop=True) - correct.sel(cell="base", drop=True)


MEASURE = Measure(
    name="transfer_accuracy",
    title="answers with the base's states put back into the tuned model",
    paper=PAPER,
    quantities=(
        Quantity(
            "accuracy_put_back",
            "share correct",
            "change of the tuned model's accuracy when the base's states of all layers are put back at a place, also "
            "while its answer grows",
            per_fact=lambda dataset: change_of(dataset, "put_back"),
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "accuracy_put_back_placebo",
            "share correct",
            "the same at as many other positions of the prompt, drawn at random",
            per_fact=lambda dataset: change_of(dataset, "placebo"),
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "accuracy_gap",
            "share correct",
            "accuracy of the tuned model minus its base's, in these facts",
            per_fact=_gap,
            bounds=(-1, 1),
            smallest_effect=0.05,
        ),
    ),
    control="`accuracy_put_back_placebo`: the same states at as many other positions of the prompt, which also turn "
    "some answers.",
    reads="How many answers turn right, less those that turn wrong, with the base's states of all layers put back at a "
    "place. Sureness does not move it. Not which layer: all are put together. Of twenty facts an accuracy gap is "
    "seldom told from 0, and then has no share (`returned_accuracy`).",
    undefined="The placebo where a prompt has too few other positions.",
    run=_run,
    cost=lambda shape, settings: min(settings.facts, shape.n_facts) * len(places_of(settings.components)) * PASSES,
    settings=AccuracySettings,
    needs=NEEDS,
    version=2,
)
