"""Metrics of a run's answer, several from one pass, and how far an intervention moves them.

* `answer_logprob`: log-probability of the first accepted answer, summed over its tokens, in nats;
* `answer_logit`: logit of the answer's first token as it stands;
* `logit_diff`: logit of the answer's first token minus that of a foil;
* `kl`: KL divergence in nats of the run from the same run without the intervention, over the next token;
* `rank`: rank of the answer's first token among the vocabulary, 1 the most likely;
* a function of one's own, from the logits at the positions that predict the answer's tokens, `[answer, vocab]`, and the
  prompt to one number, known by its `__name__`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subjattn.engine.interventions import Output, Row, Run
from subjattn.errors import BadInput
from subjattn.prompts import Prompt


Own = Callable[[Float[Tensor, "answer vocab"], Prompt], float]
Metric = Literal["answer_logprob", "answer_logit", "logit_diff", "kl", "rank"] | Own
METRICS: tuple[str, ...] = ("answer_logprob", "answer_logit", "logit_diff", "kl", "rank")
UNITS: dict[str, str] = {
    "answer_logprob": "nats",
    "answer_logit": "logits",
    "logit_diff": "logits",
    "kl": "nats",
    "rank": "rank",
    "calibrated_logprob": "nats",
}
MEANINGS: dict[str, str] = {
    "answer_logprob": "log-probability of the first accepted answer, summed over its tokens",
    "answer_logit": "logit of the answer's first token",
    "logit_diff": "logit of the answer's first token minus that of the foil",
    "kl": "KL divergence of the next token from the run without the intervention",
    "rank": "rank of the answer's first token, 1 the most likely",
    "calibrated_logprob": "log-probability of the first accepted answer, logits divided by a temperature",
}
AS_THEY_ARE = ("kl", "rank")
"""Metrics of the changed run itself; all others are reported as their change."""


_Key = tuple[Run, tuple[int, int] | None]


@dataclass
class Measured:
    """Metrics of rows, `[row]` in float64, and of the same prompts without their interventions.

    `control` comes from the batch of each row, so that both saw the same rounding; `noise_floor` is the
    largest difference between such a control and the plain run of its prompt, of `kl` the divergence itself.
    """

    values: dict[str, np.ndarray]
    control: dict[str, np.ndarray]
    noise_floor: dict[str, float]

    def effect(self, metric: str) -> np.ndarray:
        """What the interventions change; of `kl` and `rank`, their value under the intervention."""
        return self.values[metric] if metric in AS_THEY_ARE else self.values[metric] - self.control[metric]


Metrics = Mapping[str, Own | None]
"""Metrics by name, with the function of those that are one's own."""


def parse_metrics(metric: Metric | list[Metric]) -> Metrics:
    """The metrics asked for, one or several."""
    asked: list[Metric] = list(metric) if isinstance(metric, list | tuple) else [metric]
    unknown = [one for one in asked if one not in METRICS and not callable(one)]
    if not asked or unknown:
        named = ", ".join(map(repr, unknown)) if asked else "[]"
        raise BadInput(f"metric {named} is not among {', '.join(METRICS)}, and no function of one's own")
    found = {one if isinstance(one, str) else one.__name__: None if isinstance(one, str) else one for one in asked}
    own = [one.__name__ for one in asked if not isinstance(one, str)]
    if len(found) < len(asked) or {*own} & {*METRICS, "<lambda>"}:
        raise BadInput(f"metrics of one's own are known by their names, and {own} are not names of their own: use def")
    return found


def unit_of(metric: str) -> str:
    """Of a metric's values; one's own is its own unit."""
    return UNITS.get(metric, metric)


def meaning_of(metric: str) -> str:
    """A metric in words."""
    return MEANINGS.get(metric, f"metric {metric}, a function of one's own")


def measure_rows(outputs: Iterable[Output], rows: Sequence[Row], metrics: Metrics) -> Measured:
    """Gather metrics from the outputs of `rows`; each prompt (and contrast) has one row without an intervention.

    For `kl`, logits of a plain row are held until the last changed row of its prompt.
    """
    values = {metric: np.full(len(rows), np.nan) for metric in metrics}
    control = {metric: np.full(len(rows), np.nan) for metric in metrics}
    seen: list[tuple[Row, dict[str, np.ndarray], int]] = []
    last: tuple[Output | None, dict[str, np.ndarray]] = (None, {})
    waiting = Counter((row.run, row.contrast) for row in rows if not row.plain and "kl" in metrics)
    plain_runs: dict[_Key, Tensor] = {}
    for output in outputs:
        own = {metric: _metric(output, metric, metrics).cpu().numpy() for metric in metrics}
        beside = own
        names = [(row.run, row.contrast) for row in output.rows]
        if output.control is None and waiting:
            plain_runs |= dict(zip(names, _next_token(output), strict=True))
        if output.control is not None:
            if output.control is not last[0]:
                last = (output.control, _of_control(output.control, metrics, plain_runs))
                seen += [(row, last[1], i) for i, row in enumerate(output.control.rows)]
            beside = {metric: of[output.control_of] for metric, of in last[1].items()}
            waiting.subtract(names)
            plain_runs = {name: of for name, of in plain_runs.items() if waiting[name] > 0}
        for metric in metrics:
            values[metric][output.index] = own[metric]
            control[metric][output.index] = beside[metric]
    plain = {(row.run, row.contrast): i for i, row in enumerate(rows) if row.plain}
    floor = {
        metric: max(
            (abs(float(of[metric][i] - values[metric][plain[row.run, row.contrast]])) for row, of, i in seen),
            default=0.0,
        )
        for metric in metrics
    }
    return Measured(values, control, floor)


def _of_control(
    control: Output, metrics: Metrics, plain: Mapping[_Key, Float[Tensor, " vocab"]]
) -> dict[str, np.ndarray]:
    """Metrics of rows without an intervention that ran beside others; their `kl` is that from their plain runs."""
    found = {metric: _metric(control, metric, metrics) for metric in metrics if metric != "kl"}
    if "kl" in metrics:
        runs = torch.stack([plain[row.run, row.contrast] for row in control.rows])
        found["kl"] = _divergence(_next_token(control), runs)
    return {metric: of.cpu().numpy() for metric, of in found.items()}


def _next_token(output: Output) -> Float[Tensor, "row vocab"]:
    """Logits of every row's next token."""
    starts = [0, *accumulate(len(row.prompt.predicting) for row in output.rows)][:-1]
    return output.logits[torch.tensor(starts, device=output.logits.device)]


def _divergence(found: Float[Tensor, "row vocab"], expected: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL divergence of `found` from `expected`, both as logits, in nats."""
    logprobs = expected.log_softmax(-1)
    return (logprobs.exp() * (logprobs - found.log_softmax(-1))).sum(-1).double()


def _own(output: Output, name: str, metric: Own) -> Float[Tensor, " row"]:
    """A metric of one's own, row by row."""
    found, ends = [], [0, *accumulate(len(row.prompt.predicting) for row in output.rows)]
    for row, start, end in zip(output.rows, ends, ends[1:], strict=False):
        value = metric(output.logits[start:end], row.prompt)
        try:
            found.append(float(value))
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(
                f"metric {name} gave a {type(value).__name__} for fact {row.prompt.fact_id}: return one number"
            ) from None
    return torch.tensor(found, dtype=torch.float64)


def _metric(output: Output, metric: str, metrics: Metrics) -> Float[Tensor, " row"]:
    """One metric of an output's rows, in float64."""
    if (function := metrics[metric]) is not None:
        return _own(output, metric, function)
    logits = output.logits
    counts = [len(row.prompt.predicting) for row in output.rows]
    first = torch.tensor([0, *accumulate(counts)][:-1], device=logits.device)
    if metric == "logit_diff":
        if logits.shape == (len(counts), 2):
            return (logits[:, 0] - logits[:, 1]).double()
        pair = logits[first].gather(1, torch.tensor([row.contrast for row in output.rows], device=logits.device))
        return (pair[:, 0] - pair[:, 1]).double()
    answers = torch.tensor([token for row in output.rows for token in row.prompt.answer_ids], device=logits.device)
    if metric == "answer_logprob":
        picked = logits.gather(1, answers[:, None])[:, 0].double() - logits.logsumexp(-1).double()
        of = torch.repeat_interleave(torch.tensor(counts)).to(logits.device)
        return torch.zeros(len(counts), dtype=torch.float64, device=logits.device).index_add(0, of, picked)
    if metric == "answer_logit":
        return logits[first].gather(1, answers[first][:, None])[:, 0].double()
    if metric == "rank":
        own = logits[first].gather(1, answers[first][:, None])
        return (logits[first] > own).sum(-1).double() + 1
    if output.control is None:
        return torch.zeros(len(counts), dtype=torch.float64, device=logits.device)
    of = torch.tensor(output.control_of, device=logits.device)
    return _divergence(_next_token(output), _next_token(output.control)[of])
