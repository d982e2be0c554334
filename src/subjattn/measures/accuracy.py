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
    control="In a study the `shuffled` arm: the same facts taught with their answers dealt out anew, from which only "
    "the frequencies of answers can be learnt. Every result names its scorer; another scorer is another accuracy.",
    reads="How often the greedy answer is right, by the named rule and in this wording. Not what the model knows: a "
    "known answer may lose to another, and another wording may bring it. Not that the name was read: frequent answers "
    "are right by chance (`subject_sensitivity`).",
    undefined="For no fact, once what it needs is there; the scorer `letters` takes facts with choices.",
    run=_run,
    cost=lambda shape, _: shape.n_facts * PREDICTING,
    settings=AccuracySettings,
    version=2,
)
