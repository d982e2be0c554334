"""Stage `chosen`: which facts measures take that do not take all, and which subjects are swapped for which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.measures.pairs import choose_pairs
from subjattn.run.plan import Context
from subjattn.study.stages.tables import load_prompts


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `chosen.json`: a random `order` of the facts, those `known` to the reference model, and `pairs`.

    Facts of relations held out are in none of them.
    """
    test = pd.read_parquet(inputs["test"])
    inside = set(test["fact_id"][~test["out_of_distribution"]])
    correct = xr.load_dataset(inputs["accuracy"], engine="h5netcdf")["accuracy"]
    known = {str(fact) for fact in correct["fact"].values[correct.values == 1]} & inside
    rng = np.random.default_rng(settings["seed"])
    prompts = load_prompts(inputs["prompts"])
    order = [prompts[int(i)] for i in rng.permutation(len(prompts)) if prompts[int(i)].fact_id in inside]
    pairs = []
    if all(prompt.span is not None for prompt in order):
        found, _ = choose_pairs(order, known, len(order), rng)
        pairs = [(clean.fact_id, corrupt.fact_id) for clean, corrupt in found]
    chosen = {"order": [prompt.fact_id for prompt in order], "known": sorted(known), "pairs": pairs}
    (out / "chosen.json").write_text(json.dumps(chosen, indent=1))
