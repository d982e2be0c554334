"""How sure a model is of its answers: the temperature that its logits fit, and metrics at that temperature.

A model tuned on what it knew gives sharper distributions, so that any log-probability falls further, in nats, whatever
is done to it. Divided by the temperature that suits each model's own answers (Guo et al. 2017), logits of two models
stand on one scale, and differences between them are no longer those of sureness alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from subjattn.engine.answers import answer_logits
from subjattn.engine.interventions import Output
from subjattn.errors import BadInput
from subjattn.measures import check_prompts, hf_model, labelled
from subjattn.measures.metrics import Own
from subjattn.measures.pooled import pseudo_values
from subjattn.measures.record import Asked, Measure, Quantity, one_per_fact
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

PAPER = "Guo et al. 2017"
GRID = np.geomspace(1 / 8, 16, 85)
"""Temperatures tried, twelve an octave; between them the loss is taken for a parabola in log T."""
LEAST = 5
"""Facts in a half, from which a temperature is fitted: fewer would set everyone's by their own chance."""
FITTING = 1.5
"""Forward passes of a prompt that its part in the fit costs, roughly."""


def fit_temperature(model: Model, prompts: Sequence[Prompt]) -> xr.Dataset:
    """The temperature at which a model's logits give the right answers' tokens the largest mean log-probability.

    Facts are parted in two halves by their ids, and each fact has the temperature that fits the *other* half: what is
    then measured at it was not used to fit it.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: facts asked.

    Returns:
        * `temperature` `(fact,)`: fitted on the other half;
        * `fitted` `(fact,)`: jackknife pseudo-values of the one fitted on all, for its interval; the attribute
          `temperature` is that one;
        * `calibrated_logprob` `(fact,)`: log-probability of the answer at `temperature`, in nats.

        NaN where no temperature from 1/8 to 16 fits best: the model knows none of the answers, or all for certain.

    Raises:
        BadInput: fewer than five facts in a half (facts are parted by their ids, not evenly).
    """
    check_prompts(prompts)
    if (fewest := int(np.bincount(_halves(prompts), minlength=2).min())) < LEAST:
        raise BadInput(
            f"{len(prompts)} facts leave {fewest} in one half, too few to fit a temperature on: ask 20 or more"
        )
    losses = np.empty((len(prompts), len(GRID)))
    for _ in noting_losses(answer_logits(hf_model(model), prompts), losses):
        pass
    own, calibrated_logprob = fitted_on_others(losses, prompts)
    definition = "temperature at which the logits give the right answers the largest log-probability"
    attrs = {"paper": PAPER, "unit": "temperature"}
    found = {
        "temperature": labelled(
            "temperature",
            own,
            prompts,
            definition=f"{definition}, fitted on the half of the facts without this",
            **attrs,
        ),
        "fitted": labelled(
            "fitted",
            pseudo_values(lambda index: _best(losses[index].mean(0)), len(prompts)),
            prompts,
            definition=f"{definition} (jackknife pseudo-values)",
            **attrs,
        ),
        "calibrated_logprob": labelled(
            "calibrated_logprob",
            calibrated_logprob,
            prompts,
            unit="nats",
            definition="log-probability of the answer at the model's own temperature, fitted on other facts",
            paper=PAPER,
        ),
    }
    return xr.Dataset(found, attrs={"temperature": _best(losses.mean(0))})


def at_temperature(temperature: float | Mapping[str, float]) -> Own:
    """A metric for `knockout`, `patch_grid`, `transfer` and others: the answer's log-probability at a temperature.

    Args:
        temperature: one for all facts, or by fact id.
    """

    def calibrated_logprob(logits: Tensor, prompt: Prompt) -> float:
        own = temperature[prompt.fact_id] if isinstance(temperature, Mapping) else temperature
        if not own > 0:
            return float("nan")
        answers = torch.tensor(prompt.answer_ids, device=logits.device)[:, None]
        return float((logits / own).log_softmax(-1).gather(1, answers).double().sum())

    return calibrated_logprob


def calibrated(model: Model, prompts: Sequence[Prompt]) -> tuple[Own, xr.DataArray]:
    """The metric at the model's own temperature, and of each fact that temperature, which fits the others.

    Both are NaN where there are too few facts to fit one, or where none fits.
    """
    try:
        temperature = fit_temperature(model, prompts)["temperature"]
    except BadInput:
        none = np.full(len(prompts), np.nan)
        temperature = labelled("temperature", none, prompts, unit="temperature", definition="too few facts to fit one")
    own = dict(zip(temperature["fact"].values.tolist(), temperature.values.tolist(), strict=True))
    return at_temperature(own), temperature


def noting_losses(outputs: Iterable[Output], losses: np.ndarray) -> Iterator[Output]:
    """Pass outputs on, and note each row's negative log-probability of the answer at every temperature of the grid."""
    for output in outputs:
        at = 0
        for i, row in zip(output.index, output.rows, strict=True):
            n = len(row.prompt.predicting)
            losses[i] = _losses(output.logits[at : at + n], row.prompt)
            at += n
        yield output


def fitted_on_others(losses: np.ndarray, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Of each fact the temperature that fits the other half, and its answer's log-probability there; NaN where none.

    Args:
        losses: `[fact, temperature of the grid]`, as `noting_losses` notes them.
        prompts: the facts.
    """
    halves = _halves(prompts)
    others = {half: losses[halves != half] for half in (0, 1)}
    best = {half: _best(of.mean(0)) if len(of) >= LEAST else np.nan for half, of in others.items()}
    own = np.array([best[half] for half in halves.tolist()])
    at = [
        np.nan if np.isnan(t) else -np.interp(np.log(t), np.log(GRID), row) for t, row in zip(own, losses, strict=True)
    ]
    return own, np.array(at)


def _halves(prompts: Sequence[Prompt]) -> np.ndarray:
    """The half, 0 or 1, that each fact belongs to, whichever others there are."""
    return np.array([zlib.crc32(prompt.fact_id.encode()) % 2 for prompt in prompts])


def _losses(logits: Tensor, prompt: Prompt) -> np.ndarray:
    """Negative log-probability of the answer at every temperature of the grid."""
    answers = torch.tensor(prompt.answer_ids, device=logits.device)
    picked = logits[torch.arange(len(answers)), answers]
    return np.array(
        [float(((logits / t).logsumexp(-1) - picked / t).double().sum()) for t in GRID.tolist()], np.float64
    )


def _best(loss: np.ndarray) -> float:
    """Where the loss is least, by a parabola through the three points around; NaN at an end of the grid."""
    at = int(loss.argmin())
    if not 0 < at < len(GRID) - 1:
        return float("nan")
    below, here, above = loss[at - 1 : at + 2]
    step = np.log(GRID[1] / GRID[0])
    return float(GRID[at] * np.exp(step * (below - above) / (2 * (below - 2 * here + above))))


def _run(asked: Asked, _: object) -> xr.Dataset:
    found = fit_temperature(asked.model, asked.prompts)
    asked.tell(len(asked.prompts))
    return found


MEASURE = Measure(
    name="temperature",
    title="how sure the model is",
    paper=PAPER,
    quantities=(
        Quantity(
            "temperature",
            "temperature",
            "temperature at which the logits give the right answers the largest log-probability; above 1 the model is "
            "surer than it is right",
            per_fact=one_per_fact("fitted"),
            smallest_effect=0.1,
        ),
        Quantity(
            "calibrated_logprob",
            "nats",
            "log-probability of the answer at the model's own temperature, fitted on other facts",
            per_fact=one_per_fact("calibrated_logprob"),
            smallest_effect=0.1,
        ),
    ),
    control="Facts are parted in halves, and each has the temperature that fits the other half.",
    reads="How much surer the model is than it is right, as one number; at its own temperature log-probabilities of "
    "two arms stand on one scale. Not accuracy, and not the sureness of a single fact.",
    undefined="Where no temperature from 1/8 to 16 fits best: the model knows none of the answers, or all for certain. "
    "Fewer than five facts in a half are refused.",
    run=_run,
    cost=lambda shape, _: FITTING * shape.n_facts,
    needs=frozenset({"same_prompts"}),
    version=2,
)
