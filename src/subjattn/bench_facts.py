"""Time what is done with facts: finding every subject's tokens, and labelling knowledge against plain ways to do it."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import pandas as pd
import psutil  # type: ignore[import-untyped]
import torch

from subjattn.facts import read_facts
from subjattn.knowledge.sampling import Sampler
from subjattn.knowledge.slick import Budget, answer_groups, cost, hopeless, sampler_of, slick
from subjattn.models import LoadedModel, load_tokenizer
from subjattn.prompts import Prompt, subject_spans


REPEATS = 3
GENERATED = 5
"""Facts that transformers' own `generate` is timed on, scaled to all."""


class PeakProcess:
    """The most memory that this process holds inside the context, `peak` in bytes; looked at every 5 ms."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watching.join()

    def _watch(self) -> None:
        process, last = psutil.Process(), False
        while not last:
            last = self._done.wait(0.005)
            self.peak = max(self.peak, process.memory_info().rss)


def time_spans(source: str, model: str) -> dict[str, Any]:
    """Seconds to read a source and to find every subject's tokens in its question, and the process's peak memory."""
    with PeakProcess() as memory:
        started = time.perf_counter()
        facts, rejected = read_facts(source, merge=False)
        read = time.perf_counter()
        spans = subject_spans(facts, load_tokenizer(model))
        done = time.perf_counter()
    return {
        "rows": len(facts),
        "rejected": len(rejected),
        "shared_edges": int(spans["shared_edge"].sum()),
        "seconds_reading": read - started,
        "seconds_spans": done - read,
        "peak_bytes": memory.peak,
    }


def time_slick(model: LoadedModel, facts: pd.DataFrame, pool: pd.DataFrame, budget: Budget) -> dict[str, Any]:
    """Seconds to label facts, and one few-shot prompt of all facts in three ways, interleaved.

    Returns:
        `seconds`: of the whole labelling. `one_prompt`: medians with the prompts' beginning computed once (`shared`)
        and in every prompt (`unshared`), all else the same, and of transformers' `generate` with as many samples,
        one fact at a time (`generate`, on a few facts, scaled). The ratios are to `shared`.
    """
    started = time.perf_counter()
    slick(model, facts, pool, budget)
    seconds = time.perf_counter() - started
    groups = answer_groups(facts, pool, model.tokenizer, budget, 0)
    sampler = sampler_of(model, budget)
    endings = sorted(sampler.ends | {token for token in range(len(model.tokenizer)) if token in sampler.newlines})
    ways: dict[str, Callable[[], None]] = {
        "shared": lambda: _draw(model, sampler, groups, budget, share=True),
        "unshared": lambda: _draw(model, sampler, groups, budget, share=False),
        "generate": lambda: _generate(model, sampler, budget, endings, groups[0][:GENERATED]),
    }
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            timed[name].append(time.perf_counter() - started)
    one = {name: statistics.median(own) for name, own in timed.items()}
    one["generate"] *= len(facts) / min(GENERATED, len(groups[0]))
    return {
        "facts": len(facts),
        "budget": budget.model_dump(),
        "cost": cost(facts, pool, model.tokenizer, budget),
        "seconds": seconds,
        "one_prompt": one,
        "ratios": {name: one[name] / one["shared"] for name in ("unshared", "generate")},
    }


def _draw(model: LoadedModel, sampler: Sampler, groups: list[list[Prompt]], budget: Budget, share: bool) -> None:
    for group in groups:
        given_up = partial(hopeless, model, budget, group)
        longest = budget.longest(model.tokenizer, group)
        seeds = [[budget.seed, i] for i in range(len(group))]
        sampler.draw(group, seeds, longest, hopeless=given_up, share=share)


def _generate(model: LoadedModel, sampler: Sampler, budget: Budget, endings: list[int], prompts: list[Prompt]) -> None:
    for prompt, longest in zip(prompts, budget.longest(model.tokenizer, prompts), strict=True):
        ids = torch.tensor([prompt.ids[: prompt.prediction + 1]], device=model.model.device)
        with torch.inference_mode():
            model.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=sampler.temperature,
                top_k=0,
                num_return_sequences=1 + sampler.n_samples,
                max_new_tokens=longest,
                eos_token_id=endings,
                pad_token_id=min(sampler.ends),
            )
