"""Metrics of a run's answer, several from one pass, and how far an intervention moves them.

* `answer_logprob`: log-probability of the first accepted answer, summed over its tokens, in nats;
* `logit_diff`: logit of the answer's first token minus that of a foil;
* `kl`: KL divergence in nats of the run from the same run without the intervention, over the next token;
* `rank`: rank of the answer's first token among the vocabulary, 1 the most likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subjattn.engine.interventions import Output, Row, Run
from subjattn.errors import BadInput


Metric = Literal["answer_logprob", "logit_diff", "kl", "rank"]
METRICS: tuple[Metric, ...] = get_args(Metric)
UNITS: dict[Metric, str] = {"answer_logprob": "nats", "logit_diff": "logits", "kl": "nats", "rank": "rank"}
MEANINGS: dict[Metric, str] = {
    "answer_logprob": "log-probability of the first accepted answer, summed over its tokens",
    "logit_diff": "logit of the answer's first token minus that of the foil",
    "kl": "KL divergence of the next token from the run without the intervention",
    "rank": "rank of the answer's first token, 1 the most likely",
}
CHANGES: tuple[Metric, ...] = ("answer_logprob", "logit_diff")
"""Metrics reported as their change; the others are those of the changed run itself."""


_Key = tuple[Run, tuple[int, int] | None]


@dataclass
class Measured:
    """Metrics of rows, `[row]` in float64, and of the same prompts without their interventions.

    `control` comes from the batch of each row, so that both saw the same rounding; `noise_floor` is the
    largest difference between such a control and the plain run of its prompt, of `kl` the divergence itself.
    """

    values: dict[Metric, np.ndarray]
    control: dict[Metric, np.ndarray]
    noise_floor: dict[Metric, float]

    def effect(self, metric: Metric) -> np.ndarray:
        """What the interventions change; of `kl` and `rank`, their value under the intervention."""
        return self.values[metric] - self.control[metric] if metric in CHANGES else self.values[metric]


def parse_metrics(metric: Metric | list[Metric]) -> list[Metric]:
    """The metrics asked for, one or several."""
    metrics: list[Metric] = [metric] if isinstance(metric, str) else list(metric)
    if not metrics or (unknown := [name for name in metrics if name not in METRICS]):
        raise BadInput(f"metric {unknown if metrics else metric!r} is not among {', '.join(METRICS)}")
    return metrics


def measure_rows(outputs: Iterable[Output], rows: Sequence[Row], metrics: Sequence[Metric]) -> Measured:
    """Gather metrics from the outputs of `rows`; each prompt (and contrast) has one row without an intervention.

    For `kl`, logits of a plain row are held until the last changed row of its prompt.
    """
    values = {metric: np.full(len(rows), np.nan) for metric in metrics}
    control = {metric: np.full(len(rows), np.nan) for metric in metrics}
    seen: list[tuple[Row, dict[Metric, np.ndarray], int]] = []
    last: tuple[Output | None, dict[Metric, np.ndarray]] = (None, {})
    waiting = Counter((row.run, row.contrast) for row in rows if not row.plain and "kl" in metrics)
    plain_runs: dict[_Key, Tensor] = {}
    for output in outputs:
        own = {metric: _metric(output, metric).cpu().numpy() for metric in metrics}
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
    control: Output, metrics: Sequence[Metric], plain: Mapping[_Key, Float[Tensor, " vocab"]]
) -> dict[Metric, np.ndarray]:
    """Metrics of rows without an intervention that ran beside others; their `kl` is that from their plain runs."""
    found: dict[Metric, Tensor] = {metric: _metric(control, metric) for metric in metrics if metric != "kl"}
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


def _metric(output: Output, metric: Metric) -> Float[Tensor, " row"]:
    """One metric of an output's rows, in float64."""
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
    if metric == "rank":
        own = logits[first].gather(1, answers[first][:, None])
        return (logits[first] > own).sum(-1).double() + 1
    if output.control is None:
        return torch.zeros(len(counts), dtype=torch.float64, device=logits.device)
    of = torch.tensor(output.control_of, device=logits.device)
    return _divergence(_next_token(output), _next_token(output.control)[of])
