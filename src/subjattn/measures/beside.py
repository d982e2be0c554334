"""Answers of a tuned model under interventions beside its own and its base's, right or wrong, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from subjattn.engine.interventions import Row
from subjattn.measures import labelled
from subjattn.measures.answers import answered
from subjattn.measures.intervened import Interventions
from subjattn.measures.scoring import ScorerName, definition_of
from subjattn.models.arms import BASE


if TYPE_CHECKING:
    from subjattn.backends import Backend, BackendName
    from subjattn.models.arms import Arms
    from subjattn.prompts import Prompt

OWN = ("base", "tuned")
"""Cells of the models as they are; those of interventions follow."""
Intervened = tuple[int, int, int, Interventions]
"""The numbers of a fact, of a label along the dimension, and of a cell behind `OWN`; and what is done to the arm."""


def answers_beside(
    arms: Arms,
    tuned: str,
    prompts: Sequence[Prompt],
    intervened: Sequence[Intervened],
    along: str,
    labels: Sequence[Any],
    cells: Sequence[str],
    scorer: ScorerName,
    backend: BackendName | Backend,
    memory_budget: int | None,
    done: str,
    *,
    patterns: bool = False,
    **attrs: Any,
) -> xr.Dataset:
    """`correct` and `prediction`, `(fact, along, cell)`, over `OWN` and the `cells` of interventions.

    The models' own answers are given once and stand at every label. Where nothing is done in a cell, `correct` is NaN
    and `prediction` empty. `done` says in words what interventions do, `patterns` whether they put patterns; `attrs`
    are further ones of `correct`.
    """
    own = [
        (fact, 0, cell, partial(Row, arm=arms.arm(name)))
        for fact in range(len(prompts))
        for cell, name in enumerate((BASE, tuned))
    ]
    rows: list[Intervened] = [*own, *intervened]
    found = answered(
        arms.base,
        [prompts[fact] for fact, *_ in rows],
        [row[-1] for row in rows],
        scorer,
        None,
        backend,
        memory_budget,
        patterns=patterns,
        whole=False,
    )
    shape = (len(prompts), len(labels), len(OWN) + len(cells))
    correct, texts = np.full(shape, np.nan), np.full(shape, "", object)
    at = tuple(np.array([cell for *cell, _ in rows]).T)
    correct[at], texts[at] = found["correct"], found["prediction"]
    correct[..., :2], texts[..., :2] = correct[:, :1, :2], texts[:, :1, :2]
    about = {
        "unit": "share correct",
        "definition": f"{definition_of(scorer)}; {done}",
        "scorer": scorer,
        "tuned": tuned,
    }
    array = labelled("correct", correct, prompts, (along, "cell"), **about, **attrs).assign_coords(
        {along: list(labels), "cell": [*OWN, *cells]}
    )
    return array.to_dataset().assign(prediction=(array.dims, texts.astype(str)))


def change_of(dataset: xr.Dataset, cell: str, model: str = "tuned") -> xr.DataArray:
    """Right answers won and lost by a cell's interventions on a model, `(fact, part)`: a part for every label."""
    correct = dataset["correct"]
    (along,) = set(correct.dims) - {"fact", "cell"}
    change = correct.sel(cell=cell, drop=True) - correct.sel(cell=model, drop=True)
    return change.rename({along: "part"}).transpose("fact", "part").assign_attrs(definition="")
