"""What is called an effect where there is none: splits of a placebo run's replicates into two "arms" of equal size.

`subjattn run experiments/placebo.yaml --out runs/placebo`, then `python experiments/placebo.py runs/placebo`, which
writes its table into docs/statistics.md. Splits share replicates, so the uncertainty of a share is a jackknife over
replicates: splits without each in turn. "Facts alone" takes the replicates as given and facts as independent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import xarray as xr
from calibrate import write

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.evidence.intervals import difference
from subjattn.study.files import Run
from subjattn.study.values import Values


SMALLEST = {
    "accuracy": 0.02,
    "answer_logprob": 0.1,
    "attention_to_subject": 0.005,
    "knockout_drop": 0.1,
    "knockout_drop_total": 0.1,
}
"""Effects that matter in experiments/cities.yaml."""
SPLITS, MAPS = 600, 150
"""Splits that are tried, the same for all quantities; of which so many for heat maps."""


def splits(n: int, size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two groups of this size from n replicates, in random order; each pair of groups once, at most `SPLITS`."""
    every = [
        (first, second)
        for first in combinations(range(n), size)
        for second in combinations([one for one in range(n) if one not in first], size)
        if first[0] < second[0]
    ]
    return [every[int(i)] for i in np.random.default_rng(0).permutation(len(every))[:SPLITS]]


def called(values: xr.DataArray, smallest: float, first: tuple[int, ...], second: tuple[int, ...]) -> list[bool]:
    """Whether two groups are told apart, and by how much it matters: by facts alone, by facts and replicates."""
    a, b = (values.isel(draw=list(group)).assign_coords(draw=range(len(group))) for group in (first, second))
    found = []
    for facts in (True, False):
        try:
            tested = sa.contrast(a, b, scope="models" if facts else "training", cluster=() if facts else None)
        except BadInput:
            found += [False, False]
            continue
        beyond = abs(tested.estimate) > smallest
        p = tested.p_value(float(np.copysign(smallest, tested.estimate))) if beyond else 1.0
        found += [tested.p_value() < 0.05, p < 0.05]
    return found


def shown(values: xr.DataArray, first: tuple[int, ...], second: tuple[int, ...]) -> list[bool]:
    """Whether a map of the difference shows a cell: by facts alone (BH), by facts and replicates (BY)."""
    a, b = (values.isel(draw=list(group)).assign_coords(draw=range(len(group))) for group in (first, second))
    own = difference(a, b)
    alone = sa.significant(own, scope="models", correction="bh", cluster=())
    return [bool(alone.any()), bool(sa.significant(own).any())]


def with_error(rows: np.ndarray, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], n: int) -> list[str]:
    """Shares of splits in percent, each with a jackknife over replicates: splits without each of them in turn."""
    without = np.array([[out not in (*first, *second) for first, second in pairs] for out in range(n)])
    left = np.array([rows[keep].mean(0) for keep in without])
    error = np.sqrt((n - 1) / n * ((left - left.mean(0)) ** 2).sum(0))
    return [f"{100 * of:.1f} ± {100 * by:.1f}" for of, by in zip(rows.mean(0), error, strict=True)]


def table(run: Run) -> Iterator[str]:
    """Shares of splits, by group size, style and quantity; then heat maps."""
    (arm,) = run.arms
    values, n = Values(run.values), len(run.replicates(arm))
    yield (
        "| arms of | style | quantity | differs from 0, facts alone | supported or contradicted, facts alone | "
        "differs from 0 | supported or contradicted |"
    )
    yield "|---|---|---|---|---|---|---|"
    for size in (3, 5):
        pairs = splits(n, size)
        for style in run.styles:
            for quantity, smallest in SMALLEST.items():
                own = values.of(arm, style, quantity)
                assert own is not None
                rows = np.array([called(own, smallest, *pair) for pair in pairs], float)
                yield f"| {size} | {style} | {quantity} | {' | '.join(with_error(rows, pairs, n))} |"
        for style in run.styles:
            array = run.by_replicate("attention_to_subject", "attention_to_subject", style, arm)
            rows = np.array([shown(array, *pair) for pair in pairs[:MAPS]], float)
            alone, new = with_error(rows, pairs[:MAPS], n)
            yield f"| {size} | {style} | a cell of attention by layer and head | {alone} | | {new} | |"


def main() -> None:
    lines = []
    for line in table(sa.open_run(Path(sys.argv[1]))):
        print(line, flush=True)
        lines.append(line)
    write("placebo", lines)


if __name__ == "__main__":
    main()
