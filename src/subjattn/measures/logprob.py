"""The measure `answer_logprob`: how likely the right answer is to the model."""

from __future__ import annotations

import xarray as xr

from subjattn.measures.answers import LOGPROB_ATTRS, answer_logprob
from subjattn.measures.record import Asked, Measure, Quantity, one_per_fact


def _run(asked: Asked, _: object) -> xr.Dataset:
    array = answer_logprob(asked.model, asked.prompts)
    asked.tell(len(asked.prompts))
    return array.to_dataset()


MEASURE = Measure(
    name="answer_logprob",
    title="log-probability of the answer",
    paper="",
    quantities=(
        Quantity(
            "answer_logprob",
            LOGPROB_ATTRS["unit"],
            LOGPROB_ATTRS["definition"],
            per_fact=one_per_fact("answer_logprob"),
            smallest_effect=0.1,
        ),
    ),
    control="`calibrated_logprob` of the measure `temperature`: the same at the model's own temperature.",
    reads="How likely the first accepted answer is, all of its tokens together. Not accuracy: it may rise while "
    "another answer stays ahead. Nats go by how sure a model is and how many tokens the answer has, so a difference "
    "between arms may be one of sureness alone.",
    undefined="For no fact, once what it needs is there.",
    run=_run,
    cost=lambda shape, _: shape.n_facts,
    needs=frozenset({"same_prompts"}),
)
