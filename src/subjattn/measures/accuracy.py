"""The measure `accuracy`: whether the model's own answer is right."""

from __future__ import annotations

import xarray as xr
from pydantic import Field

from subjattn.measures import labelled
from subjattn.measures.answers import predict
from subjattn.measures.record import Asked, Measure, Quantity, Settings, one_per_fact
from subjattn.measures.scoring import ScorerName, definition_of


PREDICTING = 2.5
"""Forward passes of a prompt that generating an answer costs, roughly."""


class AccuracySettings(Settings):
    scorer: ScorerName = Field("answer_start", description="when an answer is right (subjattn.measures.scoring)")


def _run(asked: Asked, settings: AccuracySettings) -> xr.Dataset:
    predictions = predict(asked.model, asked.prompts, settings.scorer)
    asked.tell(len(asked.prompts) * PREDICTING)
    array = labelled(
        "accuracy",
        predictions["correct"].to_numpy(float),
        asked.prompts,
        unit="share correct",
        definition=definition_of(settings.scorer),
        scorer=settings.scorer,
    )
    dataset = array.to_dataset()
    dataset["prediction"] = ("fact", predictions["prediction"].to_numpy(object).astype(str))
    return dataset


MEASURE = Measure(
    name="accuracy",
    title="accuracy",
    paper="",
    quantities=(
        Quantity(
            "accuracy",
            "share correct",
            "the greedy answer is right, by the named scorer",
            per_fact=one_per_fact("accuracy"),
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
    ),
    run=_run,
    cost=lambda shape, _: shape.n_facts * PREDICTING,
    settings=AccuracySettings,
)
