"""Time replicates of one-layer worlds trained together against one after another, by size of the vocabulary."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from subjattn.bench import REPEATS
from subjattn.theory.gap import Finetuning, Pretraining, Steps
from subjattn.theory.onelayer import Facts, OneLayer, train
from subjattn.worlds.abstract import World, make_world


REPLICATES = 20
STEPS = 40
"""Of a repeat."""
SIZES = ((10, 2, 4), (20, 3, 6), (28, 4, 6), (60, 4, 12), (100, 5, 20), (160, 6, 21))
"""Subjects, relations and answers of a relation."""


def time_worlds() -> list[dict[str, Any]]:
    """For each size and training (SGD as in pre-training, Adam as in fine-tuning): tokens, milliseconds of a step of
    all replicates together and one after another (medians), their `ratio` (the median of the repeats' own), and the
    largest difference of the weights.
    """
    rows = []
    for size in SIZES:
        world = make_world(*size, zipf=1.0)
        for settings in (Pretraining(), Finetuning()):
            rows.append(_timed(world, settings))
    return rows


def _timed(world: World, settings: Steps) -> dict[str, Any]:
    start = OneLayer.normal(world.tokens, range(REPLICATES))
    batches = [_batch(world, settings.batch, seed) for seed in range(STEPS)]

    def together() -> torch.Tensor:
        return train(start, batches, settings.optimiser_of()).values

    def alone() -> torch.Tensor:
        found = [
            train(
                start.take([number]),
                [tuple(part[number : number + 1] for part in batch) for batch in batches],  # type: ignore[misc]
                settings.optimiser_of(),
            ).values
            for number in range(REPLICATES)
        ]
        return torch.cat(found)

    difference = float((together() - alone()).abs().max())
    pairs = [(_seconds(alone), _seconds(together)) for _ in range(REPEATS)]
    return {
        "tokens": world.tokens.n,
        "optimiser": settings.optimiser,
        "batch": settings.batch,
        "replicates": REPLICATES,
        "together_ms": 1000 / STEPS * statistics.median(own for _, own in pairs),
        "alone_ms": 1000 / STEPS * statistics.median(own for own, _ in pairs),
        "ratio": statistics.median(one / all_ for one, all_ in pairs),
        "max_abs_diff": difference,
    }


def _batch(world: World, n: int, seed: int) -> tuple[Facts, Facts, Facts]:
    rng = torch.Generator().manual_seed(seed)
    n_subjects, n_relations = world.answers.shape
    subjects = torch.randint(n_subjects, (REPLICATES, n), generator=rng)
    relations = torch.randint(n_relations, (REPLICATES, n), generator=rng)
    return subjects, n_subjects + relations, torch.from_numpy(world.answer_tokens)[subjects, relations]


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
