"""Accuracy of mixtures of a tuned model and its base at every share of the tuned, as the choice among them saw it."""

from __future__ import annotations

import json

import pandas as pd

from subjattn.study.files import Run, mixing


COLUMNS = ("arm", "draw", "seed", "weight", "validation", "test", "chosen")


def mixing_curves(run: Run) -> pd.DataFrame:
    """Accuracy at each share of the tuned model, of arms whose share was chosen (model mixing, Kazemi et al. 2023).

    Args:
        run: a finished study.

    Returns:
        A row for each arm, replicate and share: `arm`, `draw`, `seed`, `weight` (of the tuned model), accuracy on
        `validation` and `test` facts in the first style of training, and whether the share was `chosen`, which test
        facts had no part in. No rows where no arm's share was chosen.
    """
    rows = []
    for arm, spec in run.study["arms"].items():
        if spec["mix"] is None or spec["mix"]["weight"] is not None:
            continue
        for replicate in run.replicates(arm):
            found = run.parsed(f"{mixing(arm, replicate)}/mixing.json", json.loads)
            draw, seed = replicate or (None, None)
            for row in found["curve"]:
                rows.append({"arm": arm, "draw": draw, "seed": seed, "chosen": row["weight"] == found["weight"], **row})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"draw": "Int64", "seed": "Int64"})
